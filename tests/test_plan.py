"""The estimate before a run: parameters exactly, the rest in sane proportions, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import yaml

from danlu.cli.main import run
from danlu.config import Starter
from danlu.models.load import load_model, starter
from danlu.pipeline import plan
from danlu.pipeline.plan import estimate, starter_parameters
from danlu.pipeline.recipe import load_recipe

ROW = ["stage", "kind", "parameters", "tokens", "memory_mb", "seconds"]


@pytest.fixture(autouse=True)
def a_known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "gemm_rate", lambda: 1e11)


def rows(path: Path, *overrides: str) -> dict[str, dict[str, float]]:
    return {r["stage"]: r for r in estimate(load_recipe(path, overrides))}


@pytest.mark.parametrize("shape", [tiny.SHAPE, Starter().model_dump(), {**tiny.SHAPE, "layers": 3, "kv_heads": 2}])
def test_starter_parameters_are_those_of_the_model(shape: dict[str, int]) -> None:
    model = starter(700, **shape, seed=0, ids={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    assert starter_parameters(Starter(**shape), 700) == sum(p.numel() for p in model.parameters())


def test_a_row_for_every_stage(tmp_path: Path) -> None:
    found = estimate(load_recipe(tiny.recipe(tmp_path)))
    assert [r["stage"] for r in found] == list(tiny.STAGES)
    assert all(list(r) == ROW for r in found)
    assert all(r["seconds"] > 0 and r["memory_mb"] > 0 for r in found)
    assert all(r["tokens"] > 0 for r in found if r["kind"] != "tokenizer")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.yaml", "town"], "a plan writes nothing"


def test_what_costs_more_is_said_to_cost_more(tmp_path: Path) -> None:
    path = tiny.recipe(tmp_path)
    base = rows(path)
    longer = rows(path, "sft.max_steps=40")
    assert longer["sft"]["tokens"] == 2 * base["sft"]["tokens"] and longer["sft"]["seconds"] > base["sft"]["seconds"]
    wider = rows(path, "pretrain.starter.hidden_size=64")
    assert wider["ppo"]["parameters"] > 2 * base["ppo"]["parameters"]
    assert wider["ppo"]["memory_mb"] > base["ppo"]["memory_mb"] and wider["ppo"]["seconds"] > base["ppo"]["seconds"]
    assert rows(path, "sft.adapter=lora")["sft"]["memory_mb"] < base["sft"]["memory_mb"]
    assert base["ppo"]["memory_mb"] > base["sft"]["memory_mb"], "PPO holds several models"


def test_seconds_are_work_over_rate(tmp_path: Path) -> None:
    """6 N D over the machine's rate (the training cost of a transformer, Kaplan et al. 2020), and two seconds to begin."""
    row = rows(tiny.recipe(tmp_path))["pretrain"]
    assert row["tokens"] == 4 * 512
    assert row["seconds"] == pytest.approx(2 + 6 * row["parameters"] * 4 * 512 / (1e11 * plan.EFFICIENCY))


def test_parameters_of_a_given_model(tmp_path: Path) -> None:
    path = tiny.recipe(tmp_path)
    actual = sum(p.numel() for p in load_model(tiny.model()).parameters())
    found = rows(path, f"model={tiny.model()}")
    assert "tokenizer" not in found
    # The file also has a header.
    assert actual <= found["sft"]["parameters"] < actual * 1.2


def test_missing_data_is_left_to_the_run(tmp_path: Path) -> None:
    assert rows(tiny.recipe(tmp_path), f"data_root={tmp_path / 'nowhere'}")["sft"]["seconds"] > 0


def test_a_town_that_is_not_written_yet(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump({"model": str(tiny.model()), "stages": [{"kind": "sft", "data": "town:sft"}]}), "utf-8"
    )
    assert rows(path)["sft"]["tokens"] == plan.TOWN_TOKENS["sft"]


def test_plan_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny.recipe(tmp_path)
    assert run(["plan", str(path), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [list(r) for r in found] == [ROW] * 7
    assert run(["plan", str(path)]) == 0
    said = capfd.readouterr()
    assert said.out == "" and "quantize" in said.err


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert plan.gemm_rate(64) > 1e6
