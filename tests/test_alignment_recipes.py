"""The alignment recipes: their wiring, and a few steps on the first rows of the published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from published import FEW, overrides

from danlu.cli.main import run
from danlu.exceptions import SettingsError
from danlu.pipeline.listing import describe
from danlu.pipeline.plan import estimate
from danlu.pipeline.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("name", [pytest.param("dpo", marks=pytest.mark.slow), "gsm8k-grpo"])
def test_the_published_files_go_through(
    name: str, published_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DANLU_RUNS", str(tmp_path / "runs"))
    path = RECIPES / f"{name}.yaml"
    # --force: gates judge quality, which a few steps do not give.
    status = run(["run", str(path), *overrides(path, published_data), "--force"])
    assert status == 0, capfd.readouterr().err
    folder = tmp_path / "runs" / name
    stages = {s["kind"]: s for s in describe(folder)["stages"]}
    assert all(s["status"] == "done" for s in stages.values())
    gates = {(s["kind"], g["code"]): g for s in stages.values() for g in s["gates"]}
    facts = {m.parent.name[3:]: json.loads(m.read_text("utf-8"))["facts"] for m in folder.glob("*/manifest.json")}
    report = (folder / "report.html").read_text("utf-8")
    if name == "dpo":
        assert all(gates["dpo", code]["passed"] for code in ("G-STOP", "G-RENDER"))
        assert facts["dpo"]["pairs"] > 40 and "eval_accuracy" in stages["dpo"]["metrics"]
        assert "<|im_start|>user" in facts["dpo"]["rendered_example"]
        assert "Pairs ranked rightly" in report and "Implicit reward" in report
    else:
        assert gates["grpo", "G-RATIO"]["value"] == 0.0
        assert facts["grpo"]["judges"] == ["verifier"] and facts["grpo"]["prompts"] > 30
        assert "Groups of equal scores" in report


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", [pytest.param("chatllama", marks=SLOW), "colossalchat", pytest.param("deepspeed-chat", marks=SLOW)]
)
def test_the_recipes_of_others_go_through(
    name: str, published_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DANLU_RUNS", str(tmp_path / "runs"))
    path = RECIPES / f"{name}.yaml"
    status = run(["run", str(path), *overrides(path, published_data), "--force"])
    assert status == 0, capfd.readouterr().err
    folder = tmp_path / "runs" / name
    stages = {s["name"]: s for s in describe(folder)["stages"]}
    assert all(s["status"] == "done" for s in stages.values())
    manifests = {m.parent.name[3:]: json.loads(m.read_text("utf-8")) for m in folder.glob("*/manifest.json")}
    metrics = manifests["ppo"]["metrics"]
    if name == "chatllama":
        assert "eval_spearman" in manifests["reward"]["metrics"] or "eval_r2" in manifests["reward"]["metrics"]
    if name == "colossalchat":
        assert 0 < metrics["ptx_share"] < 1
    if name == "deepspeed-chat":
        assert 0 < metrics["ptx_share"] < 1
        assert (next(folder.glob("*-ppo")) / "ema" / "model.safetensors").is_file()
        # The steps share no prompt.
        phases = {
            n: [i["options"]["phase"] for i in manifests[n]["inputs"] if "options" in i]
            for n in ("sft", "reward", "ppo")
        }
        assert all(len(found) > 1 for found in phases.values()), "of both sets"
        assert {n: set(found) for n, found in phases.items()} == {
            "sft": {"sft of 2,4,4"},
            "reward": {"reward of 2,4,4"},
            "ppo": {"rl of 2,4,4"},
        }


@pytest.mark.slow
def test_votes_become_a_model_in_two_ways(
    published_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DANLU_RUNS", str(tmp_path / "runs"))
    path = RECIPES / "feedback.yaml"
    votes = published_data / "alpaca-eval-prefs"
    given = [f"model={tiny.model()}", f"votes={votes}", "processes=1"]
    for kind in ("reward", "ppo", "dpo"):
        given += [f"{kind}.{key}={value}" for key, value in {**FEW[kind], "dtype": "float32"}.items()]
        given += [f"{kind}.max_length=128"]
    call = ["run", str(path), "--force", *(x for text in [*given, "eval.limit=8"] for x in ("--set", text))]
    assert run(call) == 0, capfd.readouterr().err
    stages = {s["name"]: s for s in describe(tmp_path / "runs" / "feedback")["stages"]}
    assert [*stages] == ["reward", "ppo", "dpo", "eval"] and all(s["status"] == "done" for s in stages.values())
    assert len(stages["eval"]["metrics"]) == 2, "of both models"


def test_glm_learns_blanks_and_instructions(
    published_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DANLU_RUNS", str(tmp_path / "runs"))
    path = RECIPES / "glm-pretrain.yaml"
    status = run(["run", str(path), *overrides(path, published_data)])
    assert status == 0, capfd.readouterr().err
    found = json.loads((tmp_path / "runs" / "glm-pretrain" / "02-pretrain" / "manifest.json").read_text("utf-8"))
    assert found["facts"]["objective"] == "glm" and found["facts"]["instructions"] > 0
    assert found["metrics"]["loss"] < 7  # of about 600 tokens one in 600 is 6.4


CHAIN = """
model: /models/base
stages:
  - {kind: sft, data: a}
  - {kind: dpo, data: b}
  - {kind: reward, data: b}
  - {kind: grpo, data: c}
  - {kind: eval, data: d}
"""


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(CHAIN, "utf-8")
    return path


def settings(path: Path, *changes: str) -> dict[str, Any]:
    return {s.name: s.settings for s in load_recipe(path, changes).stages}


def test_wiring(chain: Path) -> None:
    found = settings(chain)
    assert (found["dpo"].model, found["grpo"].model) == ("stage:sft", "stage:dpo")
    assert found["grpo"].reward_model == "stage:reward"
    assert found["eval"].models == ["stage:sft", "stage:dpo", "stage:grpo"]
    # An empty name is an answer, too.
    assert settings(chain, "grpo.reward_model=''")["grpo"].reward_model == ""


def test_grpo_without_a_reward_stage(chain: Path) -> None:
    chain.write_text(CHAIN.replace("  - {kind: reward, data: b}\n", ""), "utf-8")
    assert settings(chain)["grpo"].reward_model == ""


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_they_need_a_policy(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"stages": [{"kind": kind, "data": "x"}]}), "utf-8")
    with pytest.raises(SettingsError, match="needs a stage that trains a policy"):
        load_recipe(path)


def test_plan(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {r["stage"]: r for r in estimate(load_recipe(chain, ["dpo.max_steps=10", "grpo.max_steps=10"]))}
    assert rows["dpo"]["tokens"] == 10 * 2048
    assert rows["grpo"]["tokens"] > 0 and rows["grpo"]["seconds"] > 0
