"""The clipped objective of methods without a critic: on the ratio of each token or of each answer, with a KL term."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from danlu.losses.policy import kl_k3
from danlu.losses.reduce import weighted_sum

KlEstimator = Literal["k2", "k3"]


def clipped_with_kl(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    ref_logprobs_T: Tensor,
    advantages_T: Tensor,
    weight_T: Tensor,
    denominator: float,
    *,
    clip_range: float,
    kl_coef: float,
    clip_range_high: float | None = None,
    kl_estimator: KlEstimator = "k3",
    answer_T: Tensor | None = None,
    importance_T: Tensor | None = None,
    total_weight: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """`sum_t w_t [u_t max(-A_t rho_t, -A_t clip(rho_t, 1 - low, 1 + high)) + kl_coef k_t] / denominator`.

    Shao et al. 2024 (GRPO), eq. 3 and 4, as a loss, with `rho_t = exp(logp_t - old_t)`. `high > low` is DAPO's clip-higher
    (Yu et al. 2025, eq. 10). With `answer_T` the ratio is that of the whole answer, `exp(mean_t(logp_t - old_t))`, for each
    of its tokens: GSPO (Zheng et al. 2025, eq. 5 to 7).

    Args:
        logprobs_T: of the sampled tokens under the policy being trained.
        old_logprobs_T: the trainer's own before the first update on this roll-out (no gradient).
        ref_logprobs_T: under the frozen reference (no gradient).
        advantages_T: no gradient; with `answer_T` one number for all tokens of an answer, if it is to be GSPO's.
        weight_T, denominator: DeepSeekMath's mean over answers of means over tokens: 1 / length of the token's answer, and
            the number of answers. DAPO's mean over tokens (eq. 8): 1, and the number of tokens. Dr. GRPO's constant (Liu et
            al. 2025, section 3.2): 1, and answers times the longest that one may be. REINFORCE on whole answers (RLOO): 1,
            and the number of answers. All of the whole mini-batch.
        clip_range: low in (0, 1).
        kl_coef: beta >= 0.
        clip_range_high: high > 0; None: as low.
        kl_estimator: k3, `exp(ref - logp) - 1 - (ref - logp)`, or k2, `(logp - ref)^2 / 2`, whose gradient at samples of
            the policy is that of the KL divergence.
        answer_T: the number of the answer that a token belongs to, from 0 on; all tokens of an answer are here.
        importance_T: u >= 0, no gradient (`importance_weights`); None: 1.
        total_weight: sum of the weights over the whole mini-batch, which metrics are means by; None: the denominator.

    Returns:
        The loss, and over the tokens, weighted: `clip_fraction`, `approx_kl` (k3 to the old policy), `ratio_mean`, `kl_loss`
        (k); the greatest `ratio_max` and `ratio_error` (of |ratio - 1|).
    """
    high = clip_range if clip_range_high is None else clip_range_high
    log_ratio_T = logprobs_T - old_logprobs_T
    if answer_T is not None:
        log_ratio_T = answer_means(log_ratio_T, answer_T)[answer_T]
    ratio_T = torch.exp(log_ratio_T)
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1 - clip_range, 1 + high)
    surrogate_T = torch.maximum(plain_T, clipped_T)
    if importance_T is not None:
        surrogate_T = importance_T * surrogate_T
    loss = weighted_sum(surrogate_T, weight_T, denominator)
    kl_T = kl_k3(logprobs_T, ref_logprobs_T) if kl_estimator == "k3" else kl_k2(logprobs_T, ref_logprobs_T)
    loss = loss + kl_coef * weighted_sum(kl_T, weight_T, denominator)
    with torch.no_grad():
        total = denominator if total_weight is None else total_weight
        metrics = {
            "clip_fraction": float(weighted_sum((clipped_T > plain_T).float(), weight_T, total)),
            "approx_kl": float(weighted_sum(kl_k3(old_logprobs_T, logprobs_T), weight_T, total)),
            "ratio_mean": float(weighted_sum(ratio_T, weight_T, total)),
            "ratio_max": float(ratio_T.max()) if ratio_T.numel() else 0.0,
            "ratio_error": float((ratio_T - 1).abs().max()) if ratio_T.numel() else 0.0,
            "kl_loss": float(weighted_sum(kl_T, weight_T, total)),
        }
    return loss, metrics


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """`(log p - log q)^2 / 2` at a sample of p: biased, low variance, and of the right gradient (Schulman 2020, k2)."""
    return (logprobs - ref_logprobs).square() / 2


def answer_means(values_T: Tensor, answer_T: Tensor) -> Tensor:
    """The mean over the tokens of each answer.

    Args:
        answer_T: the number of the answer that a token belongs to; every number from 0 to the greatest occurs.
    """
    count = int(answer_T.max()) + 1 if answer_T.numel() else 0
    sums = values_T.new_zeros(count).index_add(0, answer_T, values_T)
    tokens = values_T.new_zeros(count).index_add(0, answer_T, torch.ones_like(values_T))
    return sums / tokens


def importance_weights(old_logprobs_T: Tensor, sampled_logprobs_T: Tensor, clip: float) -> Tensor:
    """`min(exp(old - sampled), clip)`: what an answer that another distribution drew counts for (Yao et al. 2025, TIS).

    Args:
        old_logprobs_T: the trainer's own before the first update; no gradient.
        sampled_logprobs_T: of the engine that drew the tokens.
        clip: > 0.
    """
    return torch.exp(old_logprobs_T - sampled_logprobs_T).clamp(max=clip)
