"""PPO's two losses on a micro-batch: from the trunk's output and the experience to one number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from danlu.alignment_config import PpoSettings
from danlu.losses.policy import clipped_policy, kl_loss
from danlu.losses.reduce import weighted_sum
from danlu.losses.value import clipped_value
from danlu.models.root import TrunkOutput
from danlu.training.experience import Experience
from danlu.training.logprobs import logprobs

LossFn = Callable[[TrunkOutput, tuple[Experience, float]], tuple[Tensor, dict[str, float]]]
"""Of a micro-batch and the number of action tokens of its whole mini-batch."""


def policy_loss_of(settings: PpoSettings, kl_coef: float, weight: float = 1.0) -> LossFn:
    """The clipped objective, less the entropy bonus, plus the KL where it belongs to the loss.

    Args:
        kl_coef: weight of that KL.
        weight: of all of it, beside another loss.
    """
    options = settings.ppo

    def loss_fn(out: TrunkOutput, extra: tuple[Experience, float]) -> tuple[Tensor, dict[str, float]]:
        batch, actions = extra
        index, heat = out.tree.action_index(), settings.rollout.temperature
        logp, entropies = logprobs(out, index, heat, entropy=options.entropy_coef > 0)
        ones = torch.ones_like(logp)
        loss, metrics = clipped_policy(
            logp,
            batch.old_logprobs,
            batch.advantages,
            ones,
            actions,
            clip_range=options.clip_range,
            clip_range_high=options.clip_range_high,
            dual_clip=options.dual_clip,
            importance_T=batch.importance,
        )
        if options.kl_in == "loss":
            counted = ones if batch.importance is None else batch.importance
            kl = kl_loss(logp, batch.ref_logprobs, counted, actions, estimator=options.kl_estimator)
            loss, metrics = loss + kl_coef * kl, metrics | {"kl_loss": float(kl.detach())}
        if options.entropy_coef:
            loss = loss - options.entropy_coef * weighted_sum(entropies, ones, actions)
        return weight * loss, metrics

    return loss_fn


def value_loss_of(settings: PpoSettings) -> LossFn:
    """The critic's clipped squared error."""

    def loss_fn(out: TrunkOutput, extra: tuple[Experience, float]) -> tuple[Tensor, dict[str, float]]:
        batch, actions = extra
        values = out.values(out.tree.action_index())
        ones = torch.ones_like(values)
        return clipped_value(
            values, batch.values, batch.returns, ones, actions, clip_range=settings.ppo.value_clip_range
        )

    return loss_fn
