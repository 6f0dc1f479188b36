"""Reward-model losses on comparisons."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise(
    chosen_B: Tensor, rejected_B: Tensor, denominator: float, *, margin_B: Tensor | None = None, centring: float = 0.0
) -> tuple[Tensor, dict[str, float]]:
    """`sum_b -logsigmoid(r_chosen - r_rejected - margin) / denominator`.

    Bradley-Terry as in Ouyang et al. 2022 (InstructGPT), eq. 1 with K = 2; the margin is that of Touvron et al. 2023
    (Llama 2), eq. 2; `centring * (r_chosen + r_rejected)^2` is that of Eisenstein et al. 2023, eq. 4, and keeps scores
    near 0. Written with logsigmoid: `log(sigmoid(x))` underflows in half precision.

    Args:
        chosen_B, rejected_B: scores, one pair per row.
        denominator: pairs in the whole step.
        margin_B: >= 0.
        centring: >= 0.
    """
    chosen, rejected = chosen_B.float(), rejected_B.float()
    gap = chosen - rejected
    wanted = gap if margin_B is None else gap - margin_B
    loss = -F.logsigmoid(wanted).sum() / denominator
    if centring:
        loss = loss + centring * (chosen + rejected).square().sum() / denominator
    with torch.no_grad():
        metrics = {
            "right": float((gap > 0).sum() + 0.5 * (gap == 0).sum()),
            "margin": float(gap.sum()),
            "pairs": float(gap.numel()),
        }
    return loss, metrics
