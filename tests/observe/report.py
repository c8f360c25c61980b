"""What came of a run: problems as sentences, and the page that shows what was seen."""

from __future__ import annotations

from dataclasses import dataclass

from tests.observe import boards
from tests.observe.stage import Seen


@dataclass
class Report:
    """What was seen.

    Attributes:
      stray: Alerts that came where nothing of the kind was done.
      empty: Queries of boards without data.
      answered: How many had some.
      exemplars: How many came to Prometheus.
      factor, scrape_s: How fast the rules were, and how often the daemons were scraped.

    """

    seen: list[Seen]
    stray: list[str]
    empty: list[boards.Query]
    answered: int
    exemplars: int
    took_s: float
    versions: list[str]
    daemons: int
    factor: int
    scrape_s: int

    def problems(self, shipped: set[str]) -> list[str]:
        """What is not as it should be, as sentences.

        Args:
          shipped: The alerts that must have been seen; if there are none, not all was played, and
            boards may lack data.

        """
        found = [f"{s.alert} did not fire at {s.stage}" for s in self.seen if s.fired_s is None]
        found += [
            f"{s.alert} did not resolve at {s.stage}"
            for s in self.seen
            if s.fired_s is not None and s.resolved_s is None
        ]
        found += self.stray
        if not self.exemplars:
            found.append("no exemplar came to Prometheus")
        if shipped:
            missing = shipped - {one.alert for one in self.seen}
            found += [f"{alert} has no scene" for alert in sorted(missing)]
            found += [
                f"the board {query.board} has no data for {query.title}: {query.expr}"
                for query in self.empty
                if query[:2] not in boards.RIGHTLY_EMPTY
            ]
            without = {query[:2] for query in self.empty}
            found += [
                f"the board {board} has data for {title}, though it is listed as rightly empty"
                for board, title in boards.RIGHTLY_EMPTY.keys() - without
            ]
        return found

    def table(self) -> list[str]:
        lines = ["| alert | fault | fired after | resolved after |", "|---|---|---|---|"]
        for one in sorted(self.seen, key=lambda each: (each.alert, each.stage)):
            fired, resolved = (
                "never" if span_s is None else f"{span_s:.0f} s"
                for span_s in (one.fired_s, one.resolved_s)
            )
            lines.append(f"| {one.alert} | {one.fault} | {fired} | {resolved} |")
        return lines

    def page(self) -> str:
        """The whole of docs/observed-alerts.md."""
        linked = [
            f"| [{alert}](runbooks/{alert}.md) {rest}"
            for line in self.table()[2:]
            for _, alert, rest in [line.split(" ", 2)]
        ]
        queries = self.answered + len(self.empty)
        end = ", and these had none, rightly:" if self.empty else "."
        why = [f"- {board}, {title}: {why}" for (board, title), why in boards.RIGHTLY_EMPTY.items()]
        told = f"""\
# Alerts that were seen

Made by a run of `make observe WRITE=1`; do not edit.

{", ".join(self.versions)} watched {self.daemons} daemons while simulated servers, disks and people
did to them what the alerts tell of. Each was seen at Alertmanager. Nothing fired on the daemon
whose jobs went well, nor before the first fault. The run took {self.took_s:.0f} s.

The rules were the shipped ones, {self.factor} times faster (`for`, ranges and intervals; thresholds
are as shipped), scraped every {self.scrape_s} s: what takes 1 s here takes up to {self.factor} s
with the shipped rules. Times are from the fault, and from its end.
"""
        asked = f"""
The {queries} queries of the boards were asked over the whole run: {self.answered} had data{end}
"""
        table = [*self.table()[:2], *linked]
        return "\n".join([told, *table, asked, *([*why, ""] if self.empty else [])]).rstrip() + "\n"
