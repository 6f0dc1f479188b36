"""Staying near a frozen model: the divergence from its remembered distributions."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-8  # a probability below it is none


def kept_logprobs(logits_MV: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[M, K]` of each row's `kept` likeliest tokens, and their ids `[M, K]`; K = min(kept, V), kept >= 1."""
    top = torch.log_softmax(logits_MV.float(), dim=-1).topk(min(kept, logits_MV.shape[-1]), dim=-1)
    return top.values, top.indices


def leads(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """By how many nats each target is likelier than the likeliest other token, `[M]`; negative where it is not the likeliest."""
    logits = logits_MV.float()
    own = logits.gather(-1, targets_M[:, None])
    others = logits.scatter(-1, targets_M[:, None], float("-inf"))
    return own.squeeze(-1) - others.amax(-1)


def kl_from_kept(logits_MV: Tensor, kept_MK: Tensor, ids_MK: Tensor) -> Tensor:
    """KL(p || q) of each row, `[M]` in nats, >= 0: p is remembered, q is `softmax(logits)`.

    `sum_k p_k (log p_k - log q_k) + p_rest (log p_rest - log q_rest)`: the tokens that are not kept count as one, which makes
    it a lower bound of the whole divergence (data processing inequality), and equal to it for K = V.
    Distillation by soft targets: Hinton et al. 2015, equation 1, at temperature 1.
    """
    q_MK = torch.log_softmax(logits_MV.float(), dim=-1).gather(-1, ids_MK)
    p_MK = kept_MK.exp()
    kl = (p_MK * (kept_MK - q_MK)).sum(-1)
    if kept_MK.shape[-1] == logits_MV.shape[-1]:
        return kl
    p_rest = (1.0 - p_MK.sum(-1)).clamp(min=FLOOR)
    q_rest = (1.0 - q_MK.exp().sum(-1)).clamp(min=FLOOR)
    return kl + p_rest * (p_rest.log() - q_rest.log())
