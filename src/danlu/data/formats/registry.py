"""All formats, in the order in which rows are tried against them: the more particular shape comes first."""

from __future__ import annotations

import difflib
from typing import Final

from danlu.data.formats import alpaca, danlu, hh_rlhf, plain_text, preference_text, question_answer, sharegpt
from danlu.data.formats.base import Format, Row
from danlu.exceptions import DataError
from danlu.types import RecordKind

FORMATS: Final[tuple[Format, ...]] = (
    danlu.MESSAGES,
    danlu.COMPARISON,
    danlu.SCORED,
    danlu.PROMPT,
    preference_text.FORMAT,
    hh_rlhf.FORMAT,
    sharegpt.FORMAT,
    alpaca.FORMAT,
    question_answer.FORMAT,
    danlu.DOCUMENT,
    plain_text.FORMAT,
)


def detect(row: Row, kind: RecordKind) -> Format | None:
    """The first format that knows the row and can serve `kind`, else the first that knows it, else None."""
    first: Format | None = None
    for entry in FORMATS:
        if entry.matches(row):
            if entry.serves(kind):
                return entry
            first = first or entry
    return first


def by_name(name: str) -> Format:
    """The format of that name; `DataError` with the nearest name if there is none."""
    names = [entry.name for entry in FORMATS]
    if name in names:
        return FORMATS[names.index(name)]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    raise DataError(f"there is no format '{name}'", hint=f"{hint}Formats: {', '.join(names)}.")
