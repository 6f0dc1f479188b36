"""Token trees as flat arrays: what the cache keeps on disk and what worker processes send.

A token is its id and a mark. A mark numbers a pair of loss weight and `is_action`, of which a whole data set has a handful.
So a token takes five bytes, and what is read back equals what was stored, number for number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from danlu.tree import Node

Array = NDArray[Any]
Mark = tuple[float, bool | None]
"""Loss weight and `is_action` of a token; None where its node has no `is_action`."""

COLUMNS: dict[str, str] = {
    "ids": "<u4",
    "marks": "<u1",
    "node_ends": "<i8",  # in tokens
    "node_parents": "<i4",  # within the item
    "item_ends": "<i8",  # in nodes
    "item_tokens": "<i8",
    "item_weights": "<f8",
}
MARKS = 1 << 8


class TooManyMarks(Exception):  # no error: such trees stay lists in memory
    """The trees have more pairs of loss weight and `is_action` than a mark can number."""


@dataclass(frozen=True)
class Columns:
    """Some items as arrays, one for each of `COLUMNS`, and what their marks mean."""

    arrays: dict[str, Array]
    marks: list[Mark]


def to_columns(items: Iterable[Sequence[Node]]) -> Columns:
    """Items as arrays.

    Raises:
        TooManyMarks: see there.
    """
    found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    table: dict[Mark, int] = {}
    for item in items:
        for node in item:
            actions: Sequence[bool | None] = node.is_action if node.is_action is not None else [None] * len(node.ids)
            pairs = zip(node.loss_weights, actions, strict=True)
            found["ids"] += node.ids
            found["marks"] += [table.setdefault(pair, len(table)) for pair in pairs]
            found["node_ends"].append(len(found["ids"]))
            found["node_parents"].append(node.parent)
        found["item_ends"].append(len(found["node_ends"]))
        found["item_tokens"].append(sum(len(n.ids) for n in item))
        found["item_weights"].append(sum(sum(n.loss_weights) for n in item))
    if len(table) > MARKS:
        raise TooManyMarks
    return Columns({name: np.asarray(found[name], dtype=dtype) for name, dtype in COLUMNS.items()}, list(table))


class Gathering:
    """Lays columns of several parts end to end.

    Args:
        put: takes the next piece of a column: `put(name, array)`.
    """

    def __init__(self, put: Callable[[str, Array], object]) -> None:
        self._put = put
        self._table: dict[Mark, int] = {}
        self._tokens = self._nodes = 0

    @property
    def marks(self) -> list[Mark]:
        """What the marks mean that were put so far."""
        return list(self._table)

    def add(self, part: Columns) -> None:
        """The next part.

        Raises:
            TooManyMarks: with this part there are.
        """
        numbers = [self._table.setdefault(mark, len(self._table)) for mark in part.marks]
        if len(self._table) > MARKS:
            raise TooManyMarks
        moved = {
            "marks": np.asarray(numbers, dtype=COLUMNS["marks"])[part.arrays["marks"]],
            "node_ends": part.arrays["node_ends"] + self._tokens,
            "item_ends": part.arrays["item_ends"] + self._nodes,
        }
        for name in COLUMNS:
            self._put(name, moved.get(name, part.arrays[name]))
        self._tokens += len(part.arrays["ids"])
        self._nodes += len(part.arrays["node_ends"])


class StoredItems(Sequence[list[Node]]):
    """Items made from arrays when they are asked for, equal to what `to_columns` was given.

    Attributes:
        tokens, weights: of each item, tokens and the sum of loss weights.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns.arrays
        self._table = columns.marks
        self.tokens, self.weights = columns.arrays["item_tokens"], columns.arrays["item_weights"]

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> list[Node]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[Node]]: ...

    def __getitem__(self, index: int | slice) -> list[Node] | list[list[Node]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return [self._node(n) for n in _range(self._columns["item_ends"], index % len(self))]

    def _node(self, node: int) -> Node:
        part = _range(self._columns["node_ends"], node)
        tokens = slice(part.start, part.stop)
        marks = [self._table[mark] for mark in self._columns["marks"][tokens].tolist()]
        ids, weights = self._columns["ids"][tokens].tolist(), [weight for weight, _ in marks]
        actions = [bool(action) for _, action in marks] if marks and marks[0][1] is not None else None
        return Node(ids, weights, int(self._columns["node_parents"][node]), actions)


def _range(ends: Array, index: int) -> range:
    return range(int(ends[index - 1]) if index else 0, int(ends[index]))
