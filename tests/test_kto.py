"""KTO: the baseline from strangers' answers against a slow reference, what it learns, and what must not change its numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny as small
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from danlu.alignment_config import DpoSettings
from danlu.data.collate import encode_unpaired
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.text.chat_template import ChatTemplate
from danlu.trainers import kto
from danlu.types import Unpaired

STEPS = {"max_steps": 20, "learning_rate": 1e-2}


def train(out: Path, **changes: Any) -> Any:
    """What the stage reports, gates and all."""
    return STAGES["dpo"].run(parse(DpoSettings, small.stage("dpo", out, loss="kto", **changes)))


def updates(out: Path) -> list[dict[str, float]]:
    return [r for r in small.metrics_of(out) if "grad_norm" in r]


def test_labels_are_loss_weights() -> None:
    template = ChatTemplate(AutoTokenizer.from_pretrained(small.model()))
    question: Any = small.user("which colour has the door?")
    answers: list[Any] = [small.assistant("Gladly."), small.assistant("No idea.")]
    trees = encode_unpaired([Unpaired(question, a, a is answers[0]) for a in answers], template, 64)
    assert [len(item) for item in trees.items] == [2, 2] and trees.answers == trees.answers_with_stop == 2
    assert [set(item[1].loss_weights) for item in trees.items] == [{1.0}, {0.0}]
    assert [item[1].ids for item in trees.items] == [template.encode_answer(question, a)[1] for a in answers]
    cut = encode_unpaired([Unpaired(question, answers[0], True)], template, len(trees.items[0][0].ids))
    assert not cut.items and cut.answers_cut == 1 and cut.dropped == {"longer than max_length": 1}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 5))
def test_partners_have_another_prompt(prompts: list[int], seed: int) -> None:
    found = kto.partners_of(prompts, seed)
    assert found == kto.partners_of(prompts, seed)
    if len(set(prompts)) > 1:
        assert all(prompts[i] != prompts[partner] for i, partner in enumerate(found))
    if len(set(prompts)) in (1, len(prompts)):  # each once: one round through all of them
        assert sorted(found) == list(range(len(prompts)))


def row_logprob(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    logp = model(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return torch.stack([logp[len(prompt) + i - 1, token] for i, token in enumerate(answer)]).sum()


def test_held_out_numbers_are_those_of_single_rows(tmp_path: Path) -> None:
    """Loss, baseline and rewards of the held-out answers from the saved models alone, one row at a time."""
    lines = small.data()["comparisons"].read_text("utf-8").splitlines(keepends=True)[::9]
    data = tmp_path / "heldout.jsonl"
    data.write_text("".join(lines), "utf-8")
    out = tmp_path / "out"
    result = train(out, eval_data=str(data), beta=0.3, undesirable_weight=1.5, **STEPS)
    after, before = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (out / "model", small.model()))
    template = ChatTemplate(AutoTokenizer.from_pretrained(out / "model"))
    rows = [
        (*template.encode_answer(row["prompt"], row[side]), side == "chosen")
        for row in map(json.loads, lines)
        for side in ("chosen", "rejected")
    ]
    partners = kto.partners_of([hash(tuple(prompt)) for prompt, _, _ in rows], 0)
    ratio, stranger = [], []
    with torch.no_grad():
        for (prompt, answer, _), partner in zip(rows, partners, strict=True):
            ratio.append(float(row_logprob(after, prompt, answer) - row_logprob(before, prompt, answer)))
            other = rows[partner][1][: 64 - len(prompt)]
            stranger.append(float(row_logprob(after, prompt, other) - row_logprob(before, prompt, other)))
    z = max(0.0, sum(stranger) / len(stranger))
    losses = [
        1 - 1 / (1 + math.exp(-0.3 * (r - z))) if liked else 1.5 * (1 - 1 / (1 + math.exp(0.3 * (r - z))))
        for r, (_, _, liked) in zip(ratio, rows, strict=True)
    ]
    liked = [0.3 * r for r, row in zip(ratio, rows, strict=True) if row[2]]
    assert result.metrics["eval_kl"] == pytest.approx(z, abs=1e-4)
    assert result.metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert result.metrics["eval_chosen_reward"] == pytest.approx(sum(liked) / len(liked), abs=1e-4)
    assert abs(sum(liked) / len(liked)) > 1e-2


def test_it_learns_which_answers_are_liked(tmp_path: Path) -> None:
    result = train(tmp_path, beta=0.5, **STEPS)
    first, last = updates(tmp_path)[0], result.metrics
    # Before the first update policy and reference are one model: nothing is above or below the baseline.
    assert first["loss"] == pytest.approx(0.5, abs=1e-5) and first["margin"] == 0.0
    assert last["eval_loss"] < 0.35 and last["eval_accuracy"] > 0.8
    assert last["eval_chosen_reward"] > last["eval_rejected_reward"]
    assert [g.code for g in result.gates if g.passed] == ["G-STOP", "G-TRUNC", "G-RENDER"]
    assert result.facts["labelled_answers"] + result.facts["heldout_answers"] == 2 * 96
    assert result.facts["liked_answers"] == result.facts["labelled_answers"] / 2  # of pairs, one each
    assert "Gladly." in result.facts["rendered_example"]


def test_it_reads_labelled_answers(tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 3 else "rejected"], "label": bool(n % 3)}
        for n, row in enumerate(map(json.loads, small.data()["comparisons"].read_text("utf-8").splitlines()))
    ]
    data = small.write_rows(tmp_path / "labelled.jsonl", rows)
    result = train(tmp_path / "out", data=str(data), max_steps=2, eval_fraction=0.0)
    assert (result.facts["labelled_answers"], result.facts["liked_answers"]) == (96, 64)


@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_reference_before_training_and_at_every_step_are_one(adapter: str, tmp_path: Path) -> None:
    rows = []
    for reference in ("precomputed", "online"):
        train(tmp_path / reference, reference=reference, adapter=adapter, learning_rate=1e-2, max_steps=24)
        rows.append(updates(tmp_path / reference))
    for one, other in zip(*rows, strict=True):
        for key in ("loss", "kl", "chosen_reward"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), key


@pytest.mark.slow
def test_micro_batches_do_not_change_training(tmp_path: Path) -> None:
    rows = []
    for micro in (64, 1024):
        train(tmp_path / str(micro), micro_tokens=micro, tokens_per_step=600, max_steps=4, learning_rate=1e-2)
        rows.append(updates(tmp_path / str(micro)))
    for parts, whole in zip(*rows, strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert parts["kl"] == pytest.approx(whole["kl"], abs=1e-4)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
