"""What a file format is: how to recognise a row, and how to turn it into records of its natural kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from danlu.types import Origin, Record, RecordKind

Row = dict[str, Any]


# A row that holds one of these has an answer or a verdict: to read it as a mere prompt would lose that silently.
ANSWER_KEYS: Final[frozenset[str]] = frozenset(
    {"answer", "answers", "completion", "output", "outputs", "response", "responses", "target", "solution"}
    | {"chosen", "rejected", "label", "labels", "kto_tag", "ground_truth", "reward_model"}
)


class RowDropped(Exception):  # no error: the reader catches and counts it
    """A row is well formed but known noise of its data set (empty answer, equal pair, ...); the message says which."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to lay out a row.

    Attributes:
        name: what users write and reports say.
        shape: a row in short, for error messages.
        holds: the natural kind of content in such a row; `data/kinds.py` turns it into what a stage needs.
        matches: whether a parsed row has this shape. It looks at key names and at most at the type of a value, so that
            a row with a faulty value is still recognised and its fault can be named.
        parse: the row as records of the natural kind. Raises `DataError` for a missing or ill-typed field and `RowDropped`
            for known noise that spoils the row for every use. What spoils only some uses (an empty answer, a pair of
            equal answers: the prompt is still good) is left to `kinds.as_kind`. It must cope with any row, since users
            can force a format.
        about: who publishes it and what is special, for the documents.
        example: a small invented row, for the documents and their test.
    """

    name: str
    shape: str
    holds: RecordKind
    matches: Callable[[Row], bool]
    parse: Callable[[Row, Origin], list[Record]]
    about: str = ""
    example: Row = field(default_factory=dict)
