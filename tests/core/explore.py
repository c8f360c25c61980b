"""The long exploration (`make explore`): more faults and more servers than a test has time for."""

from __future__ import annotations

import sys
import time

from tests.core.explorer import PLAIN, Scene, explore
from tests.core.test_explorer import FAULTS, WORLDS

# What can happen to servers and by persons, besides FAULTS.
MORE = {
    "hang": 1, "off": 1, "forget": 1, "reject": 1, "zombie": 1, "stubborn": 1, "hold": 1,
    "drain": 1, "full": 1, "disk": 1, "conflict": 1, "remove": 1, "away": 2, "mean": 1,
}  # fmt: skip
LONG = [
    ("a", "S", FAULTS, 2, PLAIN),
    ("a", "ST", FAULTS, 2, PLAIN),
    *(("a", servers, faults, most + 1, scene) for servers, faults, most, scene in WORLDS.values()),
    ("a", "ST", {**FAULTS, **MORE}, 2, PLAIN),
    ("a", "ST", {"remove": 1, "hang": 1, "crash": 1}, 2, PLAIN),
    *(("ab", "ST", {fault: 1}, 1, PLAIN) for fault in FAULTS),
    ("ab", "ST", {}, 0, Scene(window=2, down="T")),
    ("ab", "S", {"crash": 1}, 1, Scene(window=2)),
    ("ab", "S", {"away": 2}, 2, PLAIN),
    ("ab", "S", {"away": 4}, 4, Scene(window=2)),
    ("ab", "ST", {"away": 2}, 2, PLAIN),
    ("a", "S", FAULTS, 3, PLAIN),
]


def main() -> int:
    """Print what each exploration visited; an AssertionError tells the way to a broken state."""
    for jobs, servers, faults, most, scene in LONG:
        began_s = time.monotonic()
        states = explore(jobs, servers, faults, most, scene)
        which = "any" if len(faults) > 1 else next(iter(faults), "none")
        print(
            f"{len(jobs)} jobs, {len(servers)} servers, {most} faults ({which}):"
            f" {states:,} states in {time.monotonic() - began_s:.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
