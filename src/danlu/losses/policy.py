"""The clipped policy objective of PPO, and estimators of the KL divergence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from danlu.losses.reduce import mean_by_answer, weighted_sum

KlEstimator = Literal["k1", "k2", "k3"]


def clipped_policy(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    weight_T: Tensor,
    denominator: float,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    importance_T: Tensor | None = None,
    answer_T: Tensor | None = None,
    total_weight: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """`sum_t w_t i_t max(-A_t rho_t, -A_t clip(rho_t, 1 - eps, 1 + eps_high)) / denominator`, `rho = exp(logp - old_logp)`.

    Schulman et al. 2017, eq. 7, with the sign turned for a minimiser. A wider upper range is DAPO's clip-higher (Yu et al.
    2025, eq. 10). With `dual_clip` c, where A < 0 the loss is at most -c A (Ye et al. 2020, eq. 5): a bad token whose ratio
    has exploded does not pull the whole step. The weight `i` stands for decoupled PPO (Hilton et al. 2022): the clipping is
    around the policy before the update, whatever policy sampled the token. With `answer_T` the ratio is that of the whole
    answer, `exp(mean_t(logp_t - old_t))`, for each of its tokens: GSPO (Zheng et al. 2025, eq. 5 to 7).

    Args:
        logprobs_T: of the sampled tokens under the policy being trained.
        old_logprobs_T: the trainer's own before the first update on this roll-out (no gradient).
        advantages_T: no gradient; with `answer_T` one number for all tokens of an answer, if it is to be GSPO's.
        weight_T: 1 for the tokens that count.
        denominator: sum of the weights over the whole mini-batch.
        clip_range: eps in (0, 1).
        clip_range_high: eps_high > 0; None: eps.
        dual_clip: c > 1; None: no bound.
        importance_T: i >= 0, no gradient, see `importance`; None: 1.
        answer_T: the number of the answer that a token belongs to, from 0 on; all tokens of an answer are here.
        total_weight: sum of the weights over the whole mini-batch, which metrics are means by; None: the denominator.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    log_ratio = logprobs_T - old_logprobs_T
    if answer_T is not None:
        log_ratio = mean_by_answer(log_ratio, answer_T)[answer_T]
    ratio = torch.exp(log_ratio)
    plain = -advantages_T * ratio
    clipped = -advantages_T * ratio.clamp(1 - clip_range, 1 + high)
    surrogate = torch.maximum(plain, clipped)
    bounded = torch.zeros_like(surrogate, dtype=torch.bool)
    if dual_clip is not None:
        bound = -dual_clip * advantages_T
        bounded = (advantages_T < 0) & (surrogate > bound)
        surrogate = torch.where(bounded, bound, surrogate)
    if importance_T is not None:
        surrogate = surrogate * importance_T
    loss = weighted_sum(surrogate, weight_T, denominator)
    with torch.no_grad():
        total = denominator if total_weight is None else total_weight
        metrics = {
            "clip_fraction": float(weighted_sum((clipped > plain).float(), weight_T, total)),
            "dual_clip_fraction": float(weighted_sum(bounded.float(), weight_T, total)),
            "approx_kl": float(weighted_sum(kl_k3(old_logprobs_T, logprobs_T), weight_T, total)),
            "ratio_mean": float(weighted_sum(ratio, weight_T, total)),
            "ratio_max": float(ratio.max()) if ratio.numel() else 0.0,
            "ratio_error": float((ratio - 1).abs().max()) if ratio.numel() else 0.0,
        }
    return loss, metrics


def importance(old_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, clip: float) -> Tensor:
    """`min(exp(old_t - behaviour_t), clip)`: what a token sampled by another policy (or by an engine whose numbers differ)
    counts under the policy before the update; truncated importance sampling (Ionides 2008; Yao et al. 2025).

    Args:
        old_logprobs_T: the trainer's own, before the update.
        behaviour_logprobs_T: the engine's own of what it sampled, when it sampled it.
        clip: >= 1.
    """
    return torch.exp(old_logprobs_T - behaviour_logprobs_T).clamp(max=clip)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """`log p - log q` at a sample of p: unbiased for KL(p || q), high variance, may be negative (Schulman 2020, k1)."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """`(log p - log q)^2 / 2` at a sample of p: biased, never negative, low variance (Schulman 2020, k2)."""
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """`(q/p - 1) - log(q/p)` at a sample of p: unbiased, never negative, low variance (Schulman 2020, k3)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """The estimator by name."""
    return {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[estimator](logprobs, ref_logprobs)


def kl_loss(
    logprobs_T: Tensor,
    ref_logprobs_T: Tensor,
    weight_T: Tensor,
    denominator: float,
    *,
    estimator: KlEstimator,
) -> Tensor:
    """`sum_t w_t k(logp_t, ref_t) / denominator`, to be differentiated: the KL in the loss and not in the reward.

    What is a good estimate need not have a good gradient (Liu et al. 2025, "Rethinking KL regularization in RLHF"). At
    samples of p, the gradient of k2 is `log(p/q) grad log p`, whose mean is the gradient of KL(p || q), as that of k1 in the
    reward is. That of k3 is `(1 - q/p) grad log p`, whose mean is the gradient of KL(q || p): the same near q = p, weaker
    where p has grown, and unbounded where p has shrunk. That of k1 has mean 0 and holds nothing back: it is for rewards only.
    Summed over the tokens of an answer neither is the gradient of the whole answer's KL: what a token does to the KL of later
    tokens is left out, which the KL in the reward does not.

    Args:
        logprobs_T: of the policy being trained, with gradient.
        ref_logprobs_T: of the reference.
        weight_T, denominator: as for `clipped_policy`.
        estimator: k2 or k3.
    """
    assert estimator != "k1", "settings refuse it"
    return weighted_sum(kl_estimate(logprobs_T, ref_logprobs_T, estimator), weight_T, denominator)
