"""The head function of every language-model loss: log-probabilities of tokens from the trunk's output."""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.losses.logprobs import token_logprobs
from danlu.models.root import TrunkOutput


def logprobs(
    out: TrunkOutput, index_M: Tensor, temperature: float = 1.0, *, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of the tokens at `index_M` given what stands before them, and the entropy there; both fp32 `[M]`.

    Under autocast the head runs in the autocast dtype, forward and backward.
    """
    hidden = out.hidden_TD.index_select(0, out.tree.predictor_T[index_M])
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    targets = out.tree.input_ids_T[index_M]
    return token_logprobs(
        hidden, out.linear.weight, targets, bias_V=out.linear.bias, temperature=temperature, entropy=entropy
    )
