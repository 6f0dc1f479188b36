"""The proofs' arithmetic: intervals over seeds, a paired test, two curves at one abscissa, the turn of a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

# Student's t, 97.5%, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Interval(NamedTuple):
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean and Student's 95% interval of 2 to 10 values; of one value the interval is everything."""
    if len(values) == 1:
        return Interval(values[0], -math.inf, math.inf)
    half = T[len(values) - 1] * stdev(values) / len(values) ** 0.5
    return Interval(fmean(values), fmean(values) - half, fmean(values) + half)


class Paired(NamedTuple):
    """Two judges of the same items: the difference of their shares of right ones with its 95% interval, and McNemar's p."""

    difference: float
    low: float
    high: float
    p: float


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """Compares two judges item by item.

    The interval is Wald's of paired differences: mean d +- 1.96 sqrt((mean d^2 - (mean d)^2) / n). p is that of the exact McNemar
    test (two-sided binomial over the items on which they differ); ties that count half take no part in it.

    Args:
        ours, theirs: 1 where an item is judged right, 0 where not, 0.5 for a tie.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, count = fmean(differences), len(differences)
    half = 1.96 * (max(0.0, fmean(d * d for d in differences) - mean * mean) / count) ** 0.5
    wins, losses = sum(d == 1 for d in differences), sum(d == -1 for d in differences)
    discordant = wins + losses
    tail = sum(math.comb(discordant, k) for k in range(min(wins, losses) + 1)) / 2**discordant
    return Paired(mean, mean - half, mean + half, min(1.0, 2 * tail))


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Means over `width` neighbours, as many before as after; at the ends over as many as there are."""
    reach = width // 2
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def value_at(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """`y` where a curve first reaches `x`, on the straight line between its points; `x` is not beyond the greatest of `xs`.

    The abscissa (a KL that grows, with noise) is taken as the greatest so far, so that the curve goes one way only.
    """
    reached = xs[0]
    if x <= reached:
        return ys[0]
    for i in range(1, len(xs)):
        if xs[i] >= x:
            before = max(xs[:i])
            place = i - 1
            share = (x - before) / (xs[i] - before)
            return ys[place] + share * (ys[i] - ys[place])
    raise ValueError(f"the curve ends at {max(xs)}, before {x}")


def at_equal_kl(
    ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]], width: int
) -> tuple[float, ...]:
    """The KL that both sides reach, and each side's score there.

    Points (KL, score) of the iterations in order are smoothed over `width` iterations; the KL is the smaller one of the two
    sides' greatest; each side's score is read off where its curve first reaches it.
    """
    curves = [[smooth(axis, width) for axis in zip(*side, strict=True)] for side in (ours, theirs)]
    kl = min(max(xs) for xs, _ in curves)
    return (kl, *(value_at(xs, ys, kl) for xs, ys in curves))


class Turn(NamedTuple):
    """Where a series has its peak, and the first place after it at which a share of the gain up to it is lost (None: nowhere)."""

    peak: int
    lost: int | None


def turn(series: Sequence[float], share: float) -> Turn:
    """The peak of a series, and where the first `share` of it is gone again."""
    peak = max(range(len(series)), key=lambda i: series[i])
    limit = series[peak] - share * abs(series[peak])
    after = [i for i in range(peak + 1, len(series)) if series[i] < limit]
    return Turn(peak, after[0] if after and series[peak] > series[0] else None)
