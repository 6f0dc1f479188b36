"""Containers and encodings: JSON in its layouts, text, gzip and zip; content beats the name; nothing crashes a reader."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows import write

from danlu.data.formats import json_stream
from danlu.data.formats.containers import RawRow, raw_rows
from danlu.data.formats.plain_text import split_documents
from danlu.data.problems import Problem, RowError
from danlu.data.read import ReadOptions, read, scan
from danlu.exceptions import DataError
from danlu.types import Document, RecordKind

KINDS: tuple[RecordKind, ...] = get_args(RecordKind)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def texts(path: Path) -> list[str]:
    return [record.text for record in read(path, "document").records if isinstance(record, Document)]


def rows_of(path: Path) -> list[Any]:
    """The rows of a file that has no fault."""
    found = list(raw_rows(path))
    assert all(isinstance(row, RawRow) for row in found), found
    return [row.value for row in found if isinstance(row, RawRow)]


def problems_of(path: Path) -> list[tuple[str, int]]:
    return [(row.code, row.line or 0) for row in raw_rows(path) if isinstance(row, RowError)]


# --- containers -------------------------------------------------------------------------------------------------------

ROWS = [{"text": "one"}, {"text": "two\u2028\x85 lines"}, {"text": "三"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.txt", "D.JSON.GZ", "d.jsonl.gz", "d.txt.gz", "d.data"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (LINES, [1, 2, 3]),
        (LINES.replace("\n", "\r\n") + "\r\n\r\n", [1, 2, 3]),
        ("\ufeff" + LINES, [1, 2, 3]),
        (json.dumps(ROWS), [1, 1, 1]),
        (json.dumps(ROWS, indent=1, ensure_ascii=False), [2, 5, 8]),
        ("\n".join(json.dumps(row, indent=1) for row in ROWS), [1, 4, 7]),
    ],
)
def test_content_beats_the_name(tmp_path: Path, name: str, content: str, lines: list[int]) -> None:
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.lower().endswith(".gz") else data)
    records = read(tmp_path / name, "document").records
    assert [record.text for record in records] == [row["text"] for row in ROWS]  # type: ignore[union-attr]
    assert [record.origin.line for record in records if record.origin] == lines


def test_gzip_is_told_by_content_and_a_single_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(gzip.compress(b'{"text": "x"}', mtime=0))
    (tmp_path / "b.json.gz").write_bytes(b'{"text": "y"}')
    assert [record.text for record in read(tmp_path, "document").records] == ["x", "y"]  # type: ignore[union-attr]


def test_plain_text_is_split_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(("\r\n\r\n" + "\r\n \r\n".join(f"{i}:" + "x" * 1500 for i in range(5))).encode())
    data = read(path, "document")
    assert data.formats == ["plain-text"]
    texts = [record.text for record in data.records if isinstance(record, Document)]
    assert [text.count("x") for text in texts] == [3000, 3000, 1500]
    assert texts[1].startswith("2:") and "\n\n3:" in texts[1]
    assert [record.origin.line for record in data.records if record.origin] == [3, 7, 11]
    [verbatim] = read(write(tmp_path, [{"a": 1}]), "document", ReadOptions(format="plain-text")).records
    assert isinstance(verbatim, Document) and verbatim.text == '{"a": 1}'


@given(st.text(alphabet="ab .。\n\t", max_size=300))
def test_splitting_text_loses_white_space_only(text: str) -> None:
    pieces = list(split_documents(text.splitlines(keepends=True), limit=20))
    assert "".join("".join(piece for _, piece in pieces).split()) == "".join(text.split())
    lines = text.split("\n")
    for line, piece in pieces:
        assert piece.strip() and len(piece) <= 20
        assert piece.split("\n")[0] in lines[line - 1]


def test_long_lines_come_in_parts_and_give_the_same_documents() -> None:
    text = "\n\n".join(["short", "x" * 50 + ". " + "y" * 70, "end " * 30 + "\nand\nmore", "last"]) + "\n"
    whole = list(split_documents(text.splitlines(keepends=True), limit=60))
    parts = iter(io.StringIO(text, newline="\n").readline, "")
    assert list(split_documents(parts, limit=60)) == whole
    stream = io.StringIO(text, newline="\n")
    assert list(split_documents(iter(lambda: stream.readline(7), ""), limit=60)) == whole
    assert [(line, piece[-5:]) for line, piece in whole][:4] == [(1, "short"), (3, "xxxx."), (3, "yyyyy"), (3, "yyyyy")]


# --- broken files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("a.json", b"", None, "the file is empty"),
        ("a.txt", b" \n", None, "the file is empty"),
        ("a.json", b"[]", None, "no row can be used"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"\n{"text": "z"}\n', 3, "broken JSON"),
        ("a.jsonl", b'{"text": "x"\n{"text": "y"}\n', 1, "broken JSON"),
        ("a.json", b'[\n {"text": "x"},\n {"text": x}\n]', 3, "broken JSON: Expecting value"),
        ("a.json", b'[\n {"text": "x"}\n {"text": "y"}\n]', 3, "does not go on with ','"),
        ("a.json", b'[{"text": "x"}]\n\nmore', 3, "more text after the end"),
        ("a.json", b'{\n "text": "x",\n "more": tru\n}', 3, "broken JSON"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', 2, "found a list, expected an object"),
        ("a.json", b'[\n"x"]', 2, "found text, expected an object"),
        ("a.json", b"hello", 1, "broken JSON"),
        ("a.json", b"[" * 100_000, 1, "nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", 1, "digits"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}', 2, "half of a character"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', 2, "not UTF-8"),
        ("a.json.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-4], None, "gzip file is damaged"),
        ("a.data", b"text\nx\n", None, "found no JSON"),
        ("a.txt", b"one\ntwo\0", 2, "NUL"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, line: int | None, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name, "document")
    assert message in caught.value.message
    assert (caught.value.file, caught.value.line) == (str(tmp_path / name), line)


def test_good_surrogate_pairs_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert texts(tmp_path / "a.jsonl") == ["😀"]


def test_what_stands_before_a_fault_is_read(tmp_path: Path) -> None:
    rows = [{"text": str(i)} for i in range(5000)]
    cases: dict[str, tuple[bytes, int, list[tuple[str, int]]]] = {
        "cut.json": (json.dumps(rows, indent=0).encode()[:-20], 4999, [("bad-json", 14999)]),
        "lines.jsonl": (b'{"text": "a"}\n{"text": \n{"text": "b"}\n', 2, [("bad-json", 2)]),
        "bytes.jsonl": ('{"text": "好"}\n'.encode() + b'{"text": "\xff"}\n{"text": "b"}\n', 2, [("bad-encoding", 2)]),
        "bytes.json": (b'[{"text": "a"},\n{"text": "\xff"},\n{"text": "b"}]', 2, [("bad-encoding", 2)]),
        "bytes.txt": (b"one\n\n" + b"x" * 3998 + b"\n\n\xff\n\nfour", 2, [("bad-encoding", 5)]),
        "cut.jsonl.gz": (gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode())[:-2000], 0, []),
    }
    for name, (content, count, problems) in cases.items():
        (tmp_path / name).write_bytes(content)
        found = list(raw_rows(tmp_path / name))
        if problems:
            assert (len(found) - len(problems), problems_of(tmp_path / name)) == (count, problems), name
        else:
            assert len(found) > 1000 and problems_of(tmp_path / name) == [("damaged-file", 0)]


# --- encodings --------------------------------------------------------------------------------------------------------

STORY = "从前有一个人，他在山上种树。大家都说他不会成功，可是十年以后，山上有了一片很大的树林。"
OLD = "國破山河在，城春草木深。感時花濺淚，恨別鳥驚心。烽火連三月，家書抵萬金。白頭搔更短，渾欲不勝簪。"


def in_layout(name: str, rows: list[dict[str, str]]) -> str:
    if name == "d.json":
        return json.dumps(rows, ensure_ascii=False, indent=1)
    if name == "d.csv":
        return "\n".join(["text", *(row["text"] for row in rows)]) + "\n"
    if name == "d.txt":
        return "\n\n".join(row["text"] for row in rows)
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.txt"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "gbk", "utf-16", "utf-16-be"])
def test_encodings(tmp_path: Path, name: str, encoding: str) -> None:
    rows = [{"text": STORY}, {"text": OLD + " café"}] if encoding != "gbk" else [{"text": STORY}, {"text": "好"}]
    text = in_layout(name, rows)
    expected = ["\n\n".join(row["text"] for row in rows)] if name == "d.txt" else [row["text"] for row in rows]
    for content in (text, text.replace("\n", "\r\n")):
        data = content.encode(encoding)
        (tmp_path / name).write_bytes(b"\xfe\xff" + data if encoding == "utf-16-be" else data)
        assert texts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Un café très chaud, déjà bu à la fenêtre de l'hôtel où j'étais né. " * 9),
        ("cp1251", "Съешь ещё этих мягких французских булок да выпей чаю. " * 9),
        ("koi8-r", "Съешь ещё этих мягких французских булок да выпей чаю. " * 9),
        ("euc-kr", "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. " * 9),
        ("shift-jis", "いろはにほへと散りぬるを我が世誰ぞ常ならむ有為の奥山今日越えて。" * 9),
        ("cp1252", "é"),
    ],
)
def test_other_old_encodings_are_not_taken_for_chinese(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(
        b'{"text": "fine"}\n' + json.dumps({"text": text}, ensure_ascii=False).encode(encoding)
    )
    assert problems_of(tmp_path / "d.jsonl") == [("bad-encoding", 2)]


@quick
@given(
    st.lists(st.text(alphabet=STORY + OLD + "abc \u2028", min_size=1).map(lambda t: STORY + t), min_size=1, max_size=4)
)
def test_gb18030_round_trip(tmp_path: Path, found: list[str]) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(in_layout("d.jsonl", [{"text": text} for text in found]).encode("gb18030"))
    assert texts(path) == found


# --- archives ---------------------------------------------------------------------------------------------------------


def test_archives_are_read_member_by_member(tmp_path: Path) -> None:
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/two.jsonl", '{"text": "2"}\n{"text": 3}')
        archive.writestr("b/one.json.gz", gzip.compress(b'[{"text": "1"}]', mtime=0))
        archive.mkdir("empty")
        for left_out in ("__MACOSX/b/._two.jsonl", ".hidden/x.json", "b/.DS_Store", "README.md"):
            archive.writestr(left_out, "no data")
    problems: list[Problem] = []
    found = [record for _, record in scan(path, on_problem=problems.append)]
    assert [r.origin and (r.origin.file, r.origin.line, r.text) for r in found if isinstance(r, Document)] == [
        (f"{path}/b/two.jsonl", 1, "2"),
        (f"{path}/b/one.json.gz", 1, "1"),
    ]
    assert [(p.code, p.file, p.line) for p in problems] == [("wrong-type", f"{path}/b/two.jsonl", 2)]
    # Content tells, not the name.
    path.rename(tmp_path / "all.jsonl")
    assert len(list(raw_rows(tmp_path / "all.jsonl"))) == 3


def test_archives_without_data_or_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README.md", "no data")
    assert problems_of(path) == [("empty-file", 0)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", "".join(f'{{"text": "{i}"}}\n' for i in range(9999)))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert problems_of(path) == [("damaged-file", 0)]
    broken = bytearray(whole)
    broken[60:90] = b"\0" * 30
    path.write_bytes(bytes(broken))
    assert problems_of(path)[-1][0] == "damaged-file"
    # The flag of a password stands in the member's header and in the directory.
    locked = bytearray(whole)
    locked[6] |= 1
    locked[whole.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(locked))
    [error] = raw_rows(path)
    assert isinstance(error, RowError) and "encrypted" in error.message


# --- streaming --------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def streamed(text: str, block: int) -> Iterator[Any]:
    with mock.patch.object(json_stream, "_BLOCK", block):
        yield from json_stream.json_rows(io.StringIO(text, newline="\n"), text[:100], "f")


@settings(quick, max_examples=200)
@given(st.lists(json_values, max_size=6), st.integers(1, 50), st.sampled_from([None, 1, 4]), st.booleans())
def test_arrays_are_decoded_piece_by_piece(rows: list[Any], block: int, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    found = list(streamed(text, block))
    assert [value for _, _, value in found] == rows
    assert all(json.loads(part) == value for _, part, value in found)
    lines = text.split("\n")
    for line, part, _ in found:
        assert part.split("\n")[0] in lines[line - 1]


@settings(quick, max_examples=200)
@given(
    st.lists(json_values, min_size=1, max_size=6),
    st.integers(1, 50),
    st.integers(0, 200),
    st.sampled_from('x"[]{},:\\\n 1'),
)
def test_broken_arrays_give_the_rows_before_the_fault(rows: list[Any], block: int, at: int, mark: str) -> None:
    text = json.dumps(rows)
    at %= len(text)
    broken = text[:at] + mark + text[at + 1 :]
    *found, last = [*streamed("[" + broken[1:], block), None]
    if found and isinstance(found[-1], RowError):
        last = found.pop()
    values = [value for _, _, value in found]
    try:
        assert values == json.loads("[" + broken[1:])
    except ValueError:
        assert isinstance(last, RowError) and last.code == "bad-json"
        # All at once or piece by piece: the same rows and the same fault.
        *others, other = streamed("[" + broken[1:], 10_000)
        assert [value for _, _, value in others] == values and (other.message, other.line) == (last.message, last.line)


@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.json", "d.csv", "d.txt", "d.jsonl.gz", "d.json.gz", "d.zip", "objects.json"]
)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"row {i} " + "好" * 2000} for i in range(2500)]  # 15 MB of UTF-8
    text = in_layout(name.removesuffix(".gz"), rows)
    if name == "objects.json":
        text = "\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in rows)
    data = text.encode()
    if name.endswith(".gz"):
        data = gzip.compress(data, 1)
    path = tmp_path / name
    path.write_bytes(data)
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("d.jsonl", data)
    del rows, text, data
    next(scan(path))
    tracemalloc.start()
    counts = Counter(entry.name for entry, _ in scan(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counts.total() >= 1250 and len(counts) == 1
    assert peak < 7_000_000


# --- fuzzing ----------------------------------------------------------------------------------------------------------

NAMES = ["x.json", "x.txt", "x.jsonl.gz", "x.bin", "x.csv", "x.tsv", "x.zip", "x.parquet"]


@settings(quick, max_examples=200)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"[", b'{"text": ', b"PK\x03\x04", b"PAR1", b"\x1f\x8b\x08\0", b"\xff\xfe", b"\xef\xbb\xbf"]),
    st.sampled_from(NAMES),
    st.sampled_from(KINDS),
)
def test_random_bytes_raise_data_errors_only(
    tmp_path: Path, data: bytes, start: bytes, name: str, kind: RecordKind
) -> None:
    (tmp_path / name).write_bytes(start + data)
    try:
        read(tmp_path / name, kind)
    except DataError as error:
        assert error.file and error.file.startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    "name",
    [
        "alpaca-en/alpaca_data.json.gz",
        "moss-sft/SFT_data.zip",
        "chatdoctor/format_dataset.csv",
        "mmlu/val",
        "gsm8k/train.jsonl.gz",
    ],
)
def test_cut_real_files_never_crash(tmp_path: Path, shared_data: Path, name: str) -> None:
    source = shared_data / name
    source = min(source.glob("*.csv")) if source.is_dir() else source
    data = source.read_bytes()
    for part in (0.001, 0.3, 0.9, 0.9999):
        path = tmp_path / source.name
        path.write_bytes(data[: int(len(data) * part)])
        problems: list[Problem] = []
        count = sum(1 for _ in scan(path, on_problem=problems.append))
        assert count or problems or part == 0.001
        assert all(problem.code and problem.file.startswith(str(path)) for problem in problems)
