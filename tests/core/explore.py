"""The long exploration (`make explore`): more faults and more servers than a test has time for."""

from __future__ import annotations

import sys
import time

from tests.core.explorer import explore
from tests.core.test_explorer import FAULTS

WORLDS = [
    ("a", "S", FAULTS, 2),
    ("a", "ST", FAULTS, 2),
    *(("ab", "ST", {fault: 1}, 1) for fault in FAULTS),
    ("a", "S", FAULTS, 3),
]


def main() -> int:
    """Print what each exploration visited; an AssertionError tells the way to a broken state."""
    for jobs, servers, faults, most in WORLDS:
        began_s = time.monotonic()
        states = explore(jobs, servers, faults, most)
        which = "any" if len(faults) > 1 else next(iter(faults))
        print(
            f"{len(jobs)} jobs, {len(servers)} servers, {most} faults ({which}):"
            f" {states:,} states in {time.monotonic() - began_s:.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
