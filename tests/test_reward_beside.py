"""Reward models that are adapters of the policy's base: one base in memory, and the scores of the merged model."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from danlu.alignment_config import GrpoSettings, PpoSettings, RewardSettings
from danlu.models.load import load_model
from danlu.parsing import parse
from danlu.trainers import grpo, players, ppo, reward_model, scoring
from danlu.trainers.players import Players


@functools.cache
def trained() -> Path:
    """A reward model's folder with its adapter beside it."""
    out = tiny.home() / "beside"
    values = tiny.stage("reward", out, adapter="lora", max_steps=6, lora={"r": 2, "alpha": 8})
    return reward_model.train(parse(RewardSettings, values)).model


def stage(kind: str, out: Path, judge: Path, **changes: Any) -> Any:
    values = tiny.stage(kind, out, reward_model=str(judge), follow_failed=True, max_steps=2, **changes)
    return parse(PpoSettings if kind == "ppo" else GrpoSettings, values)


def merged_only(folder: Path) -> Path:
    """The same reward model without its adapter."""
    return Path(shutil.copytree(trained(), folder / "judge" / "model"))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    tiny.mostly_slow([("ppo", "bfloat16"), ("grpo", "float32")], [("ppo", "float32"), ("grpo", "bfloat16")]),
)
def test_an_adapter_judges_like_the_merged_model(kind: str, dtype: str, tmp_path: Path) -> None:
    run = ppo.train if kind == "ppo" else grpo.train
    for name, judge in (("beside", trained()), ("merged", merged_only(tmp_path))):
        run(stage(kind, tmp_path / name, judge, adapter="lora", dtype=dtype))
    found, expected = (tiny.metrics_of(tmp_path / name)[0] for name in ("beside", "merged"))
    name = "score_raw" if "score_raw" in expected else "score"
    assert found[name] == pytest.approx(expected[name], abs=1e-4 if dtype == "float32" else 0.05)
    assert found["tokens"] == expected["tokens"]


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[Players]:
    """Who took part in the stages of a test."""
    found: list[Players] = []
    made = players.players_of

    def keep(*args: Any, **options: Any) -> Players:
        found.append(made(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(grpo, "players_of", keep)
    return found


def gather(gathered: list[Players], settings: GrpoSettings) -> tuple[Any, Any]:
    with pytest.raises(KeyboardInterrupt):
        grpo.train(settings)
    [judge] = scoring.judges_in(gathered[-1].reward)
    return gathered[-1].policy, judge


def shared(policy: Any, judge: Any) -> int:
    """Numbers of the judge that lie where the policy's do."""
    places = {p.data_ptr() for p in policy.parameters()}
    return sum(p.numel() for p in judge.parameters() if p.data_ptr() in places)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_held_once(dtype: str, gathered: list[Players], tmp_path: Path) -> None:
    policy, judge = gather(gathered, stage("grpo", tmp_path, trained(), adapter="lora", dtype=dtype))
    trunk = sum(p.numel() for p in load_model(tiny.model()).base_model.parameters())
    assert shared(policy, judge) == trunk
    own = sum(p.numel() for p in judge.parameters()) - trunk
    assert 0 < own < trunk / 2
    weight = judge.base_model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.dtype == getattr(torch, dtype) and not weight.requires_grad


@pytest.mark.parametrize(
    "why", tiny.mostly_slow(["another base", "a base of 4 bits"], ["all weights learn", "no adapter"])
)
def test_otherwise_it_has_weights_of_its_own(why: str, gathered: list[Players], tmp_path: Path) -> None:
    judge = merged_only(tmp_path) if why == "no adapter" else trained()
    changes: dict[str, Any] = {} if why == "all weights learn" else {"adapter": "lora"}
    changes |= {"adapter": "qlora"} if why == "a base of 4 bits" else {}
    if why == "another base":
        changes["model"] = str(tiny.model_folder(tmp_path / "other" / "model", seed=1))
    policy, model = gather(gathered, stage("grpo", tmp_path / "out", judge, **changes))
    assert shared(policy, model) == 0
