"""recipes/hh-assistant.yaml on the published files themselves, with a few steps per stage: a check of formats, not of quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from danlu.cli.main import run
from danlu.pipeline.listing import describe
from danlu.pipeline.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "hh-assistant.yaml"
FEW: dict[str, dict[str, Any]] = {
    "tokenizer": {"vocab_size": 600, "data": "${data_root}/pretrain-en/tinystories_sample.txt"},
    "pretrain": {"max_records": 60, "starter": "{hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, context: 512}"},
    "sft": {"max_records": 80},
    "reward": {"max_records": 80, "min_accuracy": 0, "max_length_correlation": 1},
    "ppo": {"max_records": 60, "max_steps": 2, "rollout.batch": 4, "rollout.max_new_tokens": 8},
}
TRAINED = ("pretrain", "sft", "reward")


def overrides(data: Path, heldout: Path) -> list[str]:
    """`--set` for a tiny run: few records and steps for every stage; `heldout` is what int8 is measured on."""
    found = [f"data_root={data}"]
    for stage in load_recipe(RECIPE).stages:
        few = dict(FEW.get(stage.kind, {}))
        if stage.kind in TRAINED:
            few |= {"max_steps": 3, "tokens_per_step": 2048}
        if stage.kind in (*TRAINED, "ppo"):
            few |= {"dtype": "float32", "save_every": 50}
        if stage.kind == "eval":
            few |= {"limit": 8}
        if stage.kind == "quantize":
            few |= {"eval_data": heldout}
        found += [f"{stage.name}.{key}={value}" for key, value in few.items()]
    return [x for text in found for x in ("--set", text)]


@pytest.mark.slow
def test_the_published_files_go_through_the_whole_recipe(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DANLU_RUNS", str(tmp_path / "runs"))
    text = (shared_data / "pretrain-en" / "wikitext-2-valid.txt").read_text("utf-8")
    heldout = tmp_path / "heldout.txt"
    heldout.write_text(text[:10_000], "utf-8")
    # --force: gates judge quality, which a few steps do not give.
    call = ["run", str(RECIPE), *overrides(shared_data, heldout), "--force"]
    status = run(call)
    said = capfd.readouterr().err
    assert status == 0, said
    folder = tmp_path / "runs" / "hh-assistant"
    stages = {s["name"]: s for s in describe(folder)["stages"]}
    assert all(s["status"] == "done" for s in stages.values())

    by_kind = {s["kind"]: s for s in stages.values()}
    gates = {g["code"]: g for s in stages.values() for g in s["gates"]}
    assert gates["G-STOP"]["passed"] and gates["G-RENDER"]["passed"]
    assert gates["G-RATIO"]["value"] == 0.0
    assert 1 < by_kind["eval"]["metrics"][next(iter(by_kind["eval"]["metrics"]))] < 600  # perplexity below uniform

    sizes = {m.parent.name[3:]: json.loads(m.read_text("utf-8"))["facts"] for m in folder.glob("*/manifest.json")}
    assert sizes["sft"]["records"] == 80 and sizes["reward"]["pairs"] > 40 and sizes["ppo"]["prompts"] > 20
    rendered = sizes["sft"]["rendered_example"]
    assert "<|im_start|>user" in rendered and "<|im_end|>" in rendered
