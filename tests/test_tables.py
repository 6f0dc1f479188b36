"""Tables: delimiters, headers, quoted cells, faulty rows, parquet."""

from __future__ import annotations

import datetime
import gzip
import sys
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from danlu.data.formats.containers import RawRow, raw_rows
from danlu.data.formats.tables import find_delimiter, has_header
from danlu.data.problems import RowError
from danlu.data.read import read
from danlu.types import Conversation


def found(path: Path) -> list[Any]:
    """Every row as (line, value) and every problem as (line, code)."""
    return [(row.line, row.value if isinstance(row, RawRow) else row.code) for row in raw_rows(path)]


def table(folder: Path, text: str | bytes, name: str = "t.csv") -> list[Any]:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return found(path)


def test_cells_with_line_breaks_keep_the_lines_right(tmp_path: Path) -> None:
    text = 'prompt,response\n"a, ""b""\nand c",d\n\nWhat?,"no\r\nyes"\n'
    rows = [(2, {"prompt": 'a, "b"\nand c', "response": "d"}), (5, {"prompt": "What?", "response": "no\r\nyes"})]
    assert table(tmp_path, text) == rows
    assert table(tmp_path, "\ufeff" + text.replace("\n\n", "\r\n\r\n")) == rows
    [first, _] = read(tmp_path / "t.csv", "conversation").records
    assert isinstance(first, Conversation) and first.messages[1]["content"] == "d"


@pytest.mark.parametrize(
    ("name", "delimiter"), [("t.csv", ","), ("t.csv", ";"), ("t.csv", "\t"), ("t.tsv", "\t"), ("t.tsv", ",")]
)
def test_the_delimiter_is_told_by_content(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = [["question", "answer"], ["1, 2; or 3?", "three"], ["a; b, or c?", "b"]]
    text = "\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)
    assert [value for _, value in table(tmp_path, text, name)] == [
        dict(zip(rows[0], row, strict=True)) for row in rows[1:]
    ]
    plain = "\n".join(delimiter.join(row) for row in [["id", "text"], ["1", "one"], ["2", "two"]])
    assert find_delimiter(plain.split("\n")) == delimiter


@pytest.mark.parametrize(
    ("rows", "header"),
    [
        ([["instruction", "output"], ["Add.", "3"]], True),
        ([["", "Question", "A", "B", "C", "D", "Answer"], ["0", "Why?", "a", "b", "c", "d", "A"]], True),
        ([["问题", "答案"], ["为什么？", "因为。"]], True),
        ([["Medical Tests", "Test no 1 (blood)"], ["x", "y"]], True),
        ([["question", "answer"]], True),
        # A question with choices and the right letter, as in MMLU.
        ([["Which is a metal", "Iron", "Water", "Air", "Fire", "A"]], False),
        ([["What is 2 + 2?", "4"], ["What is 3?", "3"]], False),
        ([["The capital of a far away country is", "Lima"]], False),
        ([["name", "3"]], False),
        ([["text", "text"]], False),
        ([["yes", "good"], ["no", "good"]], False),
        ([[""]], False),
        ([], False),
    ],
)
def test_what_is_a_header(rows: list[list[str]], header: bool) -> None:
    assert has_header(rows) is header


def test_without_a_header_columns_have_numbers(tmp_path: Path) -> None:
    text = "What is 1 + 1?,1,2,3,4,B\nWhat is 1 + 2?,1,2,3,4,C\n"
    assert table(tmp_path, text)[1] == (2, {"0": "What is 1 + 2?", "1": "1", "2": "2", "3": "3", "4": "4", "5": "C"})


def test_faulty_rows_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    text = 'prompt,response\na,b\na\n"x" y,b\nc,d,e\ne,f\ng,"h\n'
    assert table(tmp_path, text) == [
        (2, {"prompt": "a", "response": "b"}),
        (3, "wrong-columns"),
        (4, "bad-table"),
        (5, "wrong-columns"),
        (6, {"prompt": "e", "response": "f"}),
        (7, "bad-table"),
    ]
    assert table(tmp_path, b"prompt,response\na,b\nc,\xff\ne,f\n")[1] == (3, "bad-encoding")
    # What looks like JSON is JSON.
    assert table(tmp_path, '{"prompt": "a", "response": "b"}\n') == [(1, {"prompt": "a", "response": "b"})]


def test_large_cells(tmp_path: Path) -> None:
    [(_, row)] = table(tmp_path, f'prompt,response\na,"{"x" * 1_000_000}"\n')
    assert len(row["response"]) == 1_000_000


# --- parquet ----------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="PARQUET NOT TESTED: pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_parquet_by_content_and_compressed(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Q", "train": None}, {"role": "assistant", "content": "A", "train": False}]
    write_parquet(
        tmp_path / "a.parquet", [{"messages": talk, "score": 1.5}] * 1199 + [{"messages": talk, "score": None}]
    )
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.json").write_bytes(data)
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(data, 1))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("in.parquet", data)
    for name in ("a.parquet", "a.json", "b.parquet.gz", "c.zip"):
        rows = found(tmp_path / name)
        assert [line for line, _ in rows] == list(range(1, 1201))
        # All objects of a column have the same keys: null means that one has it not.
        assert rows[-1][1] == {"messages": [{"role": "user", "content": "Q"}, talk[1]], "score": None}
    [record, *_] = read(tmp_path / "a.parquet", "conversation").records
    assert isinstance(record, Conversation) and record.messages[1] == talk[1]


def test_values_that_json_does_not_have_become_text(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC)
    write_parquet(
        tmp_path / "a.parquet",
        [{"text": "x", "at": when, "cost": Decimal("1.50"), "raw": b"abc", "in": [{"at": when}]}],
    )
    [(_, row)] = found(tmp_path / "a.parquet")
    assert row == {"text": "x", "at": str(when), "cost": "1.50", "raw": "abc", "in": [{"at": str(when)}]}


def test_damaged_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "x" * i} for i in range(5000)])
    whole = (tmp_path / "a.parquet").read_bytes()
    for data in (b"PAR1", whole[:-9], whole[:500] + b"\0" * 900 + whole[1400:]):
        (tmp_path / "a.parquet").write_bytes(data)
        assert found(tmp_path / "a.parquet")[-1][1] == "damaged-file"


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    [error] = raw_rows(tmp_path / "a.parquet")
    assert isinstance(error, RowError)
    assert (error.code, error.hint, error.file) == (
        "missing-library",
        "pip install 'danlu[hub]'",
        str(tmp_path / "a.parquet"),
    )
