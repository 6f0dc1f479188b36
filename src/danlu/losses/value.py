"""The clipped value loss of PPO's critic, and how much the critic knows."""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.losses.reduce import weighted_sum


def clipped_value(
    values_T: Tensor,
    old_values_T: Tensor,
    returns_T: Tensor,
    weight_T: Tensor,
    denominator: float,
    *,
    clip_range: float = 0.2,
) -> tuple[Tensor, dict[str, float]]:
    """`0.5 sum_t w_t max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / denominator`.

    The form of the PPO code that Ouyang et al. 2022 and DeepSpeed-Chat use.

    Args:
        values_T: of the critic being trained, at the state before each action.
        old_values_T: before the first update on this roll-out.
        returns_T: targets.
        weight_T, denominator: as for the policy.
        clip_range: eps > 0, in units of the reward.
    """
    clipped = torch.clamp(values_T, old_values_T - clip_range, old_values_T + clip_range)
    squared = torch.maximum((values_T - returns_T).square(), (clipped - returns_T).square())
    loss = 0.5 * weighted_sum(squared, weight_T, denominator)
    with torch.no_grad():
        metrics = {"value_error": float(weighted_sum((values_T - returns_T).square(), weight_T, denominator))}
    return loss, metrics


def explained_variance(values_T: Tensor, returns_T: Tensor) -> float:
    """`1 - Var(R - V) / Var(R)`: 1 for a critic that foresees everything, 0 for one that says the same everywhere, below 0 for
    one that is worse than that. Returns that are all equal leave nothing to explain: 0.
    """
    values, returns = values_T.double(), returns_T.double()
    total = float(returns.var(unbiased=False))
    return 1.0 - float((returns - values).var(unbiased=False)) / total if total > 0 else 0.0
