"""What a model's answers feel of a change of its weights: Fisher information with one Kronecker product a layer.

A change `D` of a weight `[out, in]` moves the answers by about `1/2 tr(G D C D^T)` nats a token (Martens and Grosse 2015,
equation 5). C is the second moment of what goes into the layer, G that of the gradients that come back to what goes out of it,
for tokens that the model draws itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from danlu.exceptions import ModelError
from danlu.models.adapters import targets_of
from danlu.models.root import RootModel, TrunkOutput
from danlu.training.compute import Compute
from danlu.tree import TreeBatch

WIDEST = 2048  # a side of a layer that is wider is known by its diagonal: a matrix of it would cost more than the layer
DAMPING = 0.5  # of the mean eigenvalue, added to all: directions that no text uses are not free
TINY = 1e-20


@dataclass(frozen=True)
class Side:
    """A symmetric positive matrix by its eigenvalues `[n]` and eigenvectors `[n, n]` (columns; None: the unit vectors)."""

    values: Tensor
    vectors: Tensor | None

    @classmethod
    def of(cls, moment: Tensor) -> Side:
        """From a second moment `[n, n]`, or its diagonal `[n]`, with damping."""
        if moment.ndim == 1:
            values, vectors = moment.double(), None
        else:
            values, vectors = torch.linalg.eigh(moment.double())
        values = values.clamp(min=0.0)
        values = values + DAMPING * values.mean() + TINY
        return cls(values.float(), vectors.float() if vectors is not None else None)

    def scaled(self, rows: Tensor, power: float) -> Tensor:
        """`rows @ M^power` for rows `[k, n]`."""
        scale = self.values**power
        if self.vectors is None:
            return rows * scale
        return ((rows @ self.vectors) * scale) @ self.vectors.T


@dataclass(frozen=True)
class Metric:
    """What other answers feel of a layer's change: `inner` is C, `outer` is G."""

    inner: Side
    outer: Side

    def scaled(self, change: Tensor, power: float) -> Tensor:
        """`G^power D C^power` of a change `[out, in]`."""
        return self.outer.scaled(self.inner.scaled(change, power).T, power).T


def layers_of(model: Any, target: str | Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers of the trunk that `target` names ("all-linear": all of them).

    Raises:
        ModelError: there are none.
    """
    wanted = set(targets_of(model, target))
    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and _ends_with(name, wanted)
    }
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear layers named {sorted(wanted)}", hint="change target")
    return found


def _ends_with(name: str, wanted: set[str]) -> bool:
    return any(name == w or name.endswith(f".{w}") for w in wanted)


def turned(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight or its gradient as `[out, in]`, and back; GPT-2 keeps the transpose."""
    return weight.T if isinstance(module, Conv1D) else weight


def weight_of(module: nn.Module) -> nn.Parameter:
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    return weight


@contextmanager
def learning(model: Any, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Only the layers' weights take gradients inside; afterwards parameters are as they were."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    for module in layers.values():
        weight_of(module).requires_grad_(True)
    try:
        yield
    finally:
        for parameter, learnt in before:
            parameter.requires_grad_(learnt)
            parameter.grad = None


def steepest(metrics: Mapping[str, Metric], gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The natural directions `G^-1 g C^-1` of gradients `[out, in]`, and the loss's slope along them, which is also their size
    `tr(G D C D^T)` over all layers.
    """
    along = {name: metrics[name].scaled(gradient, -1.0) for name, gradient in gradients.items()}
    return along, sum(float((gradient * along[name]).sum()) for name, gradient in gradients.items())


@dataclass
class Moments:
    """Second moments of a layer, `[n, n]`, or their diagonals `[n]`: of its inputs, and of the gradients of its outputs."""

    inner: Tensor
    outer: Tensor

    def metric(self) -> Metric:
        return Metric(Side.of(self.inner), Side.of(self.outer))


def moments_of(
    model: Any,
    layers: Mapping[str, nn.Module],
    root: RootModel,
    batches: Iterable[TreeBatch],
    surprise: Callable[[TrunkOutput], Tensor],
    compute: Compute,
) -> dict[str, Moments]:
    """The moments of layers over token trees, means per token.

    Args:
        root: of the model; it reads in evaluation mode.
        surprise: minus the summed log-probability of tokens that the model drew, or draws (`drawn`).
    """
    watched = {name: _Watched(module) for name, module in layers.items()}
    tokens = 0
    mode = root.training
    root.eval()
    with learning(model, layers):
        handles = [layers[name].register_forward_hook(w.watch) for name, w in watched.items()]
        try:
            for batch in batches:
                tree = batch.to(compute.device)
                with compute.autocast():
                    loss = root(tree, "policy", surprise)
                loss.backward()
                model.zero_grad(set_to_none=True)
                tokens += len(tree.input_ids_T)
        finally:
            for handle in handles:
                handle.remove()
            root.train(mode)
    return {n: Moments(w.inner / tokens, w.outer / tokens) for n, w in watched.items()}


def drawn(seed: int) -> Callable[[TrunkOutput], Tensor]:
    """The surprise of tokens drawn in the places of those that carry loss."""
    draws = torch.Generator().manual_seed(seed)

    def surprise(out: TrunkOutput) -> Tensor:
        logprobs = torch.log_softmax(out.logits(out.tree.predictor_T[out.tree.loss_index()]), -1)
        found = torch.multinomial(logprobs.detach().exp().cpu(), 1, generator=draws).to(logprobs.device)
        return -logprobs.gather(1, found).sum()

    return surprise


class _Watched:
    """Sums of outer products of a layer's inputs, and of the gradients of its outputs; or their diagonals."""

    def __init__(self, module: nn.Module) -> None:
        weight = weight_of(module)
        out, inner = turned(module, weight).shape

        def zeros(width: int) -> Tensor:
            return torch.zeros((width,) if width > WIDEST else (width, width), device=weight.device)

        self.inner, self.outer = zeros(inner), zeros(out)

    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _add(self.inner, inputs[0].detach())
        output.register_hook(lambda gradient: _add(self.outer, gradient))


def _add(moment: Tensor, rows: Tensor) -> None:
    rows = rows.reshape(-1, rows.shape[-1]).float()
    moment.add_(rows.square().sum(0) if moment.ndim == 1 else rows.T @ rows)
