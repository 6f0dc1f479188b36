"""Files to rows: JSON, tables, plain text, each also compressed or in an archive. Content beats the file's name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from danlu.data.files import SUFFIXES, suffix
from danlu.data.formats import json_stream, tables
from danlu.data.formats.plain_text import split_documents
from danlu.data.formats.streams import DAMAGE, Member, Probe, bad_bytes, damaged, members, probe, text_of
from danlu.data.problems import RowError

_PARQUET: Final = b"PAR1"
_CHUNK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in a file: a parsed JSON value (or `{"text": ...}` with `is_text` for prose).

    `licence` is what the container says of all its rows.
    """

    file: str
    line: int
    value: Any
    is_text: bool = False
    licence: str = ""


def raw_rows(path: Path, *, plain: bool = False) -> Iterator[RawRow | RowError]:
    """The rows of one file, of an archive those of all its members; errors come as values, in their place.

    Args:
        path: an existing file.
        plain: take text for prose whatever it looks like.
    """
    for member in members(path):
        if isinstance(member, RowError):
            yield member
            continue
        try:
            yield from _member_rows(member, plain)
        except DAMAGE as error:
            yield damaged(member.name, error)
        except RowError as error:
            yield error


def _member_rows(member: Member, plain: bool) -> Iterator[RawRow | RowError]:
    with member.open() as stream:
        magic = stream.read(len(_PARQUET))
    if magic == _PARQUET:
        for number, row in tables.parquet_rows(member):
            yield RawRow(member.name, number, row)
        return
    probed = probe(member)
    if probed.blank:
        # A damaged file can look empty, too: reading it to the end tells.
        with member.open() as stream:
            for _ in stream:
                pass
        raise RowError(
            "the file is empty", code="empty-file", hint="Give a file with at least one record.", file=member.name
        )
    with text_of(member, probed) as text:
        yield from _text_rows(text, member.name, probed, plain)


def _text_rows(stream: IO[str], name: str, probed: Probe, plain: bool) -> Iterator[RawRow | RowError]:
    ending = suffix(name)
    if plain:
        yield from _documents(stream, name, probed)
    elif json_stream.START.match(probed.head) or ending in (".json", ".jsonl"):
        for item in json_stream.json_rows(stream, probed.head, name):
            yield item if isinstance(item, RowError) else _checked(name, *item, probed.bad)
    elif ending in (".csv", ".tsv"):
        for cells in tables.csv_rows(stream, probed.head, name):
            if isinstance(cells, RowError):
                yield cells
                continue
            line, row = cells
            wrong = bad_bytes(" ".join(row.values()), name, line) if probed.bad else None
            yield wrong or RawRow(name, line, row)
    elif ending == ".txt":
        yield from _documents(stream, name, probed)
    else:
        raise RowError(
            f"found no JSON, and the name does not end in {', '.join(SUFFIXES)} (or those and .gz)",
            code="unknown-container",
            hint="If it is plain text, rename it to .txt.",
            file=name,
        )


def _checked(name: str, line: int, text: str, value: Any, bad: bool) -> RawRow | RowError:
    """The row, if its characters are whole: only here its line is known."""
    if bad and (wrong := bad_bytes(text, name, line)):
        return wrong
    if "\\ud" in text or "\\uD" in text:
        # JSON can spell half a surrogate pair, which no file, hash or tokenizer takes.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return RowError(
                f"found \\u{ord(error.object[error.start]):04x}, half of a character",
                code="bad-encoding",
                hint="A character was cut in two when the file was made: remove the escape, or the row.",
                file=name,
                line=line,
            )
    return RawRow(name, line, value)


def _documents(stream: IO[str], name: str, probed: Probe) -> Iterator[RawRow | RowError]:
    for line, piece in split_documents(_prose(stream, name)):
        wrong = bad_bytes(piece, name, line) if probed.bad else None
        yield wrong or RawRow(name, line, {"text": piece}, is_text=True)


def _prose(stream: IO[str], name: str) -> Iterator[str]:
    """The lines of a text; very long ones in parts."""
    number = 1
    while chunk := stream.readline(_CHUNK):
        if "\0" in chunk:
            message = "found a NUL character: the file is not plain text"
            raise RowError(message, code="bad-encoding", file=name, line=number)
        yield chunk.replace("\r\n", "\n")
        number += chunk.endswith("\n")
