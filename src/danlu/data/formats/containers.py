"""Files to rows: gzip, encodings, JSON arrays, JSON Lines and plain text. Content beats the file's name."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from danlu.exceptions import DataError

SUFFIXES: Final = (".json", ".jsonl", ".txt")

_GZIP_MAGIC: Final = b"\x1f\x8b"
_JSON_START: Final = re.compile(r'\s*(?:\{\s*"|\[\s*\{\s*")')
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_DECODER: Final = json.JSONDecoder()
_ROW_HINT: Final = (
    "Each line must be one whole JSON object: look for a missing quote, comma or brace, or a single backslash."
)
_ARRAY_HINT: Final = "Look for a missing quote, comma or brace at or shortly before that line."


def suffix(path: Path) -> str:
    """The suffix in lower case, the one before `.gz` for compressed files."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def read_text(path: Path) -> str:
    """The whole file as text without a byte order mark; `DataError` if it is damaged, not UTF-8 or empty."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"the file cannot be read: {reason}", file=path) from error
    if data.startswith(_GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            hint = "Download or compress it again."
            raise DataError(f"the gzip file is damaged: {error}", hint=hint, file=path) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"found byte 0x{data[error.start]:02x}, which is not UTF-8",
            hint="Save the file as UTF-8, for example with: iconv -f GB18030 -t UTF-8 IN > OUT",
            file=path,
            line=data.count(b"\n", 0, error.start) + 1,
        ) from error
    if not text.strip():
        raise DataError("the file is empty", hint="Give a file with at least one record.", file=path)
    return text


def holds_json(text: str, path: Path) -> bool:
    """Whether the file is JSON rather than plain text; `DataError` if it is neither for certain."""
    if suffix(path) in (".json", ".jsonl") or _JSON_START.match(text):
        return True
    if suffix(path) == ".txt":
        return False
    raise DataError(
        f"found no JSON, and the name does not end in {', '.join(SUFFIXES)} (or those and .gz)",
        hint="If it is plain text, rename it to .txt.",
        file=path,
    )


def json_rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Every row with the 1-based line where it starts: an array's elements, or objects that follow each other."""
    start = _skip_space(text, 0)
    if text[start] == "[":
        return _array_rows(text, start, path)
    # A pretty-printed object's second line is no object by itself, so either line tells JSON Lines even if one breaks.
    lines = [line for line in text[start : start + 1_000_000].split("\n", 8) if line.strip()][:2]
    if text[start] != "{" or any(map(_is_object, lines)):
        return _line_rows(text, path)
    return _object_rows(text, start, path)


def _line_rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # Only "\n" ends a line: str.splitlines would also split at U+2028, which JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"broken JSON: {_reason(error)}", hint=_ROW_HINT, file=path, line=number) from error


def _array_rows(text: str, start: int, path: Path) -> Iterator[tuple[int, Any]]:
    at = _skip_space(text, start + 1)
    counter = _LineCounter(text, path)
    closed = text.startswith("]", at)
    while not closed:
        line = counter.line(at)
        row, at = _decode(text, at, counter)
        yield line, row
        at = _skip_space(text, at)
        closed = text.startswith("]", at)
        if not closed:
            if not text.startswith(",", at):
                raise counter.fault("the array does not go on with ',' or end with ']'", at)
            at = _skip_space(text, at + 1)
    at = _skip_space(text, at + 1)
    if at < len(text):
        raise counter.fault("found more text after the end of the array", at)


def _object_rows(text: str, start: int, path: Path) -> Iterator[tuple[int, Any]]:
    counter = _LineCounter(text, path)
    at = start
    while at < len(text):
        line = counter.line(at)
        row, at = _decode(text, at, counter)
        yield line, row
        at = _skip_space(text, at)


class _LineCounter:
    """Line numbers of rising offsets in one pass over the text."""

    def __init__(self, text: str, path: Path) -> None:
        self._text, self._path = text, path
        self._offset, self._line = 0, 1

    def line(self, offset: int) -> int:
        """The 1-based line of `offset`, which is not below the last one asked for."""
        self._line += self._text.count("\n", self._offset, offset)
        self._offset = offset
        return self._line

    def fault(self, message: str, offset: int) -> DataError:
        """The error for a syntax error at `offset`."""
        return DataError(f"broken JSON: {message}", hint=_ARRAY_HINT, file=self._path, line=self.line(offset))


def _decode(text: str, at: int, counter: _LineCounter) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        offset = error.pos if isinstance(error, json.JSONDecodeError) else at
        raise counter.fault(_reason(error), max(offset, at)) from error


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
