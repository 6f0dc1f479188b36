"""One optimizer step: a list of micro-batches with global denominators; and held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from danlu.data.collate import Trees
from danlu.losses.cross_entropy import cross_entropy
from danlu.models.root import RoleName, RootModel, TrunkOutput
from danlu.training import distributed
from danlu.training.compute import Compute
from danlu.training.logprobs import logprobs
from danlu.tree import TreeBatch

Extra = TypeVar("Extra")
# Metrics of which the greatest counts; all others are shares of a sum.
LARGEST = frozenset({"ratio_error"})
LossFn = Callable[[TrunkOutput, Extra], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class TrainResult:
    """What a trainer leaves behind: its model folder, final metrics, and the facts that gates are decided by."""

    model: Path
    metrics: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)


def accumulate(
    root: RootModel,
    role: RoleName,
    batches: Sequence[tuple[TreeBatch, Extra]],
    loss_fn: LossFn[Extra],
    compute: Compute,
) -> dict[str, float]:
    """Forward and backward of this rank's micro-batches; gradients are added up over micro-batches and ranks.

    Args:
        batches: micro-batches with whatever else their loss needs. A rank without any takes part with zero gradients.
        loss_fn: divides by the step's global denominator, so that sums of losses are the step's loss.

    Returns:
        Metrics, summed over micro-batches and ranks (those of `LARGEST`: the greatest of them), with `loss`.
    """
    sums: dict[str, float] = {"loss": 0.0}
    for tree, extra in batches:
        with compute.autocast():
            loss, metrics = root(tree.to(compute.device), role, lambda out, e=extra: loss_fn(out, e))
        loss.backward()
        sums["loss"] += float(loss.detach())
        for key, value in metrics.items():
            so_far = sums.get(key, 0.0)
            sums[key] = max(so_far, value) if key in LARGEST else so_far + value
    distributed.sum_gradients(root.parameters())
    return distributed.combine_numbers(sums, LARGEST)


def apply(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Clips the gradients, steps, clears them; returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], max_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def language_loss(out: TrunkOutput, denominator: float) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy over the tokens of a batch that carry loss."""
    index = out.tree.loss_index()
    logp, _ = logprobs(out, index)
    return cross_entropy(logp, out.tree.loss_weight_T[index], denominator)


@torch.no_grad()
def heldout_loss(root: RootModel, trees: Trees, micro_tokens: int, compute: Compute) -> float:
    """Mean loss per trained token over held-out items, in nats (exp of it is the perplexity)."""
    total, weight = 0.0, 0.0
    for tree in batches_of(trees, micro_tokens):
        with compute.autocast():
            loss, _ = root(tree.to(compute.device), "policy", lambda out: language_loss(out, 1.0))
        total += float(loss)
        weight += float(tree.loss_weight_T.sum())
    return total / max(weight, 1.0)


def batches_of(trees: Trees, micro_tokens: int) -> list[TreeBatch]:
    """All items once, shortest first (so that blocks are even), in batches of at most `micro_tokens`."""
    lengths = trees.lengths
    batches: list[list[int]] = [[]]
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches[-1] and tokens + lengths[index] > micro_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return [trees.batch(b) for b in batches if b]
