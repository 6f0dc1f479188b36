"""Duplicates: exact ones by a hash of what a record says, near ones by MinHash over its n-grams."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from danlu.data.contents import fingerprint, questions, texts
from danlu.data.ngrams import ngrams, units
from danlu.data.split import prompt_text
from danlu.exceptions import DataError, SettingsError
from danlu.types import Document, Origin, Record

By = Literal["row", "prompt"]
PERMUTATIONS: Final = 256  # the estimate of a similarity is then off by 0.03 on average
SHINGLE: Final = 3  # units: short instructions still have several


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A record that was left out, the first one like it, and how like they are.

    Near duplicates may have a similarity of 1, too: their n-grams are the same, their punctuation is not.
    """

    origin: Origin | None
    first: Origin | None
    similarity: float
    exact: bool


class Seen:
    """Tells of each record whether one like it was there before. The first one is kept.

    Args:
        near: similarity from which two records count as one: the Jaccard similarity of their sets of 3-grams over
            words and Chinese characters, estimated by MinHash (Broder 1997). None: only equal records.
        by: compare whole rows, or only their prompts.
    """

    def __init__(self, *, near: float | None = None, by: By = "row") -> None:
        if near is not None and not 0 < near < 1:
            raise SettingsError(f"found {near:g}, expected more than 0 and less than 1", field="near")
        self._by = by
        self._near = near
        self._places: dict[int, int] = {}
        self._origins: list[Origin | None] = []
        self._sketches: list[Any] = []
        if near is not None:
            rensa = _rensa()
            self._sketch = rensa.RMinHash
            self._index = rensa.RMinHashLSH(near, PERMUTATIONS, _bands(near))

    def add(self, record: Record) -> Duplicate | None:
        """The duplicate that this record is; None, and it is remembered, if it is new."""
        key = fingerprint(record) if self._by == "row" else hash(prompt_text(record))
        first = self._places.get(key)
        if first is not None:
            return Duplicate(record.origin, self._origins[first], 1.0, True)
        found = self._similar(record)
        if found is not None:
            return found
        self._places[key] = len(self._origins)
        self._origins.append(record.origin)
        return None

    def _similar(self, record: Record) -> Duplicate | None:
        if self._near is None:
            return None
        sketch = self._sketch(PERMUTATIONS, 0)
        sketch.update(_shingles(record, self._by))
        # Candidates share a band; the estimate over all permutations decides. The earliest of the most similar counts.
        rated = [(sketch.jaccard(self._sketches[i]), -i) for i in self._index.query(sketch)]
        similarity, place = max(rated, default=(0.0, 0))
        if similarity >= self._near:
            return Duplicate(record.origin, self._origins[-place], similarity, False)
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)
        return None


def dedup(records: Iterable[Record], seen: Seen, duplicates: list[Duplicate]) -> Iterator[Record]:
    """The records that are new to `seen`, in their order; the others are noted in `duplicates`."""
    for record in records:
        found = seen.add(record)
        if found is None:
            yield record
        else:
            duplicates.append(found)


def _shingles(record: Record, by: By) -> list[str]:
    chosen = questions(record) if by == "prompt" and not isinstance(record, Document) else [t for _, t in texts(record)]
    return sorted({gram for text in chosen for gram in ngrams(units(text), SHINGLE)}) or [""]


def _bands(near: float) -> int:
    """The number of bands with which a pair of similarity `near` is a candidate with a probability of at least 0.99."""
    for rows in (32, 16, 8, 4, 2):
        bands = PERMUTATIONS // rows
        if 1 - (1 - near**rows) ** bands >= 0.99:
            return bands
    return PERMUTATIONS


def _rensa() -> Any:
    try:
        return importlib.import_module("rensa")
    except ImportError as error:
        raise DataError(
            "near duplicates need the package rensa (MinHash), which is not installed",
            hint="pip install 'danlu[dedup]'",
        ) from error
