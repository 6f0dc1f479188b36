"""Stages that are broken on purpose, in the ways that PPO is broken by mistake: each is caught by a rule or gate with a name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from danlu.config import KINDS
from danlu.data.collate import EncodedPrompt
from danlu.models.load import load_model, save_model
from danlu.models.root import RootModel
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.rewards.model import ModelReward
from danlu.rewards.protocol import Episode, Score
from danlu.trainers import grpo, ppo, scoring
from danlu.training import experience, groups, heldout, objectives
from danlu.tree import Trajectory, TreeBatch

TRAINERS: dict[str, Any] = {"ppo": ppo, "grpo": grpo}
OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {"ppo": {"critic_learning_rate": 1e-3, "kl_coef": 0.01, "missing_stop_penalty": 0.0, "minibatches": 1}},
    "grpo": {"grpo": {"group_size": 8, "kl_coef": 0.01, "missing_stop_penalty": 0.0, "epochs": 2}},
}
# What is shared is broken in the same place: the cheaper one is always run.
BOTH = ("grpo", pytest.param("ppo", marks=pytest.mark.slow))
BROKEN = ("P-SCORE-FALLS", "P-RATIO", "P-ENGINE-GAP", "P-KL-NEGATIVE", "P-REWARD-HACK", "P-CRITIC-BLIND", "P-GRAD")


@functools.cache
def model() -> Path:
    """A policy with opinions: tied to the head, fresh embeddings hardly tell tokens apart."""
    loaded = load_model(tiny.model())
    with torch.no_grad():
        loaded.get_input_embeddings().weight *= 20
    return save_model(loaded, tiny.tokenizer(), tiny.home() / "opinions" / "model")


def share(ids: Sequence[int]) -> float:
    """Even tokens, from -1 to 1: what a good answer is made of here."""
    return 2 * sum(i % 2 == 0 for i in ids) / len(ids) - 1


def even(self: ModelReward, episodes: Sequence[Episode], **_: Any) -> list[Score]:
    return [Score(share(e.response_ids)) for e in episodes]


@pytest.fixture(autouse=True)
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelReward, "score", even)


def run(kind: str, out: Path, **changes: Any) -> tuple[set[str], dict[str, Any]]:
    """Codes of the rules that found something, and the gates."""
    given = {"model": str(model()), "max_steps": 14, "learning_rate": 1e-2, "eval_every": 100, "schedule": "constant"}
    given |= {"rollout": {"batch": 32, "max_new_tokens": 8}, **OPTIONS[kind], **changes}
    result = STAGES[kind].run(parse(KINDS[kind], tiny.stage(kind, out, **given)))
    codes = {f.partition(" ")[0] for f in result.facts["health"]["findings"]}
    return codes, {g.code: g for g in result.gates}


# The engine answers in float32 whatever the trainer reads in.
DTYPES = [
    ("grpo", "float32"),
    ("grpo", "bfloat16"),
    pytest.param("ppo", "float32", marks=pytest.mark.slow),
    pytest.param("ppo", "bfloat16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "dtype"), DTYPES)
def test_unbroken(kind: str, dtype: str, tmp_path: Path) -> None:
    codes, gates = run(kind, tmp_path, dtype=dtype)
    assert codes.isdisjoint(BROKEN) and all(g.passed for g in gates.values()), (codes, gates)


# -- ways to break it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param("ppo", "clipped_policy", marks=pytest.mark.slow), ("grpo", "clipped_with_kl")],
)
def test_the_sign_of_the_loss_is_reversed(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = {"ppo": objectives, "grpo": grpo}[kind]
    loss_of = getattr(module, name)

    def reversed_loss(logp: Tensor, *args: Any, **rest: Any) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = loss_of(logp, *args, **rest)
        return -loss, metrics

    monkeypatch.setattr(module, name, reversed_loss)
    codes, gates = run(kind, tmp_path)
    assert "P-SCORE-FALLS" in codes and not gates["G-PPO"].passed


@pytest.mark.parametrize("action", ["stop", pytest.param("warn", marks=pytest.mark.slow)])
def test_the_sign_of_the_reward_is_reversed(action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward cannot show it: it rises. What is measured beside it falls."""

    def odd(self: ModelReward, episodes: Sequence[Episode], **_: Any) -> list[Score]:
        return [Score(-share(e.response_ids)) for e in episodes]

    def gold(asked: Sequence[EncodedPrompt], found: Sequence[Trajectory]) -> list[float]:
        return [share(t.actions) for t in found]

    monkeypatch.setattr(ModelReward, "score", odd)
    monkeypatch.setattr(scoring, "gold_for", lambda *_, **__: gold)
    options = {"max_steps": 20, "eval_every": 2, "eval_fraction": 0.4}
    codes, gates = run("grpo", tmp_path, health={"actions": {"P-REWARD-HACK": action}}, **options)
    assert "P-REWARD-HACK" in codes
    steps = tiny.steps_of(tmp_path)
    assert steps[-1] < 20 if action == "stop" else steps[-1] == 20
    # Stopped, it keeps what was best by gold; left alone, it loses against the start model.
    assert action == "stop" or not gates["G-PPO"].passed


@pytest.mark.slow
def test_dropout_is_left_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first update is not enough to see it with adapters: they begin as zeros, whatever is dropped."""
    monkeypatch.setattr(RootModel, "eval", lambda self: self.train())
    codes, gates = run("ppo", tmp_path, adapter="lora", lora={"r": 4, "dropout": 0.3})
    assert gates["G-RATIO"].passed and "P-RATIO" in codes


@pytest.mark.parametrize("kind", BOTH)
def test_the_mask_counts_a_token_of_the_prompt(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by one: it begins with the prompt's last token and leaves out the answer's last one."""
    index: Callable[[TreeBatch], Tensor] = TreeBatch.action_index
    monkeypatch.setattr(TreeBatch, "action_index", lambda self: index(self) - 1)
    codes, _ = run(kind, tmp_path)
    assert "P-ENGINE-GAP" in codes


@pytest.mark.parametrize("kind", BOTH)
def test_old_log_probs_are_those_of_another_policy(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's: right at the first iteration, when they are the same, and never again."""
    module: Any = {"ppo": experience, "grpo": groups}[kind]
    read = module.read_actions
    monkeypatch.setattr(module, "read_actions", lambda root, role, *a, **k: read(root, "ref", *a, **k))
    codes, gates = run(kind, tmp_path)
    assert gates["G-RATIO"].passed and "P-RATIO" in codes


@pytest.mark.parametrize(("kind", "dtype"), DTYPES)
def test_the_engine_is_never_updated(kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (TRAINERS[kind], heldout):
        monkeypatch.setattr(module, "push_weights", lambda engine, root, version: setattr(engine, "version", version))
    codes, gates = run(kind, tmp_path, dtype=dtype)
    assert gates["G-RATIO"].passed and "P-ENGINE-GAP" in codes


@pytest.mark.slow
def test_roll_outs_are_drawn_at_another_temperature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colder answers than the ones that are learnt from: their log-probs are not those of the policy."""
    sampling = ppo.sampling_of
    monkeypatch.setattr(ppo, "sampling_of", lambda s, t: sampling(s.model_copy(update={"rollout": cold(s.rollout)}), t))
    codes, _ = run("ppo", tmp_path)
    assert "P-ENGINE-GAP" in codes


def cold(rollout: Any) -> Any:
    return rollout.model_copy(update={"temperature": 0.5})


def test_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All answers are scored alike."""
    monkeypatch.setattr(ModelReward, "score", lambda self, episodes, **_: [Score(0.5)] * len(episodes))
    codes, _ = run("grpo", tmp_path)
    assert {"P-EQUAL-GROUPS", "P-GRAD"} <= codes
