"""Tasks with answers that a program can check, and texts for pre-training."""

from __future__ import annotations

from typing import Any

import pytest

from danlu.data.formats.base import RowDropped
from danlu.data.formats.registry import detect
from danlu.exceptions import DataError
from danlu.types import Conversation, Document, Message, Origin, Prompt, Record, RecordKind

ORIGIN = Origin("data.jsonl", 3)


def u(content: str) -> Message:
    return {"role": "user", "content": content}


def a(content: str) -> Message:
    return {"role": "assistant", "content": content}


def parse(row: dict[str, Any], name: str, kind: RecordKind | None = None) -> list[Record]:
    """The records of a row that must be recognised as the format of that name."""
    entry = detect(row, kind)
    assert entry is not None and entry.name == name
    return entry.parse(row, ORIGIN)


def task(row: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    [record] = parse(row, name)
    assert isinstance(record, Prompt) and [message["role"] for message in record.prompt] == ["user"]
    return record.prompt[0]["content"], dict(record.reference)


def texts(row: dict[str, Any], name: str) -> list[str]:
    return [record.text for record in parse(row, name) if isinstance(record, Document)]


def fails(row: dict[str, Any], name: str, field: str) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(row, name)
    assert (caught.value.file, caught.value.line, caught.value.field) == ("data.jsonl", 3, field)
    return caught.value


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("72", "72"),
        ("1,234", "1234"),
        ("-3", "-3"),
        ("$5", "5"),
        ("0.5", "0.5"),
        (".5", ".5"),
        ("25%", "25"),
        ("18.", "18"),
    ],
)
def test_gsm8k_numbers(written: str, number: str) -> None:
    row = {"question": "Q", "answer": f"#### First\nHalf is <<144/2=72>>72.\n#### {written}"}
    assert task(row, "gsm8k") == ("Q", {"verifier": "number", "answer": number})


def test_gsm8k_gives_the_whole_solution_to_who_learns_by_imitation() -> None:
    row = {"question": "Q", "answer": "Half is <<144/2=72>>72.\n#### 72"}
    [record] = parse(row, "gsm8k-solution", "conversation")
    assert isinstance(record, Conversation) and record.messages == [u("Q"), a(row["answer"])]
    assert detect(row, "prompt") is detect(row), "a stage that needs prompts gets the reference"
    assert "seventy" in fails({"question": "Q", "answer": "#### seventy"}, "gsm8k", "answer").message
    assert detect({"question": "Q", "answer": "It is 72."}).name == "questions"  # type: ignore[union-attr]


# --- letters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "B"},
        {"0": "0", "Question": "Q", "A": "w", "B": "x", "C": "y", "D": "z", "Answer": "b "},
        {"0": "Q", "1": "w", "2": "x", "3": "y", "4": "z", "5": "B"},
        {"question": "Q", "choices": ["w", "x", "y", "z"], "answer": 1, "subject": "s"},
        {"question": "Q", "choices": {"text": ["w", "x", "y", "z"], "label": ["1", "2", "3", "4"]}, "answerKey": "2"},
    ],
)
def test_multiple_choice_in_every_shape(row: dict[str, Any]) -> None:
    expected = {"verifier": "choice", "answer": "B", "choices": ["w", "x", "y", "z"]}
    assert task(row, "multiple-choice") == ("Q\nA. w\nB. x\nC. y\nD. z", expected)


def test_faulty_choices_are_named() -> None:
    row = {"question": "Q", "A": "1", "B": 2, "answer": "B"}
    assert task(row, "multiple-choice")[0] == "Q\nA. 1\nB. 2"
    assert "expected one of A, B" in fails({**row, "answer": "C"}, "multiple-choice", "answer").message
    fails({**row, "B": None, "C": []}, "multiple-choice", "C")
    fails({"question": "Q", "choices": ["x", "y"], "answer": 2}, "multiple-choice", "answer")
    fails({"question": "Q", "choices": ["x"], "answer": 0}, "multiple-choice", "choices")
    with pytest.raises(RowDropped, match="no answer"):
        parse({**row, "answer": ""}, "multiple-choice")
    six = dict(zip("012345", ["Q", "w", "x", "y", "z", "see above"], strict=True))
    assert detect(six) is None, "any table of six columns may look like that"


# --- programs ---------------------------------------------------------------------------------------------------------


def test_unit_tests() -> None:
    row = {"prompt": "def f(n):\n", "entry_point": "f", "test": "def check(c):\n    assert c(1)\n", "task_id": "t"}
    tests = ["def check(c):\n    assert c(1)\n\n\ncheck(f)\n"]
    assert task(row, "humaneval") == ("def f(n):\n", {"verifier": "tests", "tests": tests})
    mbpp = {"text": "Write f.", "code": "...", "test_list": ["assert f(1)", "assert f(2)"], "test_setup_code": "x = 1"}
    expected = {"verifier": "tests", "tests": ["x = 1\nassert f(1)", "x = 1\nassert f(2)"]}
    assert task(mbpp, "mbpp") == ("Write f.\n\nassert f(1)", expected)
    clean = {"prompt": "Write f.", "test_imports": [], "test_list": ["assert f(1)"]}
    assert task(clean, "mbpp")[1]["tests"] == ["assert f(1)"]
    fails({**mbpp, "test_list": ["assert f(1)", 3]}, "mbpp", "test_list[1]")
    fails({**row, "entry_point": None}, "humaneval", "entry_point")


# --- verl -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "reference"),
    [
        ("1,234", {"verifier": "number", "answer": "1234"}),
        (42, {"verifier": "number", "answer": "42"}),
        ("C", {"verifier": "choice", "answer": "C"}),
        ("\\frac{1}{2}", {"answer": "\\frac{1}{2}"}),
        (["x", "y"], {"answer": ["x", "y"]}),
        ('{"inputs": ["1"], "outputs": ["2"]}', {"verifier": "tests", "tests": {"inputs": ["1"], "outputs": ["2"]}}),
        ("{not json", {"answer": "{not json"}),
        (None, {}),
    ],
)
def test_verl_truths(truth: Any, reference: dict[str, Any]) -> None:
    model = {"style": "rule", "ground_truth": truth}
    row = {"data_source": "d", "prompt": [u("Q")], "ability": "math", "reward_model": model, "extra_info": {"index": 0}}
    assert task(row, "verl") == ("Q", {**reference, "style": "rule", "data_source": "d", "ability": "math"})


def test_verl_faults_are_named() -> None:
    fails({"prompt": [u("Q")], "reward_model": None}, "verl", "reward_model")
    fails({"prompt": [u("Q"), a("A")], "reward_model": {}}, "verl", "prompt")
    assert task({"prompt": "Q", "reward_model": {"ground_truth": "7"}}, "verl")[1]["answer"] == "7"


# --- texts ------------------------------------------------------------------------------------------------------------


def test_rows_of_knowledge_become_short_texts() -> None:
    row = {"中心词": "感冒", "相关症状": ["咳嗽", "发热"], "所属科室": "内科", "相关药物": [], "备注": None}
    assert texts(row, "huatuo-knowledge") == ["中心词：感冒\n相关症状：咳嗽、发热\n所属科室：内科"]
    cold = {
        "idx": "0",
        "disease": "Cold",
        "Symptom": "['Cough', \"It's warm\"]",
        "reason": "Viruses,\nmostly",
        "x": "[1",
    }
    assert texts(cold, "disease-table") == ["disease: Cold\nSymptom: Cough, It's warm\nreason: Viruses,\nmostly\nx: [1"]
    fails({"中心词": "感冒", "相关症状": {"a": 1}}, "huatuo-knowledge", "相关症状")
    with pytest.raises(RowDropped, match="nothing about it"):
        parse({"中心词": "感冒", "相关症状": []}, "huatuo-knowledge")


def test_poems_and_books() -> None:
    assert texts({"title": "T", "author": "A", "paragraphs": ["x", " ", "y "], "id": "1"}, "poetry") == ["T\nA\n\nx\ny"]
    assert texts({"rhythmic": "R", "author": "A", "paragraphs": ["x"]}, "poetry") == ["R\nA\n\nx"]
    assert texts({"chapter": "C", "paragraphs": ["x"]}, "poetry") == ["C\n\nx"]
    assert texts({"title": "T", "chapter": "C", "section": "S", "content": ["x"]}, "poetry") == ["T\nC\n\nx"]
    book = {
        "title": "B",
        "content": [
            {"type": "t", "content": [{"chapter": "C", "author": "A", "paragraphs": ["x"]}]},
            {"paragraphs": ["y"]},
        ],
    }
    assert texts(book, "poetry") == ["C\nA\n\nx", "y"]
    fails({"title": "B", "content": [{"paragraphs": "x"}]}, "poetry", "content[0].paragraphs")
    fails({"title": "B", "content": [{"content": ["x", 3]}]}, "poetry", "content[0].content[1]")
    with pytest.raises(RowDropped, match="empty text"):
        parse({"title": "T", "paragraphs": []}, "poetry")


@pytest.mark.parametrize(
    ("row", "source"),
    [
        ({"meta": {"redpajama_set_name": "RedPajamaBook"}}, "RedPajamaBook"),
        ({"meta": "{'url': 'x'}", "red_pajama_subset": "arxiv"}, "arxiv"),
        ({"meta": {"pile_set_name": "Pile-CC"}}, "Pile-CC"),
        ({"meta": {"url": "x"}}, ""),
    ],
)
def test_a_text_s_set_becomes_its_source(row: dict[str, Any], source: str) -> None:
    entry = detect({"text": "T", **row})
    assert entry is not None and entry.name == "redpajama"
    [record] = entry.parse({"text": "T", **row}, ORIGIN)
    assert isinstance(record, Document) and record.text == "T" and record.origin == Origin("data.jsonl", 3, source)
    [named] = entry.parse({"text": "T", **row}, Origin("data.jsonl", 3, "mine"))
    assert named.origin is not None and named.origin.source == "mine", "what the user says of a source wins"


def test_files_that_hold_no_rows_are_called_by_their_name() -> None:
    index = {"mine": {"file_name": "mine.json"}, "theirs": {"hf_hub_url": "x/y", "formatting": "sharegpt"}}
    for row, name in [(index, "dataset-index"), ({f"t{i}": i for i in range(2000)}, "vocabulary")]:
        with pytest.raises(DataError) as caught:
            parse(row, name)
        assert "no data" in caught.value.message and getattr(caught.value, "code", "") == "not-data"
