"""Prompts that were read lately, in blocks, so that a request which begins like one of them does not read it again.

Only what was read as a prompt is kept: the bits of a sampled token's keys and values depend on the decoding path, and reusing
them would make an answer depend on what ran before. So the next turn of a conversation reads its last answer once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from danlu.generation.kv_cache import BLOCK

SHARE = 0.25  # of an engine's memory for keys and values
SHORTEST = 8  # tokens of a partly equal block that are worth copying


class Holder(Protocol):
    """Somewhere that keys and values `[layer, kv_head, position, head]` of a text's first `length` positions are held."""

    @property
    def length(self) -> int: ...

    def states(self, at: int, count: int) -> tuple[Tensor, Tensor]:
        """Those of `count` positions from `at` on."""
        ...

    def put(self, at: int, keys: Tensor, values: Tensor) -> None:
        """Adds those of the positions from `at` on, which comes after all it holds; its length stays what it is."""
        ...


@dataclass(eq=False)
class _Kept:
    """One block of a prompt below another one. Keys and values `[layer, kv_head, position, head]`."""

    ids: tuple[int, ...]
    parent: _Kept | None
    keys: Tensor | None = None
    values: Tensor | None = None
    children: dict[tuple[int, ...], _Kept] = field(default_factory=dict)
    order: list[tuple[int, ...]] = field(default_factory=list)  # the children's, sorted: the likest are neighbours

    def add(self, child: _Kept) -> None:
        self.children[child.ids] = child
        insort(self.order, child.ids)

    def remove(self, child: _Kept) -> None:
        del self.children[child.ids]
        del self.order[bisect_left(self.order, child.ids)]

    def likest(self, ids: tuple[int, ...]) -> tuple[_Kept | None, int]:
        """The child with the longest common beginning, and its length."""
        at = bisect_left(self.order, ids)
        found = [(_common(other, ids), other) for other in self.order[max(0, at - 1) : at + 1]]
        length, other = max(found, default=(0, ()))
        return self.children.get(other), length

    @property
    def bytes(self) -> int:
        assert self.keys is not None and self.values is not None
        return self.keys.nbytes + self.values.nbytes


class PrefixStore:
    """A tree of blocks; the least recently used leaf goes first.

    Args:
        memory: bytes it may hold; 0 keeps nothing.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.bytes = 0
        self._root = _Kept((), None)
        self._recent: OrderedDict[_Kept, None] = OrderedDict()  # parents are always more recent than their children

    def clear(self) -> None:
        """Forgets everything (the weights have changed)."""
        self._root = _Kept((), None)
        self._recent.clear()
        self.bytes = 0

    def load(self, ids: Sequence[int], lane: Holder) -> int:
        """Copies the longest known beginning of `ids` that is longer than what the lane holds into it.

        Returns:
            How many positions it holds now: its new length.
        """
        found = self._find(ids)
        known = sum(n for _, n in found)
        if known <= lane.length:
            return lane.length
        at = 0
        for kept, n in found:
            skip = max(0, lane.length - at)
            if skip < n:
                assert kept.keys is not None and kept.values is not None
                lane.put(at + skip, kept.keys[:, :, skip:n], kept.values[:, :, skip:n])
            at += n
        self._touch(found[-1][0])
        return known

    def save(self, ids: Sequence[int], lane: Holder) -> None:
        """Keeps the blocks of `ids`, all of which the lane has read."""
        node = self._root
        for at in range(0, len(ids), BLOCK):
            part = tuple(ids[at : at + BLOCK])
            child = node.children.get(part)
            if child is None:
                likest, length = node.likest(part)
                if likest is not None and length == len(part) >= SHORTEST:
                    child = likest  # a longer prompt has it already
                elif not self._keep(node, part, lane, at):
                    return
                else:
                    child = node.children[part]
            node = child
        self._touch(node)

    def _find(self, ids: Sequence[int]) -> list[tuple[_Kept, int]]:
        node, at = self._root, 0
        found: list[tuple[_Kept, int]] = []
        while at < len(ids):
            part = tuple(ids[at : at + BLOCK])
            child = node.children.get(part)
            if child is None:
                likest, length = node.likest(part)
                if likest is not None and length >= SHORTEST:
                    found.append((likest, length))
                break
            found.append((child, len(part)))
            node, at = child, at + len(part)
        return found

    def _keep(self, parent: _Kept, ids: tuple[int, ...], lane: Holder, at: int) -> bool:
        keys, values = lane.states(at, len(ids))
        kept = _Kept(ids, parent, keys.clone(), values.clone())
        if parent is not self._root:
            self._touch(parent)  # making room must not take what this block hangs on
        while self.bytes + kept.bytes > self.memory and self._recent and next(iter(self._recent)) is not parent:
            self._drop(next(iter(self._recent)))
        if self.bytes + kept.bytes > self.memory:
            return False
        likest, length = parent.likest(ids)
        if likest is not None and length == len(likest.ids):
            self._drop(likest)  # the end of a shorter prompt, which this block has in it
        parent.add(kept)
        self.bytes += kept.bytes
        self._recent[kept] = None
        self._touch(kept)
        return True

    def _touch(self, node: _Kept | None) -> None:
        while node is not None and node is not self._root:
            self._recent.move_to_end(node)
            node = node.parent

    def _drop(self, node: _Kept) -> None:
        assert node.parent is not None
        node.parent.remove(node)
        del self._recent[node]
        self.bytes -= node.bytes


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
