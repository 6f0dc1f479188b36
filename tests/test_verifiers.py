"""Verifiers: which answers are right, by hand and by generated numbers."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.rewards.protocol import Episode, Score
from danlu.rewards.verifiers import Verifier, exact, number, number_in


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("She sold 48/2 = 24 clips, so 48 + 24 = 72 in all.", "72"),
        ("#### 72", "72"),
        ("72 is it, since 8 * 9 = 72 and not 71.\n#### 72\nThat took 3 steps.", "72"),
        ("first #### 1, then #### 2", "2"),
        ("It costs $1,234.50.", "1234.50"),
        ("-5", "-5"),
        ("5-3", "3"),
        ("10 - -4", "-4"),
        ("−7 degrees", "-7"),
        ("$-3", "-3"),
        ("-$3", "-3"),
        (".5", ".5"),
        ("a share of 25%", "25"),
        ("12,34", "34"),  # no thousands
        ("１２", "12"),
        ("#### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_ends_up_with(text: str, found: str | None) -> None:
    assert number_in(text) == (Decimal(found) if found is not None else None)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("so 72", {"answer": "72"}, True),
        ("so 72.0", {"answer": "72"}, True),
        ("so 1,000 in all.", {"answer": 1000}, True),
        ("so 72, or 73", {"answer": "72"}, False),
        ("seventy-two", {"answer": "72"}, False),
        ("half past 7", {"answers": [["7", "7:30"], ["x"]]}, True),
        ("nothing", {"answer": "nothing"}, False),
    ],
)
def test_number(answer: str, reference: dict[str, Any], right: bool) -> None:
    assert number(answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (" The  cat\n", {"answer": "The cat"}, True),
        ("the cat", {"answer": "The cat"}, False),
        ("Ｂ", {"answer": "B"}, True),
        ("二", {"answers": [["2", "二"]]}, True),
        ("2 or 3", {"answers": [["2"], ["3"]]}, False),
    ],
)
def test_exact(answer: str, reference: dict[str, Any], right: bool) -> None:
    assert exact(answer, reference) is right


@given(st.integers(-(10**9), 10**9), st.integers(0, 99))
def test_every_way_of_writing_a_number_is_the_number(whole: int, cents: int) -> None:
    value = f"{whole}.{cents:02d}"
    for written in (
        value,
        f"{whole:,}.{cents:02d}",
        f"x = {value}",
        f"3 and 4 make {value}.",
        f"#### {value}\nin 2 steps",
    ):
        assert number_in(written) == Decimal(value)


def episode(response: str, **reference: Any) -> Episode:
    return Episode((1,), (2,), True, (), response, reference)


def test_each_reference_says_how_it_is_verified() -> None:
    asked = [
        episode("so 72", verifier="number", answer="72"),
        episode("72", verifier="exact", answer="72."),
        episode("anything"),
        episode("anything", answers=[["anything"]]),  # a rubric's reference names no verifier
        episode("x", verifier="tests", tests=["assert True"]),
    ]
    found = Verifier().score(asked)
    assert [s.value for s in found] == [1.0, 0.0, 0.0, 0.0, None]
    assert found[-1].error == "there is no verifier 'tests'"


def test_one_verifier_for_all() -> None:
    asked = [episode("anything", answers=[["anything"]]), episode("B", verifier="choice", answer="B"), episode("x")]
    assert [s.value for s in Verifier("exact").score(asked)] == [1.0, 1.0, 0.0]


def test_cancelled() -> None:
    assert Verifier().score([episode("x")], cancelled=lambda: True) == [Score(None, "cancelled")]
