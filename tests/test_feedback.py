"""The feedback database and `danlu feedback`: exact texts, pairs, export, damaged files."""

from __future__ import annotations

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.cli.main import run
from danlu.data.feedback import FeedbackDatabase, Vote, default_database, preference_rows, vote_rows
from danlu.data.read import read
from danlu.exceptions import DataError
from danlu.types import Comparison, Conversation, Message

QUESTION: list[Message] = [{"role": "user", "content": "Why?"}]


@pytest.fixture
def database(tmp_path: Path) -> FeedbackDatabase:
    return FeedbackDatabase(tmp_path / "new folder" / "a?b#c%20.sqlite3", create=True)


def cast(database: FeedbackDatabase, answer: str, vote: Any, prompt: str = "<user>Why?", **more: Any) -> None:
    database.store(Vote(prompt, more.pop("messages", QUESTION), answer, vote, **more))


def export(database: FeedbackDatabase, out: Path, *more: str) -> int:
    return run(["feedback", "export", "--database", str(database.path), "--out", str(out), *more])


def test_a_second_vote_replaces_the_first(database: FeedbackDatabase) -> None:
    cast(database, "a", "up", model="m", params={"seed": 1})
    cast(database, "b", "up", model="m")
    cast(database, "a", "down", model="m", params={"seed": 2})
    cast(database, "a", "up", model="other")
    assert [(v.model, v.answer, v.vote) for v in database.votes()] == [
        ("m", "a", "down"),
        ("m", "b", "up"),
        ("other", "a", "up"),
    ]
    first = database.votes()[0]
    assert first.params == {"seed": 2}
    assert first.time.endswith("+00:00")
    database.withdraw("m", "<user>Why?", "a")
    database.withdraw("m", "<user>Why?", "never voted on")
    assert [v.answer for v in database.votes()] == ["b", "a"]


def test_pairs_need_an_up_and_a_down_on_one_prompt(database: FeedbackDatabase) -> None:
    cast(database, "good", "up", model="m")
    cast(database, "fine", "up", model="m2")
    cast(database, "bad", "down", model="m")
    cast(database, "fine", "down", model="m")  # people differ: no pair with itself
    cast(database, " \n", "down", model="m")
    cast(database, "lonely", "up", prompt="<user>Who?")
    # 2 up x 2 down, without (fine, fine)
    rows = preference_rows(database)
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows] == [
        ("good", "bad"),
        ("good", "fine"),
        ("fine", "bad"),
    ]
    assert rows[0] == {
        "prompt": QUESTION,
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
        "source": "feedback",
        "model": "m",
        "rejected_model": "m",
    }
    assert (rows[2]["model"], rows[2]["rejected_model"]) == ("m2", "m")


def test_prompts_that_data_files_may_not_hold_make_no_pair(database: FeedbackDatabase, tmp_path: Path) -> None:
    refused: list[list[Message]] = [
        [{"role": "system", "content": "only"}],
        [{"role": "user", "content": "  "}],
    ]
    for number, messages in enumerate([*refused, QUESTION]):
        for answer, vote in (("a", "up"), ("b", "down")):
            cast(database, answer, vote, prompt=str(number), messages=messages)
    assert [r["prompt"] for r in preference_rows(database)] == [QUESTION]
    assert export(database, tmp_path / "o.jsonl") == 0
    assert len(read(tmp_path / "o.jsonl", "comparison").records) == 1


odd_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(prompt=odd_text, question=odd_text, answers=st.lists(odd_text, min_size=2, max_size=2, unique=True))
@settings(max_examples=15, deadline=None)
def test_texts_survive_exactly(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, question: str, answers: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("exact")
    database = FeedbackDatabase(folder / "f.sqlite3", create=True)
    messages: list[Message] = [{"role": "user", "content": question}]
    for answer, vote in zip(answers, ("up", "down"), strict=True):
        cast(database, answer, vote, prompt=prompt, messages=messages)
    again = FeedbackDatabase(database.path).votes()
    assert [(v.prompt, v.messages, v.answer) for v in again] == [(prompt, messages, a) for a in answers]
    if question.strip() and all(a.strip() for a in answers):
        assert export(database, folder / "o.jsonl") == 0
        [found] = read(folder / "o.jsonl", "comparison").records
        assert isinstance(found, Comparison)
        assert (found.prompt, [found.chosen[0]["content"], found.rejected[0]["content"]]) == (messages, answers)


def test_threads_may_vote_at_once(database: FeedbackDatabase) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: cast(database, f"answer {n % 10}", "up"), range(40)))
    assert len(database.votes()) == 10
    with sqlite3.connect(database.path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(1,)]
    connection.close()


def test_files_that_are_no_feedback_database(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no feedback database here"):
        FeedbackDatabase(tmp_path / "missing.sqlite3")
    text = tmp_path / "text.sqlite3"
    text.write_text("hello " * 1000)
    with pytest.raises(DataError, match="file is not a database"):
        FeedbackDatabase(text)
    for name, statement, message in (
        ("other", "CREATE TABLE songs (id INTEGER)", "songs"),
        ("newer", "CREATE TABLE schema_version (version INTEGER)", "schema version 7"),
    ):
        path = tmp_path / f"{name}.sqlite3"
        connection = sqlite3.connect(path)
        connection.execute(statement)
        if name == "newer":
            connection.execute("INSERT INTO schema_version VALUES (7)")
        connection.commit()
        connection.close()
        with pytest.raises(DataError, match=message):
            FeedbackDatabase(path, create=True)


def test_default_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage = Path("runs/quick/03-ppo/model")
    stage.mkdir(parents=True)
    (tmp_path / "runs/quick/recipe.yaml").write_text("{}")
    Path("models/mine").mkdir(parents=True)
    inside = Path("runs/quick/feedback.sqlite3")
    assert [default_database(m) for m in ("runs/quick", "runs/quick:sft", str(stage))] == [inside] * 3
    outside = Path("feedback.sqlite3")
    assert [default_database(m) for m in ("models/mine", "hf:a/b", "runs/other", "a/b")] == [outside] * 4


def test_export(database: FeedbackDatabase, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "pairs.jsonl"
    assert export(database, out) == 1
    assert "no votes" in capsys.readouterr().err
    cast(database, "回答", "up", model="m")
    assert export(database, out) == 1
    assert "no pair" in capsys.readouterr().err
    assert not out.exists()
    assert export(database, out, "--kind", "votes") == 0
    [row] = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert (row["label"], row["completion"][0]["content"], row["prompt_text"]) == (True, "回答", "<user>Why?")
    assert row == vote_rows(database)[0]
    cast(database, "no", "down", model="m")
    assert export(database, out, "--kind", "votes", "--force") == 0
    liked = read(out, "conversation")  # disliked answers must not be imitated
    assert [r.messages[-1]["content"] for r in liked.records if isinstance(r, Conversation)] == ["回答"]
    assert liked.dropped == {"an answer that was not liked": 1}
    capsys.readouterr()
    assert export(database, out) == 1
    assert "--force" in capsys.readouterr().err
    assert export(database, out, "--force") == 0
    captured = capsys.readouterr()
    assert (captured.out, "1 pair" in captured.err) == ("", True)
    [pair] = read(out, "comparison").records
    assert isinstance(pair, Comparison)
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("回答", "no")
    assert [p.name for p in out.parent.iterdir()] == ["pairs.jsonl"]


def test_stats(database: FeedbackDatabase, capsys: pytest.CaptureFixture[str]) -> None:
    cast(database, "a", "up", model="m[bold]")
    cast(database, "b", "down", model="m[bold]")
    assert run(["feedback", "stats", "--json", "--database", str(database.path)]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert {k: counts[k] for k in ("votes", "up", "down", "prompts", "pairs")} == {
        "votes": 2,
        "up": 1,
        "down": 1,
        "prompts": 1,
        "pairs": 1,
    }
    assert counts["models"] == {"m[bold]": {"up": 1, "down": 1}}
    assert counts["first"] <= counts["last"]
    assert run(["feedback", "stats", "--database", str(database.path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "2 votes" in captured.err and "m[bold]" in captured.err


def test_a_run_folder_stands_for_its_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cast(FeedbackDatabase(tmp_path / "feedback.sqlite3", create=True), "a", "up")
    assert run(["feedback", "stats", "--json", "--database", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["votes"] == 1
    assert run(["feedback", "stats", "--database", str(tmp_path / "missing")]) == 1
    assert "danlu serve" in capsys.readouterr().err
