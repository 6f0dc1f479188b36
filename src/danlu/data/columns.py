"""Own tables: which column holds which of danlu's fields, turned into a row that a format knows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final

from danlu.data.formats import danlu, preference_text, question_answer
from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import fault, key_list, text
from danlu.data.formats.turns import assistant, user
from danlu.exceptions import DataError
from danlu.types import Origin

FIELDS: Final = ("prompt", "response", "system", "history", "chosen", "rejected", "text", "label")
_LABELS: Final[Mapping[str, bool]] = {"true": True, "1": True, "false": False, "0": False}
# Which fields name which content; the first set that is there wins, `system` and `history` may be added.
_MEANING: Final[tuple[tuple[frozenset[str], Format], ...]] = (
    (frozenset({"prompt", "response", "label"}), danlu.UNPAIRED),
    (frozenset({"prompt", "chosen", "rejected"}), preference_text.FORMAT),
    (frozenset({"prompt", "response"}), question_answer.FORMAT),
    (frozenset({"prompt"}), question_answer.PROMPT),
    (frozenset({"text"}), danlu.DOCUMENT),
)
_EXTRAS: Final = frozenset({"system", "history"})


def format_of(columns: Mapping[str, str]) -> Format:
    """The format that a mapping's fields make.

    Raises:
        DataError: an unknown field, or fields that make nothing together.
    """
    for field in columns:
        if field not in FIELDS:
            raise DataError(f"there is no field '{field}' to map to", hint=f"Fields: {', '.join(FIELDS)}.")
    for fields, format in _MEANING:
        rest = set(columns) - fields
        allowed = _EXTRAS if format in (question_answer.FORMAT, question_answer.PROMPT) else frozenset()
        if fields <= set(columns) and rest <= allowed:
            return format
    known = "; ".join(", ".join(f for f in FIELDS if f in fields) for fields, _ in _MEANING)
    raise DataError(
        f"the mapped fields {', '.join(columns)} make no record together",
        hint=f"Map one of: {known}; system and history beside prompt and response.",
    )


def map_columns(row: Row, columns: Mapping[str, str], origin: Origin) -> Row:
    """The row with danlu's fields in place of the table's columns."""
    found: Row = {}
    for field, column in columns.items():
        if column not in row:
            raise fault(f"there is no such column; found {key_list(row)}", origin, column, code="missing-field")
        found[field] = row[column]
    history = found.get("history")
    if isinstance(history, str):
        # In a csv a list can only be written as its JSON.
        with suppress(ValueError, RecursionError):
            found["history"] = json.loads(history) if history.strip() else []
    if "label" in found:
        return {
            "prompt": [user(text(found, "prompt", origin))],
            "completion": [assistant(text(found, "response", origin))],
            "label": _label(found["label"], origin),
        }
    return found


@contextmanager
def naming_columns(columns: Mapping[str, str]) -> Iterator[None]:
    """Errors raised inside name the table's own columns rather than danlu's fields."""
    try:
        yield
    except DataError as error:
        head, bracket, rest = (error.field or "").partition("[")
        head = "response" if head == "completion" and "label" in columns else head
        if head in columns:
            error.field = columns[head] + (bracket + rest if head == "history" else "")
        raise


def _label(value: object, origin: Origin) -> bool:
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise fault(f"found {str(value)[:40]!r}, expected true, false, 1 or 0", origin, "label")
    return label
