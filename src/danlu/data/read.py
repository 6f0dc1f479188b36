"""Data files to records: finds the files, reads their rows, recognises each row's format, checks it and converts it."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from danlu.data.formats import plain_text
from danlu.data.formats.base import Format, RowDropped
from danlu.data.formats.containers import SUFFIXES, holds_json, json_rows, read_text, suffix
from danlu.data.formats.fields import fault, key_list, type_name
from danlu.data.formats.registry import FORMATS, by_name, detect
from danlu.exceptions import DataError
from danlu.types import Origin, Record, RecordKind

_MAGIC: Final = re.compile(r"[*?\[]")
_ESCAPED_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Dataset:
    """What `read` found.

    Attributes:
        records: all records, in the order of the files.
        files: the files read.
        formats: the names of the formats met, in that order.
        dropped: how many rows were left out, by reason.
    """

    records: list[Record]
    files: list[str]
    formats: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


def read(path: str | Path | Sequence[str | Path], kind: RecordKind, *, format: str | None = None) -> Dataset:
    """Read data files as records of one kind.

    Args:
        path: a file, a folder (all data files below it, sorted, hidden ones left out), a glob, or a list of these.
            A file that is named twice is read once.
        kind: what the stage needs. Conversations are read from conversations and from comparisons (prompt and chosen
            answer); prompts also from both (without the last answer); comparisons and documents only from their like.
        format: the name of a format, instead of recognising it row by row.

    Raises:
        DataError: at the first file or row that cannot be read, with its place; or if no row is left.
    """
    forced = by_name(format) if format is not None else None
    files = find_files(path)
    formats: dict[str, None] = {}
    dropped: Counter[str] = Counter()
    records: list[Record] = []
    for file in files:
        for entry, row, origin in _rows(file, kind, forced):
            formats[entry.name] = None
            try:
                records += entry.records(row, kind, origin)
            except RowDropped as reason:
                dropped[str(reason)] += 1
    if not records:
        found = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise DataError(
            f"no row can be used as a {kind} ({found or 'there are none'})",
            hint="Give other data; the reasons are those of the rows that were left out.",
            file=files[0] if len(files) == 1 else None,
        )
    return Dataset(records, [str(file) for file in files], list(formats), dict(dropped))


def find_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `read` reads for `path`, each once; `DataError` if something is not there."""
    if not isinstance(path, (str, Path)):
        if not path:
            raise DataError("no data file is given", hint="Name at least one file, folder or glob.")
        return list({found.resolve(): found for item in path for found in find_files(item)}.values())
    if str(path) == "":
        raise DataError("the path is empty", hint="Name a file, a folder or a glob.")
    if str(path).startswith("~/"):
        path = Path(path).expanduser()
    given = Path(path)
    try:
        if given.is_dir():
            own = len(given.parts)
            visible = (file for file in given.rglob("*") if not any(p.startswith(".") for p in file.parts[own:]))
            return _data_files(visible, given, "the folder")
        if given.exists():
            return [given]
        if _MAGIC.search(str(path)):
            return _data_files(_glob(given), given, "the glob")
    except (OSError, ValueError) as error:
        raise DataError(f"the path cannot be read: {error}", file=given) from error
    raise _missing(given)


def _glob(pattern: Path) -> Iterator[Path]:
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    return Path(*parts[:first]).glob(str(Path(*parts[first:])))


def _data_files(candidates: Iterator[Path], given: Path, what: str) -> list[Path]:
    found = sorted(file for file in candidates if suffix(file) in SUFFIXES and file.is_file())
    if not found:
        endings = ", ".join(SUFFIXES)
        raise DataError(
            f"{what} holds no data file", hint=f"Data files end in {endings}, or those and .gz.", file=given
        )
    return found


def _missing(path: Path) -> DataError:
    """The error for a path that is not there, with the nearest name beside the first part that is missing."""
    wanted, parent = path, path.parent
    while not parent.exists() and parent != parent.parent:
        wanted, parent = parent, parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        names = []
    near = difflib.get_close_matches(wanted.name, names, n=1)
    if near:
        hint = f"Did you mean '{parent / near[0]}'?"
    elif names:
        hint = f"'{parent}' holds: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
    else:
        hint = f"'{parent}' holds nothing that can be read."
    what = "the file does not exist" if wanted == path else f"the folder '{wanted}' does not exist"
    return DataError(what, hint=hint, file=path)


def _rows(file: Path, kind: RecordKind, forced: Format | None) -> Iterator[tuple[Format, dict[str, Any], Origin]]:
    """The rows of one file, each with its format and origin."""
    text = read_text(file)
    if forced is plain_text.FORMAT or (forced is None and not holds_json(text, file)):
        yield from _text_rows(text, file)
        return
    has_surrogates = _ESCAPED_SURROGATE.search(text) is not None
    usual: Format | None = None
    for line, row in json_rows(text, file):
        origin = Origin(str(file), line)
        if not isinstance(row, dict):
            raise fault(f"found {type_name(row)}, expected an object with named fields", origin, None)
        if has_surrogates:
            _check_unicode(row, origin)
        # A row that nobody knows is one of its neighbours' format with a fault, which that format can name.
        entry = forced or detect(row, kind) or usual
        if entry is None:
            shapes = "".join(f"\n     {known.name}: {known.shape}" for known in FORMATS)
            raise fault(f"found {key_list(row)}, which no format has", origin, None, f"Known formats:{shapes}")
        usual = usual or entry
        yield entry, row, origin


def _text_rows(text: str, file: Path) -> Iterator[tuple[Format, dict[str, Any], Origin]]:
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError("found a NUL character: the file is not plain text", file=file, line=line)
    for line, piece in plain_text.split_documents(text.replace("\r\n", "\n")):
        yield plain_text.FORMAT, {"text": piece}, Origin(str(file), line)


def _check_unicode(row: dict[str, Any], origin: Origin) -> None:
    """JSON can spell half a surrogate pair, which no file, hash or tokenizer takes; only here is its line known."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        hint = "A character was cut in two when the file was made: remove the escape, or the row."
        raise fault(f"found {half}, half of a character", origin, None, hint) from error
