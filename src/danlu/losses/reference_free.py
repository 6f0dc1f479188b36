"""Preference losses without a reference: they compare mean log-probabilities per token, so that length buys nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Found = tuple[Tensor, dict[str, float]]
# The likeliest a token may be on average before odds lose their meaning: a probability of 1 has infinite odds.
SUREST = -1e-6


def simpo(
    chosen_B: Tensor,
    rejected_B: Tensor,
    chosen_tokens_B: Tensor,
    rejected_tokens_B: Tensor,
    denominator: float,
    *,
    beta: float,
    gamma: float,
) -> Found:
    """`sum_b -logsigmoid(beta m_w - beta m_l - gamma) / denominator`, `m = log pi / tokens` (Meng et al. 2024, eq. 6).

    Args:
        chosen_B, rejected_B: log-probabilities of whole answers under the policy, summed over their tokens.
        chosen_tokens_B, rejected_tokens_B: tokens of the answers, >= 1.
        denominator: pairs in the whole step.
        beta: > 0; the paper's is 2 to 10.
        gamma: >= 0, by how much the chosen answer must lead; the paper's is 0.3 to 1.6.

    Returns:
        The loss, and sums over the pairs: `right` (a tie counts half), `margin` (beta (m_w - m_l)), the answers' mean
        log-probabilities per token, and their log-probabilities.
    """
    chosen_mean, rejected_mean = chosen_B / chosen_tokens_B, rejected_B / rejected_tokens_B
    margin = beta * (chosen_mean - rejected_mean)
    loss = -F.logsigmoid(margin - gamma).sum() / denominator
    return loss, _metrics(margin, chosen_mean, rejected_mean, chosen_B, rejected_B)


def orpo(
    chosen_B: Tensor,
    rejected_B: Tensor,
    chosen_tokens_B: Tensor,
    rejected_tokens_B: Tensor,
    denominator: float,
    *,
    weight: float,
) -> Found:
    """`sum_b [-m_w - weight logsigmoid(o_w - o_l)] / denominator`, `m = log pi / tokens`, `o = m - log(1 - exp m)`.

    Hong et al. 2024 (ORPO), eq. 3 to 7: cross entropy of the chosen answer, and the odds ratio of both.

    Args:
        chosen_B, rejected_B, chosen_tokens_B, rejected_tokens_B, denominator: as in `simpo`.
        weight: lambda > 0; the paper's is 0.1 to 1.

    Returns:
        As `simpo` with `margin` the log odds ratio `o_w - o_l`; and `nll`, the sum of `-m_w`. A mean log-probability above
        `SUREST` counts as that, and has no gradient in the odds.
    """
    chosen_mean, rejected_mean = chosen_B / chosen_tokens_B, rejected_B / rejected_tokens_B
    margin = _log_odds(chosen_mean) - _log_odds(rejected_mean)
    loss = (-chosen_mean - weight * F.logsigmoid(margin)).sum() / denominator
    metrics = _metrics(margin, chosen_mean, rejected_mean, chosen_B, rejected_B)
    return loss, {**metrics, "nll": -metrics["chosen_mean"]}


def answer_nll(chosen_B: Tensor, tokens_B: Tensor, denominator: float) -> Found:
    """`sum_b -(log pi_b / tokens_b) / denominator`: cross entropy per token, every answer counting the same.

    The term that Pang et al. 2024 (iterative RPO, eq. 1) add to DPO, so that chosen answers do not become less likely.

    Args:
        chosen_B: log-probabilities of whole answers under the policy, summed over their tokens.
        tokens_B: tokens of the answers, >= 1.
        denominator: pairs in the whole step.

    Returns:
        The loss, and as `nll` its sum over the pairs.
    """
    total = -(chosen_B / tokens_B).sum()
    return total / denominator, {"nll": float(total.detach())}


def _log_odds(mean_B: Tensor) -> Tensor:
    sure = mean_B.clamp(max=SUREST)
    return sure - torch.log(-torch.expm1(sure))


def _metrics(
    margin: Tensor, chosen_mean: Tensor, rejected_mean: Tensor, chosen_B: Tensor, rejected_B: Tensor
) -> dict[str, float]:
    with torch.no_grad():
        return {
            "right": float((margin > 0).sum() + 0.5 * (margin == 0).sum()),
            "margin": float(margin.sum()),
            "chosen_mean": float(chosen_mean.sum()),
            "rejected_mean": float(rejected_mean.sum()),
            "chosen_logprob": float(chosen_B.sum()),
            "rejected_logprob": float(rejected_B.sum()),
        }
