"""The harness's arithmetic: what one row of the table says about the reports of two sides that took turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Report = dict[str, Any]
SMALLEST = 0.1  # below it, a loss or a mean score is compared as if it were this large


def rates(reports: Sequence[Report]) -> list[float]:
    """Tokens that count per second, of each window."""
    return [report["tokens"] / report["seconds"] for report in reports]


def loss_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The greatest difference of two sides' losses step by step, as a share of the peer's (of `SMALLEST` at least).

    Infinite when there is nothing to compare, or one side took other steps than the other.
    """
    if not ours or len(ours) != len(theirs):
        return float("inf")
    return max(abs(a - b) / max(abs(b), SMALLEST) for a, b in zip(ours, theirs, strict=True))


def spread(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest of the ratios ours / theirs, each taken within one turn."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return statistics.median(ratios), ratios[0], ratios[-1]


def row(
    ours: Sequence[Report],
    theirs: Sequence[Report],
    *,
    losses: tuple[Sequence[float], Sequence[float]],
    tolerance: float,
    **facts: Any,
) -> dict[str, Any]:
    """One row of the table. Where the losses differ by more than `tolerance` it is void: it has no ratio.

    Args:
        facts: work, size, peer, peer_setting, unit, goal.
    """
    difference = loss_difference(*losses)
    void = difference > tolerance
    ratio = (None, None, None) if void else spread(rates(ours), rates(theirs))
    return {
        **facts,
        "ours": statistics.median(rates(ours)),
        "peer_value": statistics.median(rates(theirs)),
        **dict(zip(("ratio", "low", "high"), ratio, strict=True)),
        "loss_difference": difference if difference != float("inf") else None,
    }


def fastest(sides: Sequence[tuple[str, Sequence[Report]]]) -> str:
    """The side with the greatest median rate."""
    return max(sides, key=lambda side: statistics.median(rates(side[1])))[0]
