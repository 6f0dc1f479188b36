"""Numbers and truth values that a csv file can only write as text."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Final

from danlu.data.formats.base import Row
from danlu.data.formats.fields import fault, finite, present
from danlu.types import Origin

_TRUTH: Final = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def number(row: Row, field: str, origin: Origin, inside: str = "") -> float:
    """A field that must hold a finite number, or the text of one."""
    value = present(row, field, origin, inside)
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    return finite(value, origin, inside + field)


def optional_number(row: Row, field: str, origin: Origin, inside: str = "") -> float | None:
    """A field that may be absent, null, blank or NaN (how tables write "nothing"); then None."""
    value = row.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    return number(row, field, origin, inside)


def truth(row: Row, field: str, origin: Origin) -> bool:
    """A field that must say yes or no: true, false, 1, 0, or the text of one."""
    value = present(row, field, origin)
    found = _TRUTH.get(str(value).strip().lower()) if isinstance(value, (bool, int, float, str)) else None
    if found is None:
        shown = repr(value)
        raise fault(f"found {shown[:40]}, expected true, false, 1 or 0", origin, field, code="wrong-type")
    return found
