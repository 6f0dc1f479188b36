"""Direct preference optimisation: losses on the log-probabilities of two answers under a policy and its reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    denominator: float,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """`sum_b [-(1 - e) logsigmoid(h_b) - e logsigmoid(-h_b)] / denominator`, `h = beta (log pi_w/ref_w - log pi_l/ref_l)`.

    Rafailov et al. 2023, eq. 7; with label smoothing e it is the conservative form of Mitchell 2023 (cDPO), which takes a
    share e of the comparisons to be the wrong way round.

    Args:
        chosen_B, rejected_B: log-probabilities of whole answers under the policy, summed over their tokens.
        ref_chosen_B, ref_rejected_B: the same under the frozen reference (no gradient).
        denominator: pairs in the whole step.
        beta: > 0, how dear it is to leave the reference.
        label_smoothing: e in [0, 0.5).

    Returns:
        The loss, and sums over the pairs: `right` (a tie counts half), `margin` (h), the implicit rewards `beta (log pi - log ref)`
        of both answers, and their log-probabilities.
    """
    chosen_reward = beta * (chosen_B - ref_chosen_B)
    rejected_reward = beta * (rejected_B - ref_rejected_B)
    margin = chosen_reward - rejected_reward
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    with torch.no_grad():
        metrics = {
            "right": float((margin > 0).sum() + 0.5 * (margin == 0).sum()),
            "margin": float(margin.sum()),
            "chosen_reward": float(chosen_reward.sum()),
            "rejected_reward": float(rejected_reward.sum()),
            "chosen_logprob": float(chosen_B.sum()),
            "rejected_logprob": float(rejected_B.sum()),
        }
    return losses.sum() / denominator, metrics
