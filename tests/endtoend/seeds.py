"""The seed of a run: another one each time, printed, and given back to repeat it."""

from __future__ import annotations

import os
import random


def drawn_seed() -> int:
    """PROVE_SEED of the environment, or a new one."""
    seed = int(os.environ.get("PROVE_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"\nseed {seed} (repeat with PROVE_SEED={seed})")
    return seed
