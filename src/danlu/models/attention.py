"""The one attention function: token trees for training and prefill, slots for decoding.

It is registered with transformers' `AttentionInterface`, so that Hugging Face layers call it. What to attend to (a "plan")
travels as the call argument `danlu_plan`, never in a global: activation checkpointing recomputes later.

On a tree, nodes of similar length are gathered into dense blocks; a block's own backward recomputes nothing and keeps the
attention weights, which on short nodes is faster than the fused kernels of a CPU in bf16. Shapes: H query heads, G key/value
heads, K head width, T tokens, N nodes of a block, Q and S its padded query and key lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from danlu.exceptions import ModelError
from danlu.tree import TreeBatch

NAME = "danlu"
PLAN_ARGUMENT = "danlu_plan"
# A block may waste this share of its area on padding before a new block is opened (measured: below, kernels get too small).
MAX_WASTE = 0.3
MAX_BLOCK_AREA = 1 << 21


class AttentionPlan(Protocol):
    """What a plan must do: attend, for one layer."""

    longest: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [H, T, K], key and value [G, T, K] -> [T, H, K]."""
        ...


@dataclass(frozen=True)
class Block:
    """Nodes that are attended together.

    query_NQ, key_NS: token indices, padding repeats index 0; valid_M: which of the N * Q entries are real;
    valid_index_M: their token indices; mask_NQS: 0 where attention is allowed, -inf elsewhere.
    """

    query_NQ: Tensor
    key_NS: Tensor
    valid_M: Tensor
    valid_index_M: Tensor
    mask_NQS: Tensor

    def to(self, device: torch.device) -> Block:
        return Block(*(t.to(device) for t in vars(self).values()))


class TreePlan:
    """The blocks of a batch. Made once per batch, used by every layer, forward and backward."""

    def __init__(self, tree: TreeBatch, role: str | None = None) -> None:
        self.role = role  # adapters are selected by it again when activation checkpointing recomputes a layer
        self.tokens = tree.tokens
        self.longest = int(tree.position_ids_T.max()) + 1
        device = tree.input_ids_T.device
        self.blocks = [b.to(device) for b in _blocks(tree)]
        # Called with (layer, key [G, T, K], value) by prefill, which keeps them; training leaves it empty.
        self.on_key_value: Callable[[int, Tensor, Tensor], None] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.on_key_value is not None:
            self.on_key_value(layer, key, value)
        # Under autocast rotary positions leave queries and keys in fp32 and values in bf16: attend in the values' dtype.
        with torch.autocast(query.device.type, enabled=False):
            out: Tensor = _TreeAttention.apply(query.to(value.dtype), key.to(value.dtype), value, self.blocks, scale)
        return out


def _blocks(tree: TreeBatch) -> list[Block]:
    starts, ends = tree.node_start_N.tolist(), tree.node_end_N.tolist()
    paths = [tree.path(n) for n in range(tree.nodes)]
    own = [ends[n] - starts[n] for n in range(tree.nodes)]
    keys = [sum(own[p] for p in path) for path in paths]
    order = sorted(range(tree.nodes), key=lambda n: (own[n], keys[n]))
    groups: list[list[int]] = []
    for node in order:
        if groups and _fits(groups[-1], node, own, keys):
            groups[-1].append(node)
        else:
            groups.append([node])
    return [_block(group, paths, starts, ends, own, keys) for group in groups]


def _fits(group: Sequence[int], node: int, own: Sequence[int], keys: Sequence[int]) -> bool:
    members = [*group, node]
    area = len(members) * max(own[n] for n in members) * max(keys[n] for n in members)
    used = sum(own[n] * keys[n] for n in members)
    small = area <= 1 << 15  # tiny blocks cost a kernel launch each: take the padding instead
    return area <= MAX_BLOCK_AREA and (small or used >= (1 - MAX_WASTE) * area)


def _block(
    group: Sequence[int],
    paths: Sequence[Sequence[int]],
    starts: Sequence[int],
    ends: Sequence[int],
    own: Sequence[int],
    keys: Sequence[int],
) -> Block:
    queries, spans = max(own[n] for n in group), max(keys[n] for n in group)
    query = torch.zeros(len(group), queries, dtype=torch.int64)
    key = torch.zeros(len(group), spans, dtype=torch.int64)
    # A padded query row attends to key 0 only: finite numbers, thrown away below.
    mask = torch.full((len(group), queries, spans), float("-inf"))
    mask[:, :, 0] = 0.0
    valid = torch.zeros(len(group), queries, dtype=torch.bool)
    for row, node in enumerate(group):
        query[row, : own[node]] = torch.arange(starts[node], ends[node])
        key[row, : keys[node]] = torch.cat([torch.arange(starts[p], ends[p]) for p in paths[node]])
        before = keys[node] - own[node]
        mask[row, : own[node], : keys[node]] = torch.triu(
            torch.full((own[node], keys[node]), float("-inf")), diagonal=before + 1
        )
        valid[row, : own[node]] = True
    flat = valid.flatten().nonzero().squeeze(1)
    return Block(query, key, flat, query.flatten()[flat], mask)


class _TreeAttention(torch.autograd.Function):
    """softmax(q k^T * scale + mask) v over the blocks of a plan; grouped-query heads share keys and values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], scale: float) -> Tensor:
        heads, tokens, width = query.shape
        groups = key.shape[0]
        query_T, key_T, value_T = (x.transpose(0, 1).contiguous() for x in (query, key, value))
        out = query_T.new_empty(tokens, heads, width)
        kept: list[Tensor] = []
        for block in blocks:
            q, k, v = _gather(query_T, key_T, value_T, block, groups)
            probs = _probs(q, k, block, scale)
            mixed = torch.matmul(probs, v)  # [N, G, R*Q, K]
            out[block.valid_index_M] = _rows(mixed, block, heads)[block.valid_M]
            kept.append(probs)
        ctx.save_for_backward(query_T, key_T, value_T, *kept)
        ctx.blocks, ctx.scale, ctx.groups = blocks, scale, groups
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_T, key_T, value_T, *kept = ctx.saved_tensors
        heads, width = query_T.shape[1:]
        grad_out = grads[0].contiguous()
        grad_query = torch.empty_like(query_T)
        # Several nodes may share an ancestor, so its gradients are added up, in fp32.
        grad_key = torch.zeros(key_T.shape, dtype=torch.float32, device=key_T.device)
        grad_value = torch.zeros_like(grad_key)
        for block, probs in zip(ctx.blocks, kept, strict=True):
            q, k, v = _gather(query_T, key_T, value_T, block, ctx.groups)
            dense = torch.zeros(block.query_NQ.numel(), heads, width, dtype=grad_out.dtype, device=grad_out.device)
            dense[block.valid_M] = grad_out[block.valid_index_M]
            do = _fold(dense.view(*block.query_NQ.shape, heads, width), ctx.groups)
            dp = torch.matmul(do, v.transpose(-1, -2))
            ds = torch._softmax_backward_data(dp, probs, -1, probs.dtype).mul_(ctx.scale)
            grad_query[block.valid_index_M] = _rows(torch.matmul(ds, k), block, heads)[block.valid_M]
            flat = block.key_NS.flatten()
            for total, part in (
                (grad_key, torch.matmul(ds.transpose(-1, -2), q)),
                (grad_value, torch.matmul(probs.transpose(-1, -2), do)),
            ):
                total.index_add_(0, flat, part.transpose(1, 2).reshape(flat.numel(), ctx.groups, width).float())
        back = [g.to(query_T.dtype).transpose(0, 1) for g in (grad_query, grad_key, grad_value)]
        return back[0], back[1], back[2], None, None


def _fold(x: Tensor, groups: int) -> Tensor:
    """[N, Q, H, K] -> [N, G, (H/G)*Q, K]: heads that share a key become rows of one product."""
    n, q, heads, width = x.shape
    return x.view(n, q, groups, heads // groups, width).permute(0, 2, 3, 1, 4).reshape(n, groups, -1, width)


def _gather(
    query_T: Tensor, key_T: Tensor, value_T: Tensor, block: Block, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    n, s = block.key_NS.shape
    flat = block.key_NS.flatten()
    q = _fold(query_T.index_select(0, block.query_NQ.flatten()).view(*block.query_NQ.shape, *query_T.shape[1:]), groups)
    k = key_T.index_select(0, flat).view(n, s, groups, -1).transpose(1, 2)
    v = value_T.index_select(0, flat).view(n, s, groups, -1).transpose(1, 2)
    return q, k, v


def _probs(q: Tensor, k: Tensor, block: Block, scale: float) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scale)
    n, groups, _, spans = scores.shape
    folded = scores.view(n, groups, -1, block.query_NQ.shape[1], spans)
    folded += block.mask_NQS[:, None, None].to(scores.dtype)
    return torch.softmax(scores, dim=-1)


def _rows(x: Tensor, block: Block, heads: int) -> Tensor:
    """[N, G, (H/G)*Q, K] -> [N*Q, H, K]."""
    n, groups, _, width = x.shape
    length = block.query_NQ.shape[1]
    return x.view(n, groups, heads // groups, length, width).permute(0, 3, 1, 2, 4).reshape(n * length, heads, width)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' layers call. query [1, H, T, K], key and value [1, G, T, K] -> [1, T, H, K].

    Raises:
        ModelError: called without a plan, with attention dropout, or with a variant that would be silently wrong here.
    """
    plan: AttentionPlan | None = kwargs.get(PLAN_ARGUMENT)
    if plan is None:
        raise ModelError(
            f"{type(module).__name__} was called without '{PLAN_ARGUMENT}'", hint="use RootModel or Engine"
        )
    if dropout:
        raise ModelError(
            "attention dropout is not supported on token trees", hint="set attention_dropout to 0 in config.json"
        )
    for name in ("softcap", "s_aux", "sinks"):
        if kwargs.get(name) is not None:
            raise ModelError(f"attention option '{name}' of {type(module).__name__} is not supported on token trees")
    window = kwargs.get("sliding_window")
    if window and plan.longest > window:
        raise ModelError(
            f"{plan.longest} tokens exceed the sliding window of {window}, which token trees do not cut yet"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = getattr(module, "layer_idx", 0)
    return plan.attend(layer, query[0], key[0], value[0], scale).unsqueeze(0), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The plan carries all there is to know, so transformers builds no mask."""


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, _no_mask)
