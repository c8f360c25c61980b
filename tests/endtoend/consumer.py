"""A consumer: moves what appears in ``done/`` and ``failed/`` away, at moments of its own.

Run as ``python -m tests.endtoend.consumer SPOOL TAKEN SEED``; it lives until it is killed. What it
took lies in TAKEN/done and TAKEN/failed; a folder that comes a second time is moved to TAKEN/twice.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

TWICE = "twice"


def main(spool: Path, taken: Path, seed: int) -> None:
    chance = random.Random(seed)
    for place in ("done", "failed", TWICE):
        (taken / place).mkdir(parents=True)
    while os.getppid() != 1:
        for place in ("done", "failed"):
            for name in os.listdir(spool / place):
                if name.startswith(".") or chance.random() < 0.5:  # the daemon trying the folder
                    continue
                try:
                    os.rename(spool / place / name, taken / place / name)
                except OSError:  # it is there already
                    os.rename(spool / place / name, taken / TWICE / f"{name}.{time.time_ns()}")
                time.sleep(chance.uniform(0, 0.01))
        time.sleep(chance.uniform(0, 0.2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
