"""The clipped objective of methods without a critic: on the ratio of each token or of each answer, with a KL term."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from danlu.losses.policy import clipped_policy, kl_loss


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
    kl_estimator: Literal["k2", "k3"] = "k3",
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
        importance_T: u >= 0, no gradient (`losses.policy.importance`); None: 1.
        total_weight: sum of the weights over the whole mini-batch, which metrics are means by; None: the denominator.

    Returns:
        The loss, and over the tokens, weighted: `clip_fraction`, `approx_kl` (k3 to the old policy), `ratio_mean`, `kl_loss`
        (k); the greatest `ratio_max` and `ratio_error` (of |ratio - 1|).
    """
    loss, metrics = clipped_policy(
        logprobs_T,
        old_logprobs_T,
        advantages_T,
        weight_T,
        denominator,
        clip_range=clip_range,
        clip_range_high=clip_range_high,
        importance_T=importance_T,
        answer_T=answer_T,
        total_weight=total_weight,
    )
    kl = kl_loss(logprobs_T, ref_logprobs_T, weight_T, denominator, estimator=kl_estimator)
    total = denominator if total_weight is None else total_weight
    return loss + kl_coef * kl, {**metrics, "kl_loss": float(kl.detach()) * denominator / total}
