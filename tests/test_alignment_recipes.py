"""recipes/dpo.yaml and recipes/gsm8k-grpo.yaml: their wiring, and a few steps on the first rows of the published files."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from danlu.cli.main import run
from danlu.exceptions import SettingsError
from danlu.pipeline.listing import describe
from danlu.pipeline.plan import estimate
from danlu.pipeline.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
SHAPE = "{hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, context: 512}"
FEW: dict[str, dict[str, Any]] = {
    "tokenizer": {"vocab_size": 600, "data": "${data_root}/pretrain-en/tinystories_sample.txt"},
    "pretrain": {"max_records": 60, "max_steps": 3, "tokens_per_step": 2048, "starter": SHAPE},
    "sft": {"max_records": 60, "max_steps": 3, "tokens_per_step": 2048, "overlength": "drop"},
    "dpo": {"max_steps": 3, "tokens_per_step": 2048},
    "grpo": {"max_records": 60, "max_steps": 2, "rollout.batch": 8, "rollout.max_new_tokens": 8, "grpo.group_size": 4},
    "eval": {"limit": 8},
}


def first_rows(data: Path, folder: Path) -> Path:
    """The beginnings of the published files under their own names: reading all of them takes longer than the stages."""
    for name in ("hh-rlhf/helpful-base", "hh-rlhf/helpful-rejection-sampled", "hh-rlhf/harmless-base", "gsm8k"):
        (folder / name).mkdir(parents=True)
        with (
            gzip.open(data / name / "train.jsonl.gz", "rt", encoding="utf-8") as file,
            gzip.open(folder / name / "train.jsonl.gz", "wt", encoding="utf-8") as copy,
        ):
            copy.writelines(islice(file, 60))
    (folder / "alpaca-en").mkdir()
    with gzip.open(data / "alpaca-en" / "alpaca_data.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)[:150]
    with gzip.open(folder / "alpaca-en" / "alpaca_data.json.gz", "wt", encoding="utf-8") as file:
        json.dump(rows, file)
    (folder / "pretrain-en" / "gutenberg").mkdir(parents=True)
    books = [next((data / "pretrain-en" / "gutenberg").glob("*.txt")), *(data / "pretrain-en").glob("*.txt")]
    for book in books:
        target = folder / book.relative_to(data)
        target.write_text(book.read_text("utf-8")[:60_000], "utf-8")
    return folder


def overrides(path: Path, data: Path) -> list[str]:
    """`--set` for a tiny run."""
    found = [f"data_root={data}"]
    for stage in load_recipe(path).stages:
        few = FEW[stage.kind] | ({} if stage.kind in ("tokenizer", "eval") else {"dtype": "float32"})
        found += [f"{stage.name}.{key}={value}" for key, value in few.items()]
    return [x for text in found for x in ("--set", text)]


@pytest.mark.parametrize("name", ["dpo", "gsm8k-grpo"])
def test_the_published_files_go_through(
    name: str, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DANLU_RUNS", str(tmp_path / "runs"))
    path = RECIPES / f"{name}.yaml"
    # --force: gates judge quality, which a few steps do not give.
    status = run(["run", str(path), *overrides(path, first_rows(shared_data, tmp_path / "data")), "--force"])
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
