"""Small steps in the metric of what other answers would feel: natural gradients, and patches cut to a rank in the same metric.

A change `D` of a weight `[out, in]` moves the answers to other questions by about `1/2 tr(G D C D^T)` nats a token (the Fisher
information with one Kronecker product a layer: Martens and Grosse 2015, equation 5; as the price of forgetting: Ritter et al.
2018). C is the second moment of what goes into the layer, G that of the gradients that come back to what goes out of it, over
texts that are to stay as they are. A gradient `g` is followed along `G^-1 g C^-1`: of all directions that teach the fact equally
well it is the one that other answers feel least. MEMIT (Meng et al. 2023, equation 14) has the right half of this product, and
AlphaEdit (Fang et al. 2025) a projection in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from danlu.data.collate import Trees
from danlu.exceptions import KnowledgeError, ModelError
from danlu.models.adapters import targets_of
from danlu.models.patches import Factors
from danlu.models.root import RootModel, TrunkOutput
from danlu.training.compute import Compute
from danlu.training.step import shortest_first

WIDEST = 2048  # a side of a layer that is wider is known by its diagonal: a matrix of it would cost more than the layer
DAMPING = 0.5  # of the mean eigenvalue, added to all: directions that no held text uses are not free
MICRO_TOKENS = 4096
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


def _turned(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight or its gradient as `[out, in]`, and back; GPT-2 keeps the transpose."""
    return weight.T if isinstance(module, Conv1D) else weight


def _weight(module: nn.Module) -> nn.Parameter:
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    return weight


@contextmanager
def learning(model: Any, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Only the layers' weights take gradients inside; afterwards parameters are as they were."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    for module in layers.values():
        _weight(module).requires_grad_(True)
    try:
        yield
    finally:
        for parameter, learnt in before:
            parameter.requires_grad_(learnt)
            parameter.grad = None


def metrics_of(
    model: Any, root: RootModel, held: Sequence[Trees], target: str | Sequence[str], compute: Compute, seed: int
) -> dict[str, Metric]:
    """The metric of every layer over dialogues whose answers are held; labels are drawn from the model, as Fisher's are.

    Args:
        root: of the model, for reading.

    Raises:
        KnowledgeError: there is nothing to hold.
    """
    if not any(len(trees.items) for trees in held):
        raise KnowledgeError(
            "adapter: natural needs answers that are to stay",
            hint="give --replay data, set replay_pool above 0, or take --adapter lora",
        )
    layers = layers_of(model, target)
    moments = {name: _Moments(module) for name, module in layers.items()}
    draws = torch.Generator().manual_seed(seed)
    tokens = 0
    root.eval()
    with learning(model, layers):
        handles = [layers[name].register_forward_hook(m.watch) for name, m in moments.items()]
        try:
            for trees in held:
                for batch in shortest_first(trees, MICRO_TOKENS):
                    tree = trees.batch(batch).to(compute.device)
                    with compute.autocast():
                        loss = root(tree, "policy", lambda out: _surprise(out, draws))
                    loss.backward()
                    model.zero_grad(set_to_none=True)
                    tokens += len(tree.input_ids_T)
        finally:
            for handle in handles:
                handle.remove()
    return {n: Metric(Side.of(m.inner / tokens), Side.of(m.outer / tokens)) for n, m in moments.items()}


def _surprise(out: TrunkOutput, draws: torch.Generator) -> Tensor:
    """Minus the summed log-probability of tokens that the model draws itself at the answers' places."""
    index = out.tree.loss_index()
    logprobs = torch.log_softmax(out.logits(out.tree.predictor_T[index]), -1)
    drawn = torch.multinomial(logprobs.detach().exp().cpu(), 1, generator=draws).to(logprobs.device)
    return -logprobs.gather(1, drawn).sum()


class _Moments:
    """Sums of outer products of a layer's inputs, and of the gradients of its outputs; or their diagonals."""

    def __init__(self, module: nn.Module) -> None:
        weight = _weight(module)
        out, inner = _turned(module, weight).shape

        def zeros(width: int) -> Tensor:
            return torch.zeros((width,) if width > WIDEST else (width, width), device=weight.device)

        self.inner, self.outer = zeros(inner), zeros(out)

    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _add(self.inner, inputs[0].detach())
        output.register_hook(lambda gradient: _add(self.outer, gradient))


def _add(moment: Tensor, rows: Tensor) -> None:
    rows = rows.reshape(-1, rows.shape[-1]).float()
    moment.add_(rows.square().sum(0) if moment.ndim == 1 else rows.T @ rows)


class Changes:
    """Changes of some layers of a model that learn along natural gradients; `close` puts the model back."""

    def __init__(self, model: Any, metrics: Mapping[str, Metric]) -> None:
        """
        Args:
            model: its weights change while learning.
        """
        modules = dict(model.named_modules())
        self.model, self.metrics = model, metrics
        self.layers: dict[str, nn.Module] = {name: modules[name] for name in metrics}
        self.before = {n: _weight(m).detach().clone() for n, m in self.layers.items()}
        self.changes = {n: torch.zeros_like(_turned(self.layers[n], w).float()) for n, w in self.before.items()}

    @torch.no_grad()
    def step(self, trust: float) -> None:
        """Follows the gradients that the weights hold, and clears them.

        Args:
            trust: how far: `tr(G D C D^T)` over all layers, twice the nats a token that other answers are expected to move.
        """
        along: dict[str, Tensor] = {}
        slope = 0.0
        for name, module in self.layers.items():
            gradient = _weight(module).grad
            if gradient is None:  # an expert that no token went to
                continue
            plain = _turned(module, gradient).float()
            along[name] = self.metrics[name].scaled(plain, -1.0)
            slope += float((plain * along[name]).sum())
        self.model.zero_grad(set_to_none=True)
        if not math.isfinite(slope) or slope <= 0.0:
            return
        rate = math.sqrt(trust / slope)
        for name, direction in along.items():
            self.changes[name].sub_(direction, alpha=rate)
            self._write(name, self.changes[name])

    @torch.no_grad()
    def _write(self, name: str, change: Tensor) -> None:
        module, before = self.layers[name], self.before[name]
        _weight(module).copy_((before.float() + _turned(module, change)).to(before.dtype))

    @torch.no_grad()
    def factors(self, rank: int) -> dict[str, Factors]:
        """The changes cut to `rank` a layer on average: the directions that weigh most in the metric stay, wherever they are.

        The cut of `G^(1/2) D C^(1/2)` by its singular values is the nearest one in the metric (Eckart and Young 1936).
        """
        parts = {}
        for name, change in self.changes.items():
            parts[name] = torch.linalg.svd(self.metrics[name].scaled(change, 0.5), full_matrices=False)
        values = torch.cat([s for _, s, _ in parts.values()]).sort(descending=True).values
        least = max(float(values[min(rank * len(parts), len(values)) - 1]), TINY)
        found = {}
        for name, (left, sizes, right) in parts.items():
            kept = int((sizes >= least).sum())
            if kept:
                metric, root = self.metrics[name], sizes[:kept].sqrt()
                a = metric.inner.scaled(right[:kept] * root[:, None], -0.5)
                b = metric.outer.scaled((left[:, :kept] * root).T, -0.5).T
                found[name] = Factors(a.contiguous(), b.contiguous())
        return found

    @contextmanager
    def as_if(self, factors: Mapping[str, Factors]) -> Iterator[None]:
        """The model has these factors in place of the whole changes, inside."""
        for name, change in self.changes.items():
            given = factors.get(name)
            self._write(name, given.b @ given.a if given is not None else torch.zeros_like(change))
        try:
            yield
        finally:
            for name, change in self.changes.items():
                self._write(name, change)

    @torch.no_grad()
    def close(self) -> None:
        """The weights are as they were."""
        for name, module in self.layers.items():
            _weight(module).copy_(self.before[name])


def cut(changes: Changes, rank: int, holds: Callable[[], bool]) -> dict[str, Factors]:
    """Factors of the least of the ranks `rank`, `2 rank`, `4 rank`, ... with which `holds` is true; if with none, whole ones."""
    widest = max(min(change.shape) for change in changes.changes.values())
    while True:
        factors = changes.factors(rank)
        with changes.as_if(factors):
            if rank >= widest or holds():
                return factors
        rank *= 2
