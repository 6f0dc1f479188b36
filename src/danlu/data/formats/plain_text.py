"""Plain text files. `containers`, which sees the beginning of a file, decides that it is one and calls `split_documents`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import filled_text
from danlu.types import Document, Origin, Record


def split_documents(lines: Iterable[str], limit: int = 4000) -> Iterator[tuple[int, str]]:
    """Whole paragraphs (ended by blank lines) put together up to `limit` characters, each with its 1-based first line.

    A paragraph above the limit is cut after the last line break, else sentence end, else space in reach.
    Nothing but white space between pieces is lost, and no more than a few pieces are in memory.

    Args:
        lines: with their "\\n"; very long ones may come in parts.
        limit: characters.
    """
    documents = _Documents(limit)
    paragraph, start, number = "", 1, 1
    for part in lines:
        if part.endswith("\n") and part.isspace() and paragraph[-1:] in ("", "\n"):
            yield from documents.end_paragraph(start, paragraph)
            paragraph = ""
        else:
            start = start if paragraph else number
            paragraph += part
            while len(paragraph) - paragraph.endswith("\n") > limit:
                end = _place_to_cut(paragraph, limit)
                yield from documents.piece(start, paragraph[:end])
                start += paragraph.count("\n", 0, end)
                paragraph = paragraph[end:]
        number += part.endswith("\n")
    yield from documents.end_paragraph(start, paragraph)
    yield from documents.flush()


def _place_to_cut(paragraph: str, limit: int) -> int:
    # In the second half only, so that no sliver is cut off.
    found = (paragraph.rfind(mark, limit // 2, limit) for mark in ("\n", "。", ". ", " "))
    return next((at + 1 for at in found if at >= 0), limit)


class _Documents:
    """Paragraphs that wait for company."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending: list[str] = []
        self._size = self._line = 0

    def piece(self, line: int, text: str) -> Iterator[tuple[int, str]]:
        """A piece of a long paragraph: a document by itself, since no blank line may come between pieces."""
        yield from self.flush()
        if text.strip():
            yield line, text.rstrip("\n")

    def end_paragraph(self, line: int, text: str) -> Iterator[tuple[int, str]]:
        """A whole paragraph, or the rest of a long one."""
        if not text.strip():
            return
        text = text.rstrip("\n")
        if self._pending and self._size + 2 + len(text) > self._limit:
            yield from self.flush()
        if not self._pending:
            self._line, self._size = line, -2
        self._pending.append(text)
        self._size += 2 + len(text)

    def flush(self) -> Iterator[tuple[int, str]]:
        """What waits, as one document."""
        if self._pending:
            yield self._line, "\n\n".join(self._pending)
        self._pending = []


def _parse(row: Row, origin: Origin) -> list[Record]:
    return [Document(filled_text(row, "text", origin), origin)]


FORMAT = Format(
    "plain-text",
    "a text file",
    "document",
    lambda row: False,
    _parse,
    "A .txt file of prose. Paragraphs, which blank lines end, are put together to documents of up to 4,000 characters.",
    {"text": "Once upon a time there was a fox."},
)
