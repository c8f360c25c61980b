"""The steps, in order; each leaves a running service that has lost nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Final

from comfyd import __version__
from tests.systemd.installing import commands
from tests.systemd.machine import Failed, Machine
from tests.systemd.service import COMFYD, Service
from tests.systemd.transcript import Transcript
from tests.systemd.wheels import NEXT, pack

STOP_S: Final = 5.0
# Instead of a minute, or this would take all day. Everything else of the unit is as it is shipped.
WATCHDOG_S: Final = 10
NO_NETWORK: Final = (
    "export PIP_NO_INDEX=1 PIP_FIND_LINKS=/root/wheels DEBIAN_FRONTEND=noninteractive"
)


class Run:
    """What the steps share."""

    def __init__(self, machine: Machine, transcript: Transcript) -> None:
        self.machine = machine
        self.transcript = transcript
        self.comfyd = Service(machine, transcript)
        self.night = Service(
            machine, transcript, "comfyd@night",
            "/srv/comfyd/spool", "/etc/comfyd/night.yaml", 9819,
        )  # fmt: skip

    def check(self, held: object, what: str) -> None:
        if not held:
            raise Failed(f"not so: {what}")
        self.transcript.holds(what)

    def follow(
        self, heading: str, number: int = 0, *, before: Callable[[str], None] = lambda command: None
    ) -> None:
        """Do what docs/install.md says there; *before* is called with each command."""
        for command in commands(heading, number):
            before(command)
            self.machine.run(command, within_s=180, env=NO_NETWORK)

    def restarted(self, pid: int, within_s: float) -> None:
        self.machine.until(
            "systemd has started it again, and it is ready",
            lambda: self.comfyd.ready() and self.comfyd.pid not in {0, pid},
            within_s,
        )

    def journal_says(self, text: str, unit: str = "comfyd") -> bool:
        return text in self.machine.ask(f"journalctl --no-pager -q -u {unit}")


def install(run: Run) -> None:
    """Install as docs/install.md says"""
    pack(run.machine.root / "root")
    run.machine.run("systemctl --version | head -1; systemctl is-system-running")
    run.follow("Install")
    run.check(run.comfyd.ready(), "the service is active")
    run.check(run.comfyd.show("NRestarts") == "0", "it was started once")
    run.machine.run("ls -ln /var/lib/comfyd/spool | tail -n +2; id comfyd")
    run.machine.run(f"{COMFYD} demo --jobs 4 2>&1 | grep -E 'verified'")


def simulator(run: Run) -> None:
    """Start a simulated ComfyUI"""
    run.machine.run(
        "systemd-run --quiet --unit=comfyui -p DynamicUser=yes"
        f" $(readlink -f {COMFYD}) simulate --port 8188 --run-time 50ms"
    )
    run.machine.until(
        "the server is up", lambda: run.comfyd.metrics()['comfyd_server_up{server="local"}'], 30
    )
    run.machine.until(
        "systemctl status says so", lambda: "1/1 servers up" in run.comfyd.show("StatusText"), 10
    )


def submitters(run: Run) -> None:
    """Members of comfyd-submit submit and read; others do not"""
    machine = run.machine
    machine.run("useradd --create-home alice; useradd --create-home bob")
    for command in commands("Who may submit"):
        machine.run(command)
    run.comfyd.drop("first", 3, 0.1)
    run.comfyd.all_delivered()
    machine.run("cat /var/lib/comfyd/spool/done/first-0.*/result.json | head -c 100", user="alice")
    machine.run("touch /var/lib/comfyd/spool/new/x.json", user="bob", code=1)
    machine.run("ls /var/lib/comfyd/spool/done", user="bob", code=2)
    machine.run("ls /var/lib/comfyd/state", user="alice", code=2)
    machine.run("rm -r /var/lib/comfyd/spool/done/first-0.*", user="alice", code=1)


def hardening(run: Run) -> None:
    """The hardening is in force, and the metrics are there all the same"""
    machine, pid = run.machine, run.comfyd.pid
    machine.run(f"grep -E '^(Uid|Gid|CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/{pid}/status")
    machine.run("systemd-analyze security comfyd 'comfyd@night' --no-pager | grep Overall")
    machine.run(
        f"nsenter --target {pid} --mount setpriv --reuid comfyd --clear-groups touch /opt/comfyd/x",
        code=1,
    )
    found = run.comfyd.metrics()
    named = sorted(name for name in found if name.startswith("process_"))
    run.transcript.note(", ".join(named))
    run.check(
        {"process_cpu_seconds_total", "process_open_fds", "process_resident_memory_bytes",
         "process_start_time_seconds"} <= set(named),
        "process_* metrics work",
    )  # fmt: skip
    age_s = time.time() - found["process_start_time_seconds"]
    run.check(0 < age_s < 600, f"it says that it started {age_s:.0f} s ago")
    run.transcript.note(f"it takes {found['process_resident_memory_bytes'] / 2**20:.0f} MiB")


def credential(run: Run) -> None:
    """A secret as a file, then as a credential that not even comfyd's user can read on disk"""
    machine = run.machine
    run.follow("Secrets", 0)
    with_headers("{Authorization: {file: /etc/comfyd/token}}", run)
    machine.run("systemctl restart comfyd")
    run.check(run.comfyd.ready(), "it runs, and has read the file")
    run.comfyd.drop("token", 1, 0.1)
    with_headers("{Authorization: {credential: token}}", run)
    run.follow("Secrets", 1)
    run.check(run.comfyd.ready(), "it runs, and has read the credential")
    machine.run("cat /etc/comfyd/token", user="alice", code=1)
    machine.run(f"{COMFYD} check-config /etc/comfyd/comfyd.yaml")
    run.comfyd.drop("credential", 1, 0.1)
    run.comfyd.all_delivered()


def with_headers(headers: str, run: Run) -> None:
    run.machine.run(
        "sed -i '/headers/d' /etc/comfyd/comfyd.yaml;"
        f" sed -i '/url:/a \\    headers: {headers}' /etc/comfyd/comfyd.yaml"
    )


def reload(run: Run) -> None:
    """Reload the configuration: a good one, a bad one"""
    machine, comfyd = run.machine, run.comfyd
    if "reload" not in machine.ask(f"{COMFYD} --help"):
        run.transcript.note("left out: this version cannot reload")
        return
    pid, config = comfyd.pid, "/etc/comfyd/comfyd.yaml"
    stamp = "comfyd_config_last_reload_success_timestamp_seconds"
    good = "comfyd_config_last_reload_successful"
    before = comfyd.metrics()[stamp]
    comfyd.drop("reload", 5, 0.5)
    machine.run(f"echo 'audit: {{interval: 31s}}' >> {config}; systemctl reload comfyd")
    run.check(comfyd.metrics()[stamp] > before, "it is in force")
    machine.run(f"echo 'nonsense: 1' >> {config}; systemctl reload comfyd", code=1)
    run.check(comfyd.metrics()[good] == 0, "the bad one is refused")
    run.check(comfyd.ready() and comfyd.pid == pid, "the same process runs on")
    machine.run(f"sed -i '/nonsense/d' {config}; kill -HUP {pid}")
    machine.until("the good one is taken again", lambda: comfyd.metrics()[good] == 1, 15)
    machine.run(f"sed -i 's#^state: .*#&-2#' {config}; systemctl reload comfyd", code=1)
    machine.until("another state folder is refused", lambda: comfyd.metrics()[good] == 0, 15)
    run.check(
        "that needs a restart" in machine.ask("journalctl -u comfyd -n 20"), "and it says why"
    )
    machine.run(f"sed -i '/^state:/s#-2$##' {config}; systemctl reload comfyd")
    run.check(comfyd.metrics()[good] == 1, "the good one is taken again")
    run.check(comfyd.pid == pid, "all in one process")
    comfyd.all_delivered()


def bad_configuration(run: Run) -> None:
    """A wrong configuration stops it for good, until it is mended"""
    machine = run.machine
    machine.run("echo 'nonsense: 1' >> /etc/comfyd/comfyd.yaml; systemctl restart comfyd", code=1)
    time.sleep(4)  # two RestartSec
    run.check(run.comfyd.show("ExecMainStatus") == "78", "it ended with 78")
    run.check(run.comfyd.show("ActiveState") == "failed", "and is not tried again")
    machine.run("sed -i '/nonsense/d' /etc/comfyd/comfyd.yaml; systemctl restart comfyd")
    run.check(run.comfyd.ready(), "mended, it runs")


def second_daemon(run: Run) -> None:
    """A second daemon keeps away"""
    run.machine.run("sed '/headers/d' /etc/comfyd/comfyd.yaml > /etc/comfyd/copy.yaml")
    run.machine.run(
        f"runuser -u comfyd -- {COMFYD} run -c /etc/comfyd/copy.yaml", code=73, within_s=20
    )
    run.check(run.comfyd.ready(), "the first one runs on")
    run.machine.run("rm /etc/comfyd/copy.yaml")


def kill(run: Run) -> None:
    """kill -9 with jobs in flight"""
    for round_ in range(3):
        run.comfyd.drop(f"kill{round_}", 6, 0.4)
        pid = run.comfyd.pid
        run.machine.run(f"kill -9 {pid}")
        run.restarted(pid, 30)
    run.check(int(run.comfyd.show("NRestarts")) == 3, "three restarts are counted")
    run.comfyd.all_delivered()
    charged = run.comfyd.metrics()['comfyd_attempts_charged_total{server="local"}']
    run.check(charged == 0, "nothing was charged")


def hang(run: Run) -> None:
    """Hang it (SIGSTOP) with jobs in flight: the watchdog ends it"""
    machine = run.machine
    machine.run(
        "mkdir -p /etc/systemd/system/comfyd.service.d;"
        f" printf '[Service]\\nWatchdogSec={WATCHDOG_S}\\n'"
        " > /etc/systemd/system/comfyd.service.d/quick.conf;"
        " systemctl daemon-reload; systemctl restart comfyd"
    )
    pid = run.comfyd.pid
    time.sleep(2 * WATCHDOG_S)
    run.check(run.comfyd.pid == pid, f"healthy, it is left alone for {2 * WATCHDOG_S} s")
    run.comfyd.drop("hang", 6, 0.4)
    machine.run(f"kill -STOP {pid}")
    run.restarted(pid, WATCHDOG_S + 20)
    run.check(run.journal_says("Watchdog timeout"), "the journal says why")
    run.check(run.journal_says("Fatal Python error: Aborted"), "and where it hung")
    machine.run("journalctl --no-pager -q -u comfyd | grep -A5 'Watchdog timeout' | tail -6")
    run.comfyd.all_delivered()


def stop(run: Run) -> None:
    """Stop it with jobs in flight, five times"""
    machine = run.machine
    for round_ in range(5):
        run.comfyd.drop(f"stop{round_}", 4, 0.3)
        time.sleep(0.3 * round_)
        began_s = time.monotonic()
        machine.run("systemctl stop comfyd")
        took_s = time.monotonic() - began_s
        run.check(took_s < STOP_S, f"it has gone after {took_s:.1f} s")
        run.check(run.comfyd.show("Result") == "success", "in good order")
        run.comfyd.drop(f"stopped{round_}", 2, 0.1)
        machine.run("systemctl start comfyd")
    run.comfyd.all_delivered()
    charged = run.comfyd.metrics()['comfyd_attempts_charged_total{server="local"}']
    run.check(charged == 0, "nothing was charged")


def silent_server(run: Run) -> None:
    """Stop it while a server answers nothing (SIGSTOP), and start it again"""
    machine, comfyd = run.machine, run.comfyd
    comfyd.drop("silent", 6, 0.4)
    machine.run("systemctl kill -s STOP comfyui")
    comfyd.drop("meanwhile", 4, 0.1)
    time.sleep(3)
    began_s = time.monotonic()
    machine.run("systemctl stop comfyd")
    took_s = time.monotonic() - began_s
    run.check(took_s < STOP_S, f"it has gone after {took_s:.1f} s")
    began_s = time.monotonic()
    machine.run("systemctl start comfyd")
    took_s = time.monotonic() - began_s
    run.check(comfyd.ready(), f"it is ready after {took_s:.1f} s, whatever the server does")
    machine.run("systemctl kill -s CONT comfyui")
    comfyd.all_delivered()
    charged = comfyd.metrics()['comfyd_attempts_charged_total{server="local"}']
    run.check(charged == 0, "nothing was charged")


def instance(run: Run) -> None:
    """A second daemon, comfyd@night, whose spool and state are on a disk of 64 MB"""
    machine = run.machine
    machine.run("mkdir -p /srv/comfyd; mount -t tmpfs -o size=64M,mode=755 tmpfs /srv/comfyd")
    for command in commands("A spool elsewhere"):
        command = command.replace("comfyd.service.d", "comfyd@.service.d")
        if "restart" not in command:
            machine.run(command)
    [config, start, status] = commands("Several daemons")
    config = config.replace("/var/lib/comfyd/night", "/srv/comfyd").replace("8189", "8188")
    config = config.replace("\nEND", "\noutputs: {min_free_bytes: 8MiB}\nEND")
    for command in (config, start, status):
        machine.run(command)
    machine.run(
        "cd /etc/systemd/system; cp comfyd.service.d/quick.conf comfyd@.service.d/;"
        " systemctl daemon-reload; systemctl restart comfyd@night"
    )
    run.night.drop("night", 3, 0.1)
    run.night.all_delivered()


def full_disk(run: Run) -> None:
    """Fill that disk to the last byte, for longer than the watchdog waits"""
    machine, night = run.machine, run.night
    pid = night.pid
    night.drop("before", 8, 1.0)
    machine.run("head -c 1G /dev/zero > /srv/comfyd/filler; df -h /srv/comfyd | tail -1", code=0)
    machine.until("it says so", lambda: "Waiting" in night.show("StatusText"), 20)
    machine.run("systemctl show --value -p StatusText comfyd@night")
    time.sleep(3 * WATCHDOG_S)
    run.check(night.pid == pid and night.ready(), f"it waits, and lives, {3 * WATCHDOG_S} s later")
    machine.run("rm /srv/comfyd/filler")
    machine.until("it goes on", lambda: "Waiting" not in night.show("StatusText"), 20)
    night.drop("after", 3, 0.1)
    night.all_delivered()
    run.check(night.pid == pid, "all in one process")


def upgrade(run: Run) -> None:
    """Upgrade with jobs in flight, and go back"""
    machine, comfyd = run.machine, run.comfyd
    version = (
        "python3 -c 'import json,urllib.request as u;"
        f'print(json.load(u.urlopen("http://127.0.0.1:{comfyd.port}/api/v1/status"))["version"])\''
    )
    for heading, wanted in (("Upgrade", NEXT), ("Roll back", __version__)):
        name = heading.lower().replace(" ", "")

        before = comfyd.done()

        def busy(command: str, name: str = name, before: int = before) -> None:
            if command == "systemctl restart comfyd":
                comfyd.drop(name, 12, 0.4)
                machine.until("one of them is done", lambda: comfyd.done() > before, 30)

        run.follow(heading, before=busy)
        run.check(comfyd.ready(), "it runs")
        said = machine.ask(version).strip()
        run.check(said == wanted, f"it is version {said}")
        left = len(comfyd.dropped) - comfyd.done()
        run.check(left, f"{left} of its 12 jobs are not done yet")
        comfyd.drop(f"{name}-after", 2, 0.1)
        comfyd.all_delivered()
    charged = comfyd.metrics()['comfyd_attempts_charged_total{server="local"}']
    run.check(charged == 0, "nothing was charged")


def quiet(run: Run) -> None:
    """Nothing was forbidden that it wanted to do"""
    machine = run.machine
    said = machine.ask("journalctl --no-pager -q -u comfyd -u comfyd@night")
    for bad in ("Traceback", "Permission denied", "Operation not permitted", "bug in comfyd"):
        run.check(bad not in said, f"no {bad!r} in its log")
    machine.run("systemctl --failed --no-legend --no-pager | grep comfyd", code=1)


def uninstall(run: Run) -> None:
    """Uninstall"""
    run.machine.run("systemctl disable --now comfyd@night")
    run.follow("Uninstall")
    run.machine.run("ls /var/lib/comfyd/spool/done | wc -l")
    run.machine.run("systemctl status comfyd", code=4)


STEPS: Final[tuple[Callable[[Run], None], ...]] = (
    install, simulator, submitters, hardening, credential, bad_configuration, second_daemon, reload,
    kill, hang, stop, silent_server, instance, full_disk, upgrade, quiet, uninstall,
)  # fmt: skip


def title(step: Callable[[Run], None]) -> str:
    return re.sub(r"\s+", " ", step.__doc__ or step.__name__)


def selected(names: list[str]) -> list[Callable[[Run], None]]:
    """The steps of *names*, and the two that all others need."""
    return [
        step
        for step in STEPS
        if not names or step.__name__ in {"install", "simulator", "submitters", *names}
    ]
