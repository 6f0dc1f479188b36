"""Group-relative policy optimisation: advantages from the answers to one prompt, and the clipped objective with a KL term."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from torch import Tensor

from danlu.losses.policy import clipped_policy, kl_k3
from danlu.losses.reduce import weighted_sum

EPS = 1e-4


def group_advantages(rewards_G: Sequence[float], *, eps: float = EPS) -> list[float]:
    """`A_i = (r_i - mean(r)) / (std(r) + eps)` over the answers to one prompt (Shao et al. 2024, section 4.1.2).

    The standard deviation is that of a sample (G - 1). A group of equal rewards has nothing to teach: exactly 0.

    Args:
        rewards_G: of G >= 2 answers.
        eps: > 0.
    """
    if max(rewards_G) == min(rewards_G):
        return [0.0] * len(rewards_G)
    mean, std = fmean(rewards_G), stdev(rewards_G)
    return [(r - mean) / (std + eps) for r in rewards_G]


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
) -> tuple[Tensor, dict[str, float]]:
    """`sum_t w_t [max(-A_t rho_t, -A_t clip(rho_t)) + kl_coef k3_t] / denominator` (Shao et al. 2024, eq. 3 and 4, as a loss).

    Args:
        logprobs_T, old_logprobs_T, advantages_T, clip_range: as in `clipped_policy`.
        ref_logprobs_T: under the frozen reference (no gradient).
        weight_T, denominator: DeepSeekMath's mean over answers of means over tokens: 1 / length of the token's answer, and
            the number of answers. DAPO's mean over tokens (Yu et al. 2025, eq. 8): 1, and the number of tokens. Both of
            the whole mini-batch.
        kl_coef: beta >= 0.
    """
    loss, metrics = clipped_policy(
        logprobs_T, old_logprobs_T, advantages_T, weight_T, denominator, clip_range=clip_range
    )
    kl = weighted_sum(kl_k3(logprobs_T, ref_logprobs_T), weight_T, denominator)
    return loss + kl_coef * kl, {**metrics, "kl_loss": float(kl.detach())}
