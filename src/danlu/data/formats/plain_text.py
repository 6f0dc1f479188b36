"""Plain text files. The reader, which sees the whole file, decides that it is one and calls `split_documents`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import filled_text
from danlu.types import Document, Origin, Record, RecordKind

_BLANK_LINES: Final = re.compile(r"\n(?:[^\S\n]*\n)+")


def split_documents(text: str, limit: int = 4000) -> Iterator[tuple[int, str]]:
    """Whole paragraphs (ended by blank lines) put together up to `limit` characters, each with its 1-based first line.

    A paragraph above the limit is cut after the last line break, else sentence end, else space in reach.
    Nothing but white space between pieces is lost.
    """
    pending: list[str] = []
    size = first_line = 0
    for line, paragraph in _paragraphs(text):
        pieces = list(_cut(paragraph, limit))
        if (pending and size + 2 + len(pieces[0][1]) > limit) or len(pieces) > 1:
            if pending:
                yield first_line, "\n\n".join(pending)
            pending = []
            # The pieces of one long paragraph must not meet again with a blank line between them.
            yield from ((line + down, piece) for down, piece in pieces[:-1])
        down, piece = pieces[-1]
        first_line = first_line if pending else line + down
        size = size + 2 + len(piece) if pending else len(piece)
        pending.append(piece)
    if pending:
        yield first_line, "\n\n".join(pending)


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """The paragraphs that are not blank, each with its 1-based line."""
    line = 1
    start = 0
    for gap in _BLANK_LINES.finditer(text):
        if text[start : gap.start()].strip():
            yield line, text[start : gap.start()]
        line += text.count("\n", start, gap.end())
        start = gap.end()
    if text[start:].strip():
        yield line, text[start:].rstrip("\n")


def _cut(paragraph: str, limit: int) -> Iterator[tuple[int, str]]:
    """Pieces of at most `limit` characters, each with the number of lines above it. A piece is never blank."""
    start = line = 0
    while len(paragraph) - start > limit:
        # In the second half only, so that no sliver is cut off.
        found = (paragraph.rfind(mark, start + limit // 2, start + limit) for mark in ("\n", "。", ". ", " "))
        end = next((at + 1 for at in found if at >= 0), start + limit)
        if paragraph[start:end].strip():
            yield line, paragraph[start:end].rstrip("\n")
        line += paragraph.count("\n", start, end)
        start = end
    if paragraph[start:].strip():
        yield line, paragraph[start:]


def _parse(row: Row, kind: RecordKind, origin: Origin) -> list[Record]:
    return [Document(filled_text(row, "text", origin), origin)]


FORMAT = Format("plain-text", "a text file", "document", lambda row: False, _parse)
