"""The chinese-poetry collection: poems, songs and classics with a title, an author and lines."""

from __future__ import annotations

from typing import Any

from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.fields import wrong_type
from danlu.types import Document, Origin, Record


def _matches(row: Row) -> bool:
    return isinstance(row.get("paragraphs"), list) or (isinstance(row.get("content"), list) and "title" in row)


def _texts(row: Row, origin: Origin, inside: str) -> list[Record]:
    """The documents of a row: its own lines, or those of the parts that a book nests in `content`."""
    field = "paragraphs" if "paragraphs" in row else "content"
    lines: Any = row.get(field)
    if not isinstance(lines, list):
        raise wrong_type(lines, "a list of lines", origin, inside + field)
    if lines and all(isinstance(part, dict) for part in lines):
        return [record for i, part in enumerate(lines) for record in _texts(part, origin, f"{inside}{field}[{i}].")]
    for i, line in enumerate(lines):
        if not isinstance(line, str):
            raise wrong_type(line, "text", origin, f"{inside}{field}[{i}]")
    body = "\n".join(line.strip() for line in lines if line.strip())
    if not body:
        return []
    named = (row.get(key) for key in ("title", "rhythmic", "chapter", "author"))
    head = "\n".join(value.strip() for value in named if isinstance(value, str) and value.strip())
    return [Document(f"{head}\n\n{body}" if head else body, origin)]


def _parse(row: Row, origin: Origin) -> list[Record]:
    documents = _texts(row, origin, "")
    if not documents:
        raise RowDropped("empty text")
    return documents


FORMAT = Format(
    "poetry",
    '{"title" or "rhythmic" or "chapter", "author", "paragraphs": [...]}',
    "document",
    _matches,
    _parse,
    "The chinese-poetry collection. A poem becomes a document: its title, its author, an empty line, its lines. Books that "
    "nest their chapters in `content` give one document a chapter; notes and pronunciation beside the lines are left out.",
    {"title": "春", "author": "某人", "paragraphs": ["风吹柳叶绿，", "雨打杏花红。"]},
)
