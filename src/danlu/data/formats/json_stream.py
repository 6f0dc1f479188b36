"""JSON Lines, JSON arrays and objects that follow each other, row by row: memory does not grow with the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any, Final

from danlu.data.problems import RowError

START: Final = re.compile(r'\s*(?:\{\s*["}]|\[\s*(?:\{\s*["}]|\]))')
"""What JSON rows begin with."""

_BLOCK: Final = 1 << 18
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_COMMA: Final = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
_DECODER: Final = json.JSONDecoder()
_LONGEST_LITERAL: Final = 16
_ROW_HINT: Final = (
    "Each line must be one whole JSON object: look for a missing quote, comma or brace, or a single backslash."
)
_ARRAY_HINT: Final = (
    "Look for a missing quote, comma or brace at or shortly before that line; what follows it was not read."
)

Item = tuple[int, str, Any]
"""The line where a row begins, its text and its value."""


def json_rows(stream: IO[str], head: str, name: str) -> Iterator[Item | RowError]:
    """Every row with the 1-based line where it starts: an array's elements, or objects that follow each other.

    Args:
        stream: the text.
        head: its beginning, at least some lines of it, by which the layout is told.
        name: of the file, for errors.
    """
    start = head.lstrip()
    if start.startswith("["):
        return _array_rows(stream, name)
    # A pretty-printed object's second line is no object by itself, so either line tells JSON Lines even if one breaks.
    lines = [line for line in start[:1_000_000].split("\n", 8) if line.strip()][:2]
    if not start.startswith("{") or any(map(_is_object, lines)):
        return _line_rows(stream, name)
    return _object_rows(stream, name)


def _line_rows(stream: IO[str], name: str) -> Iterator[Item | RowError]:
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        try:
            yield number, line, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield RowError(f"broken JSON: {_reason(error)}", code="bad-json", hint=_ROW_HINT, file=name, line=number)


def _array_rows(stream: IO[str], name: str) -> Iterator[Item | RowError]:
    window = _Window(stream, name)
    try:
        window.take("[")
        closed = window.take("]")
        while not closed:
            yield window.value()
            if window.next_element():
                continue
            closed = window.take("]")
            if not closed and not window.take(","):
                raise window.fault("the array does not go on with ',' or end with ']'", window.at)
        if not window.at_end():
            raise window.fault("found more text after the end of the array", window.at)
    except RowError as error:
        yield error


def _object_rows(stream: IO[str], name: str) -> Iterator[Item | RowError]:
    window = _Window(stream, name)
    try:
        while not window.at_end():
            yield window.value()
    except RowError as error:
        yield error


class _Window:
    """A piece of a text stream that moves on, and grows where a value does not end in it."""

    def __init__(self, stream: IO[str], name: str) -> None:
        self._stream, self._name = stream, name
        self._text, self.at = "", 0
        self._ended = False
        self._line, self._counted = 1, 0
        self._column = 0  # so many characters of its first line stand before the window

    def at_end(self) -> bool:
        """Skip white space; whether nothing follows."""
        while True:
            found = _SPACE.match(self._text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self._text) or self._ended:
                return self.at >= len(self._text)
            self._grow()

    def take(self, mark: str) -> bool:
        """Skip white space, then `mark` if it follows; whether it did."""
        if self.at_end() or self._text[self.at] != mark:
            return False
        self.at += 1
        return True

    def next_element(self) -> bool:
        """Go to an array's next element if its beginning is in the window; a short cut for `take`."""
        found = _COMMA.match(self._text, self.at)
        if found is None or found.end() == len(self._text):
            return False
        self.at = found.end()
        return True

    def value(self) -> Item:
        """The value that follows; `RowError` if there is none."""
        if self.at >= len(self._text) or self._text[self.at].isspace():
            self.at_end()
        line = self._line_at(self.at)
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_be_cut(error):
                    column = error.colno + (self._column if error.lineno == 1 else 0)
                    raise self.fault(f"{error.msg} (column {column})", max(error.pos, self.at)) from error
            except (ValueError, RecursionError) as error:
                raise self.fault(_reason(error), self.at) from error
            else:
                # A number at the window's end may go on behind it ("1.", "1e+").
                if end < len(self._text) - 2 or self._ended:
                    text = self._text[self.at : end]
                    self.at = end
                    return line, text, value
            self._grow()

    def fault(self, message: str, offset: int) -> RowError:
        """The error for a syntax error at `offset`."""
        line = self._line_at(offset)
        return RowError(f"broken JSON: {message}", code="bad-json", hint=_ARRAY_HINT, file=self._name, line=line)

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the value may only be broken because it goes on behind the window."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_LITERAL

    def _line_at(self, offset: int) -> int:
        """The 1-based line of `offset`, which is not below the last one asked for."""
        self._line += self._text.count("\n", self._counted, offset)
        self._counted = offset
        return self._line

    def _grow(self) -> None:
        self._line_at(self.at)
        rest = self._text[self.at :]
        last = self._text.rfind("\n", 0, self.at)
        self._column = self.at - last - 1 if last >= 0 else self._column + self.at
        # At least doubled, so that a large value is not decoded again for every block of it.
        block = self._stream.read(max(_BLOCK, len(rest)))
        self._ended = not block
        self._text, self.at, self._counted = rest + block, 0, 0


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
