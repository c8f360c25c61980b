"""comfyd in the machine, seen as its administrator sees it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.endtoend import graphs
from tests.endtoend.daemon import samples
from tests.systemd.machine import Failed, Machine
from tests.systemd.transcript import Transcript

COMFYD = "/opt/comfyd/bin/comfyd"

# Looks at every delivered result, and at what the server ran, and says both in one line of JSON.
_LEDGER = r"""
import hashlib, json, pathlib, urllib.request
done = {}
for path in pathlib.Path("SPOOL/done").iterdir():
    result = json.loads((path / "result.json").read_bytes())
    whole = all(
        hashlib.sha256((path / output["file"]).read_bytes()).hexdigest() == output["sha256"]
        for output in result["outputs"]
    )
    done[path.name] = whole and bool(result["outputs"])
with urllib.request.urlopen("http://127.0.0.1:8188/history") as answer:
    history = json.load(answer)
runs = {}
for record in history.values():
    mark = record["prompt"][3].get("comfyd", {})
    runs[mark.get("job")] = runs.get(mark.get("job"), 0) + 1
folders = ("new", "claimed", "failed")
left = {name: sorted(p.name for p in pathlib.Path("SPOOL", name).iterdir()) for name in folders}
print(json.dumps({"done": done, "runs": runs, "left": left}))
"""


@dataclass
class Service:
    """One unit and its spool."""

    machine: Machine
    transcript: Transcript
    unit: str = "comfyd"
    spool: str = "/var/lib/comfyd/spool"
    config: str = "/etc/comfyd/comfyd.yaml"
    port: int = 9818

    def __post_init__(self) -> None:
        self.dropped: list[str] = []

    def show(self, name: str) -> str:
        """One property of the unit."""
        return self.machine.ask(f"systemctl show --value -p {name} {self.unit}").strip()

    @property
    def pid(self) -> int:
        return int(self.show("MainPID"))

    def ready(self) -> bool:
        states = self.machine.ask(f"systemctl show --value -p ActiveState,SubState {self.unit}")
        return states.split() == ["active", "running"]

    def metrics(self) -> dict[str, float]:
        fetch = (
            "import urllib.request as u;"
            f"print(u.urlopen('http://127.0.0.1:{self.port}/metrics', timeout=10).read().decode())"
        )
        return samples(self.machine.ask(f'python3 -c "{fetch}"'))

    # --- jobs ------------------------------------------------------------------------------------

    def drop(self, name: str, count: int, seconds: float) -> list[str]:
        """Submit *count* jobs of *seconds* each, as alice; their ids."""
        files = []
        for number in range(count):
            seed = len(self.dropped) + number
            path = self.machine.root / "home/alice" / f"{name}-{number}.json"
            path.write_text(json.dumps(graphs.slow(seed, seconds)))
            files.append(path.name)
        command = f"{COMFYD} -c {self.config} submit {' '.join(files)}"
        ids = self.machine.ask(command, user="alice").split()
        if len(ids) != count:
            raise Failed(f"{len(ids)} ids instead of {count}")
        self.transcript.note(f"alice submits {count} jobs of {seconds:g} s: {name}-0 ...")
        self.dropped += ids
        return ids

    def ledger(self) -> dict[str, Any]:
        script = _LEDGER.replace("SPOOL", self.spool)
        found: dict[str, Any] = json.loads(self.machine.ask(f"python3 -c '{script}'"))
        return found

    def done(self) -> int:
        return len(self.machine.ask(f"ls {self.spool}/done").split())

    def all_delivered(self, within_s: float = 90) -> None:
        """Every job that was ever dropped is in done/, whole, once, and nothing else is left."""
        self.machine.until(
            f"all {len(self.dropped)} jobs are in done/",
            lambda: self.done() >= len(self.dropped),
            within_s,
        )
        left = f"find {self.spool}/new {self.spool}/claimed -name '[!.]*' -mindepth 1"
        self.machine.until("new/ and claimed/ are empty", lambda: not self.machine.ask(left), 30)
        found = self.ledger()
        problems = []
        if sorted(found["done"]) != sorted(self.dropped):
            problems.append(f"done/ holds {sorted(found['done'])}, not {sorted(self.dropped)}")
        problems += [f"{job} is not whole" for job, whole in found["done"].items() if not whole]
        problems += [f"{name}/ holds {left}" for name, left in found["left"].items() if left]
        twice = {job: found["runs"].get(job, 0) for job in self.dropped}
        twice = {job: count for job, count in twice.items() if count != 1}
        if twice:
            problems.append(f"not run once: {twice}")
        if problems:
            raise Failed("; ".join(problems))
        self.transcript.holds(
            f"each of the {len(self.dropped)} jobs is in done/ once, with the SHA-256 it should"
            " have, and ran once; failed/ is empty"
        )
