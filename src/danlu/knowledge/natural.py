"""Small steps in the metric of what other answers would feel: natural gradients, and patches cut to a rank in the same metric.

The metric is that of `training/fisher.py` over texts that are to stay as they are; as the price of forgetting it stands in Ritter
et al. 2018. A gradient `g` is followed along `G^-1 g C^-1`: of all directions that teach the fact equally well it is the one that
other answers feel least. MEMIT (Meng et al. 2023, equation 14) has the right half of this product, and AlphaEdit (Fang et al.
2025) a projection in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from danlu.data.collate import Trees
from danlu.exceptions import KnowledgeError
from danlu.models.patches import Factors
from danlu.models.root import RootModel
from danlu.training.compute import Compute
from danlu.training.fisher import TINY, Metric, drawn, layers_of, moments_of, steepest, turned, weight_of
from danlu.training.step import shortest_first

MICRO_TOKENS = 4096


def metrics_of(
    model: Any, root: RootModel, held: Sequence[Trees], target: str | Sequence[str], compute: Compute, seed: int
) -> dict[str, Metric]:
    """The metric of every layer over dialogues whose answers are held.

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
    batches = (trees.batch(batch) for trees in held for batch in shortest_first(trees, MICRO_TOKENS))
    layers = layers_of(model, target)
    found = moments_of(model, layers, root, batches, drawn(seed), compute)
    return {name: moments.metric() for name, moments in found.items()}


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
        self.before = {n: weight_of(m).detach().clone() for n, m in self.layers.items()}
        self.changes = {n: torch.zeros_like(turned(self.layers[n], w).float()) for n, w in self.before.items()}

    @torch.no_grad()
    def step(self, trust: float) -> None:
        """Follows the gradients that the weights hold, and clears them.

        Args:
            trust: how far: `tr(G D C D^T)` over all layers, twice the nats a token that other answers are expected to move.

        Raises:
            KnowledgeError: they are no numbers.
        """
        gradients = {}
        for name, module in self.layers.items():
            gradient = weight_of(module).grad
            if gradient is not None:  # None: an expert that no token went to
                gradients[name] = turned(module, gradient).float()
        along, slope = steepest(self.metrics, gradients)
        self.model.zero_grad(set_to_none=True)
        if not math.isfinite(slope):
            raise KnowledgeError(
                "the gradients of this step are no numbers, so nothing is changed",
                hint="lower trust in the settings; if the model itself answers with noise, load an earlier one",
            )
        if slope <= 0.0:
            return  # all of it is sure already
        rate = math.sqrt(trust / slope)
        for name, direction in along.items():
            self.changes[name].sub_(direction, alpha=rate)
            self._write(name, self.changes[name])

    @torch.no_grad()
    def _write(self, name: str, change: Tensor) -> None:
        module, before = self.layers[name], self.before[name]
        weight_of(module).copy_((before.float() + turned(module, change)).to(before.dtype))

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
            weight_of(module).copy_(self.before[name])


def cut(changes: Changes, rank: int, holds: Callable[[], bool]) -> dict[str, Factors]:
    """Factors of the least of the ranks `rank`, `2 rank`, `4 rank`, ... with which `holds` is true; if with none, whole ones."""
    widest = max(min(change.shape) for change in changes.changes.values())
    while True:
        factors = changes.factors(rank)
        with changes.as_if(factors):
            if rank >= widest or holds():
                return factors
        rank *= 2
