"""Kahneman-Tversky optimisation: a loss on single answers that somebody liked or did not."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_baseline(log_ratios_B: Tensor) -> float:
    """`max(0, mean_b log pi(y'_b | x_b) / ref(y'_b | x_b))`: a rough KL(pi || ref) (Ethayarajh et al. 2024, section 4).

    Args:
        log_ratios_B: of answers y' that were given to other prompts; no gradient; may be empty (then 0).
    """
    return max(0.0, float(log_ratios_B.double().mean())) if log_ratios_B.numel() else 0.0


def kto(
    policy_B: Tensor,
    ref_B: Tensor,
    liked_B: Tensor,
    baseline: float,
    denominator: float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """`sum_b [w_D (1 - sigmoid(r_b - beta z))  or  w_U (1 - sigmoid(beta z - r_b))] / denominator`, `r = beta (log pi - log ref)`.

    Ethayarajh et al. 2024 (KTO), eq. 8, the first for liked answers, the second for the others; z is `kl_baseline`.

    Args:
        policy_B, ref_B: log-probabilities of whole answers, summed over their tokens; the reference has no gradient.
        liked_B: bool.
        baseline: z >= 0, of the whole step.
        denominator: answers in the whole step.
        beta: > 0.
        desirable_weight, undesirable_weight: > 0; the paper keeps w_D n_D / (w_U n_U) between 1 and 4/3.

    Returns:
        The loss, and sums over the answers: `right` (a liked one above z, another one below; at z half), `liked`, and
        `liked_reward` and `other_reward`, each over its own answers.
    """
    reward = beta * (policy_B - ref_B)
    lead = reward - beta * baseline
    sign = torch.where(liked_B, 1.0, -1.0).to(lead.dtype)
    weight = torch.where(liked_B, desirable_weight, undesirable_weight).to(lead.dtype)
    loss = (weight * torch.sigmoid(-sign * lead)).sum() / denominator
    with torch.no_grad():
        metrics = {
            "right": float((sign * lead > 0).sum() + 0.5 * (lead == 0).sum()),
            "liked": float(liked_B.sum()),
            "liked_reward": float(reward[liked_B].sum()),
            "other_reward": float(reward[~liked_B].sum()),
        }
    return loss, metrics
