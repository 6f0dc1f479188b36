"""One optimizer step: a list of micro-batches with global denominators; and held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from danlu.data.collate import Trees
from danlu.models.root import Reads, RoleName, RootModel, TrunkOutput
from danlu.models.rows import RowBatch
from danlu.training import distributed
from danlu.training.compute import Compute
from danlu.training.logprobs import nll
from danlu.training.rank_allocation import orthogonality
from danlu.training.sharding import is_sharded, missing_rounds, pass_nothing, share_forwards, whole
from danlu.tree import TreeBatch

Extra = TypeVar("Extra")
# Metrics of which the greatest counts; all others are shares of a sum.
LARGEST = frozenset({"ratio_error", "ratio_max"})
LossFn = Callable[[TrunkOutput, Extra], tuple[Tensor, dict[str, float]]]


class Sized(Protocol):
    """Items that know their lengths in tokens."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class TrainResult:
    """What a trainer leaves behind: its model folder, final metrics, and the facts that gates are decided by."""

    model: Path
    metrics: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)


def accumulate(
    root: nn.Module,
    role: RoleName,
    batches: Sequence[tuple[TreeBatch | RowBatch | TrunkOutput, Extra]],
    loss_fn: Callable[[Any, Extra], tuple[Tensor, dict[str, float]]],
    compute: Compute,
    *,
    reads: Reads | None = None,
) -> dict[str, float]:
    """Forward and backward of this rank's micro-batches; gradients are added up over micro-batches and ranks.

    Args:
        batches: micro-batches with whatever else their loss needs. A rank without any takes part with zero gradients. In place
            of a micro-batch what the trunk made of it, with its graph.
        loss_fn: divides by the step's global denominator, so that sums of losses are the step's loss.
        reads: of token trees, the hidden states that it reads (`RootModel.forward`).

    Returns:
        Metrics, summed over micro-batches and ranks (those of `LARGEST`: the greatest of them), with `loss`.
    """
    missing = missing_rounds(root, len(batches))
    sums: dict[str, float] = {"loss": 0.0}
    told = {"reads": reads} if reads is not None else {}
    for tree, extra in batches:
        with compute.autocast():
            if isinstance(tree, TrunkOutput):
                loss, metrics = loss_fn(tree, extra)
            else:
                loss, metrics = root(tree.to(compute.device), role, lambda out, e=extra: loss_fn(out, e), **told)
        (loss * compute.loss_scale).backward()
        sums["loss"] += float(loss.detach())
        for key, value in metrics.items():
            so_far = sums.get(key, 0.0)
            sums[key] = max(so_far, value) if key in LARGEST else so_far + value
    penalty = orthogonality(root, role)
    if penalty is not None and distributed.is_main():  # gradients are summed over ranks
        (penalty * compute.loss_scale).backward()
    if is_sharded(root):  # their gradients are added up in the backward pass, in which all ranks take part
        pass_nothing(root, [role], missing, compute, backward=True)
    else:
        distributed.sum_gradients(root.parameters())
    if compute.loss_scale != 1.0:
        for parameter in root.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(compute.loss_scale)
    return distributed.combine_numbers(sums, LARGEST)


def apply(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    allowed: Callable[[float], bool] = lambda norm: True,
) -> float:
    """Clips the gradients, steps, clears them; returns the norm before clipping.

    Args:
        allowed: asked with that norm whether the update is made (`Session.judge`).
    """
    norm = float(whole(torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], max_norm)))
    if allowed(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def language_loss(out: TrunkOutput, denominator: float) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy over the tokens of a batch that carry loss."""
    index = out.tree.loss_index()
    loss = nll(out, index, out.tree.loss_weight_T[index]) / denominator
    return loss, {"loss_sum": float(loss.detach()) * float(denominator)}


def heldout_loss(root: RootModel, trees: Trees, micro_tokens: int, compute: Compute) -> float:
    """Mean loss per trained token over held-out items, in nats (exp of it is the perplexity)."""

    def sums(tree: TreeBatch) -> tuple[float, float]:
        with compute.autocast():
            loss, _ = root(
                tree.to(compute.device), "policy", lambda out: language_loss(out, 1.0), reads=TreeBatch.before_loss
            )
        return float(loss), float(tree.loss_weight_T.sum())

    found = share_forwards(root, ["policy"], batches_of(trees, micro_tokens), sums, compute)
    return sum(loss for loss, _ in found) / max(sum(weight for _, weight in found), 1.0)


def batches_of(trees: Trees, micro_tokens: int) -> list[TreeBatch]:
    """All items once, in the batches of `shortest_first`."""
    return [trees.batch(b) for b in shortest_first(trees, micro_tokens)]


def shortest_first(trees: Trees | Sized, micro_tokens: int) -> list[list[int]]:
    """Every item's index once, shortest first (so that blocks are even), in batches of at most `micro_tokens`."""
    lengths = trees.lengths
    batches: list[list[int]] = [[]]
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches[-1] and tokens + lengths[index] > micro_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return [b for b in batches if b]
