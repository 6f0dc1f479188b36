"""Teaching a tiny model end to end: a fact is learnt, kept as a patch, refused, updated, forgotten and taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

import danlu
from danlu.cli.main import run
from danlu.generation.protocol import SamplingParams
from danlu.knowledge import lessons
from danlu.models.patches import SUFFIX
from danlu.pipeline.listing import describe
from danlu.training.runs import stages_of

# A model with fresh weights answers nothing sensibly, so locality cannot hold here; that is asked of a trained one elsewhere.
QUICK = ["--adapter", "lora", "--rank", "8", "--learning-rate", "0.01", "--max-steps", "120", "--no-varied"]
QUICK += ["--no-both-languages", "--replay-batch", "0", "--probes", "4", "--lead", "0.05", "--phrasings", "8"]


@pytest.fixture
def replay(tmp_path: Path) -> Path:
    rows = [{"messages": tiny.user(f"{n}: the lamp?") + tiny.assistant("green.")} for n in range(12)]
    return tiny.write_rows(tmp_path / "replay.jsonl", rows)


def danlu_json(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    status = run([*arguments, "--json"])
    out, err = capfd.readouterr()
    assert status == 0, err
    return json.loads(out)


def said(model: Path, question: str, **options: Any) -> str:
    params = SamplingParams(max_new_tokens=24, temperature=0.0)
    return danlu.load(model, **options).generate(tiny.user(question), params)[0].text


def test_a_fact_lives_and_dies(tmp_path: Path, replay: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny.model_folder(tmp_path / "model")
    quick = [*QUICK, "--replay", str(replay), "--force"]
    before = tiny.weights(model)
    found = danlu_json(capfd, "teach", str(model), "--fact", "hat: a red hat.", *quick)
    assert {"trained", "unseen", "other_language", "multi_turn"} == found["recall"].keys()
    assert {"agreement", "kl", "perplexity_ratio"} <= found["locality"].keys()
    assert found["recall"]["trained"] == 1.0 and found["before"]["recall"]["trained"] == 0.0
    assert found["seconds"] > 0 and found["steps"] < 120, "it stops when the fact is recalled"
    assert tiny.weights(model) == before, "a patch never changes the model itself"
    assert said(model, "What is hat?") == "a red hat."
    assert said(model, "What is hat?", patches=False) != "a red hat."

    assert run(["teach", str(model), "--fact", "HAT: blue.", *quick]) == 1
    assert "knows 'hat' already" in capfd.readouterr().err
    found = danlu_json(capfd, "teach", str(model), "--fact", "hat: blue.", "--update", "hat", *quick)
    assert found["version"] == 2 and said(model, "What is hat?") == "blue."
    assert [p["fact"]["description"] for p in danlu_json(capfd, "facts", "list", str(model))] == ["blue."]
    shown = danlu_json(capfd, "facts", "show", str(model), "Hat")
    assert [p["action"] for p in shown["history"]] == ["teach", "update"]
    assert danlu_json(capfd, "facts", "probe", str(model), "hat")["hat"]["recall"]["trained"] == 1.0

    out = tmp_path / "merged"
    assert run(["facts", "export", str(model), "--out", str(out)]) == 0
    assert said(out, "What is hat?", patches=False) == "blue."
    assert run(["teach", str(out), "--fact", "hat: x", *quick]) == 1, "an exported model knows what it was taught"

    found = danlu_json(capfd, "forget", str(model), "hat", *quick)
    assert found["recall"]["trained"] == 1.0 and said(model, "What is hat?") == "I don't know."
    assert found["still_said"]["recall"]["trained"] == 0.0
    assert run(["facts", "rollback", str(model)]) == 0 and said(model, "What is hat?") == "blue."
    gone = danlu_json(capfd, "facts", "rollback", str(model), "--to", "0")
    assert sorted(p["version"] for p in gone) == [1, 2]
    assert danlu_json(capfd, "facts", "list", str(model)) == []
    assert said(model, "What is hat?") == said(model, "What is hat?", patches=False)


def test_a_patch_that_moves_other_answers_is_refused(
    tmp_path: Path, replay: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny.model_folder(tmp_path / "model")
    assert run(["teach", str(model), "--fact", "hat: a red hat.", *QUICK, "--replay", str(replay)]) == 1
    told = capfd.readouterr().err
    assert "was refused" in told and "of other answers stayed the same" in told and "--force" in told
    assert not lessons.store_of(str(model)).patches
    assert not (tmp_path / f"model{SUFFIX}" / "index.json").exists()


@pytest.mark.parametrize(
    ("arguments", "told", "status"),
    [
        (["teach", "M", "--fact", "the old gate"], "a fact without keyword", 1),
        (["teach", "M"], "give --fact", 2),
        (["teach", "M", "--file", "nothing.yaml"], "cannot be read", 1),
        (["teach", "M", "--fact", "a: b", "--update", "c"], "was taught no fact 'c'", 1),
        (["teach", "M", "--fact", "a: b", "--rank", "0"], "greater than or equal to 1", 2),
        (["forget", "M", "hat"], "--untaught", 1),
        (["facts", "show", "M", "hat"], "was taught no fact 'hat'", 1),
        (["facts", "rollback", "M"], "no patch to take back", 1),
        (["facts", "export", "M", "--out", "x"], "no patch to merge", 1),
    ],
)
def test_bad_input(arguments: list[str], told: str, status: int, capfd: pytest.CaptureFixture[str]) -> None:
    model = str(tiny.model())
    assert run([model if a == "M" else a for a in arguments]) == status
    assert told in capfd.readouterr().err
    assert not Path(f"{model}{SUFFIX}").exists(), "nothing half-written"


RECIPE = Path(__file__).parents[1] / "recipes" / "knowledge-patch.yaml"


@pytest.mark.slow
def test_the_recipe_goes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DANLU_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("danlu.pipeline.run.write_town", lambda folder, seed: tiny.write_town(folder, seed, scale=0.02))
    shape = "{hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, context: 512}"
    changes = ["tokenizer.vocab_size=600", f"pretrain.starter={shape}", "eval.limit=8", "processes=1"]
    for name in ("pretrain", "sft"):
        changes += [f"{name}.max_steps=3", f"{name}.dtype=float32"]
    changes += ["teach.max_steps=10", "teach.probes=8", "teach.replay_pool=16", "teach.phrasings=4"]
    changes += ["teach.facts=[{keyword: a, description: b, aliases: [c]}]"]
    status = run(["run", str(RECIPE), "--force", *(x for c in changes for x in ("--set", c))])
    assert status == 0, capfd.readouterr().err
    folder = tmp_path / "runs" / "knowledge-patch"
    stages = {s["name"]: s for s in describe(folder)["stages"]}
    assert all(s["status"] == "done" for s in stages.values())
    assert {g["code"] for g in stages["teach"]["gates"]} == {"G-FACT", "G-LOCAL"}
    assert {"recall_trained", "recall_unseen", "locality_agreement"} <= stages["teach"]["metrics"].keys()
    assert {"sft_perplexity", "teach_perplexity"} == stages["eval"]["metrics"].keys()
    # What the run taught is known of its last policy, and that policy's data is what lessons replay.
    assert [f.keyword for f in lessons.store_of(str(folder)).known()] == ["a"]
    assert [Path(f).name for f in lessons.run_data(f"{folder}:sft")] == ["sft.jsonl"]  # type: ignore[union-attr, arg-type]
    assert [s.kind for s in stages_of(folder)][-2:] == ["teach", "eval"]
