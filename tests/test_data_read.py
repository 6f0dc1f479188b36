"""Reading data files into records: paths, kinds, options, problems, real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rows import a, fails, read_rows, u, write

from danlu.data.files import find_files
from danlu.data.formats.registry import FORMATS, by_name, detect
from danlu.data.licences import commercial_use, licence_table
from danlu.data.problems import FaultyRows, Problem, RowError
from danlu.data.read import ReadOptions, read, scan
from danlu.exceptions import DataError
from danlu.types import Comparison, Conversation, Document, Prompt, Ranking, RecordKind, Unpaired

# --- paths ------------------------------------------------------------------------------------------------------------


def test_folders_globs_and_lists(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "sub/c.txt", ".hidden/d.jsonl", ".e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, [{"text": name}], name)
    (tmp_path / "README.md").write_text("no data")

    def names(path: Any) -> list[str]:
        return [file.relative_to(tmp_path).as_posix() for file in find_files(path)]

    assert names(tmp_path) == ["a.json", "b.jsonl", "sub/c.txt"]
    assert names(f"{tmp_path}/[ab].json*") == ["a.json", "b.jsonl"]
    assert names([tmp_path / "sub", tmp_path]) == ["sub/c.txt", "a.json", "b.jsonl"]
    assert read(str(tmp_path), "document").files == [str(file) for file in find_files(tmp_path)]


@pytest.mark.parametrize(
    ("path", "message", "hint"),
    [
        ("data.josnl", "does not exist", "Did you mean '{}/data.jsonl'?"),
        ("traning/x.json", "folder '{}/traning' does not exist", "Did you mean '{}/training'?"),
        ("zzz", "does not exist", "holds: data.jsonl, training"),
        ("training", "holds no data file", ".jsonl"),
        ("*.md", "holds no data file", ".jsonl"),
    ],
)
def test_missing_files_are_named_with_the_nearest(tmp_path: Path, path: str, message: str, hint: str) -> None:
    write(tmp_path, [{"text": "x"}])
    (tmp_path / "training").mkdir()
    with pytest.raises(DataError) as caught:
        read(f"{tmp_path}/{path}", "document")
    assert message.format(tmp_path) in caught.value.message
    assert hint.format(tmp_path) in caught.value.hint
    assert caught.value.file == f"{tmp_path}/{path}"


@pytest.mark.parametrize("path", ["", []])
def test_no_path_is_an_error(path: Any) -> None:
    with pytest.raises(DataError):
        read(path, "document")


# --- problems --------------------------------------------------------------------------------------------------------


def test_unknown_shapes_name_keys_and_formats(tmp_path: Path) -> None:
    error = fails(tmp_path, [{"foo": 1, "bar": 2}], "prompt")
    assert "'foo', 'bar'" in error.message
    assert all(entry.name in error.hint for entry in FORMATS)
    assert "no keys" in fails(tmp_path, [{}], "prompt").message
    # Beside known rows the odd one is a faulty one of them.
    error = fails(tmp_path, [{"text": "x"}, {"txet": "y"}], "document")
    assert (error.line, error.field) == (2, "text")
    assert "'txet'" in error.message


def test_forced_format(tmp_path: Path) -> None:
    row = {"prompt": "Q", "response": "A"}
    assert read_rows(tmp_path, [row], "conversation", format="question-answer").formats == ["question-answer"]
    assert fails(tmp_path, [row], "conversation", format="alpaca").field == "instruction"
    with pytest.raises(DataError, match="no format 'alpacca'") as caught:
        by_name("alpacca")
    assert "Did you mean 'alpaca'?" in caught.value.hint


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    error = fails(tmp_path, [{"instruction": "Q", "output": ""}] * 2, "conversation")
    assert "empty answer: 2" in error.message


def test_every_problem_is_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    rows: list[Any] = [{"instruction": "Q", "output": "A"}]
    rows += [{"instruction": "Q", "output": i} for i in range(30)] + [{"instruction": "Q"}, ["x"]]
    error = fails(tmp_path, rows, "conversation")
    assert isinstance(error, FaultyRows)
    assert error.counts == {"wrong-type": 31, "missing-field": 1}
    assert "found 32 problems (wrong-type: 31, missing-field: 1)" in error.message
    lines = error.message.split("\n")[1:]
    assert len(lines) == 21 and lines[-1].strip() == "... and 12 more"
    assert lines[0].strip() == (f"{tmp_path}/data.jsonl:2: field 'output': found a number, expected text [wrong-type]")
    assert "--skip-bad" in error.hint
    # One alone is told in full.
    alone = fails(tmp_path, [rows[0], rows[1]], "conversation")
    assert isinstance(alone, RowError) and (alone.line, alone.field, alone.code) == (2, "output", "wrong-type")


def test_faulty_rows_are_left_out_only_on_demand(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "Q", "response": "A"}, {"prompt": "Q"}, {"prompt": "Q", "response": ""}])
    with path.open("a") as stream:
        stream.write('{"prompt": "Q", "resp')
    options = ReadOptions(skip_bad=True)
    data = read(path, "conversation", options)
    assert len(data.records) == 1
    assert data.skipped == {"missing-field": 1, "bad-json": 1}
    assert data.dropped == {"empty answer": 1}
    assert data.left_out == {"empty answer": 1, "faulty row: missing-field": 1, "faulty row: bad-json": 1}
    with pytest.raises(DataError, match=r"no row can be used as a conversation .*faulty row: missing-field: 1"):
        read(write(tmp_path, [{"prompt": "Q", "respons": "x"}]), "conversation", options)
    # Content of another kind is no faulty row, except where it is asked for.
    mixed = write(tmp_path, [{"text": "T"}, {"text": "U"}, {"messages": [u("Q"), a("A")]}], "mixed.jsonl")
    with pytest.raises(RowError, match="found plain text") as caught:
        read(mixed, "conversation")
    assert caught.value.line == 1, "said once, not of every row"
    assert read(mixed, "conversation", options).skipped == {"wrong-kind": 2}


def test_scan_gives_natural_kinds_and_tells_of_everything(tmp_path: Path) -> None:
    good = "\n\nHuman: q\n\nAssistant: a"
    rows = [
        {"prompt": "Q", "responses": ["A", "B"], "scores": [1, 2]},
        {"instruction": "Q", "output": ""},
        {"chosen": good, "rejected": good},
        {"chosen": good + "\n\nHuman: x", "rejected": good},
        {"prompt": "Q"},
        {"what": 1},
        {"prompt": [u("Q")], "completion": [a("A")], "label": False},
    ]
    problems: list[Problem] = []
    dropped: list[tuple[str, int]] = []
    found = list(
        scan(
            write(tmp_path, rows),
            on_problem=problems.append,
            on_dropped=lambda reason, origin: dropped.append((reason, origin.line)),
        )
    )
    # Whether an empty answer or an equal pair spoils a row depends on its use.
    kinds = [Ranking, Conversation, Comparison, Prompt, Unpaired]
    assert [type(record) for _, record in found] == kinds
    assert [entry.name for entry, _ in found] == ["scored", "alpaca", "hh-rlhf", "prompt-text", "unpaired"]
    assert dropped == [("does not end with an assistant turn", 4)]
    assert [(p.code, p.line, p.field) for p in problems] == [("missing-field", 6, "prompt")]
    with pytest.raises(RowError):
        list(scan(tmp_path / "data.jsonl"))
    assert len(list(scan(tmp_path / "data.jsonl", ReadOptions(skip_bad=True)))) == 5


def test_a_row_that_lacks_what_its_neighbours_have_is_faulty(tmp_path: Path) -> None:
    # Alone it would be a prompt; beside rows with an answer it has lost its own.
    rows = [{"instruction": "Q", "input": "", "output": "A"}, {"instruction": "R", "input": ""}]
    problems: list[Problem] = []
    assert len(list(scan(write(tmp_path, rows), on_problem=problems.append))) == 1
    assert [(p.code, p.line, p.field) for p in problems] == [("missing-field", 2, "output")]
    assert [e.name for e, _ in scan(write(tmp_path, rows[::-1]))] == ["alpaca-prompt", "alpaca"]


def test_the_short_cut_finds_what_a_trial_of_all_formats_finds() -> None:
    values = [None, 1, "x", "\n\nHuman: q\n\nAssistant: a", ["x"], [u("Q")], {"x": "y"}, True]
    rows = [known.example for known in FORMATS if known.example]
    rows += [{**row, key: value} for row in rows for key in row for value in values]
    rows += [{k: v for k, v in row.items() if k != key} for row in rows[:100] for key in row]
    for row in rows:
        assert detect(row) is next((known for known in FORMATS if known.matches(row)), None), row


# --- options ----------------------------------------------------------------------------------------------------------


def test_columns_are_mapped(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('id,content,summary,talk,liked\n1,q,r,"[[""x"",""y""]]",true\n2,s,t,,0\n')

    def mapped(kind: RecordKind, **columns: str) -> list[Any]:
        return read(table, kind, ReadOptions(columns=columns)).records

    first, second = mapped("conversation", prompt="content", response="summary", history="talk")
    assert first.messages == [u("x"), a("y"), u("q"), a("r")] and second.messages == [u("s"), a("t")]
    assert [r.label for r in mapped("unpaired", prompt="content", response="summary", label="liked")] == [True, False]
    [pair, _] = mapped("comparison", prompt="content", chosen="summary", rejected="id")
    assert (pair.prompt, pair.chosen, pair.rejected) == ([u("q")], [a("r")], [a("1")])
    assert [r.prompt for r in mapped("prompt", prompt="content")] == [[u("q")], [u("s")]]
    assert [r.text for r in mapped("document", text="summary")] == ["r", "t"]
    with pytest.raises(DataError) as caught:
        mapped("conversation", prompt="question", response="summary")
    assert isinstance(caught.value, FaultyRows) and "field 'question'" in caught.value.message
    with pytest.raises(DataError, match="no field 'answer' to map to"):
        mapped("conversation", prompt="content", answer="summary")
    with pytest.raises(DataError, match="make no record together"):
        mapped("conversation", prompt="content", text="summary")
    # Errors name the table's own columns.
    for kind, row, columns, field in (
        ("conversation", {"q": "Q", "a": 3}, {"prompt": "q", "response": "a"}, "a"),
        ("conversation", {"q": "Q", "a": "A", "h": [1]}, {"prompt": "q", "response": "a", "history": "h"}, "h[0]"),
        ("unpaired", {"q": "Q", "a": "A", "l": "maybe"}, {"prompt": "q", "response": "a", "label": "l"}, "l"),
        ("unpaired", {"q": "Q", "a": "", "l": "1"}, {"prompt": "q", "response": "a", "label": "l"}, "a"),
    ):
        assert fails(tmp_path, [row], kind, columns=columns).field == field  # type: ignore[arg-type]


def test_a_prefix_stands_before_every_first_question(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "system", "content": "S"}, u("Q"), a("A"), u("R"), a("B")]},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": "Q"},
        {"text": "T"},
    ]
    found = [record for _, record in scan(write(tmp_path, rows), ReadOptions(source_prefix="Say: "))]
    talk, pair, prompt, document = found
    assert isinstance(talk, Conversation) and isinstance(pair, Comparison)
    assert [m["content"] for m in talk.messages] == ["S", "Say: Q", "A", "R", "B"]
    assert pair.prompt == [u("Say: Q")] and isinstance(prompt, Prompt) and prompt.prompt == [u("Say: Q")]
    assert isinstance(document, Document) and document.text == "T"


def test_origins_know_licence_and_source(tmp_path: Path) -> None:
    rows = [
        {"text": "a"},
        {"text": "b", "license": "MIT"},
        {"text": "c", "licence": "CC BY-NC 4.0", "source": "web"},
        {"text": "d", "licence": None, "source": {"x": 1}},
        {"text": "e", "license": "My own"},
    ]
    path = write(tmp_path, rows)
    options = ReadOptions(licence="apache-2.0", source="town")
    data = read(path, "document", options)
    assert [(r.origin.licence, r.origin.source) for r in data.records if r.origin] == [
        ("apache-2.0", "town"),
        ("MIT", "town"),
        ("CC BY-NC 4.0", "web"),
        ("apache-2.0", "town"),
        ("My own", "town"),
    ]
    assert data.origins == [
        {"file": str(path), "records": 5, "licence": "apache-2.0, MIT, CC BY-NC 4.0, My own", "source": "town, web"}
    ]
    data = read(path, "document", ReadOptions(commercial_only=True))
    assert [r.text for r in data.records if isinstance(r, Document)] == ["b"]
    assert data.dropped == {
        "unknown licence: none given": 2,
        "no commercial use: CC BY-NC 4.0": 1,
        "unknown licence: My own": 1,
    }


def test_the_licence_table() -> None:
    assert all(
        commercial_use(name) for name in ("MIT", "Apache License 2.0", "CC BY 4.0", "cc_by_sa_4.0", "CC0-1.0", "ODC-BY")
    )
    assert [commercial_use(name) for name in ("CC-BY-NC-4.0", "cc by nc sa 4.0", "Research only")] == [False] * 3
    assert commercial_use("") is None and commercial_use("proprietary") is None
    assert not any("-nc" in name and allowed for name, allowed in licence_table().items())


def test_single_scored_rows_of_several_files_become_pairs(tmp_path: Path) -> None:
    for name, answer, score in (("a.jsonl", "good", 5), ("b.jsonl", "bad", 1)):
        write(tmp_path, [{"prompt": "Q", "responses": [answer], "scores": [score]}], name)
    [pair] = read(tmp_path, "comparison", margin=True).records
    assert pair == Comparison([u("Q")], [a("good")], [a("bad")], 4.0, pair.origin)
    rows = [{"prompt": "Q", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}]
    assert len(read(write(tmp_path, rows, "c.jsonl"), "comparison", pairs="all").records) == 3


# --- real files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind", "count", "dropped"),
    [
        ("alpaca-en/alpaca_data.json.gz", "conversation", 49890, {"empty answer": 25}),
        ("hh-rlhf/harmless-base", "comparison", 1983, {"empty answer": 3}),
        ("hh-rlhf/helpful-base", "comparison", 1989, {"chosen equals rejected": 2, "empty answer": 3, "empty turn": 1}),
        ("hh-rlhf/helpful-rejection-sampled", "comparison", 2295, {"chosen equals rejected": 27}),
        ("hh-rlhf", "prompt", 6302, {"empty turn": 1}),
        ("hh-rlhf", "conversation", 6299, {"empty answer": 3, "empty turn": 1}),
        ("sharegpt-zh-1k", "conversation", 992, {"does not end with an assistant turn": 7, "empty turn": 1}),
        ("gpteacher", "conversation", 4319, {}),
        ("advertise-gen/chatglm*.jsonl", "conversation", 100, {}),
        ("pretrain-en", "document", None, {}),
    ],
)
def test_published_files(
    shared_data: Path, path: str, kind: RecordKind, count: int | None, dropped: dict[str, int]
) -> None:
    data = read(shared_data / path, kind)
    assert data.dropped == dropped
    assert count is None or len(data.records) == count
    assert all(type(record).__name__.lower() == kind for record in data.records)
    if kind == "document":
        assert set(data.formats) == {"plain-text", "document"}
        books = [r for r in data.records if isinstance(r, Document) and r.origin and r.origin.file.endswith(".txt")]
        assert len(books) > 1000 and max(len(book.text) for book in books) <= 4000
