"""BLEU-4 and Chinese ROUGE as ChatGLM's evaluation has them: worked by hand, and from a model to the predictions file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tiny

from danlu.cli.main import run
from danlu.evals import overlap
from danlu.exceptions import SettingsError


def test_worked_by_hand() -> None:
    """Words 我 喜欢 苹果 against 我 喜欢 香蕉: 2 of 3 words, 1 of 2 pairs, a common run of 2 of 3."""
    found = overlap.scores("我喜欢苹果", "我喜欢香蕉")
    assert found["rouge-1"] == pytest.approx(100 * 2 / 3, abs=1e-4)
    assert found["rouge-2"] == pytest.approx(50, abs=1e-4)
    assert found["rouge-l"] == pytest.approx(100 * 2 / 3, abs=1e-4)
    # Characters: 3 of 5, 2 of 4, 1 of 3, and 0 of 2, which method 3 counts as 1/2 of one: 1 / (2^1 * 2).
    expected = (3 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25
    assert found["bleu-4"] == pytest.approx(100 * expected, abs=1e-4)


def test_equal_and_empty_texts() -> None:
    assert set(overlap.scores("简约的牛仔外套", "简约的牛仔外套").values()) == {100.0}
    assert set(overlap.scores("", "牛仔").values()) == {0.0}
    assert set(overlap.scores("  ", "牛仔").values()) == {0.0}


def test_a_model_and_its_predictions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"content": f"类型#上衣*材质#{n}", "summary": "简约的牛仔外套"} for n in range(5)]
    data = tmp_path / "dev.json"
    data.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    out = tmp_path / "predictions.jsonl"
    call = ["eval", str(tiny.model()), "--data", str(data), "--task", "overlap", "--max-new-tokens", "8"]
    assert run([*call, "--limit", "3", "--out", str(out), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    predictions = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert found["questions"] == len(predictions) == 3
    assert all(0 <= found[name]["low"] <= found[name]["mean"] <= 100 for name in overlap.METRICS)
    assert predictions[0]["label"] == "简约的牛仔外套" and predictions[0]["prompt"][-1]["role"] == "user"
    mean = sum(p["bleu-4"] for p in predictions) / 3
    assert found["bleu-4"]["mean"] == pytest.approx(mean)


def test_missing_packages_are_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "nltk" else found(name, *a))
    with pytest.raises(SettingsError, match="task overlap needs nltk"):
        overlap.require()
    path = tmp_path / "r.yaml"
    stages = "[{kind: sft, data: x.jsonl}, {kind: eval, task: overlap, data: x.jsonl}]"
    path.write_text(f"model: {tiny.model()}\nstages: {stages}\n", "utf-8")
    (tmp_path / "x.jsonl").write_text('{"content": "a", "summary": "b"}\n', "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DANLU_RUNS", str(tmp_path / "runs"))
    assert run(["run", str(path)]) == 1
    assert "danlu[metrics]" in capfd.readouterr().err
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))
