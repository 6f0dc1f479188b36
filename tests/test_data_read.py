"""Reading data files into records and splitting them: formats, containers, errors, real files."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.data.formats.plain_text import split_documents
from danlu.data.formats.registry import FORMATS, by_name
from danlu.data.read import Dataset, find_files, read
from danlu.data.split import prompt_text, split_heldout, split_phases
from danlu.exceptions import DataError, SettingsError
from danlu.types import Comparison, Conversation, Document, Message, Prompt, RecordKind

KINDS: tuple[RecordKind, ...] = get_args(RecordKind)


def u(content: str) -> Message:
    return {"role": "user", "content": content}


def a(content: str) -> Message:
    return {"role": "assistant", "content": content}


def s(content: str) -> Message:
    return {"role": "system", "content": content}


def write(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")
    return path


def read_rows(folder: Path, rows: list[Any], kind: RecordKind, **options: Any) -> Dataset:
    return read(write(folder, rows), kind, **options)


def fails(folder: Path, rows: list[Any], kind: RecordKind, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read_rows(folder, rows, kind, **options)
    assert caught.value.file == str(folder / "data.jsonl")
    return caught.value


# --- danlu's own formats ----------------------------------------------------------------------------------------------


def test_own_formats_serve_the_kinds_they_hold(tmp_path: Path) -> None:
    talk = {"messages": [s("Be kind."), u("Hi"), {**a("Hello"), "train": False}, u("More"), a("Sure")]}
    [conversation] = read_rows(tmp_path, [talk], "conversation").records
    assert isinstance(conversation, Conversation)
    assert conversation.messages == talk["messages"]
    assert conversation.origin is not None
    assert (conversation.origin.file, conversation.origin.line) == (str(tmp_path / "data.jsonl"), 1)
    [prompt] = read_rows(tmp_path, [talk], "prompt").records
    assert isinstance(prompt, Prompt)
    assert prompt.prompt == talk["messages"][:-1]

    # Answers that follow each other are one answer.
    [prompt] = read_rows(tmp_path, [{"messages": [u("Q"), a("A"), a("B")]}], "prompt").records
    assert isinstance(prompt, Prompt) and prompt.prompt == [u("Q")]

    pair = {"prompt": [u("Q")], "chosen": [a("good")], "rejected": [a("bad")], "margin": 0.5}
    [comparison] = read_rows(tmp_path, [pair], "comparison").records
    assert isinstance(comparison, Comparison)
    assert (comparison.prompt, comparison.chosen, comparison.rejected) == ([u("Q")], [a("good")], [a("bad")])
    assert comparison.margin == 0.5
    [imitated] = read_rows(tmp_path, [pair], "conversation").records
    assert isinstance(imitated, Conversation) and imitated.messages == [u("Q"), a("good")]
    [asked] = read_rows(tmp_path, [pair], "prompt").records
    assert isinstance(asked, Prompt) and asked.prompt == [u("Q")]

    [task] = read_rows(tmp_path, [{"prompt": [u("1+1")], "reference": {"answer": "2"}}], "prompt").records
    assert isinstance(task, Prompt) and task.reference == {"answer": "2"}
    [document] = read_rows(tmp_path, [{"text": " as is \n"}], "document").records
    assert isinstance(document, Document) and document.text == " as is \n"


def test_scored_answers_become_best_against_worst(tmp_path: Path) -> None:
    rows = [
        {"prompt": [u("Q")], "responses": ["so-so", "best", [a("worst")]], "scores": [3, 4.5, 0]},
        {"prompt": "Q", "responses": ["x", "y"], "scores": [1, 1]},
    ]
    data = read_rows(tmp_path, rows, "comparison")
    [pair] = data.records
    assert isinstance(pair, Comparison)
    assert (pair.chosen, pair.rejected, pair.margin) == ([a("best")], [a("worst")], 0.0)
    assert data.dropped == {"all scores equal": 1}
    assert data.formats == ["scored"]


SERVED: list[tuple[dict[str, Any], set[str]]] = [
    ({"messages": [u("Q"), a("A")]}, {"conversation", "prompt"}),
    ({"prompt": [u("Q")], "chosen": [a("A")], "rejected": [a("B")]}, {"conversation", "prompt", "comparison"}),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, {"conversation", "prompt", "comparison"}),
    (
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
        {"conversation", "prompt", "comparison"},
    ),
    ({"prompt": [u("Q")]}, {"prompt"}),
    ({"text": "T"}, {"document"}),
    ({"instruction": "Q", "input": "", "output": "A"}, {"conversation", "prompt"}),
    ({"prompt": "Q", "response": "A"}, {"conversation", "prompt"}),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, {"conversation", "prompt"}),
]


@pytest.mark.parametrize(("row", "served"), SERVED)
def test_every_other_kind_is_refused_by_name(tmp_path: Path, row: dict[str, Any], served: set[str]) -> None:
    for kind in KINDS:
        if kind in served:
            assert len(read_rows(tmp_path, [row], kind).records) == 1
        else:
            error = fails(tmp_path, [row], kind)
            assert "but this stage needs" in error.message
            assert error.line == 1
            assert error.hint


# --- published formats ------------------------------------------------------------------------------------------------


def messages_of(folder: Path, row: dict[str, Any]) -> list[Message]:
    [record] = read_rows(folder, [row], "conversation").records
    assert isinstance(record, Conversation)
    return record.messages


def test_alpaca(tmp_path: Path) -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["q", "r"]]}
    assert messages_of(tmp_path, row) == [s("Be brief."), u("q"), a("r"), u("Add\n1 2"), a("3")]
    for blank in ("", None, "<noinput>", "No input.", "`<noinput>`"):
        assert messages_of(tmp_path, {"instruction": "Add", "input": blank, "response": "3"}) == [u("Add"), a("3")]
    [prompt] = read_rows(tmp_path, [{"instruction": "Add"}], "prompt").records
    assert isinstance(prompt, Prompt) and prompt.prompt == [u("Add")]
    assert fails(tmp_path, [{"instruction": "Add", "input": ""}], "conversation").field == "output"


def test_question_answer_with_history(tmp_path: Path) -> None:
    row = {"prompt": "and 2?", "response": "two", "history": [["1?", "one"]]}
    assert messages_of(tmp_path, row) == [u("1?"), a("one"), u("and 2?"), a("two")]


def test_preference_text_and_deepspeed_chat_dialogues(tmp_path: Path) -> None:
    def prompt(text: str) -> list[Message]:
        [pair] = read_rows(tmp_path, [{"prompt": text, "chosen": " A", "rejected": "B"}], "comparison").records
        assert isinstance(pair, Comparison) and pair.chosen == [a(" A")]
        return pair.prompt

    assert prompt("Why?") == [u("Why?")]
    assert prompt("Human: Why? Assistant:") == [u("Why?")]
    assert prompt("\n\nHuman: x\n\nAssistant: y\n\nHuman: a Human: b\n\nAssistant:") == [
        u("x"),
        a("y"),
        u("a Human: b"),
    ]
    assert prompt("Human: who is MyAssistant:") == [u("Human: who is MyAssistant:")]


def test_hh_prompt_is_the_longest_common_beginning_before_an_assistant_turn(tmp_path: Path) -> None:
    start = "\n\nHuman: hi\n\nAssistant: hello"
    rows = [
        {"chosen": f"{start}\n\nHuman: q\n\nAssistant: good", "rejected": f"{start}\n\nHuman: q\n\nAssistant: bad"},
        # They part in a user turn: the common assistant turn before it opens both answers.
        {"chosen": f"{start}\n\nHuman: q\n\nAssistant: good", "rejected": f"{start}\n\nHuman: r\n\nAssistant: bad"},
        # One is the beginning of the other.
        {"chosen": start, "rejected": f"{start}\n\nHuman: q\n\nAssistant: bad"},
        # Doubled roles are merged.
        {"chosen": f"{start}\n\nAssistant: again", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    ]
    pairs = [(p.prompt, p.chosen, p.rejected) for p in read_rows(tmp_path, rows, "comparison").records]  # type: ignore[union-attr]
    assert pairs == [
        ([u("hi"), a("hello"), u("q")], [a("good")], [a("bad")]),
        ([u("hi")], [a("hello"), u("q"), a("good")], [a("hello"), u("r"), a("bad")]),
        ([u("hi")], [a("hello")], [a("hello"), u("q"), a("bad")]),
        ([u("hi")], [a("hello\n\nagain")], [a("no")]),
    ]


def test_hh_noise_is_dropped_and_counted(tmp_path: Path) -> None:
    good = "\n\nHuman: q\n\nAssistant: a"
    noise = [
        (good, good, "chosen equals rejected"),
        (good, "\n\nHuman: q\n\nAssistant: ", "empty answer"),
        ("\n\nAssistant: a\n\nHuman: q\n\nAssistant: b", good, "starts with an assistant turn"),
        (good + "\n\nHuman: more", good, "does not end with an assistant turn"),
        ("\n\nHuman: other\n\nAssistant: a", good, "no common prompt"),
        ("\n\nHuman: \n\nAssistant: x", "\n\nHuman: \n\nAssistant: y", "empty question"),
    ]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected, _ in noise]
    data = read_rows(tmp_path, [*rows, {"chosen": good, "rejected": good + " b"}], "comparison")
    assert len(data.records) == 1
    assert data.dropped == {reason: 1 for _, _, reason in noise}
    # What only spoils the pair does not spoil the prompt.
    assert len(read_rows(tmp_path, rows[:2], "prompt").records) == 2


def test_sharegpt_roles_and_noise(tmp_path: Path) -> None:
    def row(*turns: tuple[str, str], **more: str) -> dict[str, Any]:
        return {"conversations": [{"from": who, "value": value} for who, value in turns], **more}

    tools = row(("human", "q"), ("function_call", "{}"), ("observation", "4"), ("gpt", "four"), system="S")
    assert messages_of(tmp_path, tools) == [s("S"), u("q"), a("{}"), {"role": "tool", "content": "4"}, a("four")]
    good = row(("human", "q"), ("gpt", "r"))
    noise = {
        "does not end with an assistant turn": row(("human", "q"), ("gpt", "r"), ("human", "q")),
        "empty turn": row(("human", "q"), ("gpt", ""), ("human", "q"), ("gpt", "r")),
        "empty answer": row(("human", "q"), ("gpt", " ")),
        "empty question": row(("human", ""), ("gpt", "r")),
        "starts with an assistant turn": row(("system", "x"), ("gpt", "hi"), ("human", "q"), ("gpt", "r")),
    }
    data = read_rows(tmp_path, [*noise.values(), good], "conversation")
    assert len(data.records) == 1
    assert data.dropped == dict.fromkeys(noise, 1)
    error = fails(tmp_path, [good, row(("wizard", "q"))], "conversation")
    assert (error.line, error.field) == (2, "conversations[0].from")
    assert "'wizard'" in error.message


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [u("Q"), a("bad")], "label": False},
        {"messages": [u("Q"), a("A")], "tools": [{"type": "function"}]},
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": {}, "rejected": {}},
        {"instruction": "Q", "context": "C", "response": "A"},
        {"instruction": "Q", "input": "", "output": ["best", "worst"]},
        {"prompt": [u("Q")], "reward_model": {"ground_truth": "4"}},
        {"prompt": {"text": "root", "replies": []}},
    ],
)
def test_rows_with_keys_that_change_their_meaning_are_not_guessed_at(tmp_path: Path, row: dict[str, Any]) -> None:
    assert "which no format has" in fails(tmp_path, [row], "conversation").message


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
    [verbatim] = read(write(tmp_path, [{"a": 1}]), "document", format="plain-text").records
    assert isinstance(verbatim, Document) and verbatim.text == '{"a": 1}'


@given(st.text(alphabet="ab .。\n\t", max_size=300))
def test_splitting_text_loses_white_space_only(text: str) -> None:
    pieces = list(split_documents(text, limit=20))
    assert "".join("".join(piece for _, piece in pieces).split()) == "".join(text.split())
    lines = text.split("\n")
    for line, piece in pieces:
        assert piece.strip() and len(piece) <= 20
        assert piece.split("\n")[0] in lines[line - 1]


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
        ("*.csv", "holds no data file", ".jsonl"),
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


# --- errors -----------------------------------------------------------------------------------------------------------


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
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xc4\xe3"}', 2, "not UTF-8"),
        ("a.json.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-4], None, "gzip file is damaged"),
        ("a.csv", b"text\nx\n", None, "found no JSON"),
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
    [record] = read(tmp_path / "a.jsonl", "document").records
    assert isinstance(record, Document) and record.text == "😀"


PAIR = {"prompt": [u("Q")], "chosen": [a("A")], "rejected": [a("B")]}
SCORED = {"prompt": [u("Q")], "responses": ["A", "B"], "scores": [1, 2]}


@pytest.mark.parametrize(
    ("kind", "row", "field", "message"),
    [
        ("conversation", {"messages": []}, "messages", "the list is empty"),
        ("conversation", {"messages": {}}, "messages", "found an object, expected a list"),
        ("conversation", {"messages": ["hi"]}, "messages[0]", "found text, expected an object"),
        ("conversation", {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ("conversation", {"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "found 'bot', expected"),
        ("conversation", {"messages": [{"role": 1, "content": "x"}]}, "messages[0].role", "found a number"),
        ("conversation", {"messages": [u("Q"), {**a("A"), "content": None}]}, "messages[1].content", "found null"),
        ("conversation", {"messages": [u("Q"), a(" ")]}, "messages[1].content", "the message is empty"),
        ("conversation", {"messages": [u("Q")]}, "messages", "the last message is from 'user'"),
        ("conversation", {"messages": [{**u("Q"), "train": True}, a("A")]}, "messages[0].train", "only assistant"),
        ("conversation", {"messages": [u("Q"), {**a("A"), "train": 1}]}, "messages[1].train", "true or false"),
        ("conversation", {"messages": [u("Q"), {**a("A"), "tool_calls": [1]}]}, "messages[1].tool_calls", "structured"),
        ("comparison", {"prompt": [u("Q")], "chosen": [a("A")]}, "rejected", "missing"),
        ("comparison", {**PAIR, "prompt": [u("Q"), a("A")]}, "prompt", "ends with an assistant turn"),
        ("comparison", {**PAIR, "prompt": [s("S")]}, "prompt", "system messages only"),
        ("comparison", {**PAIR, "chosen": "A"}, "chosen", "found text, expected a list"),
        ("comparison", {**PAIR, "margin": -1}, "margin", "found -1, expected at least 0"),
        ("comparison", {**PAIR, "margin": True}, "margin", "found true/false, expected a number"),
        ("comparison", {"prompt": "Q", "chosen": "A", "rejected": 5}, "rejected", "found a number, expected text"),
        (
            "comparison",
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"},
            "rejected",
            "found text that starts",
        ),
        ("comparison", {**SCORED, "scores": [1]}, "scores", "found 1 scores for 2 responses"),
        ("comparison", {**SCORED, "scores": [1, None]}, "scores[1]", "found null, expected a number"),
        ("comparison", {**SCORED, "scores": [1, float("nan")]}, "scores[1]", "not finite"),
        ("comparison", {**SCORED, "scores": [1, 10**400]}, "scores[1]", "not finite"),
        ("comparison", {**SCORED, "responses": ["A", ""]}, "responses[1]", "empty"),
        ("comparison", {**SCORED, "responses": ["A", 1]}, "responses[1]", "found a number"),
        ("prompt", {"prompt": [u("Q")], "reference": "2"}, "reference", "found text, expected an object"),
        ("prompt", {"prompt": 5}, "prompt", "found a number, expected a list"),
        ("document", {"text": ""}, "text", "the field is empty"),
        ("document", {"text": ["x"]}, "text", "found a list, expected text"),
        ("conversation", {"instruction": "Q", "output": 3}, "output", "found a number"),
        ("conversation", {"instruction": "Q", "output": "A", "history": "x"}, "history", "found text"),
        ("conversation", {"prompt": "Q", "response": "A", "history": [["x"]]}, "history[0]", "found a list"),
        ("conversation", {"prompt": "Q", "response": "A", "history": [["x", 1]]}, "history[0]", "found a number"),
        ("conversation", {"conversations": []}, "conversations", "the list is empty"),
        ("conversation", {"conversations": [{"from": "human"}]}, "conversations[0].value", "missing"),
    ],
)
def test_faulty_fields(tmp_path: Path, kind: RecordKind, row: dict[str, Any], field: str, message: str) -> None:
    error = fails(tmp_path, [row], kind)
    assert error.field == field
    assert message in error.message
    assert error.line == 1


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


# --- properties -------------------------------------------------------------------------------------------------------

odd_text = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\u2028\u2029\x85\x1c\r\n\0\ufeff😀")),
    min_size=1,
).filter(lambda text: bool(text.strip()))
talks = st.lists(st.tuples(odd_text, odd_text), min_size=1, max_size=3).map(
    lambda rounds: [turn for question, answer in rounds for turn in (u(question), a(answer))]
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.lists(talks, min_size=1, max_size=3), st.booleans(), st.booleans())
def test_own_format_round_trip(tmp_path: Path, data: list[list[Message]], ascii_only: bool, array: bool) -> None:
    rows: list[Any] = [{"messages": messages} for messages in data]
    path = tmp_path / "data.jsonl"
    text = json.dumps(rows, ensure_ascii=ascii_only, indent=1)
    if not array:
        text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    path.write_bytes(text.encode())
    assert [record.messages for record in read(path, "conversation").records] == data  # type: ignore[union-attr]


@quick
@given(st.binary(max_size=200), st.sampled_from(["x.json", "x.txt", "x.jsonl.gz", "x.bin"]), st.sampled_from(KINDS))
def test_random_bytes_raise_data_errors_only(tmp_path: Path, data: bytes, name: str, kind: RecordKind) -> None:
    (tmp_path / name).write_bytes(data)
    try:
        read(tmp_path / name, kind)
    except DataError as error:
        assert error.file


SHAPES: list[dict[str, Any]] = [dict(row) for row, _ in SERVED] + [SCORED]
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=5)
    | st.just("\n\nHuman: \n\nAssistant:"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "train"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = sorted(
    {key for row in SHAPES for key in row} | {"responses", "scores", "margin", "history", "system", "input"}
)


@settings(quick, max_examples=200)
@given(
    st.sampled_from(SHAPES),
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3),
    st.sampled_from(KINDS),
    st.sampled_from([None, *(entry.name for entry in FORMATS)]),
    st.integers(0, 400),
)
def test_mutated_rows_give_valid_records_or_data_errors(
    tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], kind: RecordKind, name: str | None, cut: int
) -> None:
    text = json.dumps({**row, **changes})
    (tmp_path / "x.jsonl").write_text(text[:cut] if cut < len(text) and cut % 3 == 0 else text)
    try:
        records = read(tmp_path / "x.jsonl", kind, format=name).records
    except DataError:
        return
    for record in records:
        assert type(record).__name__.lower() == kind
        answers = []
        if isinstance(record, Conversation):
            answers = [record.messages]
        elif isinstance(record, Comparison):
            answers = [record.chosen, record.rejected]
            assert record.chosen != record.rejected and record.margin >= 0
        if isinstance(record, (Comparison, Prompt)):
            assert record.prompt and record.prompt[-1]["role"] != "assistant"
        for messages in answers:
            assert messages[-1]["role"] == "assistant" and messages[-1]["content"].strip()


# --- splits -----------------------------------------------------------------------------------------------------------


def talk(i: int, answer: str = "A") -> Conversation:
    return Conversation([u(f"question {i}"), a(answer)])


def test_heldout_is_stable_and_keeps_prompts_together() -> None:
    records = [talk(i % 1000, str(i)) for i in range(2000)]
    train, heldout = split_heldout(records, 0.1)
    assert len(train) + len(heldout) == 2000
    assert 60 <= len({prompt_text(record) for record in heldout}) <= 140
    assert {prompt_text(record) for record in train}.isdisjoint(map(prompt_text, heldout))
    assert split_heldout(records[:300], 0.1)[1] == [
        record for record in heldout if int(record.messages[1]["content"]) < 300
    ]
    pairs = [Comparison([u(f"question {i}")], [a("x")], [a("y")]) for i in range(1000)]
    assert {prompt_text(pair) for pair in split_heldout(pairs, 0.1)[1]} == set(map(prompt_text, heldout))


def test_heldout_has_something_on_both_sides_if_it_can() -> None:
    for start in range(0, 40, 2):
        two = [talk(start), talk(start + 1)]
        for fraction in (1e-9, 0.5, 1 - 1e-9):
            train, heldout = split_heldout(two, fraction)
            assert len(train) == len(heldout) == 1
    assert split_heldout([talk(1), talk(1, "B")], 0.9) == ([talk(1), talk(1, "B")], [])
    assert split_heldout([talk(1), talk(2)], 0) == ([talk(1), talk(2)], [])
    assert split_heldout([], 0.5) == ([], [])
    # Half a character cannot come from `read`, but from a model.
    assert split_heldout([talk(1, "A"), Conversation([u("\ud83d"), a("A")])], 0.5)[1]
    with pytest.raises(SettingsError):
        split_heldout([talk(1)], 1.0)
    documents = [Document(f"{i}" + "x" * 300 + tail) for i in range(50) for tail in "ab"]
    assert all(len(side) % 2 == 0 for side in split_heldout(documents, 0.3))
    assert split_heldout([talk(1), talk(2)], 0.5, key=lambda record: "same")[1] == []


def test_phases_share_no_prompt_and_are_independent_of_heldout() -> None:
    records = [talk(i) for i in range(2000)]
    phases = [split_phases(records, (2, 4, 4), phase) for phase in range(3)]
    assert [round(len(phase) / 200) for phase in phases] == [2, 4, 4]
    assert sorted(prompt_text(r) for phase in phases for r in phase) == sorted(map(prompt_text, records))
    # With one hash for both, all held-out prompts would lie in the first phase.
    for phase in phases:
        assert 0.05 < len(split_heldout(phase, 0.1)[1]) / len(phase) < 0.15
    assert split_phases(records, (1, 0), 0) == records and split_phases(records, (1, 0), 1) == []
    faulty: list[tuple[list[float], int]] = [([], 0), ([0, 0], 0), ([-1, 2], 0), ([1, 1], 2), ([1, 1], -1)]
    for weights, wanted in faulty:
        with pytest.raises(SettingsError):
            split_phases(records, weights, wanted)


# --- real files -------------------------------------------------------------------------------------------------------

SHARED = Path(os.environ.get("DANLU_SHARED", Path(__file__).parents[2] / "shared")) / "data"


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
def test_published_files(path: str, kind: RecordKind, count: int | None, dropped: dict[str, int]) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"REAL DATA NOT TESTED: {SHARED} is missing; set DANLU_SHARED to the folder that holds data/")
    data = read(SHARED / path, kind)
    assert data.dropped == dropped
    assert count is None or len(data.records) == count
    assert all(type(record).__name__.lower() == kind for record in data.records)
    if kind == "document":
        assert set(data.formats) == {"plain-text", "document"}
        books = [r for r in data.records if isinstance(r, Document) and r.origin and r.origin.file.endswith(".txt")]
        assert len(books) > 1000 and max(len(book.text) for book in books) <= 4000
