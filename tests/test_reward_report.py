"""What held-out answers say of a reward model: each number worked by hand, or against a slow count of all pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny as small
from hypothesis import given
from hypothesis import strategies as st

from danlu.trainers.reward_report import Judged, auc, metrics_of, pairs_of, repeats_of, report_of
from danlu.training.interval import wilson
from danlu.types import Comparison, Ranking, Unpaired

LN3 = math.log(3)


def judged(
    scores: list[float],
    targets: list[float],
    items: list[int] | None = None,
    *,
    lengths: list[int] | None = None,
    sources: list[str] | None = None,
    **rest: Any,
) -> Judged:
    """Pairs if nothing else is said: answers 0 and 1 belong to record 0, and so on."""
    places = items if items is not None else [i // 2 for i in range(len(scores))]
    return Judged(
        np.array(scores, dtype=np.float64),
        np.array(targets, dtype=np.float64),
        np.array(places),
        np.array(lengths if lengths is not None else [4] * len(scores)),
        sources if sources is not None else ["a"] * (max(places) + 1),
        **rest,
    )


def pairs(*gaps: float, **rest: Any) -> Judged:
    """Pairs of which the first answer is the better one."""
    return judged([s for g in gaps for s in (g, 0.0)], [2.0, 1.0] * len(gaps), **rest)


# -- metrics --------------------------------------------------------------------------------------------------------------


def test_metrics_of_pairs_by_hand() -> None:
    # gaps ln 3, 0, -ln 3, ln 3: right 1, 1/2, 0, 1; loss (ln 4/3 + ln 2 + ln 4 + ln 4/3) / 4; margin ln 3 / 4
    found = metrics_of(pairs(LN3, 0, -LN3, LN3), "pairwise")
    low, high = wilson(0.625, 4)
    assert found == {
        "eval_loss": pytest.approx((2 * math.log(4 / 3) + math.log(2) + math.log(4)) / 4),
        "eval_accuracy": 0.625,
        "eval_accuracy_low": pytest.approx(low),
        "eval_accuracy_high": pytest.approx(high),
        "eval_margin": pytest.approx(LN3 / 4),
        "eval_length_correlation": 0.0,
    }


def test_a_ranking_counts_once() -> None:
    # Record 0: three answers, ranks 3 2 1, scores 2 1 3: pairs (2, 1) right, (2, 3) and (1, 3) wrong: 1/3.
    # Record 1: one pair, right. (1/3 + 1) / 2, on two trials.
    found = metrics_of(judged([2, 1, 3, 1, 0], [3, 2, 1, 2, 1], [0, 0, 0, 1, 1]), "kwise")
    assert found["eval_accuracy"] == pytest.approx(2 / 3)
    assert found["eval_accuracy_low"] == pytest.approx(wilson(2 / 3, 2)[0])


@given(st.lists(st.integers(2, 5), min_size=1, max_size=30))
def test_all_right_is_exactly_one(sizes: list[int]) -> None:
    """Thirds and tenths of a prompt add up to whole ones: a share above 1 would lie outside of its interval."""
    ranks = [float(-n) for size in sizes for n in range(size)]
    items = [i for i, size in enumerate(sizes) for _ in range(size)]
    found = metrics_of(judged(ranks, ranks, items), "kwise")
    assert found["eval_accuracy"] == 1.0 <= found["eval_accuracy_high"] < 1 + 1e-9


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-3, 3), st.integers(0, 2)), min_size=2, max_size=12),
)
def test_pairs_are_those_of_a_loop(answers: list[tuple[int, float, int]]) -> None:
    """Every pair of one prompt with different targets, its prompt's pairs weighing 1 together."""
    found = pairs_of(judged([s for _, s, _ in answers], [float(y) for _, _, y in answers], [i for i, _, _ in answers]))
    expected = [(i, s - other) for i, s, y in answers for j, other, z in answers if i == j and y > z]
    if not expected:
        assert len(found.gap_P) <= len(answers) // 2
        return
    assert sorted(zip(found.item_P.tolist(), found.gap_P.tolist(), strict=True)) == sorted(expected)
    for item in {i for i, _ in expected}:
        assert float(found.weight_P[found.item_P == item].sum()) == pytest.approx(1.0)


def test_answers_of_different_prompts_are_compared_where_no_prompt_has_two() -> None:
    """Scores and targets repeat every three prompts, as in a file that was written so; pairs are found all the same."""
    powers = [2.0**n for n in range(30)]
    found = pairs_of(judged(powers, [float(n % 3) for n in range(30)], list(range(30))))
    assert 5 <= len(found.gap_P) <= 15 and found.weight_P.tolist() == [1.0] * len(found.gap_P)
    # A difference of two powers of two tells which two: each answer is in one pair, its target the higher one first.
    named = [n for gap in found.gap_P.tolist() for n in _powers_of(gap)]
    assert len(set(named)) == len(named)
    assert all(a % 3 > b % 3 for a, b in zip(named[::2], named[1::2], strict=True))
    assert found.item_P.tolist() == named[::2]


def _powers_of(gap: float) -> tuple[int, int]:
    """a and b of 2^a - 2^b."""
    for a in range(30):
        for b in range(30):
            if 2.0**a - 2.0**b == gap and a != b:
                return a, b
    raise AssertionError(gap)


def test_metrics_of_scores_by_hand() -> None:
    # errors 0, 0, 1, -1 around targets 0 1 2 3 (variance 1.25): MSE 0.5, R^2 = 1 - 0.5 / 1.25 = 0.6
    found = metrics_of(judged([0, 1, 3, 2], [0, 1, 2, 3]), "pointwise")
    assert (found["eval_loss"], found["eval_r2"]) == (0.5, pytest.approx(0.6))
    # Ranks 1 2 4 3 against 1 2 3 4: 1 - 6 (1 + 1) / (4 * 15) = 0.8
    assert found["eval_spearman"] == pytest.approx(0.8)
    assert found["eval_accuracy"] == 0.5  # of the pairs (0, 1) and (2, 3) the first is right


def test_scores_that_are_all_equal_leave_nothing_to_correlate() -> None:
    found = metrics_of(judged([0.5, 1, 3, 2], [1, 1, 1, 1]), "pointwise")
    assert "eval_r2" not in found and "eval_spearman" not in found and "eval_accuracy" not in found
    assert found["eval_loss"] == pytest.approx((0.25 + 0 + 4 + 1) / 4)


def test_metrics_of_labels_by_hand() -> None:
    # liked at ln 3 and -ln 3, others at -ln 3 and 0: right 1, 0, 1, 1/2. Weights 2 for liked, 1 for others.
    found = metrics_of(judged([LN3, -LN3, -LN3, 0], [1, 1, 0, 0], [0, 1, 2, 3], weights=(1.0, 2.0)), "unpaired")
    loss = (2 * math.log(4 / 3) + 2 * math.log(4) + math.log(4 / 3) + math.log(2)) / 4
    assert found["eval_loss"] == pytest.approx(loss) and found["eval_accuracy"] == 0.625
    # Liked against others: ln 3 beats both; -ln 3 ties with one and loses to the other: (1 + 1 + 1/2 + 0) / 4
    assert found["eval_auc"] == pytest.approx(0.625)
    assert found["eval_margin"] == pytest.approx(LN3 / 2)


def test_one_label_has_no_auc() -> None:
    found = metrics_of(judged([1.0, 2.0], [1, 1], [0, 1]), "unpaired")
    assert "eval_auc" not in found and found["eval_accuracy"] == 1.0


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=14).filter(
        lambda answers: len({liked for _, liked in answers}) == 2
    )
)
def test_auc_is_the_share_of_pairs(answers: list[tuple[int, bool]]) -> None:
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0 for a, liked in answers if liked for b, other in answers if not other
    ]
    area, low, high = auc(np.array([float(s) for s, _ in answers]), np.array([liked for _, liked in answers]))
    assert area == pytest.approx(sum(wins) / len(wins))
    assert 0 <= low <= area + 1e-12 and area - 1e-12 <= high <= 1


def test_the_interval_of_an_auc_by_hand() -> None:
    # 0.75 of two and two: Q1 = 0.6, Q2 = 1.125 / 1.75 = 9/14;
    # (0.1875 + (0.6 - 0.5625) + (9/14 - 0.5625)) / 4, times 1.96 below the area
    area, low, high = auc(np.array([1.0, 3.0, 2.0, 0.0]), np.array([True, True, False, False]))
    variance = (0.1875 + 0.0375 + 9 / 14 - 0.5625) / 4
    assert (area, high) == (0.75, 1.0) and low == pytest.approx(0.75 - 1.96 * math.sqrt(variance))


# -- the report -----------------------------------------------------------------------------------------------------------


def test_accuracy_by_source_and_by_length() -> None:
    # chosen 20 against 10 tokens: longer; 10 against 20: shorter; 19 against 20: within 10%; 18 against 20 as well
    found = report_of(
        pairs(1, -1, 1, 1, lengths=[20, 10, 10, 20, 19, 20, 18, 20], sources=["wiki", "wiki", "", "wiki"]),
        "pairwise",
        None,
    )
    assert [(r["source"], r["share"], r["count"]) for r in found["by_source"]] == [
        ("wiki", pytest.approx(2 / 3), 3),
        ("", 1.0, 1),
    ]
    assert [(r["chosen"], r["share"], r["count"]) for r in found["by_length"]] == [
        ("longer", 1.0, 1),
        ("shorter", 0.0, 1),
        ("within 10%", 1.0, 2),
    ]
    assert found["accuracy"]["share"] == found["metrics"]["eval_accuracy"] == 0.75
    assert found["heldout"] == {"records": 4, "pairs": 4}


def test_calibration_of_pairs_by_hand() -> None:
    # sigmoid(ln 3) = 0.75 of four pairs, three of them right: all as sure as they should be. And one tie: 0.5, half right.
    found = report_of(pairs(LN3, LN3, LN3, -LN3, 0), "pairwise", None)
    assert [(r["from"], r["count"], r["predicted"], r["found"]) for r in found["calibration"]] == [
        (0.5, 1, 0.5, 0.5),
        (0.75, 4, pytest.approx(0.75), 0.75),
    ]
    assert found["calibration_error"] == pytest.approx(0.0, abs=1e-12)


def test_calibration_error_by_hand() -> None:
    # Three pairs at 0.75, all right: off by 0.25. One at sigmoid(ln 9) = 0.9, wrong: off by 0.9. (3 * 0.25 + 0.9) / 4
    found = report_of(pairs(LN3, LN3, LN3, -2 * LN3), "pairwise", None)
    assert found["calibration_error"] == pytest.approx((0.75 + 0.9) / 4)


def test_calibration_of_labels_by_hand() -> None:
    # Two answers at sigmoid(ln 3) = 0.75, one liked, the labels weighing 3 and 1: liked 3 / 4 of the weight.
    found = report_of(judged([LN3, LN3], [1, 0], [0, 1], weights=(1.0, 3.0)), "unpaired", None)
    (row,) = found["calibration"]
    assert (row["from"], row["count"]) == (pytest.approx(0.7), 2)
    assert (row["predicted"], row["found"]) == (pytest.approx(0.75), 0.75)
    assert found["heldout"] == {"records": 2, "answers": 2} and found["by_length"] == []


def test_calibration_of_scores_is_in_their_unit() -> None:
    # Predictions 0 and 10 in the outermost of ten bins; what was given to them 1 and 3 (mean 2), and 7.
    found = report_of(judged([0, 0, 10], [1, 3, 7], [0, 0, 1]), "pointwise", None)
    assert [(r["predicted"], r["found"], r["count"]) for r in found["calibration"]] == [(0.0, 2.0, 2), (10.0, 7.0, 1)]
    assert found["calibration_error"] == pytest.approx((2 * 2 + 3) / 3)


def test_margins_left_of_zero_are_the_wrong_ones() -> None:
    found = report_of(pairs(2, 1.5, -1, -0.1), "pairwise", None)["margins"]
    assert len(found) == 20 and (found[0]["from"], found[-1]["to"]) == (-2.0, 2.0)
    assert sum(r["count"] for r in found if r["to"] <= 0) == 2 and sum(r["count"] for r in found) == 4


@given(st.lists(st.floats(-6, 6, allow_subnormal=False), min_size=1, max_size=20))
def test_nothing_is_lost_in_bins(gaps: list[float]) -> None:
    found = report_of(pairs(*gaps), "pairwise", None)
    assert sum(r["count"] for r in found["calibration"]) == len(gaps)
    assert sum(r["count"] for r in found["margins"]) in (len(gaps), 0)
    assert 0 <= found["calibration_error"] <= 1


def test_a_model_that_says_nothing_has_a_report_too() -> None:
    found = report_of(judged([1, 1], [3, 3], [0, 1]), "pointwise", None)
    assert found["accuracy"] is None and found["by_source"] == found["margins"] == []


# -- the same thing judged more than once -----------------------------------------------------------------------------------


def said(text: str) -> Any:
    return small.assistant(text)


def asked(text: str) -> Any:
    return small.user(text)


def test_agreement_of_comparisons_by_hand() -> None:
    # Question 1: a over b twice, b over a once: of three pairs of labels one agrees. Question 2: twice the same: one of one.
    records = [
        Comparison(asked("1"), said("a"), said("b")),
        Comparison(asked("1"), said("b"), said("a")),
        Comparison(asked("1"), said("a"), said("b")),
        Comparison(asked("2"), said("a"), said("b")),
        Comparison(asked("2"), said("a"), said("b")),
        Comparison(asked("3"), said("a"), said("b")),
        Comparison(asked("3"), said("a"), said("c")),
    ]
    # 1/2 of four pairs of labels agree: they know nothing, and nobody can do better than a coin.
    assert repeats_of(records, "pairwise") == {"repeated": 2, "labels": 5, "agreement": 0.5, "ceiling": 0.5}
    assert repeats_of(records[5:], "pairwise") is None


def test_the_ceiling_is_that_of_labels_that_err_alike() -> None:
    # Every label right with 0.9: two agree with 0.81 + 0.01 = 0.82, and (1 + sqrt(0.64)) / 2 = 0.9.
    records = [Comparison(asked(str(n)), said("a"), said("b")) for n in range(50) for _ in range(2)]
    for n in range(9):
        records[2 * n] = Comparison(asked(str(n)), said("b"), said("a"))
    found = repeats_of(records, "pairwise")
    assert found is not None and found["agreement"] == 0.82 and found["ceiling"] == pytest.approx(0.9)


def test_agreement_of_rankings() -> None:
    # (a, b) and (a, c) are judged twice and agree, (b, c) disagree; c and d once. Ties are no label.
    records = [
        Ranking(asked("1"), [said("a"), said("b"), said("c")], [3.0, 2.0, 1.0]),
        Ranking(asked("1"), [said("c"), said("a"), said("b")], [2.0, 5.0, 1.0]),
        Ranking(asked("1"), [said("a"), said("c")], [2.0, 2.0]),
    ]
    found = repeats_of(records, "kwise")
    assert found is not None and (found["repeated"], found["labels"]) == (3, 6)
    assert found["agreement"] == pytest.approx(2 / 3)


def test_agreement_of_labels_and_difference_of_scores() -> None:
    labels = [Unpaired(asked("1"), said("a"), liked) for liked in (True, True, False)]
    found = repeats_of([*labels, Unpaired(asked("1"), said("b"), True)], "unpaired")
    assert found is not None and (found["repeated"], found["agreement"]) == (1, pytest.approx(1 / 3))
    scores = [Ranking(asked("1"), [said("a")], [s]) for s in (1.0, 4.0)]
    assert repeats_of(scores, "pointwise") == {"repeated": 1, "labels": 2, "difference": 3.0}
