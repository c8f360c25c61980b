"""The unit files agree with the program, and with systemd; the wheel brings them along."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from comfyd import __version__
from comfyd.cli.arguments import build_parser
from comfyd.cli.exits import Exit
from comfyd.spool.layout import MODES
from tests.systemd.installing import commands

ROOT = Path(__file__).parent.parent
SYSTEMD = ROOT / "systemd"
UNITS = ("comfyd.service", "comfyd@.service")
EXPOSURE_MAX = 15  # tenths; docs/install.md tells what is reached
RELATIVES = {path.relative_to(SYSTEMD) for path in SYSTEMD.rglob("*") if path.is_file()}

# Continuous integration installs it (.ci/run), so there nothing is left out.
needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="there is no systemd-analyze here"
)


def text(name: str) -> str:
    return (SYSTEMD / name).read_text(encoding="utf-8")


def settings(name: str, unit: str = "comfyd.service") -> list[str]:
    lines = text(unit).splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]


def analyze(*words: object, complaint: str = "") -> str:
    """What systemd-analyze has to say; it must complain of nothing else than *complaint*."""
    command = ["systemd-analyze", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.partition(": ")[2].strip()) == (0, complaint), done.stderr
    return done.stdout


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as systemd finds them, with a program that exists."""
    for name in UNITS:
        there = text(name).replace("/opt/comfyd/bin/comfyd", shutil.which("true") or "")
        (tmp_path / name).write_text(there)
    return tmp_path


# --- the program ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "config"), [("comfyd", "comfyd"), ("comfyd@", "%i")])
def test_what_it_starts_is_a_command_of_ours(unit, config):
    [command] = settings("ExecStart", f"{unit}.service")
    args = build_parser().parse_args(shlex.split(command)[1:])
    assert args.command == "run"
    assert args.config == Path(f"/etc/comfyd/{config}.yaml")


def test_what_a_restart_cannot_mend_is_not_restarted():
    [codes] = settings("RestartPreventExitStatus")
    assert {int(code) for code in codes.split()} == {Exit.USAGE, Exit.BUSY, Exit.CONFIG}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("LimitCORE", ["0"]),
        ("TasksMax", ["256"]),
        ("NoNewPrivileges", ["yes"]),
        ("CapabilityBoundingSet", [""]),
        ("ProtectSystem", ["strict"]),
        ("ProtectHome", ["yes"]),
        ("PrivateTmp", ["yes"]),
        ("PrivateDevices", ["yes"]),
        ("PrivateUsers", ["yes"]),
        ("RestrictAddressFamilies", ["AF_UNIX AF_INET AF_INET6"]),
        ("SystemCallFilter", ["@system-service", "~@privileged @resources"]),
        ("User", ["comfyd"]),
        ("UMask", ["0077"]),
        ("ProcSubset", []),  # or there are no process_* metrics
        ("RestrictSUIDSGID", []),  # the spool's folders are setgid
    ],
)
def test_what_it_may_not_do_and_what_it_must_be_able_to_do(name, values):
    assert settings(name) == values


def test_an_instance_is_as_the_service_but_for_its_folders():
    alone = text("comfyd.service").splitlines()[1:]
    instance = text("comfyd@.service").splitlines()[1:]
    changed = [(a, b) for a, b in zip(alone, instance, strict=True) if a != b]
    assert [b for _, b in changed] == [
        "Description=comfyd, a job daemon for ComfyUI (%i)",
        "StateDirectory=comfyd/%i",
        "ExecStart=/opt/comfyd/bin/comfyd run -c /etc/comfyd/%i.yaml",
        "ExecReload=/opt/comfyd/bin/comfyd reload -c /etc/comfyd/%i.yaml",
        "# It writes to /var/lib/comfyd/NAME only (elsewhere: drop-ins/spool-elsewhere.conf).",
    ]


def test_the_folders_are_made_as_the_daemon_makes_them():
    rows = [line.split() for line in text("tmpfiles.d/comfyd.conf").splitlines()[1:]]
    made = {Path(path).name: int(mode, 8) for _, path, mode, *_ in rows if "/spool/" in path}
    assert made == MODES
    owners = {(user, group) for _, path, _, user, group in rows if "/var/" in path}
    assert owners == {(settings("User")[0], settings("Group")[0])}


def test_a_newcomer_needs_ten_commands():
    told = commands("Install")
    assert len(told) <= 10
    assert told[-1] == "/opt/comfyd/bin/comfyd status"
    assert f"/opt/comfyd-{__version__}" in told[1]


# --- systemd --------------------------------------------------------------------------------------


@needs_systemd
@pytest.mark.parametrize(
    "dropped", ["", "credential", "loopback-only", "memory", "spool-elsewhere"]
)
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_has_nothing_to_say_about_it(units, unit, dropped):
    if dropped:
        (units / f"{unit}.d").mkdir()
        shutil.copy(SYSTEMD / "drop-ins" / f"{dropped}.conf", units / f"{unit}.d")
    assert analyze("verify", units / unit.replace("@", "@night")) == ""


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_its_exposure_is_what_is_told(units, unit):
    rated = analyze(
        "security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE_MAX}", units / unit
    )
    [score] = re.findall(r"exposure level for \S+: ([0-9.]+)", rated)
    told = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert f"**{score}** (0 is locked up" in told


@needs_systemd
def test_a_newer_systemd_takes_the_reload_drop_in(units):
    [version] = re.findall(r"^systemd (\d+)", analyze("--version"), re.M)
    (units / "comfyd.service.d").mkdir()
    shutil.copy(SYSTEMD / "drop-ins" / "notify-reload.conf", units / "comfyd.service.d")
    older = "Failed to parse service type, ignoring: notify-reload" if int(version) < 253 else ""
    analyze("verify", units / "comfyd.service", complaint=older)


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("wheel")
    copy = into / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, copy, ignore=ignored)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(into), str(copy)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, timeout=300)
    [made] = into.glob("*.whl")
    return made


def test_the_wheel_is_named_as_the_page_says(wheel):
    assert wheel.name == f"comfyd-{__version__}-py3-none-any.whl"
    assert wheel.name in (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


def test_the_wheel_holds_the_program_and_all_that_a_service_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {Path(name) for name in archive.namelist()}
        shared = Path(f"comfyd-{__version__}.data/data/share/comfyd")
        for relative in RELATIVES:
            there = str(shared / "systemd" / relative)
            assert archive.read(there) == (SYSTEMD / relative).read_bytes()
        sample = archive.read(str(shared / "comfyd.yaml"))
        assert sample == (ROOT / "config" / "comfyd.yaml").read_bytes()
        entry = archive.read(f"comfyd-{__version__}.dist-info/entry_points.txt").decode()
        for folder, pattern in (("rules", "*.yaml"), ("dashboards", "*.json")):
            for path in (ROOT / "grafana" / folder).glob(pattern):
                assert (
                    archive.read(str(shared / "grafana" / folder / path.name)) == path.read_bytes()
                )
        assert str(shared.parent / "man" / "man1" / "comfyd.1") in archive.namelist()
    assert "comfyd = comfyd.__main__:main" in entry
    sources = {path.relative_to(ROOT) for path in (ROOT / "comfyd").rglob("*.py")}
    assert {Path("comfyd/py.typed"), *sources} <= held
    assert not [name for name in held if name.parts[0] == "tests"]
