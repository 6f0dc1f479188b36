"""Online DPO: which pairs it makes, its first update against a slow reference, that it learns, and resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny as small
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_grpo_methods import killed_and_resumed, row_logprobs, toy_judge, train, updates
from torch import Tensor
from transformers import AutoModelForCausalLM

from danlu.rewards.model import ModelReward
from danlu.rewards.protocol import Episode, Score
from danlu.trainers import online_dpo
from danlu.training.groups import Drawn

ONLINE = {"method": "online-dpo", "rollout": {"batch": 32, "max_new_tokens": 8}}


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_best_and_worst(scores: list[int]) -> None:
    found = online_dpo.best_and_worst([9.0, *map(float, scores)], range(1, len(scores) + 1))
    if len(set(scores)) == 1:
        assert found is None
    else:
        assert found == [1 + scores.index(max(scores)), 1 + scores.index(min(scores))]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    seen: list[Drawn] = []
    build = online_dpo._pairs

    def record(players: Any, drawn: Drawn, settings: Any) -> Any:
        seen.append(drawn)
        return build(players, drawn, settings)

    monkeypatch.setattr(online_dpo, "_pairs", record)
    return seen


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_updates_are_those_of_dpo_on_its_pairs(loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient norm of the second iteration, whose policy is no longer the reference, one row at a time."""
    seen = recorded(monkeypatch)
    options = {"group_size": 4}
    rule = {"loss": loss, "beta": 0.3}
    common = {**ONLINE, "grpo": options, "online_dpo": rule, "learning_rate": 1e-2, "max_grad_norm": 1e9}
    train(tmp_path / "one", max_steps=1, **common)
    train(tmp_path / "two", max_steps=2, **common)
    policy, ref = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (tmp_path / "one" / "model", small.model()))
    drawn, losses = seen[-1], []
    for places in drawn.groups:
        best, worst = max(places, key=lambda i: drawn.scores[i]), min(places, key=lambda i: drawn.scores[i])
        if drawn.scores[best] == drawn.scores[worst]:
            continue
        with torch.no_grad():
            base = (
                row_logprobs(ref, drawn.trajectories[best]).sum() - row_logprobs(ref, drawn.trajectories[worst]).sum()
            )
        h = row_logprobs(policy, drawn.trajectories[best]).sum() - row_logprobs(policy, drawn.trajectories[worst]).sum()
        terms: dict[str, Tensor] = {
            "sigmoid": -F.logsigmoid(0.3 * (h - base)),
            "ipo": (h - base - 1 / 0.6).square(),
            "hinge": F.relu(1 - 0.3 * (h - base)),
        }
        losses.append(terms[loss])
    mean = torch.stack(losses).mean()
    mean.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in policy.parameters() if p.grad is not None))
    first, second = updates(tmp_path / "two")
    assert first["margin"] == 0.0 and second["margin"] != 0.0
    assert second["loss"] == pytest.approx(mean.item(), rel=1e-4)
    assert second["grad_norm"] == pytest.approx(norm, rel=1e-3) and second["pairs"] == len(losses)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 8])
def test_it_raises_a_toy_reward(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelReward, "score", toy_judge)
    options = {"group_size": size, "missing_stop_penalty": 0.0, "epochs": 2}
    result = train(tmp_path, **ONLINE, grpo=options, max_steps=15, learning_rate=2e-2)
    assert abs(updates(tmp_path)[0]["score"]) < 0.3 and result.metrics["score"] > 0.3
    assert result.metrics["eval_score"] > result.metrics["first_eval_score"] + 0.2
    assert result.gates[0].code == "G-RATIO" and result.gates[0].value == 0.0
    assert result.metrics["kl"] > 0.1 and updates(tmp_path)[0]["equal_groups"] < 0.5


def test_ties_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(self: ModelReward, episodes: Sequence[Episode], **_: Any) -> list[Score]:
        # The first two groups of the four are ties.
        return [Score(float(n) if n >= 8 else 0.0) for n in range(len(episodes))]

    monkeypatch.setattr(ModelReward, "score", judge)
    options = {"group_size": 4, "missing_stop_penalty": 0.0}
    train(
        tmp_path,
        **{**ONLINE, "rollout": {"batch": 16, "max_new_tokens": 8}},
        grpo=options,
        max_steps=2,
        eval_fraction=0.0,
    )
    assert [(r["pairs"], r["equal_groups"]) for r in updates(tmp_path)] == [(2.0, 0.5)] * 2


def test_nothing_but_ties_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelReward, "score", lambda self, episodes, **_: [Score(1.0)] * len(episodes))
    options = {"group_size": 4, "missing_stop_penalty": 0.0}
    train(tmp_path, **ONLINE, grpo=options, max_steps=2, learning_rate=1e-2)
    assert small.weights(tmp_path / "model") == small.weights(small.model())
    assert [(r["pairs"], r["loss"], r["grad_norm"]) for r in updates(tmp_path)] == [(0.0, 0.0, 0.0)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_an_interrupted_stage_goes_on_bit_for_bit(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"group_size": 4, "epochs": 2, "minibatches": 2}
    whole, again = killed_and_resumed(tmp_path, monkeypatch, **ONLINE, grpo=options, adapter=adapter)
    assert again.metrics == whole.metrics and again.gates == whole.gates and again.facts == whole.facts


@pytest.mark.slow
def test_micro_batches_do_not_change_training(tmp_path: Path) -> None:
    rows = []
    for micro in (64, 1024):
        options = {"group_size": 4, "minibatches": 2}
        train(tmp_path / str(micro), **ONLINE, micro_tokens=micro, max_steps=3, learning_rate=1e-2, grpo=options)
        rows.append(updates(tmp_path / str(micro)))
    for parts, whole in zip(*rows, strict=True):
        for key in ("loss", "score", "kl", "margin"):
            assert parts[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-4), key
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
