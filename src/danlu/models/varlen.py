"""Token trees on CUDA, through `torch.nn.attention.varlen.varlen_attn`: a sequence per node, its ancestors' keys before its own.

The kernel aligns a causal mask with the end of the keys, so that a node sees its ancestors fully and itself causally. Keys
that several nodes share are gathered once for each; the gather's backward pass adds their gradients up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.models.blocks import pieces
from danlu.tree import TreeBatch

Kernel = Callable[..., Tensor]
WIDEST_HEAD = 256


@dataclass(frozen=True)
class Sequences:
    """Queries and keys of the nodes, end to end.

    Attributes:
        key_index_M: index of every key; None if it is that of the queries (no node has a parent).
        query_ends, key_ends: int32 `[N + 1]`, cumulative lengths, from 0.
        most_queries, most_keys: the longest of each.
    """

    key_index_M: Tensor | None
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, tree: TreeBatch, before: int = 0) -> Sequences:
        """Nodes in their order, which is that of the queries.

        Args:
            before: keys of a virtual root that stand before the batch's own; every node sees them first.
        """
        nodes = pieces(tree, longest=tree.tokens)
        device = tree.input_ids_T.device
        root = torch.arange(before)
        parts = [[root, *(torch.arange(*run) + before for run in node.runs)] for node in nodes]
        index = torch.cat([part for node in parts for part in node])
        lengths = torch.tensor([[node.queries for node in nodes], [before + node.keys for node in nodes]])
        ends = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).to(device, torch.int32)
        alone = not before and index.numel() == tree.tokens
        return cls(None if alone else index.to(device), ends[0], ends[1], int(lengths[0].max()), int(lengths[1].max()))


def kernel() -> Kernel | None:
    """torch's function, if this torch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    found: Any = varlen_attn
    return found if "window_size" in inspect.signature(found).parameters else None


def fits(value: Tensor, softcap: float | None) -> bool:
    """Whether the kernel can do it: 16-bit values on a CUDA card of compute capability 8 or more, no cap on scores."""
    return (
        value.is_cuda
        and value.dtype in (torch.float16, torch.bfloat16)
        and softcap is None
        and value.shape[2] <= WIDEST_HEAD
        and value.shape[2] % 8 == 0
        and torch.cuda.get_device_capability(value.device) >= (8, 0)
        and kernel() is not None
    )


def attend(query: Tensor, key: Tensor, value: Tensor, nodes: Sequences, scale: float, window: int | None) -> Tensor:
    """query [H, T, K], key and value [G, before + T, K] -> [T, H, K] in the values' dtype; see `AttentionPlan.attend`."""
    run = kernel()
    assert run is not None, "see `fits`"
    query, key, value = (x.to(value.dtype).transpose(0, 1) for x in (query, key, value))
    if nodes.key_index_M is not None:
        key, value = key.index_select(0, nodes.key_index_M), value.index_select(0, nodes.key_index_M)
    options: dict[str, bool] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(run).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11
            share = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = run(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            nodes.query_ends,
            nodes.key_ends,
            nodes.most_queries,
            nodes.most_keys,
            scale=scale,
            # Positions to the left and to the right of a query that it sees.
            window_size=(-1 if window is None else window - 1, 0),
            **options,
        )
    return out
