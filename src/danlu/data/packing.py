"""The order in which training sees its items: which items an optimizer step holds, and how they are cut into micro-batches.

Both are functions of the arguments alone: a resumed run asks for the step it stopped at and gets what it would have got,
and another number of processes cuts the same items differently.
"""

from __future__ import annotations

import functools
import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

MicroBatches = list[list[int]]
Lengths = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Plan(Sequence[MicroBatches]):
    """steps -> micro-batches -> item indices. Make one with `plan_steps`; a step is cut when it is asked for.

    Attributes:
        lengths: tokens of each item.
        ends: of each epoch, where its steps end in the epoch's order.
        firsts: the number of the first step of each epoch.
        steps: how many in all.
    """

    lengths: NDArray[np.int64]
    ends: list[NDArray[np.int64]]
    firsts: list[int]
    steps: int
    micro_tokens: int
    seed: int
    ranks: int

    def __len__(self) -> int:
        return self.steps

    @overload
    def __getitem__(self, step: int) -> MicroBatches: ...

    @overload
    def __getitem__(self, step: slice) -> list[MicroBatches]: ...

    def __getitem__(self, step: int | slice) -> MicroBatches | list[MicroBatches]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(self.steps))]
        if not -self.steps <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        step %= self.steps
        epoch = bisect_right(self.firsts, step) - 1
        ends, index = self.ends[epoch], step - self.firsts[epoch]
        begin = int(ends[index - 1]) if index else 0
        items = _order(self.seed, epoch, len(self.lengths))[begin : int(ends[index])].tolist()
        return micro_batches(items, self.lengths[items].tolist(), self.micro_tokens, ranks=self.ranks)


def plan_steps(
    lengths: Lengths,
    *,
    tokens_per_step: int,
    micro_tokens: int,
    epochs: float,
    max_steps: int | None,
    seed: int,
    ranks: int = 1,
) -> Plan:
    """Which items each optimizer step sees, cut into micro-batches.

    Each epoch is a fresh permutation. A step takes items until it holds `tokens_per_step` tokens, whatever the number of
    ranks; see `micro_batches` for the rest.

    Args:
        lengths: tokens of each item, at least one item.
        epochs: passes over the items, if there is no `max_steps`.
        ranks: processes that share the micro-batches of a step.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    assert sizes.size, "the trainers refuse empty data"
    wanted = math.inf if max_steps is None else max_steps
    passes = epochs if max_steps is None else math.inf
    ends: list[NDArray[np.int64]] = []
    firsts: list[int] = []
    steps = 0
    while steps < wanted and len(ends) < passes:
        order = _order(seed, len(ends), sizes.size)
        share = min(1.0, passes - len(ends))
        firsts.append(steps)
        ends.append(_step_ends(sizes[order[: max(1, round(sizes.size * share))]], tokens_per_step))
        steps += len(ends[-1])
    return Plan(sizes, ends, firsts, int(min(steps, wanted)), micro_tokens, seed, ranks)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _step_ends(lengths: NDArray[np.int64], tokens_per_step: int) -> NDArray[np.int64]:
    """Where steps end: after the first item with which a step holds `tokens_per_step` tokens, and after the last item."""
    tokens = np.cumsum(lengths)
    ends: list[int] = []
    before = 0
    while not ends or ends[-1] < len(tokens):
        end = min(int(np.searchsorted(tokens, before + tokens_per_step)) + 1, len(tokens))
        before = int(tokens[end - 1])
        ends.append(end)
    return np.asarray(ends, dtype=np.int64)


def micro_batches(items: Sequence[int], lengths: Sequence[int], micro_tokens: int, *, ranks: int = 1) -> MicroBatches:
    """A step's items as micro-batches of at most `micro_tokens` tokens; a longer item stands alone.

    With one rank they are cut in the order given, or by best fit (longest first, each where the least room is left) if that
    makes fewer. With more, there are as many for each rank, as even as can be, so that no rank waits for another.

    Args:
        items: in the step's order, which micro-batches keep inside.
        lengths: of these items.
        ranks: rank r takes the micro-batches r, r + ranks, r + 2 * ranks, ...
    """
    cut = min(_in_order(lengths, micro_tokens), _best_fit(lengths, micro_tokens), key=len)
    if ranks > 1:
        count = min(math.ceil(len(cut) / ranks) * ranks, len(items))
        cut = _for_ranks(_even(lengths, count, micro_tokens) or cut, lengths, ranks)
    return [[items[place] for place in sorted(batch)] for batch in cut]


def _in_order(lengths: Sequence[int], capacity: int) -> MicroBatches:
    batches: MicroBatches = []
    room = 0
    for place, length in enumerate(lengths):
        if not batches or length > room:
            batches.append([])
            room = capacity
        batches[-1].append(place)
        room -= length
    return batches


def _best_fit(lengths: Sequence[int], capacity: int) -> MicroBatches:
    batches: MicroBatches = []
    rooms: list[tuple[int, int]] = []  # (room left, batch), sorted
    for place in _longest_first(lengths):
        found = bisect_left(rooms, (lengths[place], -1))
        if found < len(rooms):
            room, batch = rooms.pop(found)
        else:
            room, batch = capacity, len(batches)
            batches.append([])
        batches[batch].append(place)
        insort(rooms, (room - lengths[place], batch))
    return sorted(batches, key=min)


def _even(lengths: Sequence[int], count: int, capacity: int) -> MicroBatches | None:
    """`count` micro-batches of like size: longest first, each where the most room is left; None where an item does not fit."""
    batches: MicroBatches = [[] for _ in range(count)]
    loads = [(0, batch) for batch in range(count)]
    for place in _longest_first(lengths):
        load, batch = heapq.heappop(loads)
        if load and load + lengths[place] > capacity:
            return None
        batches[batch].append(place)
        heapq.heappush(loads, (load + lengths[place], batch))
    return batches


def _for_ranks(batches: MicroBatches, lengths: Sequence[int], ranks: int) -> MicroBatches:
    """Heaviest first, forth and back over the ranks."""
    heaviest = sorted(batches, key=lambda batch: (-sum(lengths[place] for place in batch), min(batch)))
    rounds = [heaviest[i : i + ranks] for i in range(0, len(heaviest), ranks)]
    return [batch for i, turn in enumerate(rounds) for batch in (turn[::-1] if i % 2 and len(turn) == ranks else turn)]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda place: -lengths[place])
