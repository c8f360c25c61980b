"""What ``comfyd doctor`` looks at: each check gives findings, each with its remedy.

Nothing here changes anything, but for probes that are removed at once. Blocking throughout.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import grp
import os
import pwd
import resource
import shlex
import shutil
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import trio

from comfyd import __version__
from comfyd.cli.exits import Refused
from comfyd.cli.reading import ANSWER_S, ask_daemon
from comfyd.cli.screen import counted, size
from comfyd.config import UNREAD, Config, Server
from comfyd.config.server import is_loopback
from comfyd.core.snapshot import NOT_ASKED
from comfyd.core.wire.stats import version_verdict
from comfyd.errors import ComfydError, ConfigError, ServerError, SpoolBusy
from comfyd.journal.file import prepare_state
from comfyd.journal.lock import StateLock
from comfyd.journal.sqlite import open_readonly
from comfyd.services.link import client_of
from comfyd.services.space import INODES, JOURNAL_BYTES
from comfyd.services.unit import is_known
from comfyd.spool.layout import MODES, Spool, free_bytes
from comfyd.spool.removal import left_aside
from comfyd.spool.watcher import why_no_events
from comfyd.web.control_client import DaemonUnreachable, address_of

Level = Literal["ok", "warning", "problem"]

SKEW_S: Final = 5.0  # below that, nobody is misled by times in logs
OPEN_FILES: Final = 1024
# Where renames, locks or events do not work as on a local disk.
NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "afs", "ncpfs"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "virtiofs", "beegfs", "gpfs"}
)
PASSING: Final = frozenset({"tmpfs", "ramfs"})
_TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronized
_BORN: Final = 1_760_000_000.0  # no clock that is right is before this program


@dataclass(frozen=True, slots=True)
class Finding:
    """Attributes:

    subject: What was looked at, in a word or two.
    what: What was found, as a sentence.
    remedy: What to do, as a sentence; "" if nothing.
    """

    subject: str
    level: Level
    what: str
    remedy: str = ""


def ok(subject: str, what: str) -> Finding:
    return Finding(subject, "ok", what)


def warning(subject: str, what: str, remedy: str) -> Finding:
    return Finding(subject, "warning", what, remedy)


def problem(subject: str, what: str, remedy: str) -> Finding:
    return Finding(subject, "problem", what, remedy)


def everything(config: Config) -> Iterator[Finding]:
    """All findings, in the order in which a person would look."""
    status, daemon = _daemon(config)
    yield from daemon
    yield from _checked("spool", lambda: _spool(config, running=status is not None))
    yield from _leftovers(Spool(config.spool))
    yield from _checked("state", lambda: _state(config, running=status is not None))
    yield from _checked("spool disk", lambda: _file_system(config, "spool disk", config.spool))
    yield from _checked("state disk", lambda: _file_system(config, "state disk", config.state))
    yield from _checked("events", lambda: _events(config))
    yield from _checked("workflows", lambda: _workflows(config))
    yield from _exposed(config)
    yield from _secrets(config)
    if daemon[0].level != "problem" and status is None:
        yield from _checked("metrics", lambda: _listen(config))
    yield from _clock()
    yield from _checked("limits", lambda: _limits(config))
    yield from _servers(config, status)
    yield from _units(config)


def _checked(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What *check* finds; that it cannot look is a finding too."""
    try:
        yield from check()
    except PermissionError as error:
        yield warning(
            subject,
            f"{error.filename or 'it'} may not be looked at: {error.strerror}.",
            "Run comfyd doctor as root or as the daemon's own user.",
        )
    except OSError as error:
        what = f"{error.filename or 'it'} cannot be looked at: {error.strerror}."
        yield problem(subject, what, "Mend or remove it, with the daemon stopped.")


# --- the daemon ----------------------------------------------------------------------------------


def _daemon(config: Config) -> tuple[dict[str, Any] | None, list[Finding]]:
    """What the running daemon says of itself; None if there is none to ask."""
    subject = "daemon"
    try:
        status: dict[str, Any] = ask_daemon(config, {"verb": "status"}, ANSWER_S)["status"]
    except (DaemonUnreachable, Refused) as error:
        return None, [_why_silent(config, str(error))]
    if status["version"] != __version__:
        found = warning(
            subject,
            f"It runs version {status['version']}, and this is {__version__}.",
            "Restart it, so that both are the same.",
        )
    elif status["waiting"]:
        found = problem(subject, str(status["waiting"]), "It goes on by itself after that.")
    elif status["paused"]:
        found = warning(subject, "Its intake is paused.", "Run comfyd resume to take jobs again.")
    else:
        found = ok(subject, f"It runs, version {status['version']}.")
    return status, [found]


def _why_silent(config: Config, why: str) -> Finding:
    subject, path = "daemon", config.state / "control.sock"
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except PermissionError:
        remedy = "Run comfyd doctor as root or as the daemon's own user."
        return warning(subject, f"It may not be asked: {why}", remedy)
    if mode and not stat.S_ISSOCK(mode):
        return problem(subject, f"{path} is no socket.", "Move it elsewhere: it keeps comfyd down.")
    if _is_locked(config.state / "lock"):
        return problem(
            subject,
            f"One owns {config.state} but does not answer.",
            "Look at its log, and restart it: systemctl restart comfyd.",
        )
    if mode:
        return warning(
            subject,
            "It does not run, and left its control socket: it was killed.",
            "Start it: systemctl start comfyd, or comfyd run; the socket is replaced.",
        )
    return warning(subject, "It does not run.", "Start it: systemctl start comfyd, or comfyd run.")


def _is_locked(path: Path) -> bool:
    try:
        if not path.exists():
            return False
        StateLock(path).acquire_shared().release()
    except SpoolBusy:
        return True
    except OSError:
        return False
    return False


# --- folders -------------------------------------------------------------------------------------


def _spool(config: Config, *, running: bool) -> Iterator[Finding]:
    subject, spool = "spool", Spool(config.spool)
    if not spool.root.is_dir():
        if not spool.root.parent.is_dir():
            remedy = f"Make {spool.root.parent}, for the daemon's user to write."
            yield problem(subject, f"{spool.root.parent} is not there.", remedy)
        else:
            yield warning(subject, f"{spool.root} is not there.", "The daemon makes it at start.")
        return
    missing = [name for name in MODES if not os.path.lexists(spool.root / name)]
    if missing:
        yield (problem if running else warning)(
            subject,
            f"{', '.join(missing)} is missing in {spool.root}.",
            "The daemon makes it at its next start.",
        )
        return
    owner = spool.root.stat().st_uid
    if os.geteuid() not in {0, owner}:
        remedy = f"Run comfyd doctor as root or as {_user(owner)}."
        yield warning(subject, f"Only {_user(owner)} can try the moves of a job there.", remedy)
        return
    there = [name for name in (*MODES, ".lock") if os.path.lexists(spool.root / name)]
    odd = [name for name in there if (spool.root / name).lstat().st_uid != owner]
    if odd:
        yield problem(
            subject,
            f"{', '.join(odd)} in {spool.root} is not {_user(owner)}'s, whose the spool is.",
            f"Run: chown -R {owner} {shlex.quote(str(spool.root))}",
        )
        return
    try:
        spool.check_private()
        spool.try_moves()
    except ConfigError as error:
        what = error.problem.removeprefix("the spool cannot be used: ")
        yield problem(subject, f"{what.partition('; run: ')[0]}.", _run_of(what))
    except OSError as error:
        one = "All of it must lie on one file system." if error.errno == errno.EXDEV else ""
        full = "Make room." if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
        remedy = one or full or "Mend the rights of its folders, or of the file system."
        yield problem(subject, f"A job could not be moved through it: {error}.", remedy)
    else:
        yield from _doors(spool)
        yield ok(subject, "A job can be moved through it.")


def _doors(spool: Spool) -> Iterator[Finding]:
    """Who may submit: the group of new/ and tmp/, and nobody else."""
    for path in (spool.new, spool.tmp):
        mode = stat.S_IMODE(path.stat().st_mode)
        right = f"{MODES[path.name]:o}"
        remedy = f"Run: chmod {right} {shlex.quote(str(path))}"
        if mode & stat.S_IWOTH:
            yield warning("spool", f"Everybody may submit: {path} has mode {mode:o}.", remedy)
        elif not mode & stat.S_IWGRP:
            yield warning("spool", f"Its group may not submit: {path} has mode {mode:o}.", remedy)
        elif not mode & stat.S_ISVTX:
            what = f"Who submits may remove what others submitted: {path} has mode {mode:o}."
            yield warning("spool", what, remedy)
        elif not mode & stat.S_ISGID:
            what = f"What is submitted is not its group's: {path} has mode {mode:o}, not {right}."
            yield warning("spool", what, remedy)
    # The group of results is taken for the submit group.
    group = spool.done.stat().st_gid
    for path in (spool.new, spool.tmp, spool.failed):
        own = path.stat().st_gid
        if own != group:
            yield warning(
                "spool",
                f"{path} belongs to the group {_group(own)}, and done/ to {_group(group)}.",
                f"Run: chgrp {_group(group)} {shlex.quote(str(path))}",
            )


def _leftovers(spool: Spool) -> Iterator[Finding]:
    """Results that retention put aside and could not empty."""
    if os.access(spool.stage, os.R_OK | os.X_OK):
        left = left_aside(spool)
        if left:
            what = f"Something is left in stage/ of {counted(len(left), 'removed result')}."
            more = " ..." if len(left) > 3 else ""
            names = " ".join(shlex.quote(str(path)) for path in left[:3])
            yield warning("spool", what, f"As root, run: rm -rf {names}{more}")


def _run_of(sentence: str) -> str:
    command = sentence.partition("; run: ")[2]
    return f"Run: {command}" if command else "Mend the rights of its folders."


def _state(config: Config, *, running: bool) -> Iterator[Finding]:
    subject, folder = "state", config.state
    if not folder.is_dir():
        yield warning(subject, f"{folder} is not there.", "The daemon makes it at start.")
        return
    if _is_daemons(config):
        try:
            prepare_state(folder)
        except ConfigError as error:
            what = error.problem.removeprefix("the state folder cannot be used: ")
            yield problem(subject, f"{what.partition('; run: ')[0]}.", _run_of(what))
            return
    mode = folder.stat().st_mode
    if mode & 0o077:
        remedy = f"Run: chmod 700 {folder}"
        yield warning(subject, f"{folder} may be read or written by others.", remedy)
    for left in sorted(folder.glob("comfyd.db.damaged-*")):
        if not left.name.endswith("-wal"):
            yield warning(
                subject,
                f"{left.name} is a journal that was damaged and set aside.",
                "Find out what the disk says (dmesg, smartctl), and move it away once you know.",
            )
    journal = folder / "comfyd.db"
    if not journal.exists():
        yield (problem if running else warning)(
            subject,
            f"There is no journal, {journal}.",
            "The daemon builds one at its next start, from the spool and the servers.",
        )
    elif running:
        yield ok(subject, f"The daemon has its journal open, {size(journal.stat().st_size)}.")
    else:
        yield _journal(folder)


def _is_daemons(config: Config) -> bool:
    """Whether this process has the daemon's rights: the spool is its user's, or else state."""
    folder = config.spool if config.spool.is_dir() else config.state
    return os.geteuid() == folder.stat().st_uid


def _journal(folder: Path) -> Finding:
    subject = "state"
    try:
        with StateLock(folder / "lock").acquire_shared():
            reads = open_readonly(folder / "comfyd.db")
            jobs = sum(reads.counts().values())
            reads.close()
    except SpoolBusy:
        return warning(subject, "Its journal is in use.", "Run comfyd doctor once more.")
    except ComfydError as error:
        return problem(
            subject, f"{error}.", "Put a snapshot in its place, or let the next start build one."
        )
    return ok(subject, f"Its journal can be read; it knows {jobs} jobs.")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"the user with id {uid}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


# --- file systems --------------------------------------------------------------------------------


def _file_system(config: Config, subject: str, folder: Path) -> Iterator[Finding]:
    while not folder.exists():
        folder = folder.parent
    kind, found = file_system_of(folder), os.statvfs(folder)
    keep = config.outputs.min_free_bytes
    if subject == "state disk":
        keep = min(keep, JOURNAL_BYTES)
    free = free_bytes(found)
    if kind in NETWORK and subject == "state disk":
        remedy = "Put state on a local disk: a journal on this one can be damaged."
        yield problem(subject, f"{folder} lies on a network file system ({kind}).", remedy)
    elif kind in NETWORK:
        remedy = "Use a local disk; or drop files here from this machine only, and expect delays."
        yield warning(subject, f"{folder} lies on a network file system ({kind}).", remedy)
    elif kind in PASSING:
        remedy = "Use a disk, unless its jobs may be lost."
        yield warning(subject, f"{folder} lies in memory ({kind}): a reboot empties it.", remedy)
    if found.f_flag & os.ST_RDONLY:
        yield problem(subject, f"{folder} is read-only.", "Mount it for writing.")
    elif free < keep:
        yield problem(
            subject,
            f"{size(free)} are free, and {size(keep)} are kept: nothing is taken.",
            "Make room, or set outputs.min_free_bytes lower.",
        )
    elif found.f_files and found.f_favail < INODES:
        yield problem(
            subject, f"Only {found.f_favail} inodes are left.", "Remove files that nobody needs."
        )
    elif free < 2 * keep:
        remedy = "Make room, or set retention."
        yield warning(subject, f"{size(free)} are free; below {size(keep)} it stops.", remedy)
    else:
        yield ok(subject, f"{kind}, {size(free)} free.")


def file_system_of(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The kind of file system that *path* lies on, such as ``ext4``; "unknown" if nobody says."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    best: tuple[int, str] = (-1, "unknown")
    real = str(path.resolve())
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return best[1]
    for line in lines:
        head, _, tail = line.partition(" - ")
        fields, kind = head.split(), tail.split(" ")[0]
        if len(fields) < 5:
            continue
        point = fields[4].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        # Some file systems give their files another device than the mount has.
        rank = len(point) + (100_000 if fields[2] == wanted and inside else 0)
        if inside and rank > best[0]:
            best = rank, kind
    return best[1]


def _events(config: Config) -> Iterator[Finding]:
    subject, folder = "events", config.spool / "new"
    if not folder.is_dir():
        return
    why = why_no_events(folder)
    if why:
        yield warning(
            subject,
            f"The kernel tells nothing of {folder} ({why}): it is only looked at now and then.",
            "Raise its limits: sysctl fs.inotify.max_user_instances=1024"
            " fs.inotify.max_user_watches=524288",
        )
    else:
        yield ok(subject, "The kernel tells of new files at once.")


def _workflows(config: Config) -> Iterator[Finding]:
    folder = config.workflows
    if folder is not None and not folder.is_dir():
        remedy = "Make it, or take workflows out of the configuration."
        yield problem("workflows", f"{folder} is no folder.", remedy)


def _exposed(config: Config) -> Iterator[Finding]:
    listen = config.metrics.listen
    if config.metrics.web_config is None and not is_loopback(listen.host):
        yield warning(
            "metrics",
            f"{listen} can be asked from elsewhere, without a password.",
            "Set metrics.web_config, or listen on 127.0.0.1.",
        )


def _secrets(config: Config) -> Iterator[Finding]:
    for server in config.servers:
        for path in filter(None, (secret.file for secret in server.headers.values())):
            if path.stat().st_mode & 0o007:
                yield warning(
                    f"server {server.name}",
                    f"Everybody may use its secret, {path}.",
                    f"Run: chmod o= {shlex.quote(str(path))}",
                )


def _listen(config: Config) -> Iterator[Finding]:
    if config.state.is_dir() and not os.access(config.state, os.X_OK):
        return  # whether a daemon runs, and has it, may not be known
    listen = config.metrics.listen
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((listen.host, listen.port))
        except OSError as error:
            yield problem(
                "metrics",
                f"{listen} cannot be listened on: {error.strerror or error}.",
                "Stop what listens there (ss -ltnp), or set metrics.listen to another address.",
            )


# --- the machine ---------------------------------------------------------------------------------


def _clock() -> Iterator[Finding]:
    if time.time() < _BORN:
        yield problem("clock", "It is years behind.", "Set it: timedatectl set-ntp true")
    elif not clock_is_kept():
        remedy = "Let it be synchronized: timedatectl set-ntp true"
        yield warning("clock", "The kernel says that nothing keeps it right.", remedy)
    else:
        yield ok("clock", "It is synchronized.")


def clock_is_kept() -> bool:
    """Whether the kernel believes its clock to be synchronized; True where nobody can say."""
    timex = ctypes.create_string_buffer(512)  # larger than struct timex; modes 0: only ask
    call = getattr(ctypes.CDLL(None, use_errno=True), "adjtimex", None)
    return call is None or call(timex) != _TIME_ERROR


def _limits(config: Config) -> Iterator[Finding]:
    """Of the daemon, if it runs and may be asked; else of whoever asks."""
    most, _ = resource.prlimit(_pid(config.state / "control.sock"), resource.RLIMIT_NOFILE)
    if most < OPEN_FILES:
        remedy = "Set LimitNOFILE=4096 in its unit, or ulimit -n 4096."
        yield warning("limits", f"Only {most} files may be open at once.", remedy)
    else:
        yield ok("limits", f"{most} files may be open at once.")


def _pid(control_sock: Path) -> int:
    """Who listens there; 0, which means ourselves, if nobody does that we may ask or see."""
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.settimeout(ANSWER_S)
        with address_of(control_sock) as address:
            sock.connect(address)
        told = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", told)[0]
        return pid
    return 0


# --- servers -------------------------------------------------------------------------------------


def _servers(config: Config, status: dict[str, Any] | None) -> Iterator[Finding]:
    said = {} if status is None else {each["name"]: each for each in status["servers"]}
    found: dict[str, list[Finding]] = {}

    async def ask_all() -> None:
        async with trio.open_nursery() as nursery:
            for server in config.servers:
                nursery.start_soon(_ask, config, server, found)

    trio.run(ask_all)
    for server in config.servers:
        yield from found[server.name]
        view = said.get(server.name)
        subject = f"server {server.name}"
        if status is not None and view is None:
            remedy = "Let the daemon read the configuration anew: comfyd reload, or restart it."
            yield warning(subject, "The daemon does not know it.", remedy)
        elif view is not None and view.get("draining"):
            remedy = f"Run comfyd resume {server.name} to use it again."
            yield warning(subject, "It is being drained.", remedy)
        elif view is not None and view["state"] == "down" and view["reason"] != NOT_ASKED:
            if any(each.level == "problem" for each in found[server.name]):
                continue  # the same, and said already
            remedy = "Mend that; the daemon tries again by itself."
            yield problem(
                subject, f"The daemon finds it down: {view['reason'].rstrip('.')}.", remedy
            )
        elif view is not None and view["state"] == "wedged":
            remedy = "Restart ComfyUI there; comfyd status and docs/servers.md say more."
            yield problem(subject, f"The daemon sends it nothing: {view['reason']}", remedy)
        elif view is not None and view["state"] == "deaf":
            remedy = "Restart ComfyUI if it lasts: its results are found by asking, with a delay."
            yield warning(subject, "It sends no events.", remedy)


async def _ask(config: Config, server: Server, found: dict[str, list[Finding]]) -> None:
    subject, findings = f"server {server.name}", found.setdefault(server.name, [])
    if any(secret is UNREAD for secret in server.headers.values()):
        what = (
            "It was not asked: its secret was not read. comfyd status says how the daemon finds it."
        )
        findings.append(ok(subject, what))
        return
    try:
        client = client_of(server, config)
    except ComfydError as error:
        findings.append(problem(subject, f"{error}.", "Mend its entry in the configuration."))
        return
    try:
        stats = await client.system_stats()
        asked_s = time.time()
        told_s = await client.told_s()
        answered_s = time.time()
    except ServerError as error:
        remedy = "Start ComfyUI there, or mend its url, headers or firewall."
        findings.append(problem(subject, f"{server.url} does not answer: {error}.", remedy))
        return
    finally:
        with trio.move_on_after(1, shield=True):
            await client.aclose()
    verdict = version_verdict(stats.version)
    version = stats.version or "of unknown version"
    if verdict.refusal:
        findings.append(problem(subject, f"{verdict.refusal}.", "Update ComfyUI there."))
    elif verdict.warning:
        remedy = "Make sure that it is ComfyUI itself, not something in front of it."
        findings.append(warning(subject, f"{verdict.warning}.", remedy))
    else:
        findings.append(ok(subject, f"ComfyUI {version} answers."))
    if told_s is not None:
        # It tells whole seconds, and may have told it any time while it was asked.
        ahead_s, behind_s = told_s - answered_s, asked_s - (told_s + 1.0)
        skew_s = max(ahead_s, behind_s)
        if skew_s > SKEW_S:
            way = "ahead of" if ahead_s > behind_s else "behind"
            remedy = "Synchronize both clocks (NTP): times in logs and results are compared."
            findings.append(warning(subject, f"Its clock is {skew_s:.0f} s {way} ours.", remedy))


def _units(config: Config) -> Iterator[Finding]:
    named = [server for server in config.servers if server.restart_unit is not None]
    if named and shutil.which("systemctl") is None:
        yield problem(
            f"server {named[0].name}",
            f"restart_unit is {named[0].restart_unit}, and there is no systemctl here.",
            "Take restart_unit out of the configuration: it works on this machine only.",
        )
        return
    for server in named:
        if trio.run(is_known, str(server.restart_unit)) is False:
            yield problem(
                f"server {server.name}",
                f"restart_unit is {server.restart_unit}, which systemd does not know.",
                "Name the unit that runs ComfyUI here: systemctl list-units --type=service",
            )
