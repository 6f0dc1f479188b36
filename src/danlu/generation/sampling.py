"""From logits to tokens: penalties and bans, temperature, truncation, and one draw a row.

A row's result is a function of its own logits, parameters, history and token index, bit for bit: never of what else is in the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from danlu.exceptions import GenerationFailed
from danlu.generation.penalties import adjust
from danlu.generation.protocol import SamplingParams, TopLogprobs
from danlu.generation.seeds import uniforms
from danlu.generation.truncation import BLOCK, NARROW, likeliest, most_likely, truncate, truncates

CACHED = 1 << 20  # logits that a CPU works on at once: a step's temporaries stay in its cache


class Sampled(NamedTuple):
    """One token per row, its log-probability in the distribution it was drawn from, and that distribution's likeliest tokens."""

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]


def sample(
    logits_SV: Tensor, params: Sequence[SamplingParams], steps: Sequence[int], history: Sequence[Sequence[int]]
) -> Sampled:
    """One token per row by inverse CDF, on the device of the logits.

    Args:
        logits_SV: one row per request, any float dtype; not changed.
        params: one per row. `SamplingParams` says in which order they act.
        steps: how many tokens each request has sampled before.
        history: prompt and sampled ids of each row, read only where `reads_history`. `array("q")` is read without a copy.

    Raises:
        GenerationFailed: logits that are no numbers.
    """
    together = len(params) if logits_SV.is_cuda else max(1, CACHED // logits_SV.shape[1])
    parts = [slice(i, i + together) for i in range(0, len(params), together)]
    sampled = [_sample(logits_SV[s], params[s], steps[s], history[s]) for s in parts]
    tokens, logprobs, tops = ([x for part in parts for x in part] for parts in zip(*sampled, strict=True))
    if any(x != x for x in logprobs):
        raise GenerationFailed(
            "the model's logits are not numbers",
            hint="its weights overflow this dtype, or its training has diverged",
        )
    return Sampled(tokens, logprobs, tops)


def _sample(
    logits_SV: Tensor, params: Sequence[SamplingParams], steps: Sequence[int], history: Sequence[Sequence[int]]
) -> Sampled:
    logits = adjust(logits_SV, params, steps, history)
    heat = torch.tensor([1.0 if p.greedy else p.temperature for p in params], device=logits.device)
    scores = logits / heat[:, None] if any(not p.greedy and p.temperature != 1.0 for p in params) else logits
    draws = torch.from_numpy(uniforms([p.seed for p in params], steps)).to(logits.device)
    tokens, logprobs = [0] * len(params), [0.0] * len(params)
    tops: list[TopLogprobs] = [()] * len(params)
    for kept in _kept(scores, params):
        index = torch.tensor(kept.rows, device=logits.device)
        own = [params[r] for r in kept.rows]
        probs = torch.softmax(kept.scores_RC, dim=-1)
        greedy = [p.greedy for p in own]
        columns = most_likely(kept.scores_RC) if any(greedy) else index
        if not all(greedy):
            drawn = inverse_cdf(probs, draws[index])
            columns = torch.where(torch.tensor(greedy, device=logits.device), columns, drawn) if any(greedy) else drawn
        picked = probs.gather(1, columns[:, None]).log()
        if kept.ids_RC is not None:
            columns = kept.ids_RC.gather(1, columns[:, None]).squeeze(1)
        values = zip(kept.rows, columns.tolist(), picked.squeeze(1).tolist(), strict=True)
        for row, token, logprob in values:
            tokens[row], logprobs[row] = token, logprob
        if any(p.logprobs for p in own):
            for row, top in zip(kept.rows, _top(probs, kept.ids_RC, own), strict=True):
                tops[row] = top
    return Sampled(tokens, logprobs, tops)


class Kept(NamedTuple):
    """Some rows of a call and the tokens they may draw; `ids_RC` are the columns' token ids where they are not 0 .. V-1."""

    rows: list[int]
    scores_RC: Tensor
    ids_RC: Tensor | None


def _kept(scores_SV: Tensor, params: Sequence[SamplingParams]) -> list[Kept]:
    cut = [i for i, p in enumerate(params) if truncates(p)]
    whole = [i for i, p in enumerate(params) if not truncates(p)]
    found = [Kept(whole, _select(scores_SV, whole), None)] if whole else []
    if cut:
        groups = truncate(_select(scores_SV, cut), [params[i] for i in cut])
        found += [Kept([cut[r] for r in rows], scores, ids) for rows, scores, ids in groups]
    return found


def _select(scores_SV: Tensor, rows: list[int]) -> Tensor:
    return scores_SV if len(rows) == len(scores_SV) else scores_SV[torch.tensor(rows, device=scores_SV.device)]


def inverse_cdf(probs_RC: Tensor, draws_R: Tensor) -> Tensor:
    """The column in which each draw falls, [R]. A column without probability is never drawn.

    Args:
        probs_RC: float32, not negative, with a positive sum in each row.
        draws_R: float64 in [0, 1).
    """
    columns = probs_RC.shape[1]
    whole = columns // BLOCK * BLOCK
    sums = probs_RC[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1) if whole else probs_RC[:, :0]
    if whole < columns:
        sums = torch.cat([sums, probs_RC[:, whole:].sum(-1, keepdim=True)], dim=1)
    block, rest = _place(sums, draws_R)
    first = (block * BLOCK)[:, None]
    inside = first + torch.arange(BLOCK, device=probs_RC.device)
    beyond = inside >= columns
    part = probs_RC.gather(1, inside.clamp_(max=columns - 1)).masked_fill_(beyond, 0.0)
    # Only where there are no numbers does this reach the end.
    return (first.squeeze(1) + _place(part, rest)[0]).clamp_(max=columns - 1)


def _place(weights_RC: Tensor, draws_R: Tensor) -> tuple[Tensor, Tensor]:
    """The column in which a draw falls, and where in it, in [0, 1)."""
    cdf = torch.cumsum(weights_RC, dim=-1, dtype=torch.float64)
    # A product that rounds up to the total would fall behind the last column that has a weight.
    target = torch.minimum(draws_R * cdf[:, -1], cdf[:, -1] * _BELOW_ONE)[:, None]
    column = torch.searchsorted(cdf, target, right=True).clamp_(max=weights_RC.shape[1] - 1)
    weight = weights_RC.gather(1, column).double()
    rest = (target - (cdf.gather(1, column) - weight)) / weight
    return column.squeeze(1), rest.squeeze(1).clamp_(0.0, _BELOW_ONE)


_BELOW_ONE = 1.0 - 2.0**-52


def _top(probs_RC: Tensor, ids_RC: Tensor | None, params: Sequence[SamplingParams]) -> list[TopLogprobs]:
    # One width for all, so that the order of equals does not depend on what other rows ask for.
    width = NARROW if max(p.logprobs for p in params) <= NARROW else probs_RC.shape[1]
    values, columns = likeliest(probs_RC, min(width, probs_RC.shape[1]))
    ids = columns if ids_RC is None else ids_RC.gather(1, columns)
    listed = zip(ids.tolist(), values.log().tolist(), params, strict=True)
    return [
        tuple((i, v) for i, v in zip(row[: p.logprobs], logps[: p.logprobs], strict=True) if v > float("-inf"))
        for row, logps, p in listed
    ]
