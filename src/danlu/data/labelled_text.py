"""Rows for understanding: texts with a class, tokens with tags, blanks with choices; in any container that data comes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from danlu.data.files import find_files
from danlu.data.formats.containers import RawRow, raw_rows
from danlu.exceptions import DataError
from danlu.train_config import Sources, as_list

BLANK = "[MASK]"


@dataclass(frozen=True)
class LabelledText:
    """A text (or a pair of texts) and its class."""

    text: str
    label: str
    second: str = ""


@dataclass(frozen=True)
class TaggedTokens:
    """Words and a tag for each."""

    tokens: list[str]
    tags: list[str]


@dataclass(frozen=True)
class Cloze:
    """A text with one [MASK], what may stand there, and the index of what is right."""

    text: str
    choices: list[str]
    label: int


def _rows(sources: Sources) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    for source in as_list(sources):
        for path in find_files(source.path):
            for raw in raw_rows(path):
                if not isinstance(raw, RawRow):
                    raise raw
                if not isinstance(raw.value, Mapping):
                    raise DataError("found no object", file=path, line=raw.line, hint='{"text": "...", "label": "..."}')
                yield str(path), raw.line, raw.value


def _text(row: Mapping[str, Any], field: str, file: str, line: int) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError("expected a text", file=file, line=line, field=field, hint=f"fields here: {', '.join(row)}")
    return value


def read_labelled(sources: Sources) -> list[LabelledText]:
    """Rows `{"text": "...", "label": ...}`, with `text_pair` if there are two texts; a label is a text or a number.

    Raises:
        DataError: a field is missing or of another type.
    """
    found = []
    for file, line, row in _rows(sources):
        label = row.get("label")
        if not isinstance(label, (str, int)):
            raise DataError("expected a text or a number", file=file, line=line, field="label")
        second = _text(row, "text_pair", file, line) if row.get("text_pair") else ""
        found.append(LabelledText(_text(row, "text", file, line), str(label), second))
    return found


def read_tagged(sources: Sources) -> list[TaggedTokens]:
    """Rows `{"tokens": ["..."], "tags": ["..."]}`.

    Raises:
        DataError: a field is missing, or there are not as many tags as tokens.
    """
    found = []
    for file, line, row in _rows(sources):
        tokens, tags = row.get("tokens"), row.get("tags")
        for field, value in (("tokens", tokens), ("tags", tags)):
            if not isinstance(value, Sequence) or isinstance(value, str) or not value:
                raise DataError("expected a list", file=file, line=line, field=field)
        assert tokens is not None and tags is not None, "looked at just now"
        if len(tokens) != len(tags):
            raise DataError(f"found {len(tokens)} tokens and {len(tags)} tags", file=file, line=line, field="tags")
        found.append(TaggedTokens([str(t) for t in tokens], [str(t) for t in tags]))
    return found


def read_cloze(sources: Sources) -> list[Cloze]:
    """Rows `{"text": "... It is [MASK].", "choices": ["good", "bad"], "label": 0}`; the label may be the choice itself.

    Raises:
        DataError: there is not one [MASK], or the label is none of the choices.
    """
    found = []
    for file, line, row in _rows(sources):
        text, choices, label = _text(row, "text", file, line), row.get("choices"), row.get("label")
        if text.count(BLANK) != 1:
            raise DataError(f"found {text.count(BLANK)} {BLANK}, expected one", file=file, line=line, field="text")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise DataError("expected at least two texts", file=file, line=line, field="choices")
        index = choices.index(label) if label in choices else label
        if not isinstance(index, int) or not 0 <= index < len(choices):
            raise DataError(f"{label!r} is none of the choices", file=file, line=line, field="label")
        found.append(Cloze(text, choices, index))
    return found
