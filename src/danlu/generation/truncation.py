"""Which tokens a row may draw: top-k, top-p, min-p and typical sampling among its likeliest tokens.

Truncation mostly keeps a handful of tokens, so each row is cut among its NARROW likeliest, all rows at once; only a row whose
cut does not end there is looked at as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu.generation.protocol import SamplingParams

NARROW = 128
SORTED = 256  # so few keys are sorted
BINS = 2048
LEAST = -80.0  # a token so far below the likeliest one is never drawn: exp(-80) = 2e-35
STRIDE = 16
BLOCK = 512
NO_CHANCE = float("-inf")

Row = NDArray[np.floating]


def truncates(p: SamplingParams) -> bool:
    """Whether some tokens are cut off before the draw."""
    return not p.greedy and bool(p.top_k or p.top_p < 1.0 or p.min_p or p.typical_p < 1.0)


def truncate(scores_RV: Tensor, params: Sequence[SamplingParams]) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
    """Groups of rows with the scores of some tokens, -inf where one is cut off, and these tokens' ids (None: all, in order).

    Args:
        scores_RV: logits over temperature.
        params: one per row; top-k acts first, then top-p, min-p and typical, each on what the one before has left.
    """
    vocab = scores_RV.shape[1]
    scores, ids = likeliest(scores_RV, min(NARROW, vocab))
    kept, settled = _cut(scores, _Cuts.of(params, scores_RV), complete=vocab <= NARROW)
    done = settled.nonzero().squeeze(1)
    if len(done):
        yield done.tolist(), scores[done].masked_fill_(~kept[done], NO_CHANCE), ids[done]
    rest = (~settled).nonzero().squeeze(1)
    if len(rest):
        cut = np.stack(
            [cut_row(row.cpu().numpy(), params[r]) for r, row in zip(rest.tolist(), scores_RV[rest], strict=True)]
        )
        yield rest.tolist(), torch.from_numpy(cut).to(scores_RV.device), None


class _Cuts(NamedTuple):
    """What cuts each row, [R]: the limits, and of rows without top-k what only the whole row tells."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    typical: Tensor
    log_total: Tensor  # float64, log of the sum of exp(score); of rows with top-k 0
    entropy: Tensor  # in nats; of rows that typical sampling alone cuts, else 0

    @classmethod
    def of(cls, params: Sequence[SamplingParams], scores_RV: Tensor) -> _Cuts:
        device, vocab = scores_RV.device, scores_RV.shape[1]
        top_k = torch.tensor([p.top_k if p.top_k < vocab else 0 for p in params], device=device)
        others = torch.tensor([[p.top_p, p.min_p, p.typical_p] for p in params], dtype=torch.float64, device=device)
        top_p, min_p, typical = others.unbind(1)
        log_total, entropy = torch.zeros(2, len(params), dtype=torch.float64, device=device).unbind(0)
        # Top-k comes first, so that a row with it needs no other token's probability.
        free = (top_k == 0).nonzero().squeeze(1)
        if len(free):
            scores = scores_RV if len(free) == len(params) else scores_RV[free]
            probs = torch.softmax(scores, dim=-1)
            log_total[free] = _log_total(scores, probs, most_likely(scores)[:, None])
            alone = ((typical < 1) & (top_p == 1) & (min_p == 0))[free].nonzero().squeeze(1)
            if len(alone):
                entropy[free[alone]] = _row_sum(torch.special.entr(probs[alone]))
        return cls(top_k, top_p, min_p, typical, log_total, entropy)


def _cut(scores_RC: Tensor, cuts: _Cuts, *, complete: bool) -> tuple[Tensor, Tensor]:
    """Which candidates, the likeliest first, a row keeps; and for which rows nothing behind the last candidate could be kept.

    Those that equal the last kept one are kept: which of them came first would be a matter of chance.
    """
    free = cuts.top_k == 0
    kept = scores_RC > NO_CHANCE
    last = scores_RC.gather(1, (cuts.top_k - 1).clamp(0, scores_RC.shape[1] - 1)[:, None])
    kept &= (scores_RC >= last) | free[:, None]
    reached = scores_RC.masked_fill(~kept, NO_CHANCE)
    total = _log_total(reached, torch.softmax(reached, dim=-1), torch.zeros_like(last, dtype=torch.int64))
    total = torch.where(free, cuts.log_total, total)
    understood = free | ~kept[:, -1] | complete
    logprobs = scores_RC.double() - total[:, None]
    probs = logprobs.exp().masked_fill_(~kept, 0.0)

    before = torch.cumsum(probs, dim=-1) - probs
    inside = (before < cuts.top_p[:, None]).sum(-1, keepdim=True).clamp_(min=1)
    kept &= (scores_RC >= scores_RC.gather(1, inside - 1)) | (cuts.top_p == 1)[:, None]
    kept &= probs >= cuts.min_p[:, None] * probs[:, :1]
    settled = understood & (~kept[:, -1] | complete)
    if bool((cuts.typical < 1).any()):
        kept, ended = _cut_typical(logprobs, kept, cuts)
        settled |= ended
    return kept, settled


def _cut_typical(logprobs_RC: Tensor, kept: Tensor, cuts: _Cuts) -> tuple[Tensor, Tensor]:
    """Keeps the candidates whose surprise is nearest to the entropy, and says where that ends before the last candidate."""
    alone = (cuts.typical < 1) & (cuts.top_k == 0) & (cuts.top_p == 1) & (cuts.min_p == 0)
    logprobs = logprobs_RC.masked_fill(~kept, NO_CHANCE)
    logprobs = torch.where(alone[:, None], logprobs, torch.log_softmax(logprobs, dim=-1))
    probs = logprobs.exp()
    entropy = torch.where(alone, cuts.entropy, _row_sum(torch.special.entr(probs)))
    distance = (-logprobs - entropy[:, None]).abs()
    ordered, order = distance.sort(dim=-1)
    mass = torch.cumsum(probs.gather(1, order), dim=-1)
    count = (mass < cuts.typical[:, None]).sum(-1, keepdim=True)
    farthest = ordered.gather(1, count.clamp(max=distance.shape[1] - 1))
    # Tokens behind the last candidate are at least as surprising as it is.
    ended = alone & (count < distance.shape[1]).squeeze(1) & (farthest.squeeze(1) < -logprobs[:, -1] - entropy)
    return kept & ((distance <= farthest) | (cuts.typical == 1)[:, None]), ended


def _log_total(scores_RC: Tensor, probs_RC: Tensor, column_R1: Tensor) -> Tensor:
    """Log of the sum of exp(score), [R], read off one likely column: scores in their softmax are shifted by it."""
    return (scores_RC.gather(1, column_R1).double() - probs_RC.gather(1, column_R1).double().log()).squeeze(1)


def _row_sum(values_RC: Tensor) -> Tensor:
    """Sums of rows; a plain sum of one row alone is split among threads, and rounds otherwise than among others."""
    return torch.cumsum(values_RC, dim=-1, dtype=torch.float64)[:, -1]


def cut_row(scores_V: Row, p: SamplingParams) -> Row:
    """One row's scores with -inf where a token is cut off, in time linear in the vocabulary."""
    below = np.maximum(scores_V - scores_V.max(), LEAST)
    kept = below > LEAST
    if 0 < p.top_k < len(scores_V):
        kept &= scores_V >= np.partition(scores_V, -p.top_k)[-p.top_k]
    weights = np.exp(below) * kept
    if p.top_p < 1.0:
        kept &= below >= edge(below, weights, p.top_p)
    kept &= weights >= np.float64(p.min_p)
    if p.typical_p < 1.0:
        total = (weights * kept).sum(dtype=np.float64)
        surprise = np.log(total) - below
        probs = weights * kept / total
        nearness = -np.abs(surprise - probs @ surprise)
        kept &= nearness >= edge(nearness, probs, p.typical_p)
    return np.where(kept, scores_V, np.float32(NO_CHANCE))


def edge(keys: Row, weights: Row, mass: float) -> float:
    """The lowest key in the smallest set of highest keys that has this share of the weights.

    A histogram of the weights says in which bin it lies, and only that bin is sorted.
    """
    missing = mass * weights.sum(dtype=np.float64)
    while len(keys) > SORTED:
        low, high = keys.min(), keys.max()
        if high - low < 1e-30:
            return float(low)
        bins = ((high - keys) * ((BINS - 1) / (high - low))).astype(np.int32)
        reached = np.cumsum(np.bincount(bins, weights, BINS))
        at = min(int((reached < missing).sum()), int(bins.max()))
        missing -= reached[at - 1] if at else 0.0
        inside = bins == at
        keys, weights = keys[inside], weights[inside]
    order = np.argsort(-keys)
    count = int((np.cumsum(weights[order], dtype=np.float64) < missing).sum())
    return float(keys[order[min(count, len(order) - 1)]])


def likeliest(values_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest `count` values of each row in descending order, and their columns: [R, count] each."""
    rows, columns = values_RV.shape
    if columns < 4 * STRIDE * count:
        return torch.topk(values_RV, count, dim=-1)
    # The highest `count` values lie in the `count` groups with the highest maxima. A group is every `groups`-th column.
    groups = columns // STRIDE
    highest = values_RV[:, : groups * STRIDE].unflatten(1, (STRIDE, groups)).amax(1)
    best = torch.topk(highest, count, dim=-1, sorted=False).indices
    offsets = torch.arange(0, groups * STRIDE, groups, device=values_RV.device)
    rest = torch.arange(groups * STRIDE, columns, device=values_RV.device).expand(rows, -1)
    candidates = torch.cat([(best[:, :, None] + offsets).flatten(1), rest], dim=1)
    values, place = torch.topk(values_RV.gather(1, candidates), count, dim=-1)
    return values, candidates.gather(1, place)


def most_likely(values_RV: Tensor) -> Tensor:
    """The column of the highest value, [R]; of equals the first."""
    columns = values_RV.shape[1]
    if columns < 8 * BLOCK:
        return torch.argmax(values_RV, dim=-1)
    # Block by block: a maximum alone is found twenty times as fast as its place.
    whole = columns // BLOCK * BLOCK
    highest = values_RV[:, :whole].unflatten(1, (-1, BLOCK)).amax(-1)
    if whole < columns:
        highest = torch.cat([highest, values_RV[:, whole:].amax(-1, keepdim=True)], dim=1)
    # The last block repeats the last column, and the first of equals is still the first.
    inside = (highest.argmax(-1) * BLOCK)[:, None] + torch.arange(BLOCK, device=values_RV.device)
    inside.clamp_(max=columns - 1)
    column: Tensor = inside.gather(1, values_RV.gather(1, inside).argmax(-1, keepdim=True))
    return column.squeeze(1)
