"""The clipped policy objective of PPO, and estimators of the KL divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.losses.reduce import weighted_sum


def clipped_policy(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    weight_T: Tensor,
    denominator: float,
    *,
    clip_range: float = 0.2,
) -> tuple[Tensor, dict[str, float]]:
    """`sum_t w_t max(-A_t rho_t, -A_t clip(rho_t, 1 - eps, 1 + eps)) / denominator`, `rho = exp(logp - old_logp)`.

    Schulman et al. 2017, eq. 7, with the sign turned for a minimiser.

    Args:
        logprobs_T: of the sampled tokens under the policy being trained.
        old_logprobs_T: the trainer's own before the first update on this roll-out (no gradient).
        advantages_T: no gradient.
        weight_T: 1 for the tokens that count.
        denominator: sum of the weights over the whole mini-batch.
        clip_range: eps in (0, 1).
    """
    log_ratio = logprobs_T - old_logprobs_T
    ratio = torch.exp(log_ratio)
    plain = -advantages_T * ratio
    clipped = -advantages_T * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = weighted_sum(torch.maximum(plain, clipped), weight_T, denominator)
    with torch.no_grad():
        metrics = {
            "clip_fraction": float(weighted_sum((clipped > plain).float(), weight_T, denominator)),
            "approx_kl": float(weighted_sum(kl_k3(old_logprobs_T, logprobs_T), weight_T, denominator)),
            "ratio_error": float((ratio - 1).abs().max()) if ratio.numel() else 0.0,
        }
    return loss, metrics


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """`log p - log q` at a sample of p: unbiased for KL(p || q), high variance, may be negative (Schulman 2020, k1)."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """`(q/p - 1) - log(q/p)` at a sample of p: unbiased, never negative, low variance (Schulman 2020, k3)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio
