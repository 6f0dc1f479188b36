"""What starts from a taught model's weights: its facts come along, or it is refused with their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_merging import read

from danlu import assistant
from danlu.cli.main import run
from danlu.config import SftSettings
from danlu.exceptions import ModelError
from danlu.knowledge.facts import Fact
from danlu.knowledge.store import Store
from danlu.models.load import load_model
from danlu.models.merging import merge_adapters
from danlu.models.patches import Factors, add_factors
from danlu.parsing import parse
from danlu.trainers import sft
from danlu.training.runs import patches_folder

LAYER = "model.layers.1.mlp.down_proj"


def factors() -> dict[str, Factors]:
    draw = torch.Generator().manual_seed(1)
    rows = load_model(tiny.model()).get_submodule(LAYER).weight.shape
    return {
        LAYER: Factors(0.5 * torch.randn(2, rows[1], generator=draw), torch.randn(rows[0], 2, generator=draw)),
    }


def teach(folder: Path) -> Store:
    store = Store(patches_folder(str(folder), local=True), str(folder))
    store.set_base(load_model(folder))
    store.add("teach", Fact("Amber Gate", "The old east gate."), factors(), {})
    return store


@pytest.mark.parametrize("kind", ["pretrain", "sft", "reward", "dpo", "ppo", "grpo", "quantize"])
def test_a_stage_that_would_lose_facts_is_refused(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny.model_folder(tmp_path / "model")
    store = teach(folder)
    out = tmp_path / "out"
    if kind == "quantize":
        asked = ["quantize", str(folder), "--bits", "8", "--out", str(out)]
    else:
        values = tiny.stage(kind, out, model=str(folder))
        for name in ("tokenizer", "starter"):
            values.pop(name, None)
        asked = tiny.arguments(kind, values)
    status = run(asked)
    told = capfd.readouterr().err
    assert status == 1, told
    assert store.patches[0].name in told and f"danlu facts export {folder} --out" in told
    assert not (out / "model").exists(), "nothing half-written"


def test_a_model_without_its_facts_may_start(tmp_path: Path) -> None:
    """After a rollback, and from an export that has them in its weights."""
    folder = tiny.model_folder(tmp_path / "model")
    store = teach(folder)
    merged = tmp_path / "merged"
    assert run(["facts", "export", str(folder), "--out", str(merged)]) == 0
    store.rollback()
    for place, out in ((merged, "a"), (folder, "b")):
        values = tiny.stage("sft", tmp_path / out, model=str(place), max_steps=1)
        assert run(tiny.arguments("sft", values)) == 0


def test_merging_an_adapter_brings_the_facts_of_its_base(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny.model_folder(tmp_path / "model")
    out = tmp_path / "sft"
    values = tiny.stage("sft", out, model=str(folder), max_steps=2, adapter="lora", learning_rate=2e-2)
    sft.train(parse(SftSettings, values))
    merge_adapters([out / "adapter"], tmp_path / "without")
    teach(folder)
    capfd.readouterr()
    assert run(["merge", str(out / "adapter"), "--into", str(tmp_path / "with"), "--json"]) == 0
    captured = capfd.readouterr()
    report: dict[str, Any] = json.loads(captured.out)
    assert report["patches"] == ["v0001-amber-gate"] and "v0001-amber-gate" in captured.err
    expected = load_model(tmp_path / "without")
    add_factors(expected, factors())
    found = dict(load_model(tmp_path / "with").named_parameters())
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_a_taught_model_stands_on_it(tmp_path: Path, near: Any) -> None:
    """Beside the facts, as `danlu merge` puts both into the weights; the answers are those of the sum."""
    base = tiny.model_folder(tmp_path / "model")
    sft.train(parse(SftSettings, tiny.stage("sft", tmp_path / "out", model=str(base), max_steps=2, adapter="lora")))
    learnt = tmp_path / "out" / "adapter"
    teach(base)
    merge_adapters([learnt], tmp_path / "both", taught=lambda name: patches_folder(name, local=True))
    voice = read(assistant.load(base).with_adapter(learnt, "kind").model)
    near(voice, read(load_model(tmp_path / "both")), 1e-4)
    assert float((voice - read(load_model(learnt))).abs().max()) > 1e-3, "the fact is in it"
    other = tiny.model_folder(tmp_path / "other", seed=4)
    teach(other)
    with pytest.raises(ModelError, match="other weights"):
        assistant.load(other).with_adapter(learnt, "kind")
