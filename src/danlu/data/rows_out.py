"""Records as rows of danlu's own formats, and the file they are written to: whole or not at all, in flat memory."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self, cast

from danlu import atomic
from danlu.exceptions import DataError
from danlu.types import Comparison, Conversation, Document, Prompt, Ranking, Record, Unpaired

Row = dict[str, Any]
ENDINGS: Final = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def row_of(record: Record) -> Row:
    """The record as a row of its own format, with `source` and `licence` where they are known."""
    match record:
        case Conversation():
            row: Row = {"messages": record.messages}
            if record.tools:
                row["tools"] = [dict(tool) for tool in record.tools]
        case Comparison():
            row = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
            if record.margin:
                row["margin"] = record.margin
        case Ranking():
            row = {"prompt": record.prompt, "responses": record.responses, "scores": record.scores}
        case Unpaired():
            row = {"prompt": record.prompt, "completion": record.completion, "label": record.label}
        case Prompt():
            row = {"prompt": record.prompt}
            if record.reference:
                row["reference"] = dict(record.reference)
        case Document():
            row = {"text": record.text}
    if record.origin is not None:
        if record.origin.source:
            row["source"] = record.origin.source
        if record.origin.licence:
            row["licence"] = record.origin.licence
    return row


def check_out(path: Path, *, force: bool) -> None:
    """Whether a file may be written there, asked before any work is done.

    Raises:
        DataError: it exists and `force` is false, it is a folder, or its name says nothing that can be written.
    """
    if not path.name.lower().endswith(ENDINGS):
        raise DataError(
            f"rows are written as JSON Lines or as a JSON array, not to '{path.name}'",
            hint=f"End the name in {', '.join(ENDINGS)}.",
            file=path,
        )
    refuse_existing(path, force=force)


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raises `DataError` if something is there already that must not be overwritten."""
    if path.is_dir():
        raise DataError("this is a folder, expected the name of a file", file=path)
    if path.exists() and not force:
        raise DataError("the file exists already", hint="choose another --out, or overwrite it with --force", file=path)


class RowFile:
    """A file of rows that appears whole, at the end of the `with` block, or not at all.

    A name in `.json` gets an array with one row a line, `.jsonl` gets JSON Lines; either with `.gz` is compressed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._array = ".json" in path.suffixes or path.name.lower().endswith((".json", ".json.gz"))
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with self._named_fault():
            self._file = self._open.enter_context(atomic.opened(self.path))
        if self.path.name.lower().endswith(".gz"):
            # No name and no time inside: the same rows give the same bytes.
            packed = gzip.GzipFile("", "wb", 6, self._file, mtime=0)
            self._file = cast(BinaryIO, self._open.enter_context(packed))
        self._open.push(self._end)
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """One row."""
        self.write_line(json.dumps(row, ensure_ascii=False))

    def write_line(self, line: str) -> None:
        """One row that is JSON already."""
        before = ("[\n" if not self.rows else ",\n") if self._array else ""
        with self._named_fault():
            self._file.write(f"{before}{line}{'' if self._array else chr(10)}".encode())
        self.rows += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._named_fault():
            self._open.__exit__(kind, error, trace)

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._array:
            self._file.write(b"\n]\n" if self.rows else b"[]\n")

    @contextmanager
    def _named_fault(self) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            raise DataError(f"the file cannot be written: {fault.strerror}", file=self.path) from fault
