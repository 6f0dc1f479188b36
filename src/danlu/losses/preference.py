"""Reward-model losses: on pairs, on rankings, on scores, on single answers that were liked or not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise(
    chosen_B: Tensor,
    rejected_B: Tensor,
    denominator: float,
    *,
    margin_B: Tensor | None = None,
    centring: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """`sum_b -logsigmoid(r_chosen - r_rejected - margin) / denominator`.

    Bradley-Terry as in Ouyang et al. 2022 (InstructGPT), eq. 1 with K = 2; the margin is that of Touvron et al. 2023
    (Llama 2), eq. 2; `centring * (r_chosen + r_rejected)^2` is that of Eisenstein et al. 2023, eq. 4, and keeps scores
    near 0. With smoothing `e` the loss is `-(1 - e) logsigmoid(x) - e logsigmoid(-x)`: a share `e` of the comparisons is
    taken to be the wrong way round, and the gap that costs least is `logit(1 - e)` in place of infinity (Wang et al. 2024,
    Secrets of RLHF II; cDPO of Mitchell 2023 is the same). Written with logsigmoid: `log(sigmoid(x))` underflows in half
    precision.

    Args:
        chosen_B, rejected_B: scores, one pair per row.
        denominator: pairs in the whole step.
        margin_B: >= 0.
        centring: >= 0.
        label_smoothing: in [0, 0.5).
    """
    chosen, rejected = _precise(chosen_B), _precise(rejected_B)
    gap = chosen - rejected
    wanted = gap if margin_B is None else gap - margin_B
    loss = _cost(wanted, label_smoothing).sum() / denominator
    if centring:
        loss = loss + centring * (chosen + rejected).square().sum() / denominator
    return loss, _pair_metrics(gap)


def pairwise_tokens(
    scores_M: Tensor,
    ids_M: Tensor,
    lengths_A: Tensor,
    denominator: float,
    *,
    margin_B: Tensor | None = None,
    centring: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """`sum_b mean_j cost(r_chosen[j] - r_rejected[j] - margin) / denominator`, j from where the answers part to the end.

    The token-level form of Yao et al. 2023 (DeepSpeed-Chat): every token of an answer is scored, not only its last one. j
    counts the tokens of the answers of one pair from 0. It runs from the first place where chosen and rejected have different
    tokens (or one of them has ended) to the end of the longer one; beyond its end the shorter answer keeps the score of its
    last token, where DeepSpeed-Chat takes the scores of padding tokens. The prompt, which a pair shares, and tokens that both
    answers begin with have one score on both sides and are left out. Each pair weighs the same, however long it is. `cost`,
    margin and smoothing are those of `pairwise`; centring and the metrics look at the last token, by which the trained model
    scores.

    Args:
        scores_M, ids_M: scores and token ids of all tokens of all answers, one answer after the other, chosen before rejected.
        lengths_A: tokens of each answer, >= 1; an even number of answers. No two answers of a pair are equal.
        denominator: pairs in the whole step.
        margin_B, centring, label_smoothing: as for `pairwise`.
    """
    scores = _precise(scores_M)
    ends_A = lengths_A.cumsum(0)
    place_L = torch.arange(int(lengths_A.max()), device=scores.device)
    inside_AL = place_L < lengths_A[:, None]
    index_AL = (ends_A - lengths_A)[:, None] + torch.minimum(place_L, lengths_A[:, None] - 1)
    chosen_BL, rejected_BL = scores[index_AL].unflatten(0, (-1, 2)).unbind(1)
    ids_AL = torch.where(inside_AL, ids_M[index_AL], -1)
    differs_BL = ids_AL[0::2] != ids_AL[1::2]
    first_B = differs_BL.int().argmax(1)
    longest_B = lengths_A.view(-1, 2).amax(1)
    counts_BL = (place_L >= first_B[:, None]) & (place_L < longest_B[:, None])
    wanted_BL = chosen_BL - rejected_BL
    if margin_B is not None:
        wanted_BL = wanted_BL - margin_B[:, None]
    cost_BL = _cost(wanted_BL, label_smoothing) * counts_BL
    loss = (cost_BL.sum(1) / counts_BL.sum(1)).sum() / denominator
    chosen_B, rejected_B = scores[ends_A - 1].view(-1, 2).unbind(1)
    if centring:
        loss = loss + centring * (chosen_B + rejected_B).square().sum() / denominator
    return loss, _pair_metrics(chosen_B - rejected_B)


def kwise(
    scores_A: Tensor,
    ranks_A: Tensor,
    prompts_A: Tensor,
    denominator: float,
    *,
    centring: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """`sum over prompts of the mean over their pairs of -logsigmoid(r_better - r_worse), / denominator`.

    Ouyang et al. 2022 (InstructGPT), eq. 1: a prompt counts once, however many answers it has, and each answer is read once.
    Answers of equal rank are no pair. With two answers it is `pairwise`, also in `centring` and smoothing.

    Args:
        scores_A: of all answers of a batch.
        ranks_A: the higher the better; compared among the answers to one prompt.
        prompts_A: which prompt an answer belongs to: any number of its own. One without two answers of different rank
            adds nothing.
        denominator: prompts in the whole step.
        centring: >= 0.
        label_smoothing: in [0, 0.5).

    Returns:
        The loss, and as `pairwise` the sums `right` and `margin` over the prompts, each the mean over its pairs; `pairs`
        counts the prompts.
    """
    scores = _precise(scores_A)
    better, worse = ((prompts_A[:, None] == prompts_A) & (ranks_A[:, None] > ranks_A)).nonzero(as_tuple=True)
    _, prompt_P, pairs = prompts_A[better].unique(return_inverse=True, return_counts=True)
    share_P = 1 / pairs[prompt_P]
    gap_P = scores[better] - scores[worse]
    loss = (share_P * _cost(gap_P, label_smoothing)).sum() / denominator
    if centring:
        loss = loss + centring * (share_P * (scores[better] + scores[worse]).square()).sum() / denominator
    with torch.no_grad():
        metrics = {
            "right": float((share_P * ((gap_P > 0).float() + 0.5 * (gap_P == 0))).sum()),
            "margin": float((share_P * gap_P).sum()),
            "pairs": float(pairs.numel()),
        }
    return loss, metrics


def pointwise(scores_A: Tensor, targets_A: Tensor, denominator: float) -> tuple[Tensor, dict[str, float]]:
    """`sum_a (r_a - s_a)^2 / denominator`: the score that somebody gave is what the model should say.

    The regression of ChatLLaMA's reward model, and of Wang et al. 2024 (HelpSteer2). Scores of different prompts are
    compared, so they must have been given on one scale.

    Args:
        scores_A: of all answers of a batch.
        targets_A: the scores that were given.
        denominator: answers in the whole step.

    Returns:
        The loss, and the sum `error` of |r_a - s_a|.
    """
    gap = _precise(scores_A) - targets_A
    return gap.square().sum() / denominator, {"error": float(gap.detach().abs().sum())}


def unpaired(
    scores_A: Tensor, labels_A: Tensor, denominator: float, *, weights: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, dict[str, float]]:
    """`sum_a w_y * -logsigmoid(r_a if liked else -r_a) / denominator`: binary cross entropy on single answers.

    Logistic regression on the score. It is Bradley-Terry (`pairwise`) where the other answer's score is fixed at 0.

    Args:
        scores_A: of all answers of a batch; the logit of being liked.
        labels_A: 1 for a liked answer, 0 for one that was not.
        denominator: answers in the whole step.
        weights: of an answer that was not liked, and of a liked one; > 0. With `balanced_weights` both labels weigh the same.

    Returns:
        The loss, and the sum `right` of answers on the right side of 0 (at 0: half).
    """
    scores = _precise(scores_A)
    sign_A = 2 * labels_A - 1
    weight_A = torch.where(labels_A > 0, weights[1], weights[0])
    loss = -(weight_A * F.logsigmoid(sign_A * scores)).sum() / denominator
    with torch.no_grad():
        right = ((sign_A * scores > 0).float() + 0.5 * (scores == 0)).sum()
    return loss, {"right": float(right)}


def balanced_weights(disliked: int, liked: int) -> tuple[float, float]:
    """Weights of the two labels with which both weigh half, and a mean of 1 over the answers: n / (2 n_y).

    Args:
        disliked, liked: answers of each label, >= 1.
    """
    total = disliked + liked
    return total / (2 * disliked), total / (2 * liked)


def _precise(scores: Tensor) -> Tensor:
    """At least fp32."""
    return scores if scores.dtype == torch.float64 else scores.float()


def _cost(wanted: Tensor, label_smoothing: float) -> Tensor:
    cost = -F.logsigmoid(wanted)
    if label_smoothing:
        cost = (1 - label_smoothing) * cost - label_smoothing * F.logsigmoid(-wanted)
    return cost


@torch.no_grad()
def _pair_metrics(gap_B: Tensor) -> dict[str, float]:
    return {
        "right": float((gap_B > 0).float().sum() + 0.5 * (gap_B == 0).sum()),
        "margin": float(gap_B.sum()),
        "pairs": float(gap_B.numel()),
    }
