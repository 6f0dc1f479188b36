"""danlu's own formats and the oldest published ones: what they read, what they drop, which faults they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows import a, fails, read_rows, s, u

from danlu.data.formats.registry import FORMATS
from danlu.data.kinds import kind_of
from danlu.data.read import ReadOptions, read
from danlu.exceptions import DataError
from danlu.types import Comparison, Conversation, Document, Message, Prompt, RecordKind, Unpaired

KINDS: tuple[RecordKind, ...] = get_args(RecordKind)

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


OF_PAIRS = {"conversation", "prompt", "comparison", "ranking", "unpaired"}
SERVED: list[tuple[dict[str, Any], set[str]]] = [
    ({"messages": [u("Q"), a("A")]}, {"conversation", "prompt"}),
    ({"prompt": [u("Q")], "chosen": [a("A")], "rejected": [a("B")]}, OF_PAIRS),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, OF_PAIRS),
    ({"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}, OF_PAIRS),
    ({"prompt": "Q", "responses": ["A", "B"], "scores": [2, 1]}, OF_PAIRS - {"unpaired"}),
    ({"prompt": "Q", "responses": ["A", "B"], "ranks": [2, 1]}, OF_PAIRS - {"unpaired"}),
    ({"prompt": [u("Q")], "completion": [a("A")], "label": True}, {"conversation", "prompt", "unpaired"}),
    ({"prompt": [u("Q")]}, {"prompt"}),
    ({"prompt": "Q"}, {"prompt"}),
    ({"text": "T"}, {"document"}),
    ({"instruction": "Q", "input": "", "output": "A"}, {"conversation", "prompt"}),
    ({"instruction": "Q", "input": ""}, {"prompt"}),
    ({"prompt": "Q", "response": "A"}, {"conversation", "prompt"}),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, {"conversation", "prompt"}),
]


@pytest.mark.parametrize(("row", "served"), SERVED)
def test_every_other_kind_is_refused(tmp_path: Path, row: dict[str, Any], served: set[str]) -> None:
    for kind in KINDS:
        if kind in served:
            records = read_rows(tmp_path, [row], kind).records
            assert {kind_of(record) for record in records} == {kind}
            assert len(records) == (2 if kind == "unpaired" and "chosen" in row else 1)
        else:
            error = fails(tmp_path, [row], kind)
            assert error.line == 1
            assert error.hint
            # What has no answer lacks one; all else is content of another kind.
            assert "but this stage needs" in error.message or error.field in ("output", "response")


def test_tool_calls_and_thoughts_are_checked_and_kept(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    talk = [
        {"role": "developer", "content": "Be kind."},
        u("1 + 1?"),
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I must add."},
        {"role": "tool", "content": "", "tool_call_id": "c1", "name": "add"},
        {**a("2"), "weight": 0, "reasoning_content": ""},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    for written in (tools, json.dumps(tools)):
        [record] = read_rows(tmp_path, [{"messages": talk, "tools": written}], "conversation").records
        assert isinstance(record, Conversation)
        assert record.tools == tuple(tools)
        assert record.messages == [
            s("Be kind."),
            u("1 + 1?"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{**call, "function": {"name": "add", "arguments": {"x": 1}}}],
                "reasoning_content": "I must add.",
            },
            {"role": "tool", "content": "", "tool_call_id": "c1", "name": "add"},
            {**a("2"), "train": False},
        ]
    # A prompt has no place for tools.
    assert "its tools: 1" in fails(tmp_path, [{"messages": talk, "tools": tools}], "prompt").message
    pair = {"prompt": [u("Q")], "chosen": [a("A")], "rejected": [a("B")], "tools": tools}
    assert fails(tmp_path, [pair], "comparison").field == "tools"
    # Arguments that are no JSON stay what the model wrote.
    odd = {"type": "function", "function": {"name": "add", "arguments": "{x"}}
    message = {"role": "assistant", "content": "", "tool_calls": [odd]}
    [record] = read_rows(tmp_path, [{"messages": [u("Q"), message]}], "conversation").records
    assert isinstance(record, Conversation) and record.messages[1]["tool_calls"] == [odd]


def test_labelled_answers(tmp_path: Path) -> None:
    rows = [{"prompt": [u("Q")], "completion": [a(text)], "label": text == "A"} for text in "AB"]
    records = read_rows(tmp_path, rows, "unpaired").records
    assert [(r.completion, r.label) for r in records if isinstance(r, Unpaired)] == [
        ([a("A")], True),
        ([a("B")], False),
    ]
    data = read_rows(tmp_path, rows, "conversation")
    assert [r.messages for r in data.records if isinstance(r, Conversation)] == [[u("Q"), a("A")]]
    assert data.dropped == {"an answer that was not liked": 1}


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

    doubled = row(("human", "q"), ("human", "r"), ("gpt", "four"), ("bing", "five"), system="S")
    assert messages_of(tmp_path, doubled) == [s("S"), u("q\n\nr"), a("four\n\nfive")]
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


# --- faults ----------------------------------------------------------------------------------------------------------


PAIR = {"prompt": [u("Q")], "chosen": [a("A")], "rejected": [a("B")]}
CALL = "messages[1].tool_calls[0]"


def called(function: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function, **more}]}


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
        (
            "conversation",
            {"messages": [u("Q"), {**a("A"), "tool_calls": 1}]},
            "messages[1].tool_calls",
            "a list of calls",
        ),
        (
            "conversation",
            {"messages": [u("Q"), {**a("A"), "tool_calls": [1]}]},
            "messages[1].tool_calls[0]",
            "found a num",
        ),
        ("conversation", {"messages": [{**u("Q"), "tool_calls": [1]}]}, "messages[0].tool_calls", "only assistant"),
        ("conversation", {"messages": [u("Q"), called({"name": 1})]}, f"{CALL}.function.name", "found a number"),
        (
            "conversation",
            {"messages": [u("Q"), called({"name": "f", "arguments": 1})]},
            f"{CALL}.function.arguments",
            "JSON",
        ),
        ("conversation", {"messages": [u("Q"), called({"name": "f"}, id=3)]}, f"{CALL}.id", "found a number"),
        ("conversation", {"messages": [u("Q"), called({"name": "f"}, type="code")]}, f"{CALL}.type", "functions"),
        (
            "conversation",
            {"messages": [{**u("Q"), "reasoning_content": "x"}]},
            "messages[0].reasoning_content",
            "only ass",
        ),
        (
            "conversation",
            {"messages": [{"role": "tool", "content": "", "name": 1}]},
            "messages[0].name",
            "found a number",
        ),
        ("conversation", {"messages": [u("Q"), {**a("A"), "weight": 0.5}]}, "messages[1].weight", "0 and 1"),
        (
            "conversation",
            {"messages": [u("Q"), a("A")], "tools": [{"type": "function"}]},
            "tools[0]",
            "the name of a func",
        ),
        ("conversation", {"messages": [u("Q"), a("A")], "tools": "f(x)"}, "tools", "no JSON"),
        ("conversation", {"messages": [u("Q"), a("A")], "tools": {"name": "f"}}, "tools", "a list of tools"),
        (
            "unpaired",
            {"prompt": [u("Q")], "completion": [a("A")], "label": "yes"},
            "label",
            "found text, expected true",
        ),
        ("unpaired", {"prompt": [u("Q")], "completion": [u("A")], "label": True}, "completion", "is from 'user'"),
        ("ranking", {"prompt": "Q", "responses": ["A"], "ranks": ["first"]}, "ranks[0]", "found text"),
        ("comparison", {"prompt": [u("Q")], "chosen": [a("A")]}, "rejected", "missing"),
        ("comparison", {**PAIR, "prompt": [u("Q"), a("A")]}, "prompt", "ends with an assistant turn"),
        ("comparison", {**PAIR, "prompt": [s("S")]}, "prompt", "system messages only"),
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


def test_strict_faults_of_rows_that_other_formats_would_take(tmp_path: Path) -> None:
    old = {"messages": [u("Q"), {**a("A"), "function_call": {"name": "f"}}]}
    error = fails(tmp_path, [old], "conversation", format="messages")
    assert (error.field, "old form" in error.message) == ("messages[1].function_call", True)
    error = fails(tmp_path, [{**PAIR, "chosen": "A"}], "comparison", format="comparison")
    assert (error.field, error.message) == ("chosen", "found text, expected a list")


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
        records = read(tmp_path / "x.jsonl", kind, ReadOptions(format=name)).records
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
