"""Where progress is kept: of our prompts alone, and no longer than they are at hand."""

from __future__ import annotations

import json

from comfyd.core.model import PromptId
from comfyd.services.progress import ProgressBoard

GRAPH = {"3": {"class_type": "KSampler", "inputs": {}}}
SAID = json.dumps({"node": "3", "value": 5, "max": 20}).encode()


def test_what_was_sent_and_heard_is_told():
    board = ProgressBoard(lambda prompt_id: prompt_id == "ours")
    board.sent(PromptId("ours"), GRAPH)
    board.heard(PromptId("ours"), "progress", SAID)
    board.heard(PromptId("theirs"), "progress", SAID)
    known = board.of(PromptId("ours"))
    assert known is not None
    assert (known.name, known.step) == ("KSampler", 5)
    assert board.of(PromptId("theirs")) is None


def test_it_is_bounded_by_what_is_at_hand():
    at_hand: set[PromptId] = set()
    board = ProgressBoard(at_hand.__contains__)
    for number in range(10_000):
        prompt_id = PromptId(str(number))
        at_hand.add(prompt_id)
        at_hand.discard(PromptId(str(number - 3)))
        board.sent(prompt_id, GRAPH)
        assert all(board.of(each) is not None for each in at_hand)
    assert len(board._known) <= 65
