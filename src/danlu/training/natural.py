"""Natural policy gradients: an optimizer whose steps are as long as the policy may move, not as its weights may.

A policy's gradient `g` is followed along `G^-1 g C^-1` (Kakade 2001 with the Fisher information of `fisher.py`; as ACKTR, Wu et
al. 2017, has it): Adam's steps are alike in all weights, so that a few steep directions spend the divergence that learning may
cost. The metric is measured on the answers that are learnt from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from danlu.exceptions import TrainingError
from danlu.models.root import RootModel, TrunkOutput
from danlu.train_config import NaturalSteps, TrainSettings
from danlu.training.compute import Compute
from danlu.training.fisher import Metric, Moments, layers_of, moments_of, steepest, turned, weight_of
from danlu.training.logprobs import logprobs
from danlu.training.optim import optimizer_of
from danlu.tree import TreeBatch


class NaturalGradient(torch.optim.Optimizer):
    """Steps of `options.trust` nats a token (times the squared share of the peak rate) over the linear layers of a trunk.

    Args:
        layers: linear ones by name; nothing else of the model learns.
        learning_rate: the peak; what the schedule makes of it shortens the steps.
    """

    def __init__(self, layers: Mapping[str, nn.Module], learning_rate: float, options: NaturalSteps) -> None:
        self.layers, self.options = dict(layers), options
        self._metrics: dict[str, Metric] = {}
        weights = [weight_of(module) for module in self.layers.values()]
        group = {"params": weights, "peak": learning_rate, "updates": 0, "looked": -1}
        super().__init__([group], {"lr": learning_rate})

    @property
    def due(self) -> bool:
        """Whether the metric is to be measured before the next step."""
        group = self.param_groups[0]
        return bool(group["looked"] < 0 or group["updates"] - group["looked"] >= self.options.every)

    def look(self, moments: Mapping[str, Moments]) -> None:
        """Takes another metric."""
        for name, found in moments.items():
            state = self.state[weight_of(self.layers[name])]
            state["inner"], state["outer"] = found.inner, found.outer
        self._metrics.clear()
        self.param_groups[0]["looked"] = self.param_groups[0]["updates"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; none where all gradients are zero.

        Raises:
            TrainingError: a gradient or the metric is no number.
        """
        assert closure is None, "danlu's loops have none"
        group = self.param_groups[0]
        if not self._metrics:
            # What no answer reached has no metric: an expert learns once answers went to it when the metric is measured.
            moments = {n: self.state[weight_of(m)] for n, m in self.layers.items()}
            self._metrics = {
                n: Moments(s["inner"], s["outer"]).metric() for n, s in moments.items() if s["outer"].any()
            }
        means: dict[str, Tensor] = {}
        for name in self._metrics:
            module = self.layers[name]
            weight = weight_of(module)
            if weight.grad is not None:
                mean = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                means[name] = turned(module, mean.mul_(self.options.momentum).add_(weight.grad))
        along, slope = steepest(self._metrics, means)
        if not math.isfinite(slope):
            raise TrainingError(
                "a natural step's gradient or metric is no number", hint="optimizer: adamw, or lower natural.trust"
            )
        if slope <= 0.0:
            return
        rate = group["lr"] / group["peak"] * math.sqrt(self.options.trust / slope)
        for name, direction in along.items():
            module = self.layers[name]
            weight_of(module).sub_(turned(module, direction), alpha=rate)
        group["updates"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._metrics.clear()


def policy_optimizer(
    policy: Any, named: Mapping[str, nn.Parameter], learning_rate: float, settings: TrainSettings
) -> torch.optim.Optimizer:
    """The optimizer of a policy that learns from scores of its answers.

    Args:
        policy: the model; with `optimizer: natural` only its linear layers learn from here on.
        named: its parameters that learn.
    """
    if settings.optimizer != "natural":
        return optimizer_of(named, learning_rate, settings)
    layers = {n: m for n, m in layers_of(policy, "all-linear").items() if weight_of(m).requires_grad}
    kept = {id(weight_of(module)) for module in layers.values()}
    for parameter in policy.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    return NaturalGradient(layers, learning_rate, settings.natural)


def look(
    optimizer: torch.optim.Optimizer, policy: Any, root: RootModel, trees: Iterable[TreeBatch], compute: Compute
) -> None:
    """Measures the metric on these answers, which the policy drew, where that is due; every process does so with all of them.
    Other optimizers have none.
    """
    if isinstance(optimizer, NaturalGradient) and optimizer.due:
        optimizer.look(moments_of(policy, optimizer.layers, root, trees, _surprise, compute))


def _surprise(out: TrunkOutput) -> Tensor:
    logp, _ = logprobs(out, out.tree.action_index())
    return -logp.sum()
