"""The head functions of every language-model loss: log-probabilities and cross entropy from the trunk's output."""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.losses.logprobs import token_logprobs, weighted_nll
from danlu.models.root import TrunkOutput


def logprobs(
    out: TrunkOutput, index_M: Tensor, temperature: float = 1.0, *, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of the tokens at `index_M` given what stands before them, and the entropy there; both fp32 `[M]`.

    Under autocast the head runs in the autocast dtype, forward and backward.
    """
    weight, bias = out.head_weights()
    return token_logprobs(
        _predictors(out, index_M),
        weight,
        out.tree.input_ids_T[index_M],
        bias_V=bias,
        temperature=temperature,
        scale=out.rule.scale,
        softcap=out.rule.softcap,
        entropy=entropy,
        compiled=out.compiled,
    )


def nll(out: TrunkOutput, index_M: Tensor, weight_M: Tensor) -> Tensor:
    """`-sum_m w_m log p_m` of the tokens at `index_M`, one fp32 number; no gradient flows to the weights."""
    weight, bias = out.head_weights()
    targets = out.tree.input_ids_T[index_M]
    hidden = _predictors(out, index_M)
    return weighted_nll(
        hidden,
        weight,
        targets,
        weight_M,
        bias_V=bias,
        scale=out.rule.scale,
        softcap=out.rule.softcap,
        compiled=out.compiled,
    )


def _predictors(out: TrunkOutput, index_M: Tensor) -> Tensor:
    hidden = out.hidden_TD.index_select(0, out.tree.predictor_T[index_M])
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden
