"""Dense attention on token trees: pieces of similar size are gathered into blocks, with a backward pass of their own.

On a CPU the fused kernels' bf16 backward is several times slower on short nodes than plain products that keep the attention
weights. A piece is a run of a node's tokens with the keys it sees: long nodes are cut, so that hardly more than the causal
half is computed and a sliding window's keys alone are read. Shapes: H query heads, G key/value heads, R = H / G, K head width,
T tokens, N pieces of a block, Q and S its padded query and key lengths.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from danlu.shapes import power_of_two, rounded
from danlu.tree import TreeBatch

# Measured on a 2-core CPU with AMX, 8 heads of width 32: what a block costs beside its cells, in cells (a query and a key).
BLOCK_COST = 5000
BLOCK_CELLS = 1 << 17
LARGEST_GROUP = 64
LONGEST_PIECE = 64
# Few sizes of blocks, so that their products' shapes come back (`danlu/shapes.py`): queries and pieces are powers of two.
LEAST_QUERIES = 16
KEY_MULTIPLE = 64
# Blocks with longer rows compute their weights again in the backward pass: memory grows with T, not with T squared.
KEPT_KEYS = 2048


@dataclass(frozen=True)
class Piece:
    """Queries `start:end` of the batch, the first at `position` of its path, and the runs of keys from `first_key` of the path."""

    start: int
    end: int
    position: int
    first_key: int
    runs: tuple[tuple[int, int], ...]

    @property
    def queries(self) -> int:
        return self.end - self.start

    @property
    def keys(self) -> int:
        return self.position - self.first_key + self.queries


def pieces(
    tree: TreeBatch, window: int | None = None, longest: int = LONGEST_PIECE, reads: Tensor | None = None
) -> list[Piece]:
    """Every node as pieces of at most `longest` queries, about equal within a node.

    Args:
        window: a query sees itself and the `window - 1` positions before it on its path; None: all of them.
        reads: indices of tokens; pieces reach from the first to the last of them, and there is none without any. None: all tokens.
    """
    asked = None if reads is None else sorted(reads.tolist())
    starts, ends, parents = (x.tolist() for x in (tree.node_start_N, tree.node_end_N, tree.node_parent_N))
    paths: list[tuple[tuple[int, int], ...]] = []
    before: list[int] = []
    found: list[Piece] = []
    for start, end, parent in zip(starts, ends, parents, strict=True):
        path = paths[parent] if parent >= 0 else ()
        depth = before[parent] + ends[parent] - starts[parent] if parent >= 0 else 0
        paths.append((*path, (start, end)))
        before.append(depth)
        count = -(-(end - start) // longest)
        cuts = [start + (end - start) * i // count for i in range(count + 1)]
        for low, high in pairwise(cuts):
            if asked is not None:
                inside = asked[bisect_left(asked, low) : bisect_left(asked, high)]
                if not inside:
                    continue
                low, high = inside[0], inside[-1] + 1
            position = depth + low - start
            first = max(0, position - window + 1) if window is not None else 0
            found.append(Piece(low, high, position, first, _cut((*path, (start, high)), first)))
    return found


def _cut(runs: Sequence[tuple[int, int]], skip: int) -> tuple[tuple[int, int], ...]:
    """The runs without their first `skip` tokens."""
    kept = []
    for start, end in runs:
        if skip < end - start:
            kept.append((start + skip, end))
        skip = max(0, skip - (end - start))
    return tuple(kept)


class Block:
    """Pieces that are attended together.

    Attributes:
        query_NQ, key_NS: indices of tokens and of keys; where padded, the number of them.
        mask_NQS: 0 where a query sees a key, -inf elsewhere; a padded query sees key 0.
        last_N: where a piece's last key stands on its path, the root's keys before it counted too.
    """

    def __init__(self, query_NQ: Tensor, key_NS: Tensor, mask_NQS: Tensor, last_N: Tensor) -> None:
        self.query_NQ, self.key_NS, self.mask_NQS = query_NQ, key_NS, mask_NQS
        self.last_N = last_N
        self._rows: dict[tuple[str, int], Tensor] = {}

    def queries(self, heads: int) -> Tensor:
        """`query_NQ` as rows of `[(T + 1) * H, K]`: `[N * H * Q]`."""
        return self._of("query_NQ", heads)

    def keys(self, groups: int) -> Tensor:
        """`key_NS` as rows of `[(before + T + 1) * G, K]`: `[N * G * S]`."""
        return self._of("key_NS", groups)

    def _of(self, name: str, heads: int) -> Tensor:
        known = self._rows.get((name, heads))
        if known is None:
            index: Tensor = getattr(self, name)
            every = torch.arange(heads, device=index.device)[:, None]
            known = self._rows[name, heads] = (index[:, None] * heads + every).flatten()
        return known

    def mask(self, dtype: torch.dtype) -> Tensor:
        """`[N, 1, Q, S]` in the dtype of the scores."""
        if self.mask_NQS.dtype != dtype:
            self.mask_NQS = self.mask_NQS.to(dtype)
        return self.mask_NQS[:, None]

    def bias(self, table_HS: Tensor, dtype: torch.dtype) -> Tensor:
        """`[N, H, 1, S]`: what the table adds to each key, less what it adds to a piece's last one: a softmax sees differences.

        So the keys that count have small numbers, in 16 bits too. Keys are the first ones of their paths: without a window.
        """
        own = table_HS[:, : self.key_NS.shape[1]]
        own = torch.nn.functional.pad(own, (0, self.key_NS.shape[1] - own.shape[1]))
        return (own[None] - table_HS[:, self.last_N].T[:, :, None])[:, :, None].to(dtype)


class Blocks:
    """All blocks of a batch for one window.

    Args:
        before: keys of a virtual root that stand before the batch's own; every query sees them, also past its window.
        reads: indices of the tokens whose rows are asked for; of the others, rows may be zero. None: all.
    """

    def __init__(
        self,
        tree: TreeBatch,
        window: int | None = None,
        longest: int = LONGEST_PIECE,
        before: int = 0,
        reads: Tensor | None = None,
    ) -> None:
        found = pieces(tree, window, longest, reads)
        self.tokens, self.whole = tree.tokens, reads is None
        device = tree.input_ids_T.device
        self.items = [_block(group, tree.tokens, window, device, before) for group in _groups(found, before)]
        # Every key is read by one piece alone: its gradient is a copy, not a sum.
        self.single = self.whole and sum(before + p.keys for p in found) == before + tree.tokens


def _groups(found: Sequence[Piece], before: int) -> list[list[Piece]]:
    """The pieces, sorted by size, cut where padding and the cost of blocks are least together."""
    order = sorted(found, key=lambda p: (_keys(p, before), p.queries))
    best = [0.0]
    cut: list[int] = []
    for end in range(1, len(order) + 1):
        spans, queries = _keys(order[end - 1], before), 0
        least, at = float("inf"), end - 1
        for start in range(end - 1, max(-1, end - 1 - LARGEST_GROUP), -1):
            queries = max(queries, order[start].queries)
            cells = power_of_two(end - start) * max(LEAST_QUERIES, power_of_two(queries)) * spans
            if start < end - 1 and cells > BLOCK_CELLS:
                break
            if best[start] + cells < least:
                least, at = best[start] + cells, start
        best.append(least + BLOCK_COST)
        cut.append(at)
    groups: list[list[Piece]] = []
    end = len(order)
    while end:
        groups.append(order[cut[end - 1] : end])
        end = cut[end - 1]
    return groups


def _keys(piece: Piece, before: int) -> int:
    return rounded(before + piece.keys, KEY_MULTIPLE)


def _block(group: Sequence[Piece], tokens: int, window: int | None, device: torch.device, before: int) -> Block:
    queries = max(LEAST_QUERIES, power_of_two(max(p.queries for p in group)))
    count, spans = power_of_two(len(group)), max(_keys(p, before) for p in group)
    query = torch.full((count, queries), tokens, dtype=torch.int64)
    key = torch.full((count, spans), before + tokens, dtype=torch.int64)
    for row, piece in enumerate(group):
        query[row, : piece.queries] = torch.arange(piece.start, piece.end)
        key[row, :before] = torch.arange(before)
        key[row, before : before + piece.keys] = torch.cat([torch.arange(*run) for run in piece.runs]) + before
    # Position of query i and key j on the path; the first key of a piece is at 0, the root's are before it.
    first_N = torch.tensor([p.position - p.first_key for p in group] + [0] * (count - len(group)))
    at_NQ1 = first_N[:, None, None] + torch.arange(queries)[:, None]
    at_S = torch.arange(spans) - before
    seen = at_S <= at_NQ1
    if window is not None:
        seen &= (at_S > at_NQ1 - window) | (at_S < 0)
    real = query[:, :, None] < tokens
    seen = torch.where(real, seen, torch.arange(spans) == 0)
    mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    last_N = torch.tensor([before + p.position + p.queries - 1 for p in group] + [0] * (count - len(group)))
    return Block(query.to(device), key.to(device), mask.to(device), last_N.to(device))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    scale: float,
    softcap: float | None = None,
    bias_HS: Tensor | None = None,
) -> Tensor:
    """query [H, T, K], key and value [G, before + T, K] -> [T, H, K] in the values' dtype.

    Query head h reads key head h // (H / G).
    Scores are `scale * q k`, with a cap `softcap * tanh(scale * q k / softcap)` (Gemma 2), plus `bias_HS` by the place of the key
    on its path (ALiBi; without a window). Products run in the values' dtype: under autocast rotary positions leave queries and
    keys in fp32.
    """
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = _BlockAttention.apply(query, key, value, blocks, scale, softcap, bias_HS)
    return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Blocks,
        scale: float,
        softcap: float | None,
        bias: Tensor | None,
    ) -> Tensor:
        heads, groups = query.shape[0], key.shape[0]
        # The scale goes into the queries, once, instead of into every score.
        factor = scale if softcap is None else scale / softcap
        flat = [_rows(query, value.dtype, factor), _rows(key, value.dtype), _rows(value, value.dtype)]
        empty = value.new_empty if blocks.whole else value.new_zeros
        out = empty((blocks.tokens + 1) * heads, value.shape[2])
        graded = any(ctx.needs_input_grad)
        kept: list[Tensor | None] = []
        for block in blocks.items:
            q, k, v = _gather(flat, block, heads, groups)
            probs, _ = _weights(q, k, block, softcap, bias)
            mixed = torch.bmm(probs, v)
            out.index_copy_(0, block.queries(heads), mixed.view(-1, mixed.shape[2]))
            kept.append(probs if graded and block.key_NS.shape[1] <= KEPT_KEYS and softcap is None else None)
        if graded:
            ctx.save_for_backward(*flat, *kept)
            ctx.blocks, ctx.factor, ctx.softcap, ctx.heads, ctx.groups = blocks, factor, softcap, heads, groups
            ctx.bias = bias
            ctx.dtypes = query.dtype, key.dtype, value.dtype
        return out[: blocks.tokens * heads].view(blocks.tokens, heads, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, heads, groups = ctx.saved_tensors, ctx.heads, ctx.groups
        flat, kept = saved[:3], saved[3:]
        grad_out = _rows(grads[0].transpose(0, 1), flat[2].dtype)
        grad_query = torch.empty_like(flat[0]) if ctx.blocks.whole else torch.zeros_like(flat[0])
        sums = flat[1].dtype if ctx.blocks.single else torch.promote_types(flat[1].dtype, torch.float32)
        grad_key = torch.zeros_like(flat[1], dtype=sums)
        grad_value = torch.zeros_like(flat[2], dtype=sums)
        for block, probs in zip(ctx.blocks.items, kept, strict=True):
            q, k, v = _gather(flat, block, heads, groups)
            slope = None
            if probs is None:
                probs, slope = _weights(q, k, block, ctx.softcap, ctx.bias, slope=True)
            do = grad_out.index_select(0, block.queries(heads)).view(*q.shape[:2], -1)
            ds = torch._softmax_backward_data(torch.bmm(do, v.transpose(1, 2)), probs, -1, probs.dtype)
            if slope is not None:
                ds.mul_(slope)
            grad_query.index_copy_(0, block.queries(heads), torch.bmm(ds, k).view(-1, q.shape[2]))
            rows = block.keys(groups)
            for total, left, right in ((grad_key, ds, q), (grad_value, probs, do)):
                part = torch.bmm(left.transpose(1, 2), right).view(-1, right.shape[2])
                if ctx.blocks.single:
                    total.index_copy_(0, rows, part)
                else:
                    total.index_add_(0, rows, part.to(sums))
        grad_query = _heads(grad_query, heads).to(ctx.dtypes[0]) * ctx.factor
        grad_key, grad_value = (
            _heads(g, groups).to(d) for g, d in zip((grad_key, grad_value), ctx.dtypes[1:], strict=True)
        )
        return grad_query, grad_key, grad_value, None, None, None, None


def _rows(x: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """`factor * x` [H, T, K] as rows [(T + 1) * H, K], the last token's zero: what padded places read and write."""
    heads, tokens, width = x.shape
    rows = x.new_empty(tokens + 1, heads, width, dtype=dtype)
    rows[tokens] = 0
    if factor == 1.0:
        rows[:tokens] = x.transpose(0, 1)
    else:
        torch.mul(x.transpose(0, 1), factor, out=rows[:tokens])
    return rows.view(-1, width)


def _heads(rows: Tensor, heads: int) -> Tensor:
    """[(T + 1) * H, K] -> [H, T, K]."""
    return rows[:-heads].view(-1, heads, rows.shape[1]).transpose(0, 1)


def _gather(flat: Sequence[Tensor], block: Block, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [N * G, R * Q, K], k and v [N * G, S, K]: heads that share a key are rows of one product."""
    query, key, value = flat
    batch = block.query_NQ.shape[0] * groups
    q = query.index_select(0, block.queries(heads)).view(batch, -1, query.shape[1])
    k = key.index_select(0, block.keys(groups)).view(batch, -1, key.shape[1])
    v = value.index_select(0, block.keys(groups)).view(batch, -1, value.shape[1])
    return q, k, v


def _weights(
    q: Tensor, k: Tensor, block: Block, softcap: float | None, bias_HS: Tensor | None = None, *, slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention weights [N * G, R * Q, S]; with a cap and `slope` also the derivative of the scores by the products."""
    scores = torch.bmm(q, k.transpose(1, 2))
    slopes = None
    if softcap is not None:
        scores.tanh_()
        slopes = (1 - scores.square()).mul_(softcap) if slope else None
        scores.mul_(softcap)
    count, length = block.query_NQ.shape
    by_head = scores.view(count, -1, length, scores.shape[2]).add_(block.mask(scores.dtype))
    if bias_HS is not None:
        by_head.add_(block.bias(bias_HS, scores.dtype))
    return torch.softmax(scores, dim=-1), slopes
