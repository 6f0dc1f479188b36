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


def kwise(
    scores_A: Tensor, ranks_A: Tensor, prompts_A: Tensor, denominator: float, *, centring: float = 0.0
) -> tuple[Tensor, dict[str, float]]:
    """`sum over prompts of the mean over their pairs of -logsigmoid(r_better - r_worse), / denominator`.

    Ouyang et al. 2022 (InstructGPT), eq. 1: a prompt counts once, however many answers it has, and each answer is read once.
    Answers of equal rank are no pair. With two answers it is `pairwise`, also in `centring`.

    Args:
        scores_A: of all answers of a batch.
        ranks_A: the higher the better; compared among the answers to one prompt.
        prompts_A: which prompt an answer belongs to: any number of its own. Each has at least two answers of different rank.
        denominator: prompts in the whole step.
        centring: >= 0.

    Returns:
        The loss, and as `pairwise` the sums `right` and `margin` over the prompts, each the mean over its pairs; `pairs`
        counts the prompts.
    """
    scores = scores_A.float()
    better, worse = ((prompts_A[:, None] == prompts_A) & (ranks_A[:, None] > ranks_A)).nonzero(as_tuple=True)
    _, prompt_P, pairs = prompts_A[better].unique(return_inverse=True, return_counts=True)
    share_P = 1 / pairs[prompt_P]
    gap_P = scores[better] - scores[worse]
    loss = -(share_P * F.logsigmoid(gap_P)).sum() / denominator
    if centring:
        loss = loss + centring * (share_P * (scores[better] + scores[worse]).square()).sum() / denominator
    with torch.no_grad():
        metrics = {
            "right": float((share_P * ((gap_P > 0).float() + 0.5 * (gap_P == 0))).sum()),
            "margin": float((share_P * gap_P).sum()),
            "pairs": float(pairs.numel()),
        }
    return loss, metrics
