"""The recipes of single fine-tunings and domains: a few steps on the first rows of the published files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from published import overrides

from danlu.cli.main import run
from danlu.pipeline.listing import describe

RECIPES = Path(__file__).parents[1] / "recipes"
POLICIES = {
    "alpaca-lora": ["pretrain", "sft"],
    "chatdoctor": ["pretrain", "general", "generated", "dialogues", "refined"],
    "huatuo": ["pretrain", "graph", "literature"],
    "dolly": ["pretrain", "sft"],
    "moss": ["pretrain", "sft"],
    "chatglm-adgen-ptuning": ["pretrain", "chat", "sft"],
    "chatglm-alpaca-lora": ["pretrain", "sft"],
    "wenzhong-gpt2": ["pretrain", "sft"],
    "belle-chinese": ["english", "chinese", "sft"],
    "pmc-llama": ["general", "domain", "sft"],
}
ALWAYS = ("huatuo", "chatglm-adgen-ptuning")  # the others take as long, and go with `make slow`
CASES = [pytest.param(name, "", marks=() if name in ALWAYS else pytest.mark.slow, id=name) for name in POLICIES] + [
    pytest.param("huatuo", f"family={f}", marks=pytest.mark.slow, id=f"huatuo-{f}") for f in ("bloom", "chatglm2")
]


@pytest.mark.parametrize(("name", "change"), CASES)
def test_the_published_files_go_through(
    name: str,
    change: str,
    published_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DANLU_RUNS", str(tmp_path))
    path = RECIPES / f"{name}.yaml"
    extra = [change] if change else []
    if name == "chatglm-adgen-ptuning":  # a tokenizer of 600 tokens cuts every character into bytes
        extra += ["chat.max_length=900", "sft.max_length=900", "sft.max_prompt_tokens=450", "sft.max_answer_tokens=450"]
    # --force: gates judge quality, which a few steps do not give.
    status = run(["run", str(path), *overrides(path, published_data, *extra), "--force"])
    assert status == 0, capfd.readouterr().err
    stages = {s["name"]: s for s in describe(tmp_path / name)["stages"]}
    assert all(s["status"] == "done" for s in stages.values())
    for before, after in zip(["", *POLICIES[name]], POLICIES[name], strict=False):
        manifest = json.loads(next((tmp_path / name).glob(f"*-{after}/manifest.json")).read_text("utf-8"))
        assert not before or f"-{before}/model" in json.dumps(manifest["inputs"]), f"{after} goes on from {before}"
    for stage in stages.values():
        gates = {g["code"]: g for g in stage["gates"]}
        assert all(gates[code]["passed"] for code in ("G-RENDER",) if code in gates), gates
        # After three steps no model knows a stop token that an adapter leaves as it is.
        assert (
            "adapter" in (RECIPES / f"{name}.yaml").read_text("utf-8")
            or gates.get("G-STOP", {"passed": True})["passed"]
        )
