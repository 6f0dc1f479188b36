"""The one normaliser. Every loss is a sum over tokens (or pairs) divided by a denominator counted over the whole step.

An optimizer step may be cut into micro-batches and over processes; when each part is divided by the step's own global
count, 1 x 8 accumulation equals 8 x 1 and one process equals two. Averages of averages do not.
"""

from __future__ import annotations

from torch import Tensor


def weighted_sum(values: Tensor, weights: Tensor, denominator: float | Tensor) -> Tensor:
    """`sum(values * weights) / denominator` in fp32.

    Args:
        values, weights: the same shape.
        denominator: the sum of the weights (or count) over all micro-batches and processes of the step, > 0.
    """
    return (values.float() * weights.float()).sum() / denominator
