"""Every health rule on a series that deserves it and on one that does not; curves and signs of text worked by hand."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest
from fake_run import curves
from hypothesis import given
from hypothesis import strategies as st

from danlu.training.curves import near, noise, points, trend, values
from danlu.training.rules import HACK_FALL, READ, RULES, examine
from danlu.training.text_signs import text_signs

Row = dict[str, Any]
Curve = Callable[[float], float]


def rows(count: int = 60, every: int = 5, **curve: Curve) -> list[Row]:
    """A row for each of `count` iterations; a curve is a function of the share of training done. `eval_...` come every 5."""
    found: list[Row] = [{"step": 0, **{k: f(0) for k, f in curve.items() if k.startswith("eval_")}}]
    for step in range(1, count + 1):
        row: Row = {"step": step}
        row |= {k: f(step / count) for k, f in curve.items() if not k.startswith("eval_") or step % every == 0}
        found.append(row)
    return found


def codes(logged: Sequence[Mapping[str, Any]]) -> set[str]:
    return {f.code for f in examine(logged, RULES)}


def line(start: float, end: float) -> Curve:
    return lambda t: start + (end - start) * t


def fall(start: float, end: float, speed: float = 8.0) -> Curve:
    return lambda t: end + (start - end) * math.exp(-speed * t)


def flat(value: float) -> Curve:
    return lambda t: value


def noisy(curve: Curve, deviation: float, seed: int = 0) -> Curve:
    draw = random.Random(seed)
    return lambda t: curve(t) + draw.gauss(0, deviation)


def hump(t: float) -> float:
    """Gold as Gao et al. draw it over the way that the policy has gone: up, then down (peak 1 at the middle)."""
    return 4 * t * (1 - t)


FIRES: list[tuple[str, list[Row]]] = [
    ("P-KL-HIGH", rows(kl=noisy(lambda t: 30 * t * t, 0.3))),
    ("P-KL-HIGH", rows(kl=noisy(line(0, 20), 0.3))),
    ("P-KL-NEGATIVE", rows(kl=noisy(flat(-0.5), 0.2))),
    ("P-TIMID", rows(kl=noisy(flat(0.005), 0.02), score=noisy(flat(0.3), 0.05))),
    ("P-LEN-GROWTH", rows(length=line(20, 60))),
    ("P-LEN-COLLAPSE", rows(length=line(20, 3))),
    ("P-STOP-LOST", rows(stop_rate=line(0.98, 0.7))),
    ("P-ENTROPY-LOST", rows(entropy=fall(1.2, 0.02, 10))),
    ("P-REPEATS", rows(repetition=line(0.02, 0.5))),
    ("P-REPEATS", rows(distinct_2=fall(0.8, 0.1))),  # each answer is fine, but all are the same
    ("P-EMPTY", rows(empty_rate=line(0, 0.3))),
    ("P-REWARD-HACK", rows(eval_gold=noisy(hump, 0.01), eval_score=line(0, 2), score=line(0, 2))),
    ("P-REWARD-HACK", rows(eval_score=noisy(hump, 0.01), score=noisy(line(0, 2), 0.1))),  # without gold
    ("P-CRITIC-BLIND", rows(explained_variance=noisy(flat(-0.2), 0.1))),
    ("P-RATIO", rows(3, ratio_error_first=flat(0.01))),
    ("P-RATIO", rows(ratio_max=flat(40))),
    ("P-ENGINE-GAP", rows(8, engine_gap=lambda t: 1e-6 if t < 0.2 else 0.03)),
    # One update behind in bf16, as it was measured: far below the bound of 0.1.
    ("P-ENGINE-GAP", rows(4, engine_gap=lambda t: 3.2e-3 if t < 0.3 else 1.6e-2)),
    ("P-ENGINE-GAP", rows(8, engine_gap=flat(0.01), engine_gap_max=flat(0.7))),
    ("P-ENGINE-GAP", rows(8, engine_gap=flat(1e-4), engine_gap_high=flat(1.0))),
    ("P-CLIP-HIGH", rows(clip_fraction=noisy(flat(0.45), 0.05))),
    ("P-SCORE-FALLS", rows(score=noisy(line(0.3, -1), 0.1))),
    ("P-SCORE-FALLS", rows(30, score=noisy(lambda t: 0.5 - 1.5 * max(0, t - 0.5), 0.05))),
    ("P-EQUAL-GROUPS", rows(equal_groups=line(0.2, 0.9))),
    ("P-GRAD", rows(grad_norm=line(0.1, 8))),
    ("P-GRAD", rows(6, grad_norm=flat(0))),
    ("P-GRAD", rows(critic_grad_norm=line(0.2, 20))),
    ("P-PTX-SHARE", rows(ptx_share=flat(0.97))),
    ("P-PTX-SHARE", rows(ptx_share=flat(0.001))),
]

SILENT: list[tuple[str, list[Row]]] = [
    ("P-KL-HIGH", rows(kl=noisy(fall(0, 14, 5), 0.2))),  # it levels out
    ("P-KL-HIGH", rows(kl=line(0, 6))),
    ("P-KL-HIGH", rows(kl=line(9, 12))),  # a resting place that drifts
    ("P-KL-NEGATIVE", rows(kl=noisy(flat(0.02), 0.3))),  # k1 is below 0 in many an iteration
    ("P-KL-NEGATIVE", rows(9, kl=flat(-1))),
    ("P-TIMID", rows(kl=line(0, 3), score=flat(0.3))),
    ("P-TIMID", rows(kl=flat(0.01), score=line(0, 1))),
    ("P-TIMID", rows(15, kl=flat(0.01), score=flat(0.3))),  # too early to say
    ("P-LEN-GROWTH", rows(length=line(20, 30))),
    ("P-LEN-GROWTH", rows(length=line(1, 3))),  # thrice, but two tokens
    ("P-LEN-COLLAPSE", rows(length=line(20, 14))),
    ("P-STOP-LOST", rows(stop_rate=noisy(flat(0.97), 0.02))),
    ("P-ENTROPY-LOST", rows(entropy=line(1.2, 0.6))),
    ("P-REPEATS", rows(repetition=flat(0.3), distinct_2=line(0.8, 0.5))),  # it repeated itself before
    ("P-EMPTY", rows(empty_rate=flat(0.02))),
    ("P-REWARD-HACK", rows(eval_gold=noisy(fall(0, 1), 0.02), eval_score=line(0, 2))),
    # gold and reward fall together: that is no hack, it is P-SCORE-FALLS or worse
    ("P-REWARD-HACK", rows(eval_gold=line(1, 0), eval_score=line(2, 0), score=line(2, 0))),
    ("P-CRITIC-BLIND", rows(explained_variance=fall(-1, 0.6, 12))),
    ("P-RATIO", rows(ratio_error_first=flat(1e-6), ratio_max=lambda t: 30 if t == 0.5 else 1.5)),
    ("P-ENGINE-GAP", rows(engine_gap=noisy(flat(2e-6), 1e-7), engine_gap_max=flat(4e-5))),
    # bfloat16 as it was measured: the greatest of thousands of tokens is beyond 0.1 again and again.
    ("P-ENGINE-GAP", rows(engine_gap=noisy(flat(3e-3), 2e-4), engine_gap_max=noisy(flat(0.09), 0.02))),
    ("P-ENGINE-GAP", rows(8, engine_gap=flat(0.1), engine_gap_high=lambda t: float(t < 0.1))),  # once
    ("P-CLIP-HIGH", rows(clip_fraction=line(0.05, 0.2))),
    ("P-SCORE-FALLS", rows(score=noisy(line(0, 1), 0.2))),
    ("P-SCORE-FALLS", rows(score=noisy(flat(0.5), 0.3))),
    ("P-EQUAL-GROUPS", rows(equal_groups=line(0.9, 0.2))),
    ("P-GRAD", rows(grad_norm=line(0.02, 0.7), critic_grad_norm=fall(9, 1))),
    ("P-PTX-SHARE", rows(ptx_share=flat(0.3))),
]


@pytest.mark.parametrize(("code", "logged"), FIRES)
def test_fires(code: str, logged: list[Row]) -> None:
    assert code in codes(logged)


@pytest.mark.parametrize(("code", "logged"), SILENT)
def test_does_not_fire(code: str, logged: list[Row]) -> None:
    assert code not in codes(logged)


def test_every_rule_is_tried_both_ways() -> None:
    assert {c for c, _ in FIRES} == {c for c, _ in SILENT} == set(RULES)


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_stage_is_never_found_fault_with(seed: int) -> None:
    """Not at its end, and not at any iteration before."""
    draw = random.Random(seed)
    logged = [
        {k: v if k == "step" or k.startswith("eval_") else v * (1 + draw.gauss(0, 0.03)) for k, v in row.items()}
        for row in curves("ppo")
    ]
    for end in range(len(logged) + 1):
        assert codes(logged[:end]) == set(), end


@pytest.mark.parametrize(
    "logged", [[], [{"step": 1, "kl": 0.0, "score": 1.0}], [{"step": 1, "kl": math.nan, "score": math.inf}, {"x": 1}]]
)
def test_too_little_says_nothing(logged: list[Row]) -> None:
    assert examine(logged, RULES) == []


class Asked(dict[str, Any]):
    """A row that notes what is read of it."""

    seen: ClassVar[Counter[str]] = Counter()

    def get(self, key: str, default: Any = None) -> Any:
        self.seen[key] += 1
        return super().get(key, default)


def test_rules_read_nothing_that_is_not_kept_for_them() -> None:
    for _, logged in FIRES:
        examine([Asked(row) for row in logged], RULES)
    assert {*Asked.seen} - {"step"} == set(READ)


def test_a_finding_says_what_was_seen_and_what_to_change() -> None:
    (found,) = examine(rows(kl=line(0, 20)), ["P-KL-HIGH"])
    # The last five of 60 are those around step 58: 20 * 58/60. Half-way those around 29: 20 * 29/60.
    assert found.seen == "the policy is 19.3 nats per answer from the reference, after 9.7 half-way, and goes on"
    assert (found.code, found.severity, found.step) == ("P-KL-HIGH", "error", 60) and "kl_coef" in found.change


def test_only_the_rules_asked_for() -> None:
    assert examine(rows(kl=line(0, 20)), ["P-TIMID"]) == []


# -- the proxy goes up and gold goes down ---------------------------------------------------------------------------------


def gao(count: int, deviation: float, seed: int) -> Iterator[tuple[float, float]]:
    """(gold without noise, gold as measured) at each evaluation; d (a - b d) over the way d (Gao et al. 2022, eq. 1), peak 1."""
    draw = random.Random(seed)
    for i in range(count):
        gold = hump(0.8 * i / (count - 1))
        yield gold, gold + draw.gauss(0, deviation)


@pytest.mark.parametrize("deviation", [0.0, 0.005, 0.01])
@pytest.mark.parametrize("seed", range(10))
def test_it_is_seen_before_a_tenth_of_the_peak_is_lost(deviation: float, seed: int) -> None:
    logged: list[Row] = []
    peak = 0.0
    for i, (true, seen) in enumerate(gao(40, deviation, seed)):
        logged.append({"step": 10 * i, "eval_gold": seen, "eval_score": 0.2 * i, "score": 0.2 * i})
        if "P-REWARD-HACK" in codes(logged):
            assert peak > 0.95 and true > 0.9 * peak, (peak, true)
            return
        peak = max(peak, true)
    raise AssertionError("it was not seen at all")


@pytest.mark.parametrize("deviation", [0.01, 0.05])
def test_a_plateau_is_not_taken_for_a_fall(deviation: float) -> None:
    """Of 200 runs of 20 evaluations that level out, few are stopped, though the rule is asked at each evaluation."""
    alarms = 0
    for seed in range(200):
        draw = random.Random(seed)
        logged = [
            {"step": 10 * i, "eval_gold": 1 - math.exp(-i / 3) + draw.gauss(0, deviation), "eval_score": 0.1 * i}
            for i in range(20)
        ]
        alarms += any("P-REWARD-HACK" in codes(logged[:end]) for end in range(4, 21))
    assert alarms <= 10, alarms


@given(st.integers(4, 30), st.floats(0.1, 100), st.floats(-50, 50))
def test_units_of_gold_do_not_matter(count: int, unit: float, zero: float) -> None:
    """Gold times a unit; and a shift changes the verdict only through the size of the peak."""
    logged = [{"step": i, "eval_gold": hump(i / 40 + 0.3), "eval_score": float(i)} for i in range(count)]
    scaled = [{**row, "eval_gold": unit * float(row["eval_gold"])} for row in logged]
    assert codes(scaled) == codes(logged)
    rising = [{**row, "eval_gold": zero + unit * float(row["step"])} for row in logged]
    assert "P-REWARD-HACK" not in codes(rising)


def test_how_far_it_has_to_fall() -> None:
    """On a line without noise only the size of the fall decides: 3% of the peak over the last four evaluations.

    A line through five of them, of which the first two are level, falls by 3.2/3 as much, and no longer one by more.
    """
    for share, fires in ((HACK_FALL * 1.01, True), (HACK_FALL * 0.99 * 3 / 3.2, False)):
        gold = [0.0, 5.0, 10.0, 10.0, 10.0, *(10 - 10 * share * i / 3 for i in (1, 2, 3))]
        logged = [{"step": i, "eval_gold": g, "eval_score": i} for i, g in enumerate(gold)]
        found = [f.code for f in examine(logged, ["P-REWARD-HACK"])]
        assert bool(found) == fires, share


# -- curves by hand -----------------------------------------------------------------------------------------------------


def test_points_leave_out_what_is_no_number() -> None:
    logged = [{"step": 1, "a": 2.0}, {"step": 2, "a": math.nan}, {"a": 3.0}, {"step": 3, "b": 1}, {"step": 4, "a": 5}]
    assert points(logged, "a") == [(1.0, 2.0), (4.0, 5.0)] and values(logged, "a") == [2.0, 5.0]


def test_noise_by_hand() -> None:
    # Second differences of 0 1 0 1 0: 0 - 2 + 0 = -2, 2, -2; their median size 2, times 1.4826 over the root of 6.
    assert noise([0, 1, 0, 1, 0]) == pytest.approx(1.4826 * 2 / math.sqrt(6))
    assert noise([1.0, 3.0, 5.0, 7.0]) == 0.0  # a line


def test_noise_is_that_of_the_scatter_around_any_line() -> None:
    draw = random.Random(0)
    found = noise([0.3 * i + draw.gauss(0, 2.0) for i in range(4000)])
    assert found == pytest.approx(2.0, rel=0.05)


def test_trend_by_hand() -> None:
    # Steps -1 0 1 around 10, values 0 1 5: slope (0 * -1 + 5 * 1) / 2 = 2.5, so it rises by 5 over two steps.
    # Its error: scatter 0.5 / sqrt(2) a step, twice.
    rise, errors = trend([(9, 0), (10, 1), (11, 5)], 0.5)
    assert rise == pytest.approx(5.0) and errors == pytest.approx(5.0 / (2 * 0.5 / math.sqrt(2)))
    assert trend([(0, 1), (1, 1)], 0.0) == (0.0, 0.0) and trend([(0, 1), (1, 0)], 0.0) == (-1.0, -math.inf)


def test_near_by_hand() -> None:
    assert near([(0, 1), (10, 2), (20, 6)], 12, 2) == 4.0  # 10 and 20


# -- signs of text --------------------------------------------------------------------------------------------------------

STOP = 1


def test_text_signs_by_hand() -> None:
    # 5 6 5 6 5: 3-grams 565 656 565, so one of three repeats. 7 8: none. The third has no text.
    # Tokens without stops: 5 6 5 6 5 7 8, 4 different of 7. 2-grams: 56 65 56 65 78, 3 different of 5.
    found = text_signs([[5, 6, 5, 6, 5, STOP], [7, 8, STOP], [STOP]], {STOP})
    assert found == pytest.approx({"repetition": 1 / 9, "distinct_1": 4 / 7, "distinct_2": 3 / 5, "empty_rate": 1 / 3})


def test_an_answer_cut_off_keeps_its_last_token() -> None:
    assert text_signs([[5, 5]], {STOP}) == {
        "repetition": 0.0,
        "distinct_1": 0.5,
        "distinct_2": 1.0,
        "empty_rate": 0.0,
    }


@given(st.lists(st.lists(st.integers(2, 6), max_size=12), min_size=1, max_size=6), st.randoms())
def test_text_signs_against_a_slow_count(answers: list[list[int]], draw: random.Random) -> None:
    stopped = [[*a, STOP] if draw.random() < 0.5 else a for a in answers]
    found = text_signs(stopped, {STOP})
    assert all(0 <= v <= 1 for v in found.values())
    repeated = []
    for a in answers:
        again = [any(a[i : i + 3] == a[j : j + 3] for j in range(i)) for i in range(len(a) - 2)]
        repeated.append(sum(again) / len(again) if again else 0.0)
    assert found["repetition"] == pytest.approx(sum(repeated) / len(repeated))
    pairs = [(a[i], a[i + 1]) for a in answers for i in range(len(a) - 1)]
    firsts = [p for i, p in enumerate(pairs) if p not in pairs[:i]]
    assert found["distinct_2"] == pytest.approx(len(firsts) / len(pairs) if pairs else 1.0)
    assert found["empty_rate"] == pytest.approx(sum(not a for a in answers) / len(answers))
