"""Intervals of shares."""

from __future__ import annotations


def wilson(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share of `count` trials (Wilson 1927)."""
    centre = share + z * z / (2 * count)
    spread = z * ((share * (1 - share) + z * z / (4 * count)) / count) ** 0.5
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
