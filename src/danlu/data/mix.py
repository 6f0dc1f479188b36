"""Mixing sources by weight: exact shares, no row twice before every row of its source came once, one order per seed."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO

from danlu.exceptions import DataError, SettingsError


@dataclass(frozen=True, slots=True)
class Source:
    """Something to mix in: what users call it, and its weight against the other sources."""

    name: str
    weight: float


@dataclass(frozen=True, slots=True)
class Share:
    """What a source gave.

    Attributes:
        name: as in `Source`.
        rows: how many it has.
        taken: how many of the mixture's rows are its.
        epochs: how often each of its rows came on average; above 1 rows repeat.
    """

    name: str
    rows: int
    taken: int
    epochs: float


def parse_weighted(text: str) -> Source:
    """`path=2` as a source; without a weight it is 1.

    Raises:
        SettingsError: the weight is no positive number.
    """
    name, equals, number = text.rpartition("=")
    if not equals:
        return Source(text, 1.0)
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise SettingsError(f"found the weight '{number}', expected a number above 0, as in data.jsonl=2", field=name)
    return Source(name, weight)


def with_replay(sources: Sequence[Source], replay: Sequence[Source]) -> list[Source]:
    """The sources, and general data that takes a given fraction of the whole beside them ("replay", against forgetting).

    Args:
        sources: share what is left by their weights.
        replay: their weights are fractions of the whole, below 1 together.
    """
    fraction = math.fsum(source.weight for source in replay)
    if fraction >= 1:
        raise SettingsError(f"the fractions add up to {fraction:g}, expected less than 1", field="replay")
    total = math.fsum(source.weight for source in sources)
    return [Source(s.name, s.weight / total * (1 - fraction)) for s in sources] + list(replay)


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total` and are as near to the weights' shares as can be (largest remainders)."""
    sum_ = math.fsum(weights)
    exact = [total * weight / sum_ for weight in weights]
    found = [math.floor(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: (found[i] - exact[i], i))
    for i in order[: total - sum(found)]:
        found[i] += 1
    return found


@contextmanager
def mixed(
    sources: Sequence[tuple[Source, Callable[[], Iterable[str]]]],
    total: int,
    seed: int,
) -> Iterator[tuple[Iterator[str], list[Share]]]:
    """Rows of several sources in one shuffled order, to be taken inside the `with` block.

    Each source's rows come in a random order without repeats until all came once, then in another order, and so on. The
    result is a function of the rows, the weights, `total` and `seed`. Rows wait on the disk, so memory holds 16 bytes of each.

    Args:
        sources: each with what gives its rows as lines.
        total: how many rows to make.
        seed: of the order.

    Yields:
        The rows, and what each source gives.
    """
    if total < 1:
        raise SettingsError(f"found {total}, expected at least 1", field="total")
    with TemporaryFile("w+b") as file:
        store = _Store(file)
        ranges: list[range] = []
        for source, rows in sources:
            start = len(store)
            for row in rows():
                store.add(row)
            if len(store) == start:
                raise DataError("no row can be taken from this source", hint="Leave it out.", file=source.name)
            ranges.append(range(start, len(store)))
        taken = quotas([source.weight for source, _ in sources], total)
        order = array("q")
        for number, (rows_of, wanted) in enumerate(zip(ranges, taken, strict=True)):
            order.extend(_draw(rows_of, wanted, seed, number))
        random.Random(f"{seed}/order").shuffle(order)
        shares = [
            Share(source.name, len(rows_of), count, count / len(rows_of))
            for (source, _), rows_of, count in zip(sources, ranges, taken, strict=True)
        ]
        yield (store.line(place) for place in order), shares


def _draw(rows: range, wanted: int, seed: int, source: int) -> Iterator[int]:
    epoch = 0
    while wanted > 0:
        order = array("q", rows)
        random.Random(f"{seed}/{source}/{epoch}").shuffle(order)
        yield from order[:wanted]
        wanted -= len(order)
        epoch += 1


class _Store:
    """Lines in a temporary file, read again by number."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, line: str) -> None:
        self._ends.append(self._ends[-1] + self._file.write(line.encode()))

    def line(self, number: int) -> str:
        self._file.seek(self._ends[number])
        return self._file.read(self._ends[number + 1] - self._ends[number]).decode()
