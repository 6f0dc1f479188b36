"""From logits to tokens. A draw is a function of (seed, token index), never of what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from danlu.generation.protocol import SamplingParams

_MASK = (1 << 64) - 1
COLDEST = 1e-3  # below, logits divided by the temperature overflow: the most likely token is taken


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from a counter-based generator (SplitMix64, Steele et al. 2014)."""
    x = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return float((x ^ (x >> 31)) >> 11) / float(1 << 53)


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers (run seed, step, sample, ...)."""
    digest = np.random.SeedSequence([p & _MASK for p in parts]).generate_state(2, np.uint32)
    return (int(digest[0]) << 31) ^ int(digest[1])


def sample(
    logits_SV: Tensor, params: Sequence[SamplingParams], steps: Sequence[int], history: Sequence[Sequence[int]]
) -> tuple[list[int], list[float]]:
    """One token per row by inverse CDF, and its log-probability under the distribution it was drawn from.

    Args:
        logits_SV: one row per request, any float dtype.
        params: one per row.
        steps: how many tokens each request has sampled before.
        history: prompt and sampled ids of each row, read only where a repetition penalty is set.
    """
    logits = logits_SV.float()
    if any(p.repetition_penalty != 1.0 for p in params):
        logits = _penalise(logits, params, history)
    greedy = torch.tensor([p.temperature < COLDEST for p in params])
    heat = torch.tensor([p.temperature if p.temperature >= COLDEST else 1.0 for p in params])
    logprobs = torch.log_softmax(logits / heat[:, None], dim=-1)
    if any(p.top_k or p.top_p < 1.0 for p in params):
        logprobs = _truncate(logprobs, params)
    draws = torch.tensor([uniform(p.seed, s) for p, s in zip(params, steps, strict=True)], dtype=torch.float64)
    cdf = torch.cumsum(torch.exp(logprobs).double(), dim=-1)
    # Scaled by the total, so that a rounded sum below 1 cannot push a draw past the last token.
    drawn = (
        torch.searchsorted(cdf, (draws * cdf[:, -1])[:, None], right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    )
    tokens = torch.where(greedy, logits.argmax(-1), drawn)
    picked = logprobs.gather(1, tokens[:, None]).squeeze(1)
    return tokens.tolist(), picked.tolist()


def _penalise(logits: Tensor, params: Sequence[SamplingParams], history: Sequence[Sequence[int]]) -> Tensor:
    logits = logits.clone()
    for row, (p, seen) in enumerate(zip(params, history, strict=True)):
        if p.repetition_penalty != 1.0:
            index = torch.tensor(sorted(set(seen)))
            values = logits[row, index]
            logits[row, index] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    return logits


def _truncate(logprobs: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    ordered, order = logprobs.sort(dim=-1, descending=True)
    before = torch.cumsum(torch.exp(ordered), dim=-1) - torch.exp(ordered)
    top_p = torch.tensor([p.top_p for p in params])[:, None]
    vocab = logprobs.shape[1]
    top_k = torch.tensor([p.top_k or vocab for p in params])[:, None]
    dropped = (before >= top_p) | (torch.arange(vocab)[None] >= top_k)
    dropped[:, 0] = False
    ordered = ordered.masked_fill(dropped, float("-inf"))
    kept = torch.full_like(logprobs, float("-inf")).scatter_(1, order, ordered)
    return torch.log_softmax(kept, dim=-1)
