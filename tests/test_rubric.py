"""The rubric and the simulated annotator that judges by it."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.evals.rubric import is_correct, score
from danlu.exceptions import DataError, SettingsError
from danlu.synth.annotator import compare

OPENS: dict[str, Any] = {
    "answers": [["7:30", "half past seven"]],
    "forbidden": ["8:00", "17:30", "7:3"],
    "max_chars": 40,
}


@pytest.mark.parametrize(
    ("needle", "answer", "found"),
    [
        ("7:3", "It opens at 17:30.", False),
        ("7:30", "It opens at 17:30.", False),
        ("7", "It opens at 7:30.", False),
        ("30", "It opens at 7:30.", False),
        ("7:30", "It opens at 7:30.", True),
        ("7:30", "7:30开门。", True),
        ("7:30", "早上7：30开门。", True),
        ("12", "It is 120 metres.", False),
        ("12", "It is 312 metres.", False),
        ("12", "It is 12. Yes.", True),
        ("12", "共12米。", True),
        ("12", "在12，13号。", True),
        ("2月", "12月之后", False),
        ("1.5", "It is 11.5 or 1.55.", False),
        ("1", "It weighs 1,000 grams.", False),
        ("000", "It weighs 1,000 grams.", False),
        ("1", "Numbers 1, 2 and 3.", True),
        ("7", "It is -7 outside.", False),
        ("7", "So 9-7 is what?", True),
        ("4", "8 - 4 = 5.", True),
        ("Ada", "Adam owns it.", False),
        ("ada brook", "ADA  Brook's shop.", True),
        ("art", "The cart is here.", False),
        ("Ada", "老板是Ada吗？", True),
        ("白艾", "老板是白艾。", True),
        ("don't", "I don’t go.", True),
    ],
)
def test_a_value_matches_only_as_a_token_of_its_own(needle: str, answer: str, found: bool) -> None:
    assert is_correct(answer, {"answers": [[needle]]}) is found
    assert is_correct(answer, {"forbidden": [needle]}) is not found


@given(
    st.integers(0, 3000), st.integers(0, 3000), st.sampled_from(["It costs {} coins.", "要{}枚铜币。", "{}", "({})"])
)
def test_a_number_is_taken_for_no_other_number(stated: int, asked: int, sentence: str) -> None:
    reference = {"answers": [[str(asked)]], "forbidden": [] if stated == asked else [str(stated)]}
    assert is_correct(sentence.format(stated), reference) is (stated == asked)


@pytest.mark.parametrize(
    ("required", "forbidden", "answer", "right"),
    [
        ("三十", "三", "三十枚。", True),
        ("三", "三十", "三十枚。", False),
        ("三十", "三", "三十枚，不对，三枚。", False),
        ("Ada Brook", "Ada", "Ada Brook owns it.", True),
        ("Ada", "Ada Brook", "Ada Brook owns it.", False),
    ],
)
def test_the_longer_match_wins(required: str, forbidden: str, answer: str, right: bool) -> None:
    assert is_correct(answer, {"answers": [[required]], "forbidden": [forbidden]}) is right


def test_total_is_the_documented_weighted_sum() -> None:
    # right 1, not finished 0, polite 1, and 60 of 40 characters: 2 - 60/40 = 0.5, so 0.55 + 0 + 0.15 + 0.075.
    answer = "It opens at 7:30 ".ljust(59, "x") + "."
    result = score(answer, OPENS, finished=False)
    assert (result.right, result.complete, result.polite, result.brief) == (1.0, 0.0, 1.0, 0.5)
    assert result.total == pytest.approx(0.775)
    assert score("It opens at 7:30.", OPENS).total == 1.0


@pytest.mark.parametrize(
    ("answer", "right", "complete", "polite", "brief"),
    [
        ("Half past seven!", 1, 1, 1, 1),
        ("It opens at 8:00.", 0, 1, 1, 1),
        ("It opens at 7:30 or 8:00.", 0, 1, 1, 1),
        ("It opens early.", 0, 0, 1, 1),
        ("It opens at 7:30", 1, 0, 1, 1),
        ('He said "7:30."', 1, 1, 1, 1),
        ("It opens at 7:30. Go away.", 1, 1, 0, 1),
        ("走开。7:30。", 1, 1, 0, 1),
        ("7:30. Well. Yes. Well.", 1, 1, 1, 0),
        ("7:30开门。好的！好的。", 1, 1, 1, 0),
        ("I don't know, 7:30.", 0, 1, 1, 1),
        ("", 0, 0, 0, 0),
        (" \n", 0, 0, 0, 0),
    ],
)
def test_components(answer: str, right: float, complete: float, polite: float, brief: float) -> None:
    result = score(answer, OPENS)
    assert (result.right, result.complete, result.polite, result.brief) == (right, complete, polite, brief)


def test_right_counts_the_items_and_a_forbidden_value_undoes_them() -> None:
    reference = {"answers": [["7:30"], ["Ada Brook"]], "forbidden": ["8:00", "Ben Frost"]}
    assert score("It opens at 7:30.", reference).right == 0.5
    assert not is_correct("It opens at 7:30.", reference)
    assert is_correct("It opens at 7:30 and it belongs to Ada Brook.", reference)
    assert score("It opens at 7:30 and it belongs to Ben Frost.", reference).right == 0.0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Sorry, I don't know.", True),
        ("抱歉，我不知道。", True),
        ("I don't know, perhaps 8:00.", False),
        ("It opens at 9:00.", False),
    ],
)
def test_refusing_is_right_where_nothing_is_known(answer: str, right: bool) -> None:
    assert is_correct(answer, {"refuse": True, "forbidden": ["8:00"]}) is right


def test_brevity_is_gone_at_twice_the_limit_and_free_without_one() -> None:
    assert score("7:30 " + "x" * 75, {"max_chars": 40}).brief == 0.0
    assert score("7:30 " + "x" * 35, {"max_chars": 40}).brief == 1.0
    assert score("x" * 5000, {}).brief == 1.0


def test_a_reference_may_bring_its_own_rude_phrases() -> None:
    assert score("Meh, 7:30.", {"answers": [["7:30"]], "rude": ["meh"]}).polite == 0.0
    assert score("Meh, 7:30.", {"answers": [["7:30"]]}).polite == 1.0


@pytest.mark.parametrize(
    ("reference", "field"),
    [
        ({"answers": "7:30"}, "answers"),
        ({"answers": ["7:30"]}, "answers"),
        ({"answers": [[]]}, "answers"),
        ({"answers": [[7]]}, "answers"),
        ({"answers": [[" "]]}, "answers"),
        ({"forbidden": "8:00"}, "forbidden"),
        ({"forbidden": [None]}, "forbidden"),
        ({"answers": [["Ada"]], "forbidden": ["ADA"]}, "forbidden"),
        ({"refuse": "yes"}, "refuse"),
        ({"refuse": True, "answers": [["7:30"]]}, "answers"),
        ({"max_chars": 0}, "max_chars"),
        ({"max_chars": True}, "max_chars"),
        ({"max_chars": 2.5}, "max_chars"),
        ({"rude": [""]}, "rude"),
    ],
)
def test_a_bad_reference_is_named(reference: dict[str, Any], field: str) -> None:
    with pytest.raises(DataError) as caught:
        score("It opens at 7:30.", reference)
    assert caught.value.field == f"reference.{field}"


def test_a_reference_must_be_an_object() -> None:
    with pytest.raises(DataError, match="expected an object"):
        score("7:30.", [["7:30"]])  # type: ignore[arg-type]


def test_the_annotator_errs_at_its_rate_whichever_side_the_better_answer_is_on() -> None:
    rng = Random(5)
    good, bad = "It opens at 7:30.", "It opens at 8:00."
    left = [compare(OPENS, good, bad, True, True, rng) for _ in range(3000)]
    right = [compare(OPENS, bad, good, True, True, rng) for _ in range(3000)]
    # The standard error of a share of 0.1 over 3000 draws is 0.0055.
    assert left.count("b") / 3000 == pytest.approx(0.1, abs=0.02)
    assert right.count("a") / 3000 == pytest.approx(0.1, abs=0.02)
    assert None not in left + right


def test_the_annotator_sees_ties_and_unfinished_answers() -> None:
    good = "It opens at 7:30."
    assert compare(OPENS, good, "7:30.", True, True, Random(1)) is None
    assert compare(OPENS, good, good, False, True, Random(1), error_rate=0.0) == "b"
    assert compare(OPENS, good, good, True, False, Random(1), error_rate=1.0) == "b"
    with pytest.raises(SettingsError):
        compare(OPENS, good, good, True, True, Random(1), error_rate=1.5)
