"""Next-token cross entropy (pre-training and SFT)."""

from __future__ import annotations

from torch import Tensor

from danlu.losses.reduce import weighted_sum


def cross_entropy(
    logprobs_T: Tensor, loss_weight_T: Tensor, denominator: float | Tensor
) -> tuple[Tensor, dict[str, float]]:
    """`-sum_t w_t log p_t / denominator`.

    Args:
        logprobs_T: log-probabilities of the trained tokens.
        loss_weight_T: their weights w >= 0.
        denominator: sum of the weights over the whole step.

    Returns:
        The loss (in nats per token once summed over the step's micro-batches), and `loss_sum`, the same before the division.
    """
    loss = weighted_sum(-logprobs_T, loss_weight_T, denominator)
    return loss, {"loss_sum": float(loss.detach()) * float(denominator)}
