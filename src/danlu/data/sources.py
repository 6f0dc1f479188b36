"""What settings call data - paths, or objects with a weight, a format, columns, ... - read as one data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from danlu.data.files import find_files, is_hub
from danlu.data.phases import PHASES, Splitter, parse_phases
from danlu.data.read import Dataset, ReadOptions, read
from danlu.exceptions import DataError
from danlu.train_config import Pairs, Source, Sources, as_list
from danlu.types import Record, RecordKind

R = TypeVar("R", bound=Record)


def options_of(source: Source, *, skip_bad: bool = False) -> ReadOptions:
    """How a source is read."""
    return ReadOptions(
        format=source.format,
        columns=source.columns,
        source_prefix=source.source_prefix,
        licence=source.licence,
        skip_bad=skip_bad,
    )


def files_of(source: Source) -> list[Path]:
    """The local files of a source; none for a data set of the hub."""
    return [] if is_hub(source.path) else find_files(source.path)


def read_sources(
    sources: Sources,
    kind: RecordKind,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    pairs: Pairs = "best-worst",
    margin: bool = False,
) -> Dataset:
    """Read everything that settings name as records of one kind.

    Args:
        sources: see `config.Sources`. Paths that nothing is said about are read together, so that a file that is named
            twice is read once.
        kind: what the stage needs.
        seed: chooses which records of a source with a broken weight are taken.
        skip_bad: leave out faulty rows, and count them.
        pairs, margin: see `read`.

    Raises:
        DataError: see `read`.
    """
    given = as_list(sources)
    plain = ReadOptions(skip_bad=skip_bad)
    if all(source == Source(path=source.path) for source in given):
        return read([source.path for source in given], kind, plain, pairs=pairs, margin=margin)
    parts = [
        read(source.path, kind, options_of(source, skip_bad=skip_bad), pairs=pairs, margin=margin) for source in given
    ]
    weighted = [
        weigh(in_phase(part.records, source.phase), source.weight, seed, number)
        for number, (source, part) in enumerate(zip(given, parts, strict=True))
    ]
    if not any(weighted):
        raise DataError("weights and phases leave no record", hint="Raise them.", file=parts[0].files[0])
    return merged(parts, [record for records in weighted for record in records])


def in_phase(records: list[R], phase: str) -> list[R]:
    """The records whose prompts belong to a phase such as "reward of 2,4,4"; all of them for ""."""
    if not phase:
        return records
    name, _, shares = phase.partition(" of ")
    splitter = Splitter(parse_phases(shares), "phase")
    wanted = PHASES.index(name)
    return [record for record in records if splitter.part(record) == wanted]


def weigh(records: Sequence[Record], weight: float, seed: int, number: int) -> list[Record]:
    """The records `weight` times: whole times in their order, then a seeded share of them, also in their order.

    `number` is the source's place among the others, so that two sources of one size are not thinned alike.
    """
    whole = int(weight)
    found = list(records) * whole
    rest = round((weight - whole) * len(records))
    if rest:
        chosen = np.random.default_rng([seed, 0x3E16, number]).choice(len(records), size=rest, replace=False)
        found += [records[i] for i in sorted(chosen.tolist())]
    return found


def merged(parts: Sequence[Dataset], records: list[Record]) -> Dataset:
    """Several data sets as one, with `records` as its records."""
    dropped: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for part in parts:
        dropped.update(part.dropped)
        skipped.update(part.skipped)
    return Dataset(
        records,
        list(dict.fromkeys(file for part in parts for file in part.files)),
        list(dict.fromkeys(name for part in parts for name in part.formats)),
        dict(dropped),
        dict(skipped),
    )
