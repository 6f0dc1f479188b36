"""Data files to records: recognises each row's format, checks the row, and turns it into what a stage needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from danlu.data import signs
from danlu.data.columns import format_of, map_columns, naming_columns
from danlu.data.files import find_files, is_hub
from danlu.data.formats import plain_text
from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.containers import RawRow, raw_rows
from danlu.data.formats.fields import fault, key_list, type_name
from danlu.data.formats.registry import FORMATS, REFUSED, by_name, detect
from danlu.data.hub import hub_rows
from danlu.data.kinds import as_kind, pool_singles, serves, wrong_kind
from danlu.data.licences import commercial_use
from danlu.data.problems import FILE_WIDE, Collected, Problem, RowError, problem_of
from danlu.exceptions import DataError
from danlu.train_config import Pairs
from danlu.types import Conversation, Document, Message, Origin, Record, RecordKind

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How files are read.

    Attributes:
        format: the name of a format, instead of recognising it row by row.
        columns: danlu's field (one of `columns.FIELDS`) to the column of the table that holds it.
        source_prefix: put before every prompt (before its first user turn).
        licence: the licence of these files, where a row does not name its own.
        source: where they come from, likewise.
        commercial_only: leave out rows whose licence does not allow commercial use, or is not known.
        skip_bad: leave out faulty rows, and count them; also conversations that answer with a number where tools found nothing.
    """

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    source_prefix: str = ""
    licence: str = ""
    source: str = ""
    commercial_only: bool = False
    skip_bad: bool = False


DEFAULTS: Final = ReadOptions()

_REFUSED: Final = frozenset(entry.name for entry in REFUSED)


@dataclass(frozen=True, slots=True)
class Dataset:
    """What `read` found.

    Attributes:
        records: all records, in the order of the files.
        files: the files read.
        formats: the names of the formats met, in that order.
        dropped: how many rows were left out as known noise, by reason.
        skipped: how many faulty rows were left out (`skip_bad`), by the code of the problem.
    """

    records: list[Record]
    files: list[str]
    formats: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def left_out(self) -> dict[str, int]:
        """All rows that were left out, by reason: what a stage notes in its manifest."""
        return {**self.dropped, **{f"faulty row: {code}": count for code, count in self.skipped.items()}}

    @property
    def origins(self) -> list[dict[str, Any]]:
        """How many records each file gave, with the licences and sources that are known: for the manifest."""
        counts: Counter[str] = Counter()
        licences: dict[str, dict[str, None]] = {}
        sources: dict[str, dict[str, None]] = {}
        for record in self.records:
            if record.origin is None:
                continue
            file = record.origin.file
            counts[file] += 1
            licences.setdefault(file, {})[record.origin.licence] = None
            sources.setdefault(file, {})[record.origin.source] = None
        return [
            {"file": file, "records": count, "licence": _listed(licences[file]), "source": _listed(sources[file])}
            for file, count in counts.items()
        ]


def scan(
    path: Paths,
    options: ReadOptions = DEFAULTS,
    *,
    kind: RecordKind | None = None,
    on_problem: Callable[[Problem], None] | None = None,
    on_dropped: Callable[[str, Origin], None] | None = None,
) -> Iterator[tuple[Format, Record]]:
    """The records of data files, one after the other, each with its format; memory does not grow with the files.

    Records are of their format's natural kind and may still hold an empty answer or a pair of equal ones: whether that
    spoils them depends on the use, so `kinds.as_kind` drops them.

    Args:
        path: see `read`.
        options: how to read.
        kind: prefer formats that can serve this kind; rows of others are then a problem. None: all kinds are welcome.
        on_problem: gets every problem; the row (or, where nothing better can be done, the rest of the file) is left
            out. None: the first problem is raised, unless `options.skip_bad`.
        on_dropped: gets the reason and the place of every row that is known noise.

    Raises:
        DataError: a path is not there; content that cannot serve `kind` (unless `options.skip_bad`); the first problem
            if nobody takes it.
    """

    def fail(error: DataError) -> None:
        problem = problem_of(error)
        at_once = on_problem is None or (kind is not None and problem.code in FILE_WIDE)
        if at_once and not options.skip_bad:
            raise error
        if on_problem is not None:
            on_problem(problem)

    forced = by_name(options.format) if options.format is not None else None
    if options.columns:
        forced = format_of(options.columns)
    for rows in _files(path, plain=forced is plain_text.FORMAT):
        parser = _Parser(options, kind, forced)
        for raw in rows:
            if isinstance(raw, RowError):
                fail(raw)
                continue
            origin = parser.origin(raw)
            try:
                entry, records = parser.parse(raw, origin)
            except RowDropped as reason:
                if on_dropped is not None:
                    on_dropped(str(reason), origin)
            except DataError as error:
                fail(error)
            else:
                for record in records:
                    yield entry, record


def read(
    path: Paths,
    kind: RecordKind,
    options: ReadOptions = DEFAULTS,
    *,
    pairs: Pairs = "best-worst",
    margin: bool = False,
) -> Dataset:
    """Read data files as records of one kind.

    Args:
        path: a file, a folder (all data files below it, sorted, hidden ones left out), a glob, `hf:owner/name[:split]`,
            or a list of these. A file that is named twice is read once.
        kind: what the stage needs; `kinds.SERVED_BY` says what can serve it.
        options: how to read.
        pairs: which comparisons a ranking gives.
        margin: whether these carry the difference of the scores as margin.

    Raises:
        DataError: faulty rows or files, all of them counted and the first of them listed (content of another kind is
            raised at once); or no row is left.
    """
    formats: dict[str, None] = {}
    dropped: Counter[str] = Counter()
    problems = Collected()
    natural: list[Record] = []
    for entry, record in scan(
        path,
        options,
        kind=kind,
        on_problem=problems.add,
        on_dropped=lambda reason, origin: dropped.update([reason]),
    ):
        formats[entry.name] = None
        natural.append(record)
    if problems.counts and not options.skip_bad:
        raise problems.error()
    skipped = Counter(problems.counts)
    records: list[Record] = []
    for record in pool_singles(natural):
        if options.skip_bad and isinstance(record, Conversation) and any(signs.unsupported_numbers(record.messages)):
            skipped[signs.UNSUPPORTED] += 1
            continue
        try:
            records += as_kind(record, kind, pairs=pairs, margin=margin)
        except RowDropped as reason:
            dropped[str(reason)] += 1
    names = [str(name) for name in _names(path)]
    data = Dataset(records, names, list(formats), dict(dropped), dict(skipped))
    if not records:
        found = ", ".join(f"{reason}: {count}" for reason, count in data.left_out.items())
        raise DataError(
            f"no row can be used as a {kind} ({found or 'there are none'})",
            hint="Give other data; the reasons are those of the rows that were left out.",
            file=names[0] if len(names) == 1 else None,
        )
    return data


def _listed(names: Iterable[str]) -> str:
    """Names for people, not all if they are many (a source may be an address of its own for every row)."""
    known = [name for name in names if name]
    return ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")


def _names(path: Paths) -> list[str | Path]:
    """The files and hub data sets that a path means, each once."""
    parts = [path] if isinstance(path, (str, Path)) else path
    if not parts:
        find_files(path)
    return list(
        {
            str(name if is_hub(name) else Path(name).resolve()): name
            for part in parts
            for name in ([part] if is_hub(part) else find_files(part))
        }.values()
    )


def _files(path: Paths, *, plain: bool) -> Iterator[Iterable[RawRow | RowError]]:
    for name in _names(path):
        yield hub_rows(name) if isinstance(name, str) else raw_rows(name, plain=plain)


class _Parser:
    """The rows of one file to records; it remembers the file's usual format, so that a faulty row can be named."""

    def __init__(self, options: ReadOptions, kind: RecordKind | None, forced: Format | None) -> None:
        self._options, self._kind, self._forced = options, kind, forced
        self._usual: Format | None = None
        self._keys: frozenset[str] = frozenset()
        self._refused: set[str] = set()

    def origin(self, raw: RawRow) -> Origin:
        """Where the row comes from, with what it says of its source and licence."""
        source, licence = self._options.source, self._options.licence
        licence = raw.licence or licence
        if isinstance(raw.value, dict):
            source = _short(raw.value.get("source")) or source
            licence = _short(raw.value.get("licence")) or _short(raw.value.get("license")) or licence
        return Origin(raw.file, raw.line, source, licence)

    def parse(self, raw: RawRow, origin: Origin) -> tuple[Format, list[Record]]:
        """The format and the records of a row; `RowDropped` or `DataError` if there are none."""
        row, options = raw.value, self._options
        if not isinstance(row, dict):
            message = f"found {type_name(row)}, expected an object with named fields"
            raise fault(message, origin, None, code="wrong-type")
        if options.commercial_only and not commercial_use(origin.licence):
            known = "no commercial use" if commercial_use(origin.licence) is False else "unknown licence"
            raise RowDropped(f"{known}: {origin.licence or 'none given'}")
        if options.columns:
            with naming_columns(options.columns):
                row = map_columns(row, options.columns, origin)
                entry = self._format(raw, row, origin)
                records = entry.parse(row, origin)
        else:
            entry = self._format(raw, row, origin)
            records = entry.parse(row, origin)
        if options.source_prefix:
            records = [_prefixed(record, options.source_prefix) for record in records]
        return entry, records

    def _format(self, raw: RawRow, row: Row, origin: Origin) -> Format:
        entry = self._forced or (plain_text.FORMAT if raw.is_text else detect(row, self._kind))
        if entry is None:
            # A row that nobody knows is one of its neighbours' format with a fault, which that format can name.
            entry = self._usual
        elif self._usual is None:
            self._usual, self._keys = entry, frozenset(row)
        elif entry is not self._usual and self._keys > row.keys() and self._usual.matches(row):
            # So is a row that lacks something and would otherwise be taken for another, smaller shape.
            entry = self._usual
        if entry is None:
            raise fault(
                f"found {key_list(row)}, which no format has", origin, None, _nearest(row), code="unknown-shape"
            )
        if entry.name in _REFUSED:
            # What a refused shape is says more than its kind; once a file is enough.
            if entry.name in self._refused:
                raise RowDropped(f"more rows like the first one: {entry.name}")
            self._refused.add(entry.name)
        elif self._kind is not None and not serves(entry.holds, self._kind):
            raise wrong_kind(entry.holds, self._kind, origin, entry.name)
        return entry


def _nearest(row: Row) -> str:
    """What to do with a row that nobody knows."""

    def likeness(known: Format) -> float:
        return len(known.example.keys() & row.keys()) / len(known.example.keys() | row.keys())

    nearest = max((known for known in FORMATS if known.example), key=likeness)
    near = f"The nearest is '{nearest.name}', {nearest.shape}. " if likeness(nearest) > 0 else ""
    return f"{near}Name the columns with --map prompt=...,response=..., or a format with --as: {_names_of_formats()}."


@cache
def _names_of_formats() -> str:
    return ", ".join(known.name for known in FORMATS)


def _short(value: object) -> str:
    """A row's own source or licence, if it is a name rather than content."""
    return value.strip() if isinstance(value, str) and len(value) <= 200 else ""


def _prefixed(record: Record, prefix: str) -> Record:
    if isinstance(record, Document):
        return record
    if isinstance(record, Conversation):
        return replace(record, messages=_with_prefix(record.messages, prefix))
    return replace(record, prompt=_with_prefix(record.prompt, prefix))


def _with_prefix(messages: list[Message], prefix: str) -> list[Message]:
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        return messages
    asked: Message = {**messages[first], "content": prefix + messages[first]["content"]}
    return [*messages[:first], asked, *messages[first + 1 :]]
