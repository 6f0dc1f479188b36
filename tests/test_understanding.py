"""Cloze classification, and heads for texts and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from danlu.cli.main import run
from danlu.config import KINDS
from danlu.data.labelled_text import Cloze, read_cloze, read_labelled, read_tagged
from danlu.evals.cloze import cloze, encode
from danlu.exceptions import DataError, ModelError
from danlu.models.load import load_model
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A GLM and a UniLM after a step each, and a Llama."""
    found = {"causal": tiny.model()}
    for objective in ("glm", "unilm"):
        out = tmp_path_factory.mktemp(objective)
        STAGES["pretrain"].run(parse(KINDS["pretrain"], tiny.stage("pretrain", out, objective=objective, max_steps=1)))
        found[objective] = out / "model"
    return found


def rows(folder: Path, per_token: bool) -> Path:
    made: list[dict[str, Any]] = []
    for n in range(12):
        for i, (colour, thing) in enumerate(zip(tiny.COLOURS, tiny.THINGS, strict=False)):
            words = [str(n), "the", thing, "is", colour]
            if per_token:
                made.append({"tokens": words, "tags": ["N", "W", "W", "W", "C" if i % 2 else "D"]})
            else:
                made.append({"text": " ".join(words), "label": i % 2})
    return tiny.write_rows(folder / "rows.jsonl", made)


@pytest.mark.parametrize(
    ("task", "base"),
    tiny.mostly_slow(
        [("classify", "causal"), ("token-classify", "unilm"), ("classify", "glm")],
        [("classify", "unilm"), ("token-classify", "glm"), ("token-classify", "causal")],
    ),
)
def test_heads_learn(base: str, task: str, bases: dict[str, Path], tmp_path: Path) -> None:
    per_token = task == "token-classify"
    values = tiny.stage("sft", tmp_path, model=str(bases[base]), task=task, max_steps=40, learning_rate=1e-2)
    values |= {"data": str(rows(tmp_path, per_token)), "eval_fraction": 0.2}
    found = STAGES["sft"].run(parse(KINDS["sft"], values))
    assert found.metrics["eval_accuracy"] > 0.9
    auto = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "model")
    assert model.config.id2label == (dict(enumerate("CDNW")) if per_token else {0: "0", 1: "1"})


def test_cloze_takes_the_likelier_choice(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_model(bases["glm"]).eval(), AutoTokenizer.from_pretrained(bases["glm"])
    ids = model.config.blank_ids()
    text = "The door is [MASK], as ever."
    given = [tokenizer.bos_token_id, *encode(tokenizer, text, ids.masks[0])]
    assert given.count(ids.masks[0]) == 1
    choices = [" red", " a green door"]
    place, scores = given.index(ids.masks[0]), []
    for choice in choices:  # each choice alone, by hand
        piece = tokenizer(choice, add_special_tokens=False)["input_ids"]
        positions = [[*range(len(given)), *[place] * len(piece)], [*[0] * len(given), *range(1, len(piece) + 1)]]
        inputs = torch.tensor([[*given, ids.sop, *piece[:-1]]])
        with torch.no_grad():
            logits = model(inputs, torch.tensor([positions]), torch.tensor([len(given)])).logits
        scores.append(sum(float(logits[0, len(given) + i].log_softmax(-1)[t]) for i, t in enumerate(piece)))
    best = scores.index(max(scores))
    found = cloze(model, tokenizer, [Cloze(text, choices, best), Cloze(text, choices, 1 - best)])
    assert found.summary["correct"]["mean"] == 0.5 and found.rows[0]["correct"] == 1.0
    assert found.rows[0]["logprobs"] == pytest.approx(scores, abs=1e-3)
    path = tiny.write_rows(tmp_path / "cloze.jsonl", [{"text": text, "choices": choices, "label": choices[best]}])
    assert run(["eval", str(bases["glm"]), "--data", str(path), "--task", "cloze", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["correct"]["mean"] == 1.0
    with pytest.raises(ModelError, match="does not fill blanks"):
        cloze(load_model(tiny.model()), tokenizer, [])


@pytest.mark.parametrize(
    ("read", "row", "words"),
    [
        (read_cloze, {"text": "no blank", "choices": ["a", "b"], "label": 0}, "found 0"),
        (read_cloze, {"text": "[MASK]", "choices": ["a"], "label": 0}, "at least two"),
        (read_cloze, {"text": "[MASK]", "choices": ["a", "b"], "label": "c"}, "none of the choices"),
        (read_labelled, {"text": "x"}, "a text or a number"),
        (read_labelled, {"label": "x"}, "expected a text"),
        (read_tagged, {"tokens": ["a", "b"], "tags": ["A"]}, "2 tokens and 1 tags"),
        (read_tagged, {"tokens": "ab", "tags": ["A"]}, "expected a list"),
    ],
)
def test_faulty_rows_are_named(read: Any, row: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=words) as error:
        read(str(path))
    assert error.value.line == 1


def test_a_unilm_is_tuned_by_masking_its_answers(bases: dict[str, Path], tmp_path: Path) -> None:
    values = tiny.stage("sft", tmp_path, model=str(bases["unilm"]), max_steps=30, learning_rate=1e-2)
    found = STAGES["sft"].run(parse(KINDS["sft"], values))
    assert found.metrics["eval_loss"] < found.metrics["first_eval_loss"] - 0.5
    assert {gate.code: gate.passed for gate in found.gates} == {"G-STOP": True, "G-TRUNC": True, "G-RENDER": True}
    with pytest.raises(ModelError, match="no causal model"):
        STAGES["dpo"].run(parse(KINDS["dpo"], tiny.stage("dpo", tmp_path / "dpo", model=str(bases["unilm"]))))
