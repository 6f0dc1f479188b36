"""`danlu data convert` and `import`: what a target can hold comes back as it was, and what it cannot is said."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from danlu.cli.data_convert import TARGETS as CHOICES
from danlu.cli.main import run
from danlu.config import SftSettings
from danlu.data.convert import TARGETS, Converted, convert
from danlu.data.formats.registry import by_name, detect
from danlu.data.importer import import_registry, is_registry
from danlu.data.kinds import pool_singles
from danlu.data.problems import RowError
from danlu.data.read import read, scan
from danlu.data.rows_out import RowFile, row_of
from danlu.exceptions import DataError
from danlu.parsing import parse
from danlu.types import (
    Comparison,
    Conversation,
    Document,
    Message,
    Origin,
    Prompt,
    Ranking,
    Record,
    ToolCall,
    Unpaired,
)

ORIGIN = Origin("rows.jsonl", 7)


def u(content: str) -> Message:
    return {"role": "user", "content": content}


def a(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}  # type: ignore[typeddict-item]


def s(content: str) -> Message:
    return {"role": "system", "content": content}


def t(content: str, **more: Any) -> Message:
    return {"role": "tool", "content": content, **more}  # type: ignore[typeddict-item]


def call(name: str, **arguments: Any) -> ToolCall:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def rows_of(record: Record, to: str, **options: Any) -> tuple[list[dict[str, Any]], Converted]:
    told = Converted()
    return list(convert([record], to, told, **options)), told


def back(row: dict[str, Any]) -> Record:
    """A row as a file's reader recognises it, after a trip through JSON."""
    row = json.loads(json.dumps(row, ensure_ascii=False))
    entry = detect(row)
    assert entry is not None
    [record] = entry.parse(row, ORIGIN)
    return record


# -- round trips ----------------------------------------------------------------------------------------------------------

# Private-use characters are where danlu itself puts marks; line separators and odd spaces must come through.
NASTY = (
    "<noinput>",
    "No input.",
    "Human: hi",
    "a\n\nAssistant: b",
    " <user>: a <bot>: b",
    "### Response:\nx",
    "<|im_end|>",
    "a\u2028b\x85c",
    " padded \n",
    '{"name": "f", "arguments": {}}',
    "[]",
)
texts = st.sampled_from(NASTY) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ue000\ue001"), min_size=1, max_size=30
).filter(str.strip)
names = st.sampled_from(["search", "天气", "f"])


@st.composite
def dialogues(draw: st.DrawFn) -> list[Message]:
    system = [s(draw(texts))] if draw(st.booleans()) else []
    turns = [[u(draw(texts)), a(draw(texts))] for _ in range(draw(st.integers(1, 3)))]
    return system + [turn for pair in turns for turn in pair]


@st.composite
def odd_conversations(draw: st.DrawFn) -> Conversation:
    """With tools, thoughts, masked turns and turns out of order: much of it has no place in most formats."""
    messages: list[Message] = []
    for role in draw(st.lists(st.sampled_from("usat"), max_size=6)):
        if role == "a":
            turn = a(draw(texts))
            if draw(st.booleans()):
                turn["tool_calls"] = draw(
                    st.lists(st.builds(lambda n, x: call(n, x=x), names, texts), min_size=1, max_size=2)
                )
                turn["content"] = draw(st.sampled_from(["", "Let me look."]))
            if draw(st.booleans()):
                turn["train"] = draw(st.booleans())
            if draw(st.booleans()):
                turn["reasoning_content"] = draw(texts)
        else:
            turn = {"u": u, "s": s, "t": t}[role](draw(texts))
            if role == "t" and draw(st.booleans()):
                turn["name"] = draw(names)
        messages.append(turn)
    tools = ({"type": "function", "function": {"name": "search"}},) if draw(st.booleans()) else ()
    return Conversation([*messages, a(draw(texts))], ORIGIN, tools)


def plain(record: Record) -> Record:
    """Without what means nothing: a turn that says it is trained, which all are."""
    if isinstance(record, Conversation):
        messages = [{k: v for k, v in m.items() if not (k == "train" and v)} for m in record.messages]
        return Conversation(messages, ORIGIN, record.tools)  # type: ignore[arg-type]
    return record


def without_ids(record: Record, *, names: bool) -> Record:
    """As `plain`, also without ids of calls (OpenAI's rows make them up) and, on demand, names beside results."""
    record = plain(record)
    assert isinstance(record, Conversation)
    messages: list[Any] = [dict(m) for m in record.messages]
    for message in messages:
        message.pop("tool_call_id", None)
        if names:
            message.pop("name", None)
        if "tool_calls" in message:
            message["tool_calls"] = [{k: v for k, v in c.items() if k != "id"} for c in message["tool_calls"]]
    return Conversation(messages, ORIGIN, record.tools)


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(dialogues())
@pytest.mark.parametrize("to", ["danlu", "alpaca", "sharegpt", "openai"])
def test_dialogues_of_text_come_back(to: str, messages: list[Message]) -> None:
    record = Conversation(messages, ORIGIN)
    try:
        [row] = rows_of(record, to)[0]
    except RowError as error:
        # HuaTuo hides whole dialogues in Alpaca's instruction.
        assert to == "alpaca" and "reads as another format" in error.message and "<bot>" in messages[-2]["content"]
        return
    assert back(row) == record


@quick
@given(odd_conversations())
@pytest.mark.parametrize("to", ["danlu", "alpaca", "sharegpt", "openai"])
def test_odd_conversations_come_back_or_are_refused(to: str, record: Conversation) -> None:
    """A target that takes a record keeps all of it; there is no third way."""
    try:
        [row] = rows_of(record, to)[0]
    except RowError as error:
        assert error.code == "cannot-hold" and (error.file, error.line) == ("rows.jsonl", 7)
        assert to != "danlu"
        return
    found = back(row)
    # Names beside results: ShareGPT's reader adds the one call's name, OpenAI's rows say it by the call's id.
    assert without_ids(found, names=to != "danlu") == without_ids(record, names=to != "danlu")


@quick
@given(dialogues(), dialogues(), st.floats(0, 9), st.lists(st.floats(-9, 9), min_size=1, max_size=4), st.booleans())
def test_danlu_holds_every_kind(
    question: list[Message], answer: list[Message], margin: float, scores: list[float], label: bool
) -> None:
    prompt, better, worse = question[:-1], answer[1:], [a("No.")]
    assume(better[-1]["role"] == "assistant" and better != worse)
    for record in (
        Comparison(prompt, better, worse, margin, ORIGIN),
        Ranking(prompt, [[a(f"{i}")] for i in range(len(scores))], scores, ORIGIN),
        Unpaired(prompt, better, label, ORIGIN),
        Prompt(prompt, {"answer": question[-1]["content"]}, ORIGIN),
        Document(question[-1]["content"], ORIGIN),
    ):
        [row] = rows_of(record, "danlu")[0]
        assert back(row) == record


@quick
@given(dialogues(), texts, texts, st.floats(0, 9))
def test_pairs_come_back_from_trl(question: list[Message], better: str, worse: str, margin: float) -> None:
    assume(better != worse)
    record = Comparison(question[:-1], [a(better)], [a(worse)], margin, ORIGIN)
    [row] = rows_of(record, "trl-preference")[0]
    assert back(row) == record


@quick
@given(texts, st.lists(texts, min_size=2, max_size=4, unique=True), st.lists(st.floats(0, 5), min_size=4, max_size=4))
def test_scores_come_back_from_chatllama(question: str, answers: list[str], scores: list[float]) -> None:
    record = Ranking([u(question)], [[a(x)] for x in answers], scores[: len(answers)], ORIGIN)
    try:
        rows, told = rows_of(record, "chatllama-reward")
    except RowError as error:
        assert "looks like a dialogue" in error.message
        return
    assert len(rows) == len(answers) and not told.changed
    [pooled] = pool_singles([back(row) for row in rows])
    assert pooled == record


@quick
@given(texts, texts)
def test_single_rounds_come_back_from_chatllama(question: str, answer: str) -> None:
    assume(not question.strip().startswith(("Human:", "Assistant:")))
    [actor] = rows_of(Conversation([u(question), a(answer)], ORIGIN), "chatllama-actor")[0]
    assert back(actor) == Conversation([u(question), a(answer)], ORIGIN)
    [asked] = rows_of(Prompt([u(question)], origin=ORIGIN), "chatllama-rlhf")[0]
    assert asked == {"user_input": question}
    assert back(asked) == Prompt([u(question)], origin=ORIGIN)


@quick
@given(dialogues())
def test_dialogues_come_back_from_chatllama(messages: list[Message]) -> None:
    try:
        [actor], told = rows_of(Conversation(messages, ORIGIN), "chatllama-actor")
    except RowError:
        return  # a system text, or a turn that reads as another
    assert not told.changed
    assert back(actor) == Conversation(messages, ORIGIN)
    [asked] = rows_of(Prompt(messages[:-1], origin=ORIGIN), "chatllama-rlhf")[0]
    assert back(asked) == Prompt(messages[:-1], origin=ORIGIN)


# -- worked by hand -------------------------------------------------------------------------------------------------------

TALK = Conversation([s("Be kind."), u("Hi"), a("Hello"), u("More?"), a("Sure.")], ORIGIN)
TOOLS = Conversation(
    [
        u("2+3?"),
        a("", tool_calls=[call("add", a=2, b=3)]),
        t("5"),
        a("It is 5."),
    ],
    ORIGIN,
    ({"name": "add"},),
)


def test_alpaca_row() -> None:
    [row] = rows_of(TALK, "alpaca")[0]
    assert row == {
        "instruction": "More?",
        "input": "",
        "output": "Sure.",
        "system": "Be kind.",
        "history": [["Hi", "Hello"]],
    }
    [row] = rows_of(Prompt([u("Hi"), a("Hello"), u("More?")]), "alpaca")[0]
    assert row == {"instruction": "More?", "input": "", "history": [["Hi", "Hello"]]}


def test_sharegpt_row_with_tools() -> None:
    [row] = rows_of(TOOLS, "sharegpt")[0]
    assert row["conversations"] == [
        {"from": "human", "value": "2+3?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 3}}'},
        {"from": "observation", "value": "5"},
        {"from": "gpt", "value": "It is 5."},
    ]
    assert json.loads(row["tools"]) == [{"name": "add"}]


def test_openai_row_with_tools() -> None:
    [row], told = rows_of(TOOLS, "openai")
    assert row["messages"][1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1_0", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
        ],
    }
    assert row["messages"][2] == {"role": "tool", "content": "5", "tool_call_id": "call_1_0"}
    assert told.changed == {"ids of tool calls made up": 1}
    masked = Conversation([u("a"), a("b", train=False), u("c"), a("d")])
    [row] = rows_of(masked, "openai")[0]
    assert [m.get("weight") for m in row["messages"]] == [None, 0, None, None]


def test_chatllama_dialogue_reads_as_hh_rlhf() -> None:
    talk = Conversation([u("a"), a("b"), u("c"), a("d")], ORIGIN)
    [row], told = rows_of(talk, "chatllama-actor")
    assert row == {"user_input": "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "completion": "d"}
    assert back(row) == talk and not told.changed


@pytest.mark.parametrize(
    ("record", "to", "thing"),
    [
        (TOOLS, "alpaca", "tools"),
        (TOOLS, "chatllama-actor", "tools"),
        (Conversation([u("a"), a("b", reasoning_content="c")]), "alpaca", "thoughts"),
        (Conversation([u("a"), a("b", reasoning_content="c")]), "openai", "thoughts"),
        (Conversation([u("a"), a("b", train=False), u("c"), a("d")]), "sharegpt", "not trained"),
        (Conversation([u("a"), u("b"), a("c")]), "alpaca", "two turns of one side"),
        (
            Conversation([u("a"), a("I look.", tool_calls=[call("f")]), t("x"), a("b")]),
            "sharegpt",
            "both text and tool calls",
        ),
        (
            Conversation([u("a"), a("", tool_calls=[{**call("f"), "id": "1"}]), t("x"), a("b")]),
            "sharegpt",
            "ids of tool calls",
        ),
        (
            Conversation([u("a"), a("", tool_calls=[call("f")]), t("x", name="g"), a("b")]),
            "sharegpt",
            "names of tools",
        ),
        (Conversation([u("a"), t("x"), a("b")]), "openai", "result without a call"),
        (Conversation([u("a"), s("b"), u("c"), a("d")]), "alpaca", "does not come first"),
        (Conversation([s("x"), u("a"), a("b")]), "chatllama-actor", "a system text"),
        (Conversation([u("Human: hi"), a("b")]), "chatllama-actor", "looks like a dialogue"),
        (Conversation([u(" a"), a("b"), u("c"), a("d")]), "chatllama-actor", "white space"),
        (Prompt([u("a")], {"answer": "1"}), "chatllama-rlhf", "a reference answer"),
        (Ranking([u("a")], [[a("b")], [a("c")]], [7, 7]), "chatllama-reward", "all are equal"),
    ],
)
def test_what_a_target_cannot_hold_is_refused(record: Record, to: str, thing: str) -> None:
    with pytest.raises(RowError, match=thing):
        rows_of(record, to)


def test_kinds_become_what_the_target_holds() -> None:
    pair = Comparison([u("a")], [a("good")], [a("bad")], 0.5, ORIGIN)
    [row], told = rows_of(pair, "alpaca")
    assert (row["instruction"], row["output"]) == ("a", "good")
    assert told.changed == {"rejected answers left out": 1}
    rows, told = rows_of(pair, "chatllama-reward")
    assert [(row["completion"], row["score"]) for row in rows] == [("good", 5.0), ("bad", 0.0)]
    assert set(told.changed) == {"pairs given the scores 5 and 0", "margins left out"}

    ranking = Ranking([u("a")], [[a("x")], [a("y")], [a("z")]], [30, 10, 20], ORIGIN)
    rows, told = rows_of(ranking, "chatllama-reward")
    assert [row["score"] for row in rows] == [5.0, 0.0, 2.5]
    assert list(told.changed) == ["scores put on the scale from 0 to 5 within their row"]
    [row], told = rows_of(ranking, "trl-preference")
    assert (row["chosen"], row["rejected"]) == ([a("x")], [a("y")])
    assert set(told.changed) == {"scores left out", "answers that are in no pair left out"}
    rows, told = rows_of(ranking, "trl-preference", pairs="all", margin=True)
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"], r["margin"]) for r in rows] == [
        ("x", "z", 10),
        ("x", "y", 20),
        ("z", "y", 10),
    ]
    assert not told.changed

    rows, told = rows_of(Unpaired([u("a")], [a("b")], False), "alpaca")
    assert not rows and told.dropped == {"an answer that was not liked": 1}
    with pytest.raises(RowError, match="found a document, but 'alpaca' holds conversations and prompts"):
        rows_of(Document("text"), "alpaca")


def test_source_and_licence_stay_in_danlus_rows(tmp_path: Path) -> None:
    record = Conversation([u("a"), a("b")], Origin("x", 1, "town", "MIT"))
    [row] = rows_of(record, "danlu")[0]
    [(_, found)] = scan(write(tmp_path / "a.jsonl", [row]))
    assert found.origin is not None and (found.origin.source, found.origin.licence) == ("town", "MIT")
    _, told = rows_of(record, "alpaca")
    assert told.changed == {"sources left out": 1, "licences left out": 1}


def test_the_command_offers_every_target() -> None:
    assert set(CHOICES) == set(TARGETS)
    for name, target in TARGETS.items():
        assert target.becomes is None or target.becomes in target.writers, name


# -- the command ----------------------------------------------------------------------------------------------------------


def test_convert_writes_and_counts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": "Say a.", "input": "", "output": "a"}, {"instruction": "Say b.", "input": "", "output": ""}]
    source = write(tmp_path / "in.jsonl", rows)
    out = tmp_path / "deep" / "out.jsonl"
    assert run(["data", "convert", str(source), "--out", str(out), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["records"], said["rows"], said["dropped"]) == (2, 1, {"empty answer": 1})
    assert [json.loads(line) for line in out.read_text("utf-8").splitlines()] == [
        {"messages": [u("Say a."), a("a")]},
    ]
    assert not list(out.parent.glob(".*"))

    assert run(["data", "convert", str(source), "--out", str(out)]) == 1
    assert "--force" in capfd.readouterr().err
    assert run(["data", "convert", str(source), "--out", str(out), "--force", "--to", "alpaca"]) == 0
    assert json.loads(out.read_text("utf-8"))["instruction"] == "Say a."


def test_names_decide_the_container(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"messages": [u("你好"), a(str(i))]} for i in range(3)])
    for name in ("o.json", "o.json.gz", "o.jsonl", "o.jsonl.gz"):
        assert run(["data", "convert", str(source), "--out", str(tmp_path / name)]) == 0
        data = (tmp_path / name).read_bytes()
        text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
        assert text.startswith("[\n") == (".json" in name and ".jsonl" not in name)
        assert "你好" in text
        assert len(read(tmp_path / name, "conversation").records) == 3
    # No time and no name inside: equal rows are equal bytes.
    first = (tmp_path / "o.jsonl.gz").read_bytes()
    assert first[4:8] == bytes(4)
    assert run(["data", "convert", str(source), "--out", str(tmp_path / "p.jsonl.gz")]) == 0
    assert (tmp_path / "p.jsonl.gz").read_bytes() == first
    assert run(["data", "convert", str(source), "--out", str(tmp_path / "o.parquet")]) == 1


def test_a_file_of_rows_is_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("old", "utf-8")
    with pytest.raises(KeyboardInterrupt), RowFile(out) as file:
        file.write({"text": "a"})
        raise KeyboardInterrupt
    assert out.read_text("utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_rows_stop_it_or_are_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good"}\n{"text": 3}\n{"text": \n', "utf-8")
    out = tmp_path / "out.jsonl"
    assert run(["data", "convert", str(source), "--out", str(out)]) == 1
    said = capfd.readouterr().err
    assert "in.jsonl:2" in said and "in.jsonl:3" in said and "found 2 problems" in said
    assert not out.exists()
    assert run(["data", "convert", str(source), "--out", str(out), "--skip-bad", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["rows"] == 1 and sum(said["skipped"].values()) == 2
    assert [p["line"] for p in said["problems"]] == [2, 3]


def test_what_cannot_be_held_stops_it_or_is_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", [row_of(TALK), row_of(TOOLS)])
    out = tmp_path / "out.jsonl"
    assert run(["data", "convert", str(source), "--to", "alpaca", "--out", str(out)]) == 1
    said = capfd.readouterr().err
    assert "in.jsonl:2" in said and "'alpaca' cannot hold tools" in said and not out.exists()
    assert run(["data", "convert", str(source), "--to", "alpaca", "--out", str(out), "--skip-bad"]) == 0
    said = capfd.readouterr().err
    assert "left out, faulty (cannot-hold): 1" in said and "2 records -> 1 rows" in said


def test_limit_map_kind_and_pairs(tmp_path: Path) -> None:
    table = write(tmp_path / "t.jsonl", [{"frage": f"q{i}", "antwort": f"a{i}"} for i in range(5)])
    out = tmp_path / "o.jsonl"
    command = ["data", "convert", str(table), "--map", "prompt=frage,response=antwort", "--limit", "2"]
    assert run([*command, "--kind", "prompt", "--out", str(out)]) == 0
    assert [json.loads(line) for line in out.read_text("utf-8").splitlines()] == [
        {"prompt": [u("q0")]},
        {"prompt": [u("q1")]},
    ]
    # Answers that were scored one by one find each other.
    scored = [{"user_input": "q", "completion": c, "score": n} for c, n in (("x", 1), ("y", 4), ("z", 2))]
    single = write(tmp_path / "s.jsonl", scored)
    command = ["data", "convert", str(single), "--to", "trl-preference", "--pairs", "all", "--out", str(out), "--force"]
    assert run(command) == 0
    pairs = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs] == [
        ("y", "z"),
        ("y", "x"),
        ("z", "x"),
    ]


def test_data_of_the_hub_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `hf:Anthropic/hh-rlhf` and SHP are, with a stand-in for the library that downloads them."""
    dialogue = "\n\nHuman: Is it raining?\n\nAssistant: "
    sets = {
        "o/hh": [{"chosen": f"{dialogue}Look {i}.", "rejected": f"{dialogue}Yes {i}."} for i in range(5)],
        "o/shp": [
            {"history": f"q{i}", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 3, "score_B": 40}
            for i in range(5)
        ],
    }
    hub = SimpleNamespace(load_dataset=lambda name, configuration=None, split=None: sets[name])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    for name in sets:
        for to, rows in (("chatllama-actor", 3), ("chatllama-reward", 6), ("chatllama-rlhf", 3)):
            out = tmp_path / f"{to}.json"
            command = ["data", "convert", f"hf:{name}:train", "--limit", "3", "--to", to, "--out", str(out), "--force"]
            assert run(command) == 0
            found = json.loads(out.read_text("utf-8"))
            assert len(found) == rows
            if to == "chatllama-reward":
                better = "Look 0." if name == "o/hh" else "b"
                assert [row["score"] for row in found[:2]] == [5, 0] and found[0]["completion"] == better


def test_commercial_only_tells_the_licences(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"messages": [u(f"q{i}"), a("a")], "licence": licence}
        for i, licence in enumerate(["MIT", "CC BY-NC 4.0", "", "MIT"])
    ]
    source = write(tmp_path / "in.jsonl", rows)
    out = tmp_path / "o.jsonl"
    assert run(["data", "convert", str(source), "--out", str(out), "--commercial-only", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    table = {row["licence"]: (row["rows"], row["left_out"], row["commercial"]) for row in said["licences"]}
    assert table == {"MIT": (2, 0, True), "CC BY-NC 4.0": (0, 1, False), "": (0, 1, None)}
    assert said["rows"] == 2
    assert run(["data", "convert", str(source), "--out", str(out), "--commercial-only", "--force"]) == 0
    said_for_people = capfd.readouterr().err
    assert "commercial use" in said_for_people and "CC BY-NC 4.0" in said_for_people


# -- LLaMA-Factory's registry ---------------------------------------------------------------------------------------------


def test_import_makes_sources_that_settings_take(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "mine.json", [{"instruction": "a", "output": "b"}])
    write(tmp_path / "table.json", [{"q": "a", "r": "b", "sys": "c"}])
    registry = tmp_path / "dataset_info.json"
    entries = {
        "mine": {"file_name": "mine.json"},
        "table": {"file_name": "table.json", "columns": {"prompt": "q", "response": "r", "system": "sys"}},
        "pairs": {
            "hf_hub_url": "o/pairs",
            "subset": "en",
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        "web": {"hf_hub_url": "o/web", "split": "full", "columns": {"prompt": "content"}},
        "gone": {"file_name": "gone.json"},
        "script": {"script_url": "code"},
        "pictures": {"hf_hub_url": "o/p", "formatting": "sharegpt", "columns": {"images": "images"}},
        "elsewhere": {"ms_hub_url": "o/p"},
        "loses": {
            "hf_hub_url": "o/p",
            "ranking": True,
            "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "system": "sys"},
        },
        "strange": {"hf_hub_url": "o/p", "formatting": "sharegpt", "columns": {"messages": "turns_of_talk"}},
    }
    registry.write_text(json.dumps(entries), "utf-8")
    out = tmp_path / "sources.yaml"
    assert run(["data", "import", str(registry), "--out", str(out), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    sources = yaml.safe_load(out.read_text("utf-8"))
    assert sources == [
        {"path": str(tmp_path / "mine.json")},
        {"path": str(tmp_path / "table.json"), "columns": {"prompt": "q", "response": "r", "system": "sys"}},
        {"path": "hf:o/pairs:en:train"},
        {"path": "hf:o/web:full", "columns": {"text": "content"}},
    ]
    assert parse(SftSettings, {"out": "x", "model": "m", "data": sources}).data
    assert set(said["left_out"]) == {"gone", "script", "pictures", "elsewhere", "loses", "strange"}
    assert "missing" in said["left_out"]["gone"] and "never run" in said["left_out"]["script"]
    assert run(["data", "import", str(registry), "--out", str(out)]) == 1
    assert "--force" in capfd.readouterr().err


def test_import_refuses_what_is_no_registry(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.json", [{"instruction": "a", "output": "b"}])
    assert not is_registry(data)
    with pytest.raises(DataError, match="no registry"):
        import_registry(data, tmp_path)


def test_real_registry(shared_data: Path, tmp_path: Path) -> None:
    registry = shared_data / "llama-factory-demos" / "dataset_info.json"
    found = import_registry(registry, registry.parent)
    assert len(found.sources) + len(found.left_out) == 104
    assert {"identity", "dpo_en_demo", "kto_en_demo", "glaive_toolcall_en_demo"} <= set(found.sources)
    assert "missing" in found.left_out["wiki_demo"]
    local = [source for source in found.sources.values() if not source["path"].startswith("hf:")]
    assert len(local) == 8
    for source in local:
        assert sum(1 for _ in scan(source["path"])) > 50


# -- real files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "to", "format_name"),
    [
        ("code-alpaca/code_alpaca_2k.json", "openai", "messages"),
        ("sharegpt-zh-1k/sharegpt_zh_1K_format.jsonl.gz", "alpaca", "alpaca"),
        ("llama-factory-demos/glaive_toolcall_zh_demo.json", "sharegpt", None),
        ("llama-factory-demos/dpo_zh_demo.json", "trl-preference", "comparison"),
    ],
)
def test_real_files_come_back(shared_data: Path, file: str, to: str, format_name: str | None) -> None:
    records = [record for _, record in scan(shared_data / file)][:300]
    told, refused = Converted(), Counter[str]()
    for record in records:
        try:
            rows = list(convert([record], to, told))
        except RowError as error:
            refused[error.message] += 1
            continue
        for row in rows:
            found = by_name(format_name).parse(row, ORIGIN)[0] if format_name else back(row)
            if isinstance(record, Conversation):
                assert without_ids(found, names=False) == without_ids(record, names=False)
            else:
                assert row_of(found) == row_of(record)
    assert told.rows > 0.9 * len(records), refused


def test_hh_rlhf_becomes_chatllamas_three_files(shared_data: Path, tmp_path: Path) -> None:
    source = str(shared_data / "hh-rlhf" / "helpful-base")
    counts = {}
    for to in ("chatllama-actor", "chatllama-reward", "chatllama-rlhf"):
        out = tmp_path / f"{to}.json"
        assert run(["data", "convert", source, "--limit", "200", "--to", to, "--out", str(out)]) == 0
        counts[to] = len(json.loads(out.read_text("utf-8")))
    assert counts["chatllama-actor"] == 200 and counts["chatllama-rlhf"] == 200
    assert counts["chatllama-reward"] == 400
    pairs = read(tmp_path / "chatllama-reward.json", "comparison").records
    assert len(pairs) >= 195
