"""Every recorded scenario, played again: the same steps in the same order, the same JSON keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.contract import shape
from tests.contract.scenarios import SCENARIOS
from tests.contract.wire import Session

FOLDER = Path(__file__).parent.parent / "transcripts"
# These hold a prompt that runs while other things are done; how far it gets differs.
PACED = frozenset({"interrupt", "delete_pending", "clear", "reconnect_while_running"})


def test_every_scenario_is_recorded() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(SCENARIOS)


@pytest.mark.parametrize("name", sorted(SCENARIOS))
async def test_scenario_has_the_recorded_shape(session: Session, name: str) -> None:
    if name == "progress" and not await session.has_node("SimSleep"):
        pytest.skip("the server has no SimSleep node")
    recorded = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["steps"]

    await SCENARIOS[name](session)
    steps = session.normalised()

    if name in PACED:
        assert shape.loose_sequences(steps) == shape.loose_sequences(recorded)
        assert shape.remaining(steps) == shape.remaining(recorded)
    else:
        assert shape.sequences(steps) == shape.sequences(recorded)
    assert shape.structures(steps) == shape.structures(recorded)
