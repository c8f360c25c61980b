"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes says how busy the machine is, not whether it is right.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
