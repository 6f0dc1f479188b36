"""What a file format is: how to recognise a row, and how to turn it into records of the kind that a stage needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from danlu.exceptions import DataError
from danlu.types import Origin, Record, RecordKind

Row = dict[str, Any]

SERVED_BY: Final[dict[RecordKind, frozenset[RecordKind]]] = {
    "conversation": frozenset({"conversation", "comparison"}),
    "comparison": frozenset({"comparison"}),
    "prompt": frozenset({"conversation", "comparison", "prompt"}),
    "document": frozenset({"document"}),
}
"""Which kinds of content can serve a stage that needs the key."""

_PLURAL: Final[dict[RecordKind, str]] = {
    "conversation": "conversations",
    "comparison": "comparisons",
    "prompt": "prompts without answers",
    "document": "plain text",
}
_EXAMPLE: Final[dict[RecordKind, str]] = {
    "conversation": '{"messages": [...]}',
    "comparison": '{"prompt": [...], "chosen": [...], "rejected": [...]}',
    "prompt": '{"prompt": [...]}',
    "document": '{"text": "..."} or a .txt file',
}


class RowDropped(Exception):  # no error: the reader catches and counts it
    """A row is well formed but known noise of its data set (empty answer, equal pair, ...); the message says which."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to lay out a row.

    Attributes:
        name: what users write and reports say.
        shape: a row in short, for error messages.
        holds: the kind of content in such a row.
        matches: whether a parsed row has this shape. It looks at key names and at most at the type of a value, so that
            a row with a faulty value is still recognised and its fault can be named.
        parse: the row as records of the kind asked for, one that `holds` can serve. Raises `DataError` for a missing
            or ill-typed field and `RowDropped` for known noise. It must cope with any row,
            since users can force a format.
    """

    name: str
    shape: str
    holds: RecordKind
    matches: Callable[[Row], bool]
    parse: Callable[[Row, RecordKind, Origin], list[Record]]

    def serves(self, kind: RecordKind) -> bool:
        """Whether rows of this format can be read as `kind`."""
        return self.holds in SERVED_BY[kind]

    def records(self, row: Row, kind: RecordKind, origin: Origin) -> list[Record]:
        """The records of one row; `DataError` if this format cannot serve `kind`."""
        if not self.serves(kind):
            raise DataError(
                f"found {_PLURAL[self.holds]} (format '{self.name}'), but this stage needs {_PLURAL[kind]}",
                hint=f"Give a file with rows like {_EXAMPLE[kind]}.",
                file=origin.file,
                line=origin.line,
            )
        return self.parse(row, kind, origin)
