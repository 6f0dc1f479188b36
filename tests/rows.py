"""What the tests of data files share: short messages, files of rows, and reading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from danlu.data.read import Dataset, ReadOptions, read
from danlu.exceptions import DataError
from danlu.types import Message, RecordKind


def u(content: str) -> Message:
    """A user's turn."""
    return {"role": "user", "content": content}


def a(content: str) -> Message:
    """An assistant's turn."""
    return {"role": "assistant", "content": content}


def s(content: str) -> Message:
    """A system text."""
    return {"role": "system", "content": content}


def write(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    """Rows as JSON Lines."""
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")
    return path


def read_rows(folder: Path, rows: list[Any], kind: RecordKind, **options: Any) -> Dataset:
    """Rows written and read; `options` are those of `ReadOptions`."""
    return read(write(folder, rows), kind, ReadOptions(**options))


def fails(folder: Path, rows: list[Any], kind: RecordKind, **options: Any) -> DataError:
    """The error that these rows give, which names their file."""
    with pytest.raises(DataError) as caught:
        read_rows(folder, rows, kind, **options)
    assert caught.value.file == str(folder / "data.jsonl")
    return caught.value
