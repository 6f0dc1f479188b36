"""Reading single fields of a row: what is missing, empty or of the wrong type is named with its place."""

from __future__ import annotations

import math
from typing import Any

from danlu.data.formats.base import Row
from danlu.data.problems import RowError
from danlu.types import Origin


def type_name(value: object) -> str:
    """The type of a parsed JSON value in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def fault(message: str, origin: Origin, field: str | None, hint: str = "", *, code: str = "bad-value") -> RowError:
    """A `DataError` at this row; `code` is the short word by which reports count it."""
    return RowError(message, code=code, hint=hint, file=origin.file, line=origin.line, field=field)


def wrong_type(value: object, expected: str, origin: Origin, field: str) -> RowError:
    """The error for a value of another type than `expected`."""
    return fault(f"found {type_name(value)}, expected {expected}", origin, field, code="wrong-type")


def present(row: Row, field: str, origin: Origin, inside: str = "") -> Any:
    """The value of a field that must be there; `inside` is the path to `row` when that is a part of the row."""
    if field not in row:
        message = f"the field is missing; found {key_list(row)}"
        raise fault(message, origin, inside + field, "Add the field, or remove the row.", code="missing-field")
    return row[field]


def text(row: Row, field: str, origin: Origin, inside: str = "") -> str:
    """A field that must hold text (which may be empty)."""
    value = present(row, field, origin, inside)
    if not isinstance(value, str):
        raise wrong_type(value, "text", origin, inside + field)
    return value


def optional_text(row: Row, field: str, origin: Origin) -> str:
    """A field that may be absent or null; then ""."""
    return "" if row.get(field) is None else text(row, field, origin)


def filled_text(row: Row, field: str, origin: Origin) -> str:
    """A field that must hold text which is not blank."""
    value = text(row, field, origin)
    if not value.strip():
        raise fault(
            "the field is empty, expected text", origin, field, "Fill it in, or remove the row.", code="empty-field"
        )
    return value


def filled_list(row: Row, field: str, origin: Origin) -> list[Any]:
    """A field that must hold a list with at least one element."""
    value = present(row, field, origin)
    if not isinstance(value, list):
        raise wrong_type(value, "a list", origin, field)
    if not value:
        raise fault("the list is empty", origin, field, "Fill it in, or remove the row.", code="empty-field")
    return value


def finite(value: object, origin: Origin, field: str) -> float:
    """A number that is neither NaN nor infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type(value, "a number", origin, field)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise fault("found a number that is not finite", origin, field)
    return number


def margin_of(row: Row, origin: Origin) -> float:
    """By how much the chosen answer is better; absent or null is 0."""
    margin = 0.0 if row.get("margin") is None else finite(row["margin"], origin, "margin")
    if margin < 0:
        raise fault(f"found {margin:g}, expected at least 0", origin, "margin")
    return margin


def key_list(row: Row) -> str:
    """The keys of a row for an error message, cut short."""
    names = [repr(key if len(key) <= 40 else key[:40] + "…") for key in row]
    if not names:
        return "no keys"
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"the keys {', '.join(names[:12])}{more}"
