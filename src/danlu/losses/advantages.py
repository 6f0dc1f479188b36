"""Rewards per token, generalised advantage estimation and whitening. Action tokens only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from danlu.losses.policy import KlEstimator, kl_estimate


def token_rewards(
    score: float, logprobs_A: Tensor, ref_logprobs_A: Tensor, *, kl_coef: float, estimator: KlEstimator = "k1"
) -> Tensor:
    """`r_t = -kl_coef k(log pi_t, log pi_ref_t)`, plus the score at the last action (Ouyang et al. 2022, eq. 2, where k is k1).

    Args:
        score: the reward of the whole answer.
        logprobs_A, ref_logprobs_A: of the answer's A >= 1 actions.
        kl_coef: >= 0; 0 where the KL is part of the loss.
        estimator: of the KL; k1 and k3 are unbiased (Schulman 2020).
    """
    rewards = -kl_coef * kl_estimate(logprobs_A, ref_logprobs_A, estimator)
    rewards[-1] += score
    return rewards


def gae(
    rewards_A: Tensor, values_A: Tensor, *, gamma: float, gae_lambda: float, critic_lambda: float | None = None
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of one trajectory that ends after its last action.

    `delta_t = r_t + gamma V_{t+1} - V_t`, `A_t = delta_t + gamma lambda A_{t+1}`, `R_t = A_t + V_t` (Schulman et al. 2016,
    eq. 16). V after the last action is 0. The critic's returns may have a lambda of their own (VC-PPO, Yuan et al. 2025:
    with 1 they are free of the critic's own bias, and a score at the end reaches the first token undiminished).

    Args:
        rewards_A, values_A: fp32; values are those of the state before each action.
        gamma, gae_lambda: in [0, 1].
        critic_lambda: in [0, 1], of the returns; None: `gae_lambda`.
    """
    advantages = _advantages(rewards_A, values_A, gamma, gae_lambda)
    if critic_lambda is None or critic_lambda == gae_lambda:
        return advantages, advantages + values_A
    return advantages, _advantages(rewards_A, values_A, gamma, critic_lambda) + values_A


def _advantages(rewards_A: Tensor, values_A: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    rewards, values = rewards_A.tolist(), values_A.tolist()
    advantages = [0.0] * len(rewards)
    following, carried = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * following - values[t]
        carried = delta + gamma * gae_lambda * carried
        advantages[t], following = carried, values[t]
    return torch.tensor(advantages, dtype=torch.float32)


def whiten(
    parts: Sequence[Tensor], *, shift_mean: bool = True, moments: tuple[float, float, float] | None = None
) -> list[Tensor]:
    """All parts scaled to unit variance (and mean 0) over all their tokens together.

    Args:
        parts: one tensor per trajectory.
        shift_mean: keep the mean when False, as rewards want it (Huang et al. 2024, arXiv 2403.17031).
        moments: (count, sum, sum of squares) over all processes; computed here when None.
    """
    joined = torch.cat(list(parts)).double()
    count, total, squares = moments or (joined.numel(), float(joined.sum()), float(joined.square().sum()))
    mean = total / count
    std = max(squares / count - mean * mean, 0.0) ** 0.5
    return [((p - mean) / (std + 1e-8) + (0.0 if shift_mean else mean)).float() for p in parts]
