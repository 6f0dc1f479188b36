"""Direct preference optimisation: losses on the log-probabilities of two answers under a policy and its reference.

All are functions of `h = log pi_w/ref_w - log pi_l/ref_l`: of how much more the policy has come to prefer the chosen answer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Found = tuple[Tensor, dict[str, float]]


def sigmoid(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    denominator: float,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Found:
    """`sum_b [-(1 - e) logsigmoid(beta h_b) - e logsigmoid(-beta h_b)] / denominator`.

    Rafailov et al. 2023, eq. 7; with label smoothing e it is the conservative form of Mitchell 2023 (cDPO), which takes a
    share e of the comparisons to be the wrong way round.

    Args:
        chosen_B, rejected_B: log-probabilities of whole answers under the policy, summed over their tokens.
        ref_chosen_B, ref_rejected_B: the same under the frozen reference (no gradient).
        denominator: pairs in the whole step.
        beta: > 0, how dear it is to leave the reference.
        label_smoothing: e in [0, 0.5).

    Returns:
        The loss, and sums over the pairs: `right` (a tie counts half), `margin` (beta h), the implicit rewards
        `beta (log pi - log ref)` of both answers, and their log-probabilities.
    """
    margin, metrics = _margin(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta)
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses.sum() / denominator, metrics


def robust(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    denominator: float,
    *,
    beta: float,
    flip_rate: float,
) -> Found:
    """`sum_b [-(1 - e) logsigmoid(beta h_b) + e logsigmoid(-beta h_b)] / (1 - 2 e) / denominator`.

    Chowdhury et al. 2024 (rDPO), section 3: where a share e of the comparisons was turned round by chance, its mean is the
    sigmoid loss on the true ones. Not bounded below: a pair that the policy is sure of loses more than one against it.

    Args:
        chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, denominator, beta: as in `sigmoid`.
        flip_rate: e in [0, 0.5).

    Returns:
        As `sigmoid`.
    """
    margin, metrics = _margin(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta)
    losses = -(1 - flip_rate) * F.logsigmoid(margin) + flip_rate * F.logsigmoid(-margin)
    return losses.sum() / (1 - 2 * flip_rate) / denominator, metrics


def ipo(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    denominator: float,
    *,
    beta: float,
) -> Found:
    """`sum_b (h_b - 1 / (2 beta))^2 / denominator`.

    Azar et al. 2023, eq. 17, with beta for tau: h goes to a finite number, also where all agree. On sums over an answer's
    tokens, as in the paper; not on means, as some code has it.

    Args:
        chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, denominator: as in `sigmoid`.
        beta: > 0; the margin `beta h` is drawn to 1/2.

    Returns:
        As `sigmoid`.
    """
    margin, metrics = _margin(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta)
    return ((margin - 0.5) / beta).square().sum() / denominator, metrics


def hinge(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    denominator: float,
    *,
    beta: float,
) -> Found:
    """`sum_b max(0, 1 - beta h_b) / denominator`.

    SLiC's calibration loss (Zhao et al. 2023) on ratios to the reference: Liu et al. 2024 (RSO), "hinge-norm".

    Args:
        chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, denominator: as in `sigmoid`.
        beta: > 0; from a margin of 1 on a pair teaches nothing more.

    Returns:
        As `sigmoid`.
    """
    margin, metrics = _margin(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta)
    return F.relu(1 - margin).sum() / denominator, metrics


def _margin(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, beta: float
) -> tuple[Tensor, dict[str, float]]:
    """`beta h`, and the sums that all of these losses report."""
    chosen_reward = beta * (chosen_B - ref_chosen_B)
    rejected_reward = beta * (rejected_B - ref_rejected_B)
    margin = chosen_reward - rejected_reward
    with torch.no_grad():
        metrics = {
            "right": float((margin > 0).sum() + 0.5 * (margin == 0).sum()),
            "margin": float(margin.sum()),
            "chosen_reward": float(chosen_reward.sum()),
            "rejected_reward": float(rejected_reward.sum()),
            "chosen_logprob": float(chosen_B.sum()),
            "rejected_logprob": float(rejected_B.sum()),
        }
    return margin, metrics
