"""Splitting records by a hash of their prompt: held-out data and phases."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from rows import a, u

from danlu.data.phases import PHASES
from danlu.data.sources import in_phase
from danlu.data.split import prompt_text, split_heldout
from danlu.exceptions import SettingsError
from danlu.train_config import Source
from danlu.types import Comparison, Conversation, Document


def talk(i: int, answer: str = "A") -> Conversation:
    return Conversation([u(f"question {i}"), a(answer)])


def test_heldout_is_stable_and_keeps_prompts_together() -> None:
    records = [talk(i % 1000, str(i)) for i in range(2000)]
    train, heldout = split_heldout(records, 0.1)
    assert len(train) + len(heldout) == 2000
    assert 60 <= len({prompt_text(record) for record in heldout}) <= 140
    assert {prompt_text(record) for record in train}.isdisjoint(map(prompt_text, heldout))
    assert split_heldout(records[:300], 0.1)[1] == [
        record for record in heldout if int(record.messages[1]["content"]) < 300
    ]
    pairs = [Comparison([u(f"question {i}")], [a("x")], [a("y")]) for i in range(1000)]
    assert {prompt_text(pair) for pair in split_heldout(pairs, 0.1)[1]} == set(map(prompt_text, heldout))


def test_heldout_has_something_on_both_sides_if_it_can() -> None:
    for start in range(0, 40, 2):
        two = [talk(start), talk(start + 1)]
        for fraction in (1e-9, 0.5, 1 - 1e-9):
            train, heldout = split_heldout(two, fraction)
            assert len(train) == len(heldout) == 1
    assert split_heldout([talk(1), talk(1, "B")], 0.9) == ([talk(1), talk(1, "B")], [])
    assert split_heldout([talk(1), talk(2)], 0) == ([talk(1), talk(2)], [])
    assert split_heldout([], 0.5) == ([], [])
    # Half a character cannot come from `read`, but from a model.
    assert split_heldout([talk(1, "A"), Conversation([u("\ud83d"), a("A")])], 0.5)[1]
    with pytest.raises(SettingsError):
        split_heldout([talk(1)], 1.0)
    documents = [Document(f"{i}" + "x" * 300 + tail) for i in range(50) for tail in "ab"]
    assert all(len(side) % 2 == 0 for side in split_heldout(documents, 0.3))
    assert split_heldout([talk(1), talk(2)], 0.5, key=lambda record: "same")[1] == []


def test_phases_share_no_prompt_and_are_independent_of_heldout() -> None:
    records = [talk(i) for i in range(2000)]
    phases = [in_phase(records, f"{name} of 2,4,4") for name in PHASES]
    assert [round(len(phase) / 200) for phase in phases] == [2, 4, 4]
    assert sorted(prompt_text(r) for phase in phases for r in phase) == sorted(map(prompt_text, records))
    # With one hash for both, all held-out prompts would lie in the first phase.
    for phase in phases:
        assert 0.05 < len(split_heldout(phase, 0.1)[1]) / len(phase) < 0.15
    assert in_phase(records, "") == records
    with pytest.raises(SettingsError):
        in_phase(records, "sft of 0,1,1")


@pytest.mark.parametrize("phase", ["sft", "2,4,4", "ppo of 2,4,4", "sft of 2,4", "sft of a,b,c"])
def test_a_phase_is_a_name_and_three_shares(phase: str) -> None:
    with pytest.raises(ValidationError, match="phase"):
        Source(path="x.jsonl", phase=phase)
