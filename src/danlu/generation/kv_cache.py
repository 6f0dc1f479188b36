"""The engine's own keys and values: `[layer, slot, kv_head, position, head]`, written inside the attention function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

POSITION_BLOCK = 64


class SlotCache:
    """Rows 0 .. n-1 are the running requests; when one ends, the last row moves into its place, so decoding never gathers.

    The cache grows by doubling slots and by blocks of positions, up to the limits given.
    """

    def __init__(self, layers: int, heads: int, width: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (layers, 0, heads, 0, width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def reserve(self, slots: int, positions: int) -> None:
        """Makes room for at least so many slots and positions; what is there stays."""
        layers, have_slots, heads, have_positions, width = self.keys.shape
        if slots <= have_slots and positions <= have_positions:
            return
        slots = max(have_slots, 1 << (slots - 1).bit_length() if slots > have_slots else have_slots)
        positions = max(have_positions, -(-positions // POSITION_BLOCK) * POSITION_BLOCK)
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(layers, slots, heads, positions, width)
            new[:, :have_slots, :, :have_positions] = old
            setattr(self, name, new)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies one slot's first `length` positions over another's."""
        for x in (self.keys, self.values):
            x[:, target, :, :length] = x[:, source, :, :length]


class DecodePlan:
    """One new token for each of the slots 0 .. S-1: writes its key and value, attends to everything before it."""

    def __init__(self, cache: SlotCache, positions: Sequence[int]) -> None:
        self.cache = cache
        self.longest = max(positions) + 1
        device = cache.keys.device
        self.positions_S = torch.tensor(positions, device=device)
        self.rows_S = torch.arange(len(positions), device=device)
        visible = torch.arange(self.longest, device=device)[None] <= self.positions_S[:, None]
        zero = torch.zeros((), dtype=cache.keys.dtype, device=device)
        self.mask_SP = torch.where(visible, zero, torch.full_like(zero, float("-inf")))[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [H, S, K], key and value [G, S, K] -> [S, H, K]; head h reads group h // (H / G)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows_S, :, self.positions_S] = key.transpose(0, 1).to(keys.dtype)
        values[self.rows_S, :, self.positions_S] = value.transpose(0, 1).to(values.dtype)
        slots, groups, width = query.shape[1], key.shape[0], query.shape[2]
        seen_k = keys[:slots, :, : self.longest]
        seen_v = values[:slots, :, : self.longest]
        q = query.transpose(0, 1).reshape(slots, groups, -1, width).to(keys.dtype)
        scores = torch.matmul(q, seen_k.transpose(-1, -2)) * scale + self.mask_SP
        mixed = torch.matmul(torch.softmax(scores, dim=-1), seen_v)
        return mixed.reshape(slots, -1, width).to(query.dtype)
