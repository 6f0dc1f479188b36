"""A simulated annotator: prefers the better answer by the rubric, and errs now and then as people do."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, Literal

from danlu.evals.rubric import score
from danlu.exceptions import SettingsError


def compare(
    reference: Mapping[str, Any],
    answer_a: str,
    answer_b: str,
    finished_a: bool,
    finished_b: bool,
    rng: Random,
    error_rate: float = 0.1,
) -> Literal["a", "b"] | None:
    """Which answer the annotator prefers; None when the rubric gives both the same score.

    Args:
        reference: what the answers are judged by (see `danlu.evals.rubric`).
        answer_a, answer_b: the two answers.
        finished_a, finished_b: whether each was ended by the model itself.
        rng: source of the errors; it is drawn from once for every pair that is not a tie.
        error_rate: chance of preferring the worse answer, in [0, 1].
    """
    if not 0.0 <= error_rate <= 1.0:
        raise SettingsError(f"expected a share between 0 and 1, found {error_rate}", field="error_rate")
    total_a = score(answer_a, reference, finished_a).total
    total_b = score(answer_b, reference, finished_b).total
    if total_a == total_b:
        return None
    a_wins = (total_a > total_b) != (rng.random() < error_rate)
    return "a" if a_wins else "b"
