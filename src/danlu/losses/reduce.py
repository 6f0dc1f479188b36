"""The one normaliser. Every loss is a sum over tokens (or pairs) divided by a denominator counted over the whole step.

An optimizer step may be cut into micro-batches and over processes; when each part is divided by the step's own global
count, 1 x 8 accumulation equals 8 x 1 and one process equals two. Averages of averages do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.tree import TreeBatch


def weighted_sum(values: Tensor, weights: Tensor, denominator: float | Tensor) -> Tensor:
    """`sum(values * weights) / denominator` in fp32 (fp64 for values in fp64).

    Args:
        values, weights: the same shape.
        denominator: the sum of the weights (or count) over all micro-batches and processes of the step, > 0.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    return (values.to(dtype) * weights.to(dtype)).sum() / denominator


def sum_by_node(values_M: Tensor, index_M: Tensor, tree: TreeBatch) -> Tensor:
    """Sums of values over the tokens of each node `[N]`, in fp32: a whole answer's log-probability, for one.

    Args:
        values_M: one number per token at `index_M`.
        index_M: token indices, in any order.
    """
    nodes_M = torch.searchsorted(tree.node_end_N, index_M, right=True)
    return torch.zeros(tree.nodes, device=values_M.device).index_add(0, nodes_M, values_M.float())


def mean_by_answer(values_T: Tensor, answer_T: Tensor) -> Tensor:
    """The mean over the tokens of each answer.

    Args:
        answer_T: the number of the answer that a token belongs to; every number from 0 to the greatest occurs.
    """
    count = int(answer_T.max()) + 1 if answer_T.numel() else 0
    sums = values_T.new_zeros(count).index_add(0, answer_T, values_T)
    tokens = values_T.new_zeros(count).index_add(0, answer_T, torch.ones_like(values_T))
    return sums / tokens
