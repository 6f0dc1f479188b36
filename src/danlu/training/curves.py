"""Reading logged rows: a metric's curve, its ends, and whether it has a trend beyond its own noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Points = list[tuple[float, float]]
MAD_TO_STD = 1.4826  # standard deviation of a normal distribution from its median absolute value


def points(rows: Iterable[Mapping[str, Any]], key: str) -> Points:
    """(step, value) of the rows that have `key` as a finite number."""
    found = []
    for row in rows:
        step, value = row.get("step"), row.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float) and abs(value) < float("inf"):
            found.append((float(step), float(value)))
    return found


def values(rows: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """The values of `key`, without their steps."""
    return [v for _, v in points(rows, key)]


def near(curve: Points, step: float, count: int) -> float:
    """Mean of the `count` points nearest to a step."""
    return fmean(v for _, v in sorted(curve, key=lambda p: (abs(p[0] - step), p[0]))[:count])


def noise(curve: Sequence[float]) -> float:
    """Standard deviation of a curve's scatter around whatever smooth line it follows.

    From second differences, which a straight line does not enter: the variance of a - 2b + c is six times that of one point. Their
    median absolute value is taken, so that the few of a steep start do not count as noise.

    Args:
        curve: at least 3 values, about evenly spaced.
    """
    bends = [abs(a - 2 * b + c) for a, b, c in zip(curve, curve[1:], curve[2:], strict=False)]
    return MAD_TO_STD * median(bends) / 6**0.5


def trend(curve: Points, scatter: float) -> tuple[float, float]:
    """Rise of the least-squares line from a curve's first to its last step, and how many standard errors that is.

    Args:
        curve: at least 2 points at different steps.
        scatter: standard deviation of a point around the line (`noise`).
    """
    middle = fmean(s for s, _ in curve)
    spread = sum((s - middle) ** 2 for s, _ in curve)
    slope = sum((s - middle) * v for s, v in curve) / spread
    rise = slope * (curve[-1][0] - curve[0][0])
    error = scatter / spread**0.5 * (curve[-1][0] - curve[0][0])
    return rise, rise / error if error > 0 else float("inf") * rise if rise else 0.0
