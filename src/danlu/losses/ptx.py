"""How a language-model loss is mixed into a policy's loss (PTX: Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

from typing import Literal

PtxForm = Literal["additive", "convex"]


def ptx_weights(form: PtxForm, coef: float) -> tuple[float, float]:
    """(weight of the policy's loss, weight of the language-model loss).

    additive: `policy + coef * ce` (Ouyang et al. 2022 and DeepSpeed-Chat with 27.8, OpenRLHF with 0.05). convex:
    `(1 - coef) * policy + coef * ce` (Coati with 0.9).

    Args:
        coef: > 0; for convex in (0, 1].
    """
    return (1.0, coef) if form == "additive" else (1.0 - coef, coef)


def gradient_share(ptx_norm: float, policy_norm: float) -> float:
    """`|g_ptx| / (|g_ptx| + |g_policy|)`, in [0, 1]; 0 if there is no gradient at all. Norms are those of the weighted losses."""
    total = ptx_norm + policy_norm
    return ptx_norm / total if total > 0 else 0.0
