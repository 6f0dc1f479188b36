"""The engine's own keys and values: where lanes lie, and how they move. What a step reads and writes of them: `step_plan.py`.

A lane is one sequence in the cache. Lanes of similar length share an arena `[layer, slot, kv_head, position, head]`, so that a
decoding step reads hardly more positions than each lane has, without gathering. When a lane outgrows its arena it moves to the
next one; when it ends, the arena's last lane moves into its place. What a model carries before every text is held once;
positions of lanes and of remembered prompts count the text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from danlu.models.attention import VirtualRoot

BLOCK = 64  # positions: the unit of arena lengths and remembered prompts, and the grid on which a CPU reads prompts
GPU_GRID = 512  # the same on a GPU, which prefers few large products
ROOT_MULTIPLE = 16  # a root's positions are filled up to it: every row of scores begins where a vector register does


def arena_length(positions: int) -> int:
    """The smallest of 128, 256, 384, 512, 768, 1024, ... that holds so many positions.

    Few lengths, since a step has a product for each of those that its lanes have.
    """
    length = 2 * BLOCK
    while length < positions:
        half_more = length * 3 // 2
        if half_more >= positions and half_more > 4 * BLOCK:
            return half_more
        length *= 2
    return length


@dataclass(frozen=True)
class CacheShape:
    """What one position of one lane holds: in each layer `heads` keys of `key_width` and values of `value_width` numbers."""

    layers: int
    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_position(self) -> int:
        return self.layers * self.heads * (self.key_width + self.value_width) * self.dtype.itemsize


@dataclass(eq=False)
class Lane:
    """One sequence in the cache: how many positions it may need, how many are written, and its place.

    `claim`: positions that are kept free for it, and for the lanes that will be forked from it. `past`: transformers' own cache
    of the lane, where a family's attention takes no plan (`past.py`); `ids`: what it has read, where positions depend on that.
    """

    reserved: int
    length: int = 0
    claim: int = 0
    arena: Arena | None = None
    slot: int = -1
    past: Any = None
    ids: list[int] = field(default_factory=list)

    def states(self, at: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[layer, kv_head, count, head]` that it holds from position `at` on."""
        assert self.arena is not None, "the lane is open"
        part = (slice(None), self.slot, slice(None), slice(at, at + count))
        return self.arena.keys[part], self.arena.values[part]

    def put(self, at: int, keys: Tensor, values: Tensor) -> None:
        """Writes what another lane held at these positions; its length stays what it is."""
        own_keys, own_values = self.states(at, keys.shape[2])
        own_keys.copy_(keys)
        own_values.copy_(values)


class Arena:
    """Lanes of up to `positions` tokens. Slots 0 .. n-1 are taken, in the order of `lanes`."""

    def __init__(self, shape: CacheShape, positions: int) -> None:
        self.positions = positions
        self.lanes: list[Lane] = []
        sizes = (shape.layers, 0, shape.heads, positions)
        self.keys = torch.zeros(*sizes, shape.key_width, dtype=shape.dtype, device=shape.device)
        self.values = torch.zeros(*sizes, shape.value_width, dtype=shape.dtype, device=shape.device)

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    def resize(self, slots: int) -> None:
        """Room for so many slots; what the lanes hold stays."""
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            # Zeros, not empty: a masked position has weight 0, and 0 times what lies in fresh memory may be NaN.
            new = old.new_zeros(old.shape[0], slots, *old.shape[2:])
            new[:, : len(self.lanes)] = old[:, : len(self.lanes)]
            setattr(self, name, new)


class Root:
    """What stands before every lane, held once.

    Attributes:
        keys, values: `[layer, kv_head, position, head]`, filled up to `ROOT_MULTIPLE` positions.
        tokens: positions without what fills them up.
        mask_11P: 0 at the root's positions, -inf where it is filled up.
        offset: what is added to a text's positions.
    """

    def __init__(self, root: VirtualRoot, shape: CacheShape) -> None:
        fill = -root.tokens % ROOT_MULTIPLE
        self.offset, self.tokens = root.offset, root.tokens
        self.keys, self.values = (
            torch.nn.functional.pad(torch.stack([x.to(shape.device, shape.dtype) for x in side]), (0, 0, 0, fill))
            for side in (root.keys, root.values)
        )
        hidden = torch.arange(root.tokens + fill, device=shape.device) >= root.tokens
        mask = torch.zeros(root.tokens + fill, dtype=shape.dtype, device=shape.device)
        self.mask_11P = mask.masked_fill_(hidden, float("-inf"))[None, None]

    def of(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer for each slot: `[slots * G, P, K]`."""
        every, each = self.keys[layer], self.values[layer]
        if slots == 1:
            return every, each
        first, second = (x.expand(slots, *x.shape).flatten(0, 1) for x in (every, each))
        return first, second


class KeyValueCache:
    """The arenas, within a number of bytes.

    Args:
        shape: of a position.
        memory: bytes that all arenas and the root together may have (while an arena grows, its old tensor is held too).
    """

    def __init__(self, shape: CacheShape, memory: int) -> None:
        self.shape = shape
        self.memory = memory
        self.limit = memory // shape.bytes_per_position
        self.root: Root | None = None
        self.reserved = 0
        grid = BLOCK if shape.device.type == "cpu" else GPU_GRID
        above = torch.full((grid, grid), float("-inf"), dtype=shape.dtype, device=shape.device)
        self.causal_QS = torch.triu(above, diagonal=1)  # the mask of a block of prompt on itself
        self._arenas: dict[int, Arena] = {}

    @property
    def arenas(self) -> list[Arena]:
        """All of them."""
        return list(self._arenas.values())

    def begin_with(self, root: VirtualRoot | None) -> None:
        """What stands before every lane from now on; no lane is open."""
        self.root = Root(root, self.shape) if root is not None else None
        held = self.root.keys.nbytes + self.root.values.nbytes if self.root is not None else 0
        self.limit = max(0, self.memory - held) // self.shape.bytes_per_position

    def fits(self, positions: int, lanes: int = 1) -> bool:
        """Whether so many more lanes of so many positions can be opened now."""
        return self.reserved + lanes * arena_length(positions) <= self.limit

    def open(self, reserved: int, start: int, lanes: int = 1) -> Lane:
        """A new lane that may need `reserved` positions, with room for `start` of them, that will be forked into so many."""
        lane = Lane(reserved, claim=lanes * arena_length(reserved))
        self.reserved += lane.claim
        self._enter(lane, arena_length(start))
        return lane

    def close(self, lane: Lane) -> None:
        """Gives a lane's place back; closing twice does nothing."""
        if lane.arena is not None:
            self.reserved -= lane.claim
            self._vacate(lane.arena, lane.slot)
            lane.arena, lane.slot = None, -1

    def clear(self) -> None:
        """Forgets every lane."""
        for arena in self._arenas.values():
            for lane in arena.lanes:
                lane.arena = None
        self._arenas.clear()
        self.reserved = 0

    def extend(self, lane: Lane, positions: int) -> None:
        """Room for so many positions; moves the lane to a longer arena if need be."""
        old, slot = lane.arena, lane.slot
        assert old is not None, "the lane is open"
        if positions <= old.positions:
            return
        keys, values = old.keys[:, slot, :, : lane.length], old.values[:, slot, :, : lane.length]
        new = self._enter(lane, arena_length(positions))
        new.keys[:, lane.slot, :, : lane.length] = keys
        new.values[:, lane.slot, :, : lane.length] = values
        self._vacate(old, slot)

    def fork(self, lane: Lane) -> Lane:
        """Another lane with the same tokens."""
        source = lane.arena
        assert source is not None, "the lane is open"
        share = arena_length(lane.reserved)
        lane.claim -= share
        copy = Lane(lane.reserved, claim=share)
        target = self._enter(copy, source.positions)
        for x in (target.keys, target.values):  # of the same length, so of the same arena
            x[:, copy.slot, :, : lane.length] = x[:, lane.slot, :, : lane.length]
        copy.length = lane.length
        return copy

    def reorder(self, lanes: Sequence[Lane], parents: Sequence[int], start: int) -> None:
        """Lane i continues what lane parents[i] holds; all have the same tokens before position `start`, and one length."""
        moved = [(lane, lanes[p]) for lane, p in zip(lanes, parents, strict=True) if lanes[p] is not lane]
        arena, end = lanes[0].arena, lanes[0].length
        if not moved or arena is None or start >= end:
            return
        target, source = [a.slot for a, _ in moved], [b.slot for _, b in moved]
        for x in (arena.keys, arena.values):
            x[:, target, :, start:end] = x[:, source, :, start:end]

    def _enter(self, lane: Lane, positions: int) -> Arena:
        arena = self._arenas.get(positions)
        if arena is None:
            arena = self._arenas[positions] = Arena(self.shape, positions)
        if len(arena.lanes) == arena.capacity:
            self._grow(arena)
        lane.arena, lane.slot = arena, len(arena.lanes)
        arena.lanes.append(lane)
        return arena

    def _grow(self, arena: Arena) -> None:
        needed = len(arena.lanes) + 1
        others = sum(a.capacity * a.positions for a in self._arenas.values() if a is not arena)
        wanted = 2 * arena.capacity if others + 2 * arena.capacity * arena.positions <= self.limit else needed
        if others + needed * arena.positions > self.limit:
            self._trim(arena)
        arena.resize(max(wanted, needed))

    def _trim(self, keep: Arena) -> None:
        """Gives back what no lane uses."""
        for length, arena in list(self._arenas.items()):
            if arena is keep:
                continue
            if not arena.lanes:
                del self._arenas[length]
            elif arena.capacity > len(arena.lanes):
                arena.resize(len(arena.lanes))

    def _vacate(self, arena: Arena, slot: int) -> None:
        last = arena.lanes.pop()
        if slot < len(arena.lanes):
            for x in (arena.keys, arena.values):
                x[:, slot, :, : last.length] = x[:, last.slot, :, : last.length]
            arena.lanes[slot], last.slot = last, slot
