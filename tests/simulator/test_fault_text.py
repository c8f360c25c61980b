"""How faults are written."""

from __future__ import annotations

import random

import pytest

from comfyd.simulator import SWITCHES, Faults, HowOften, parse_fault
from comfyd.simulator.faults import CardFail, ClassFail, StatusFail, Switch

EXAMPLES = {
    "drop-": "drop-end=0.5",
    "delay-": "delay-status=2s",
    "half-open": "half-open=ws",
    "post-fail": "post-fail=503:2",
    "post-fail-class": "post-fail-class=500:KSampler",
    "evict-history": "evict-history=1",
    "restart-after": "restart-after=3",
    "stalled-publisher": "stalled-publisher",
    "stuck-worker": "stuck-worker",
    "missing-node": "missing-node=SaveImage",
    "missing-model": "missing-model=tuned.safetensors",
    "max-upload": "max-upload=64KiB",
    "upload-fail": "upload-fail=507",
    "view-fail": "view-fail=403:1",
    "card-fails": "card-fails=cuda:0.5",
}


def example(name: str, argument: str) -> str:
    return EXAMPLES.get(name, f"{name}=500ms" if argument == "DURATION" else f"{name}=2")


@pytest.mark.parametrize("switch", SWITCHES, ids=[switch.name for switch in SWITCHES])
def test_every_switch_can_be_set_and_cleared(switch: Switch) -> None:
    off = Faults()
    faults = Faults.parse([example(switch.name, switch.argument)])
    assert faults != off
    faults.clear()
    assert faults.drop == off.drop
    assert vars(faults).keys() == vars(off).keys()
    assert all(
        vars(faults)[name] == value
        for name, value in vars(off).items()
        if name not in ("chance", "_changed")
    )


def test_switches_are_told_apart_and_described() -> None:
    assert len({switch.name for switch in SWITCHES}) == len(SWITCHES)
    assert len({switch.attribute for switch in SWITCHES}) == len(SWITCHES)
    assert all(switch.about and "\n" not in switch.about for switch in SWITCHES)
    assert all(hasattr(Faults(), switch.attribute) for switch in SWITCHES)


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [
        ("history-fail", "history_fail", HowOften()),
        ("history-fail=3", "history_fail", HowOften(count=3)),
        ("history-fail=0.25", "history_fail", HowOften(probability=0.25)),
        ("slow=500ms", "slow_s", 0.5),
        ("slow=2m", "slow_s", 120.0),
        ("half-open", "half_open", "all"),
        ("post-fail=503", "post_fail", StatusFail(503, HowOften())),
        ("post-fail=500:2", "post_fail", StatusFail(500, HowOften(count=2))),
        ("post-fail-class=500:KSampler", "post_fail_class", ClassFail(500, "KSampler")),
        ("card-fails=memory", "card_fails", CardFail("memory", HowOften())),
        ("card-fails=cuda:3", "card_fails", CardFail("cuda", HowOften(count=3))),
        ("missing-node=A,B", "missing_nodes", frozenset({"A", "B"})),
        ("max-upload=64KiB", "max_upload_bytes", 65536),
        ("drop-executed=0.5", "drop", {"executed": HowOften(probability=0.5)}),
        ("delay-end=1.5s", "delay_s", {"end": 1.5}),
    ],
)
def test_a_fault_is_parsed(text: str, attribute: str, value: object) -> None:
    assert getattr(Faults.parse([text]), attribute) == value


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nonsense", "there is no fault 'nonsense'; there are drop-"),
        ("drop-", "drop- needs a message type"),
        ("drop-nonsense", "there is no message type 'nonsense'"),
        ("drop-end=2.5", "a probability is 0 to 1"),
        ("slow", "slow: a duration is written"),
        ("slow=5", "slow: a duration is written"),
        ("slow=-5s", "slow: a duration is written"),
        ("evict-history=few", "evict-history: a whole number"),
        ("post-fail=200", "an HTTP status from 400 to 599"),
        ("half-open=tcp", "ws, http or all"),
        ("card-fails", "cuda, memory or other is wanted"),
        ("card-fails=gpu", "cuda, memory or other is wanted"),
        ("missing-node", "a name is wanted"),
        ("missing-model=a,", "a name is wanted"),
        ("max-upload=64", "a size is written 512B"),
        ("stalled-publisher=1", "it takes no argument"),
        ("history-fail=often", "history-fail: "),
        ("", "there is no fault ''"),
    ],
)
def test_a_wrong_fault_is_refused_in_a_sentence(text: str, complaint: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_fault(text)
    assert complaint in str(refused.value)


def test_chance_is_repeatable() -> None:
    def draws() -> list[bool]:
        faults = Faults.parse(["history-fail=0.5"], seed=7)
        return [faults.strikes(faults.history_fail) for _ in range(50)]

    assert draws() == draws()
    assert 10 < sum(draws()) < 40


def test_a_count_runs_out() -> None:
    often = HowOften(count=2)
    assert [often.strikes(random.Random(0)) for _ in range(4)] == [True, True, False, False]
