"""RedPajama and its kin: a text with a `meta` object that says where it comes from."""

from __future__ import annotations

from dataclasses import replace

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import filled_text
from danlu.types import Document, Origin, Record


def _source(row: Row) -> str:
    meta = row["meta"] if isinstance(row.get("meta"), dict) else {}
    named = (row.get("red_pajama_subset"), meta.get("redpajama_set_name"), meta.get("pile_set_name"))
    return next((name for name in named if isinstance(name, str) and name.strip()), "")


def _parse(row: Row, origin: Origin) -> list[Record]:
    # The sources are what mixing weighs.
    known = origin if origin.source else replace(origin, source=_source(row))
    return [Document(filled_text(row, "text", origin), known)]


FORMAT = Format(
    "redpajama",
    '{"text": "...", "meta": {...}}',
    "document",
    lambda row: "text" in row and ("meta" in row or "red_pajama_subset" in row),
    _parse,
    "RedPajama, SlimPajama and the Pile: a text, and in `meta` the set it belongs to, which becomes the document's source.",
    {"text": "Once upon a time there was a fox.", "meta": {"redpajama_set_name": "RedPajamaBook"}},
)
