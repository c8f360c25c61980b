"""The servers together: what is on each, what is fenced there, and which may be given a job.

Owned by the engine. A row belongs to a server only if its name and its URL are the same: a name
whose URL changed is another server.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from comfyd.core import letdown, verdicts
from comfyd.core.facts import Accepted, NotSent, Rejected, SubmitUnknown
from comfyd.core.fencing import Watch
from comfyd.core.model import Fence, JobId, PromptId, Reason, Row, ServerName, State
from comfyd.core.notes import Note
from comfyd.core.policy import Policy, exponential_s, has_lasted
from comfyd.core.server import Server


class Fleet:
    """See the module.

    Attributes:
      servers: By name, as configured.
      on_server: Jobs with a prompt in flight there, oldest first.
      watches: Fences by prompt id, but for those of servers that are not configured.
      dormant: Those, to be minded once their server is configured again.

    """

    def __init__(self, servers: Iterable[Server], policy: Policy) -> None:
        self.policy = policy
        self.servers = {server.name: server for server in servers}
        self.on_server: dict[ServerName, dict[JobId, None]] = {n: {} for n in self.servers}
        self.watches: dict[PromptId, Watch] = {}
        self.dormant: dict[PromptId, Fence] = {}
        self._alone: dict[ServerName, frozenset[JobId]] = {}  # sent with nothing else beside them
        self._stuck: dict[ServerName, frozenset[JobId]] = {}  # stalled, and not stopped yet

    def fork(self) -> Fleet:
        """An independent copy."""
        new = copy.copy(self)
        new.servers, new.watches = dict(self.servers), dict(self.watches)
        new.dormant = dict(self.dormant)
        new.on_server = {name: dict(jobs) for name, jobs in self.on_server.items()}
        new._alone, new._stuck = dict(self._alone), dict(self._stuck)
        return new

    # --- keeping it ------------------------------------------------------------------------------

    def of(self, row: Row) -> Server | None:
        """The server that *row* was sent to, if it is still configured."""
        server = None if row.server is None else self.servers.get(row.server)
        return server if server is not None and server.origin == row.origin else None

    def put(self, server: Server) -> None:
        """Replace what is known of a server."""
        self.servers[server.name] = server

    def add(self, server: Server, rows: Iterable[Row]) -> list[JobId]:
        """A server is new, or back.

        Args:
          rows: Of all jobs at hand.

        Returns:
          Those of them with a prompt in flight there.

        """
        self.servers[server.name] = server
        self.on_server[server.name] = {}
        for row in rows:
            self.index(None, row)
        fences, self.dormant = list(self.dormant.values()), {}
        for fence in fences:
            self.watch(fence)
        return list(self.on_server[server.name])

    def remove(self, name: ServerName) -> None:
        """A server is gone, with nothing of ours left there but what was given up."""
        del self.servers[name], self.on_server[name]
        self._alone.pop(name, None)
        self._stuck.pop(name, None)
        for prompt_id, watch in list(self.watches.items()):
            if watch.fence.server == name:
                del self.watches[prompt_id]
                self.dormant[prompt_id] = watch.fence

    def index(self, old: Row | None, row: Row) -> None:
        """Keep the look-ups in step with a row that changed."""
        for each, there in ((old, False), (row, True)):
            server = None if each is None else self.of(each)
            if each is None or server is None or not each.state.in_flight:
                continue
            here = self.on_server[server.name]
            if there:
                here[each.job] = None
            else:
                here.pop(each.job, None)
            marks = ((self._alone, each.deaths > 0), (self._stuck, _is_stalled(each)))
            for known, holds in marks:
                if holds:
                    jobs = known.get(server.name, frozenset())
                    known[server.name] = jobs | {each.job} if there else jobs - {each.job}

    def watch(self, fence: Fence) -> None:
        """Mind *fence* from now on, or once its server is configured."""
        server = self.servers.get(fence.server)
        if server is not None and server.origin == fence.origin:
            self.watches[fence.prompt_id] = Watch(fence=fence)
        else:
            self.dormant[fence.prompt_id] = fence

    def fences(self, name: ServerName) -> int:
        """How many attempts that were given up there are not proven to be over."""
        return sum(watch.fence.server == name for watch in self.watches.values())

    def due_watches(self, now_s: float) -> Iterator[Watch]:
        """Those to be asked now; a server that is down is not asked."""
        for watch in list(self.watches.values()):
            if not watch.asked and watch.look_s <= now_s and self.servers[watch.fence.server].up:
                yield watch

    def look_again(self, name: ServerName, now_s: float) -> None:
        """Something happened there: ask about its fences at once."""
        for prompt_id, watch in self.watches.items():
            if watch.fence.server == name and watch.absent_s is None:
                self.watches[prompt_id] = replace(watch, look_s=now_s)

    def keep_fit(self, now_s: float) -> None:
        """Note since when each server cannot be used."""
        for server in list(self.servers.values()):
            fit = (
                server.up is not False
                and not server.refusal
                and not server.retiring
                and not self.trouble(server.name, now_s)
            )
            if fit != (server.unfit_since_s is None):
                self.put(replace(server, unfit_since_s=None if fit else now_s))

    # --- what came of jobs there -----------------------------------------------------------------

    def answered(
        self,
        row: Row,
        fact: Accepted | Rejected | NotSent | SubmitUnknown,
        *,
        now_s: float,
        u: float,
    ) -> None:
        """Leave a server that turns submissions away alone for a while; no job is to blame."""
        server = self.of(row)
        if server is None or fact.token.attempt != row.attempt:
            return
        if isinstance(fact, Accepted):
            return self.took(row, now_s, uploaded=fact.uploaded)
        if isinstance(fact, Rejected):
            return self.put(server.opened())
        failures = server.failures + 1
        policy = self.policy
        answered = fact.status is not None and fact.status not in letdown.BUSY
        most_s = policy.turned_away_max_s if answered else policy.retry_max_s
        delay_s = exponential_s(failures, policy.retry_first_s, most_s, u=u)
        if fact.retry_after_s is not None:
            delay_s = max(delay_s, min(fact.retry_after_s, policy.abandon_after_s))
        closed_until_s = max(server.closed_until_s, now_s + delay_s)
        server = replace(server, failures=failures, closed_until_s=closed_until_s, said=fact.said)
        self.put(server)

    def took(self, row: Row, now_s: float, *, uploaded: bool = False) -> None:
        """It has a prompt that was sent to it, whether it said so or was found to have it."""
        if (server := self.of(row)) is not None:
            uploaded_s = now_s if uploaded else server.uploaded_s
            self.put(replace(server.opened(), accepted_s=now_s, uploaded_s=uploaded_s))

    def succeeded(self, row: Row) -> None:
        """A prompt succeeded: how long it took, and that its server is well."""
        server = self.of(row)
        if server is None or row.started_at is None or row.ended_at is None:
            return
        run_s = row.ended_at - row.started_at
        average_s = server.run_average_s
        mixed_s = run_s if average_s is None else 0.8 * average_s + 0.2 * run_s
        self.put(replace(server, run_average_s=mixed_s, strikes=()))

    def blame(self, job: JobId, note: Note) -> None:
        """A failure that may be a server's fault, or that has turned out to be the job's."""
        if note.data["blame"] == "job":
            for server in list(self.servers.values()):
                self.put(server.cleared_of(job))
        elif (blamed := self.servers.get(ServerName(note.server or ""))) is not None:
            self.put(blamed.struck(job, card=note.data["blame"] == "card"))

    # --- what is so ------------------------------------------------------------------------------

    def trouble(self, name: ServerName, now_s: float) -> str:
        """Why a server that answers is given nothing more, as a sentence; "" if all is well."""
        wedged = self.wedged(name, now_s)
        if not wedged and self._stuck.get(name):
            return "A prompt runs without any sign of progress, and is being stopped."
        return wedged

    def wedged(self, name: ServerName, now_s: float) -> str:
        """Why nothing but a restart will help it, as a sentence; "" if it needs none."""
        server = self.servers[name]
        if self._is_sick(server):
            return (
                f"The last {len(server.strikes)} jobs failed here, and not by their own fault: look"
                f" at its card and its log, restart ComfyUI, or run: comfyd resume {name}"
            )
        if server.wedged:
            return "Prompts wait and none runs: its worker has died; restart ComfyUI."
        for watch in self.watches.values():
            if watch.fence.server == name and watch.is_stubborn(self.policy, now_s=now_s):
                return "A prompt that was to be stopped goes on; restart ComfyUI if it never ends."
        return ""

    def to_restart(self, now_s: float) -> list[tuple[Server, str]]:
        """Servers that answer, are wedged and may be restarted now, and why."""
        due = [s for s in self.servers.values() if s.up and now_s >= s.restart_s]
        return [(server, why) for server in due if (why := self.wedged(server.name, now_s))]

    def restart_s(self, now_s: float) -> float:
        """When a server that is wedged may be restarted (again); inf if none waits for that."""
        waiting = (s for s in self.servers.values() if s.up and now_s < s.restart_s < math.inf)
        return min((s.restart_s for s in waiting if self.wedged(s.name, now_s)), default=math.inf)

    def _is_sick(self, server: Server) -> bool:
        """Whether too many jobs in a row failed there. Where not all of them spoke of the card, and
        every other server has as many to its name, it is the jobs: cards do not fall ill together.
        """
        most = self.policy.sick_after
        if len(server.strikes) < most or sum(card for _, card in server.strikes) >= most:
            return len(server.strikes) >= most
        others = [
            other
            for other in self.servers.values()
            if other.name != server.name and not other.refusal and not other.retiring
        ]
        return not others or any(len(other.strikes) < most for other in others)

    def is_usable(self, server: Server, now_s: float) -> bool:
        """Whether something may be sent there now, as far as the server is concerned."""
        return self._is_fit(server) and now_s >= server.opens_s

    def _is_fit(self, server: Server) -> bool:
        """The same, but that it may be left alone for a while."""
        fenced = self.fences(server.name) > 0
        return bool(server.up) and server.unfit_since_s is None and not fenced

    def is_wanted(self, row: Row, now_s: float) -> bool:
        """Whether nobody has said no to this job, or any server that works now has not."""
        return not row.verdicts or any(
            self.is_usable(server, now_s)
            and not server.retiring
            and not verdicts.has_said(row, server.name, server.origin)
            for server in self.servers.values()
        )

    def takes_others(self, row: Row, *, upload: bool) -> bool:
        """Whether its server has accepted another job since some server let this one down.

        Args:
          upload: One with files: without them, a full disk there stops no job.

        """
        server = self.of(row)
        if server is None or row.let_down is None:
            return False
        return (server.uploaded_s if upload else server.accepted_s) > row.let_down.since_s

    def is_hopeful(self, server: Server, now_s: float) -> bool:
        """Whether it is worth waiting for: it is well, or has not been unwell for long."""
        if server.refusal or server.retiring:
            return False
        return not has_lasted(server.unfit_since_s, self.policy.abandon_after_s, now_s=now_s)

    def hopeful(self, now_s: float) -> frozenset[ServerName]:
        """Those worth waiting for."""
        return frozenset(s.name for s in self.servers.values() if self.is_hopeful(s, now_s))

    def hopes_end_s(self, now_s: float) -> float:
        """When the next of those stops being so, if nothing changes."""
        ends = (
            server.unfit_since_s + self.policy.abandon_after_s
            for server in self.servers.values()
            if server.unfit_since_s is not None and self.is_hopeful(server, now_s)
        )
        return min(ends, default=math.inf)

    def elsewhere(self, row: Row, now_s: float) -> bool:
        """Whether a server other than the row's own may still take it."""
        return any(
            server.name != row.server
            and not verdicts.has_said(row, server.name, server.origin)
            and self.is_hopeful(server, now_s)
            for server in self.servers.values()
        )

    # --- finding places --------------------------------------------------------------------------

    def has_room(self, server: Server, now_s: float) -> bool:
        """Whether one more prompt may be sent there now."""
        if not self.is_usable(server, now_s) or self._alone.get(server.name):
            return False
        ours = len(self.on_server[server.name])
        # Others' prompts count, but never keep us out for good: one of ours may always wait.
        theirs = server.remaining if server.hearing and ours else 0
        return max(ours, theirs) < server.room(self.policy)

    def place(self, row: Row, open_: Iterable[ServerName], now_s: float) -> Server | None:
        """The least loaded of *open_* that may take this job."""
        waits = self._waits_for_another(row, now_s)
        best: tuple[tuple[bool, bool, bool, float], Server] | None = None
        for name in open_:
            server = self.servers[name]
            ours = len(self.on_server[name])
            if verdicts.has_said(row, name, server.origin) or (row.deaths and ours):
                continue
            if waits and letdown.is_by(row, server):
                continue
            # Where prompts wait and none was seen to run, only if there is nowhere else; nor where
            # it is likely to be let down once more.
            rank = (
                server.idle_since_s is not None,
                row.let_down is not None and server.failures > 0,
                letdown.is_by(row, server),
                max(ours, server.remaining) / server.room(self.policy),
            )
            if best is None or rank < best[0]:
                best = rank, server
        return None if best is None else best[1]

    def _waits_for_another(self, row: Row, now_s: float) -> bool:
        """Whether one that did not let it down last is only left alone for a moment: with several
        jobs about, the one that did is open at just the wrong times."""
        if row.let_down is None or row.deaths:
            return False
        soon_s = now_s + self.policy.retry_max_s  # a Retry-After may be far longer
        return any(
            now_s < server.closed_until_s <= soon_s
            and self._is_fit(server)
            and not letdown.is_by(row, server)
            and not verdicts.has_said(row, server.name, server.origin)
            for server in self.servers.values()
        )

    def could_run(self, server: Server, row: Row, now_s: float) -> bool:
        """Whether it may be given that job, once it has room."""
        said = verdicts.has_said(row, server.name, server.origin)
        return not said and self.is_usable(server, now_s)

    def reserve(self, row: Row, now_s: float) -> ServerName | None:
        """The server that a job which must be sent alone waits for: the one soonest empty."""
        fitting = [
            server.name for server in self.servers.values() if self.could_run(server, row, now_s)
        ]
        return min(fitting, key=lambda name: len(self.on_server[name]), default=None)

    def idle(self, now_s: float) -> list[Server]:
        """Those that could run something at once, and have nothing to do."""
        return [
            server
            for server in self.servers.values()
            if self.is_usable(server, now_s)
            and not self.on_server[server.name]
            and not server.remaining
            and server.idle_since_s is None
        ]


def _is_stalled(row: Row) -> bool:
    return row.state is State.STOPPING and row.why is not None and row.why.reason is Reason.STALLED
