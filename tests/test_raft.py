"""RAFT: what is kept and written, its update against a slow reference, that it learns, resume, and selection alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny as small
import torch
from test_grpo_methods import killed_and_resumed, row_logprobs, toy_judge, train, updates
from transformers import AutoModelForCausalLM, AutoTokenizer

from danlu.alignment_config import GrpoSettings, Raft
from danlu.cli.main import run
from danlu.config import SftSettings
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.rewards.model import ModelReward
from danlu.text.chat_template import ChatTemplate
from danlu.trainers import raft
from danlu.training.groups import Drawn
from danlu.training.session import Session
from danlu.tree import Segment, Trajectory

RAFT: dict[str, Any] = {"method": "raft", "rollout": {"batch": 32, "max_new_tokens": 8}}
# Fresh weights hardly ever write a stop token.
KEEP = {"unfinished": True}


def selected(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "selected.jsonl").read_text("utf-8").splitlines()]


def template() -> ChatTemplate:
    return ChatTemplate(AutoTokenizer.from_pretrained(small.model()))


def drawn_of(answers: list[tuple[str, float, bool]], size: int) -> Drawn:
    text = template()
    stop = min(text.stop_ids)
    made = []
    for content, _, finished in answers:
        ids = [*text.tokenizer(content, add_special_tokens=False)["input_ids"], *([stop] if finished else [])]
        made.append(Trajectory((Segment((5,), False), Segment(tuple(ids), True, (-1.0,) * len(ids))), 0, finished))
    return Drawn([], made, [score for _, score, _ in answers], size, {})


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [1, 4]),
        ({"unfinished": True}, [0, 4]),
        ({"min_score": 2.0}, [4]),
        ({"min_score": 5.0}, []),
        ({"keep": 2}, [1, 2, 4, 5]),
    ],
)
def test_the_best_are_kept(options: dict[str, Any], kept: list[int]) -> None:
    """Not the unfinished one, not the empty one; of equal ones the first."""
    first = [("red", 9.0, False), ("green", 2.0, True), ("blue", 1.0, True), ("", 8.0, True)]
    second = [("red", 3.0, True), ("green", 3.0, True), ("blue", 3.0, True), ("white", 0.0, True)]
    drawn = drawn_of([*first, *second], 4)
    settings = GrpoSettings.model_validate({"method": "raft", "raft": options})
    assert raft.best_of(drawn, template(), settings) == kept


def test_an_update_is_sft_on_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient norm of the first iteration, one row at a time: the mean over all kept tokens."""
    seen: list[tuple[Drawn, list[int]]] = []
    build = raft.best_of

    def record(drawn: Drawn, text: ChatTemplate, settings: Any) -> list[int]:
        kept = build(drawn, text, settings)
        seen.append((drawn, kept))
        return kept

    monkeypatch.setattr(raft, "best_of", record)
    options = {"group_size": 4}
    train(tmp_path, **RAFT, raft={**KEEP, "keep": 2}, max_steps=1, grpo=options, max_grad_norm=1e9)
    ((drawn, kept),) = seen
    for places in drawn.groups:
        chosen = [drawn.scores[i] for i in places if i in kept]
        assert sorted(chosen) == sorted(drawn.scores[i] for i in places)[-2:]
    model = AutoModelForCausalLM.from_pretrained(small.model()).eval()
    loss = -torch.cat([row_logprobs(model, drawn.trajectories[i]) for i in kept]).mean()
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    (logged,) = updates(tmp_path)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-4) and logged["kept"] == 16.0
    assert logged["kept_score"] == pytest.approx(sum(drawn.scores[i] for i in kept) / 16)
    assert not {"kl", "ratio_error"} & set(logged), "there is no reference"
    rows = selected(tmp_path)
    assert [r["score"] for r in rows] == [drawn.scores[i] for i in kept]
    text = template()
    for row, place in zip(rows, kept, strict=True):
        assert row["source"] == "raft" and row["step"] == 1
        assert row["messages"][:-1] == drawn.prompts[place].messages
        assert row["messages"][-1] == text.decode_message(drawn.trajectories[place].actions)


def test_it_raises_a_toy_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelReward, "score", toy_judge)
    options = {"group_size": 8, "missing_stop_penalty": 0.0}
    result = train(tmp_path, **RAFT, raft=KEEP, grpo=options, max_steps=15, learning_rate=2e-2)
    assert abs(updates(tmp_path)[0]["score"]) < 0.3 and result.metrics["score"] > 0.4
    assert result.metrics["eval_score"] > result.metrics["first_eval_score"] + 0.3
    assert [(g.code, g.passed) for g in result.gates] == [("G-PPO", True)]
    assert result.facts["selected"] == len(selected(tmp_path)) == 15 * 4


def test_selection_alone_writes_a_set_that_sft_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelReward, "score", toy_judge)
    options = {"group_size": 4, "missing_stop_penalty": 0.0}
    result = train(tmp_path / "out", **RAFT, raft={**KEEP, "train": False}, grpo=options, max_steps=4)
    assert small.weights(tmp_path / "out" / "model") == small.weights(small.model())
    assert updates(tmp_path / "out") == [] and "loss" not in result.metrics
    rows = selected(tmp_path / "out")
    assert len(rows) == result.facts["selected"] > 24
    assert sum(r["score"] for r in rows) / len(rows) > result.metrics["score"] + 0.2, "the best of four"
    data = {"data": str(tmp_path / "out" / "selected.jsonl"), "eval_fraction": 0.0, "max_steps": 1}
    found = STAGES["sft"].run(parse(SftSettings, small.stage("sft", tmp_path / "sft", **data)))
    assert found.facts["answers"] == len(rows)


def test_best_of_n_is_its_selection_alone(tmp_path: Path) -> None:
    settings = parse(GrpoSettings, {"method": "best-of-n", "raft": {"keep": 2}})
    assert settings.method == "raft" and settings.raft == Raft(keep=2, train=False)
    assert parse(GrpoSettings, settings.model_dump()) == settings
    values = small.stage("grpo", tmp_path, method="best-of-n", max_steps=1, eval_fraction=0)
    assert run(small.arguments("grpo", {**values, "raft.unfinished": True})) == 0
    assert len(selected(tmp_path)) == 2, "of two groups"


def test_nothing_good_enough_changes_nothing(tmp_path: Path) -> None:
    result = train(tmp_path, **RAFT, raft={**KEEP, "min_score": 1e9}, grpo={"group_size": 4}, max_steps=2)
    assert small.weights(tmp_path / "model") == small.weights(small.model())
    assert selected(tmp_path) == [] and result.facts["selected"] == 0
    assert [(r["kept"], r["loss"], r["grad_norm"]) for r in updates(tmp_path)] == [(0.0, 0.0, 0.0)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_an_interrupted_stage_goes_on_bit_for_bit(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"group_size": 4, "epochs": 2, "minibatches": 2}
    whole, again = killed_and_resumed(tmp_path, monkeypatch, **RAFT, raft=KEEP, grpo=options, adapter=adapter)
    assert again.metrics == whole.metrics and again.facts == whole.facts
    files = [(tmp_path / name / "selected.jsonl").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1] and len(files[0]) > 1000


def test_a_return_to_a_checkpoint_takes_its_rows_back(tmp_path: Path) -> None:
    kept = raft.Selected(tmp_path, 0)
    for step in range(4):
        kept.write(step, [{"step": step + 1, "n": step}] * 2)
    kept.write(2, [{"step": 3, "n": 7}])
    kept.write(3, [])
    assert [(r["step"], r["n"]) for r in selected(tmp_path)] == [(1, 0), (1, 0), (2, 1), (2, 1), (3, 7)]
    assert kept.rows == 5
    with (tmp_path / "selected.jsonl").open("a") as file:
        file.write('{"step": 4, "cut o')
    assert raft.Selected(tmp_path, 2).rows == 4 and len(selected(tmp_path)) == 4
    assert raft.Selected(tmp_path, 0).rows == 0 and selected(tmp_path) == []


def test_a_stage_that_is_done_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when the loop is over and the model not yet written."""
    options: dict[str, Any] = {**RAFT, "raft": KEEP, "grpo": {"group_size": 4}, "max_steps": 2, "save_every": 1}
    monkeypatch.setattr(Session, "_save_due", lambda self, done: True)
    train(tmp_path, **options)
    rows = selected(tmp_path)
    train(tmp_path, **options)
    assert selected(tmp_path) == rows != []
