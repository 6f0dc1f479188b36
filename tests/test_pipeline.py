"""A whole tiny chain through `danlu run`, and what its run folder is good for afterwards."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from tiny import STAGES, Chain, chain

from danlu.cli.main import run
from danlu.config import KINDS as KINDS_SETTINGS
from danlu.exceptions import Interrupted, RunError
from danlu.parsing import parse
from danlu.pipeline.listing import describe
from danlu.pipeline.run import run_stage
from danlu.pipeline.stages import STAGES as KINDS
from danlu.pipeline.stages import label
from danlu.training.runs import resolve_model


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    """The finished run in a place of its own: a moved run folder."""
    made = chain()
    shutil.copytree(made.runs, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DANLU_RUNS", str(tmp_path / "runs"))
    return Chain(made.recipe, tmp_path / "runs", made.first)


def cut(run_folder: Path, stage: str) -> None:
    """Takes a stage and those after it away."""
    for folder in run_folder.glob("[0-9]*"):
        if int(folder.name[:2]) > STAGES.index(stage):
            shutil.rmtree(folder)


def times(folder: Path) -> dict[str, int]:
    """Every file of the stages with its time of change."""
    return {str(p): p.stat().st_mtime_ns for d in folder.glob("[0-9]*") for p in d.rglob("*") if p.is_file()}


def manifest(run_folder: Path, stage: str) -> dict[str, Any]:
    path = run_folder / f"{STAGES.index(stage) + 1:02d}-{stage}" / "manifest.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(settings: Any) -> None:
        raise AssertionError(f"a finished stage was run again into {settings.out}")

    for kind, entry in KINDS.items():
        monkeypatch.setitem(KINDS, kind, type(entry)(work, entry.version, entry.inputs, entry.models))


# -- the chain ----------------------------------------------------------------------------------------------------------


def test_until_stops_after_the_stage() -> None:
    assert chain().first == ["01-tokenizer", "02-pretrain", "03-sft"]


def test_runs_json_has_exactly_this_shape(copy: Chain, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["runs", "tiny", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert list(found) == ["run", "seconds", "stages", "table"]
    assert [s["name"] for s in found["stages"]] == list(STAGES) == [s["kind"] for s in found["stages"]]
    for stage in found["stages"]:
        assert list(stage) == ["name", "kind", "status", "seconds", "metrics", "gates"]
        assert stage["status"] == "done"
        assert stage["metrics"] and all(isinstance(v, float) for v in stage["metrics"].values())
        assert all(list(g) == ["code", "passed", "value", "threshold"] for g in stage["gates"])
    assert found["seconds"] == pytest.approx(sum(s["seconds"] for s in found["stages"]), abs=1e-3)
    assert [r["model"] for r in found["table"]] == ["base", "sft", "ppo", "int8"]
    for row in found["table"]:
        assert list(row) == ["model", "rubric", "correct", "stop_rate", "length"]
        assert all(0 <= row[k]["low"] <= row[k]["mean"] <= row[k]["high"] <= 1 for k in ("rubric", "correct"))
        assert 0 <= row["stop_rate"] <= 1 <= row["length"] <= 8


def test_gates_and_their_verdicts(copy: Chain) -> None:
    gates = {g["code"]: g for s in describe(copy.run)["stages"] for g in s["gates"]}
    assert list(gates) == ["G-STOP", "G-TRUNC", "G-RENDER", "G-RM", "G-RATIO", "G-PPO", "G-QUANT"]
    assert all(g["passed"] for g in gates.values())
    # Old log-probs are the trainer's own over the same batches: not nearly but exactly the same numbers.
    assert gates["G-RATIO"]["value"] == 0.0


def test_manifests_record_where_results_come_from(copy: Chain) -> None:
    for stage in STAGES:
        found = manifest(copy.run, stage)
        assert found["schema"] == 1 and found["seed"] == 0 and found["status"] == "done"
        assert found["versions"]["torch"] and found["hardware"]["cpus"] and found["peak_memory_mb"] > 50
        assert all(i["sha256"] and i["bytes"] for i in found["inputs"])
    fields = {i["field"] for i in manifest(copy.run, "ppo")["inputs"]}
    assert fields == {"data", "model", "reward_model"}
    assert "<|im_start|>assistant" in manifest(copy.run, "sft")["facts"]["rendered_example"]


def test_every_stage_leaves_what_the_design_names(copy: Chain) -> None:
    assert yaml.safe_load((copy.run / "recipe.yaml").read_text("utf-8"))["stages"][4]["reward_model"] == "stage:reward"
    assert (copy.run / "report.html").stat().st_size > 10_000
    for stage in ("pretrain", "sft", "reward", "ppo"):
        folder = copy.model(stage).parent
        assert {"settings.yaml", "manifest.json", "metrics.jsonl", "model"} <= {p.name for p in folder.iterdir()}
    samples = (copy.run / "06-eval" / "samples.jsonl").read_text("utf-8").splitlines()
    assert [list(json.loads(s)["answers"]) for s in samples] == [["base", "sft", "ppo"]] * 3
    assert not [p for p in copy.run.rglob("*") if "partial" in p.name]


def test_each_stage_really_trained(copy: Chain) -> None:
    assert len({tiny.weights(copy.model(s)) for s in ("pretrain", "sft", "ppo")}) == 3
    first, last = (tiny.metrics_of(copy.model("sft").parent)[i]["loss"] for i in (0, -2))
    assert last < first - 0.3


# -- again --------------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(copy: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the run folder was moved, as here, and when settings without effect on the result differ."""
    before, described = times(copy.run), describe(copy.run)
    forbid_work(monkeypatch)
    sets = ["sft.log_every=3", "sft.save_every=7", "sft.keep_checkpoints=5", "sft.report_to=[tensorboard]"]
    assert run(["run", str(copy.recipe), *(x for s in sets for x in ("--set", s))]) == 0
    assert times(copy.run) == before
    assert describe(copy.run) == described


def test_a_missing_stage_is_made_again_and_the_same(copy: Chain) -> None:
    seconds, before = {s: manifest(copy.run, s)["seconds"] for s in STAGES}, tiny.weights(copy.model("ppo"))
    kept = {p: t for p, t in times(copy.run).items() if "/05-ppo/" not in p}
    shutil.rmtree(copy.model("ppo").parent)
    assert run(["run", str(copy.recipe)]) == 0
    assert tiny.weights(copy.model("ppo")) == before
    assert {p: t for p, t in times(copy.run).items() if "/05-ppo/" not in p} == kept
    assert {s: manifest(copy.run, s)["seconds"] for s in STAGES if s != "ppo"} == {
        s: v for s, v in seconds.items() if s != "ppo"
    }


def test_other_settings_are_refused_by_name(copy: Chain, capfd: pytest.CaptureFixture[str]) -> None:
    before = times(copy.run)
    assert run(["run", str(copy.recipe), "--set", "sft.learning_rate=0.5"]) == 1
    said = capfd.readouterr().err
    assert "sft.learning_rate" in said and "0.003" in said and "0.5" in said and "--name" in said
    assert times(copy.run) == before
    assert (
        run(["run", str(copy.recipe), "--set", "sft.learning_rate=0.5", "--name", "other", "--until", "tokenizer"]) == 0
    )
    assert (copy.runs / "other" / "01-tokenizer" / "model").is_dir()
    ended = capfd.readouterr()
    assert "Report:" in ended.out + ended.err and "Try next" not in ended.out + ended.err  # no policy to chat with yet


def test_a_nested_setting_is_named_alone(copy: Chain, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["run", str(copy.recipe), "--set", "ppo.ppo.kl_coef=0.77"]) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "ppo.ppo.kl_coef = " in said and "now says 0.77" in said and "gae_lambda" not in said


def test_sigterm_outside_of_a_training_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a machine is shut down during an evaluation: the stage is interrupted, not "running" for ever."""
    before = signal.getsignal(signal.SIGTERM)
    entry = KINDS["tokenizer"]
    terminated = type(entry)(lambda _: signal.raise_signal(signal.SIGTERM), entry.version, entry.inputs, entry.models)
    monkeypatch.setitem(KINDS, "tokenizer", terminated)
    settings = parse(KINDS_SETTINGS["tokenizer"], {"data": str(tiny.data()["documents"]), "out": str(tmp_path / "out")})
    with pytest.raises(Interrupted, match="'words'"):
        run_stage("words", "tokenizer", settings)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_changed_input_is_refused_by_name(copy: Chain, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    town = tmp_path / "town"
    shutil.copytree(copy.recipe.parent / "town", town)
    cut(copy.run, "tokenizer")
    moved = ["run", str(copy.recipe), "--set", f"data_root={town}", "--until", "tokenizer"]
    assert run(moved) == 0
    with (town / "pretrain.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "One more."}\n')
    before = times(copy.run)
    assert run(moved) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "pretrain.jsonl has changed" in said and "--name" in said
    assert times(copy.run) == before


def test_a_changed_recipe_order_is_refused(copy: Chain, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(copy.recipe.read_text("utf-8"))
    content["stages"][2]["name"] = "chat"
    other = tmp_path / "tiny.yaml"
    other.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    assert run(["run", str(other)]) == 1
    said = capfd.readouterr().err
    assert "03-sft" in said and "chat" in said


def test_two_processes_in_one_run_folder(copy: Chain, tmp_path: Path) -> None:
    cut(copy.run, "pretrain")
    long = ["run", str(copy.recipe), "--set", "pretrain.max_steps=100000", "--until", "pretrain"]
    child = tiny.start(long, tmp_path / "log", DANLU_RUNS=str(copy.runs))
    try:
        tiny.wait_for(lambda: len(tiny.steps_of(copy.run / "02-pretrain")) > 2, child)
        assert child.is_alive(), (tmp_path / "log").read_text("utf-8")
        second = tiny.start(long, tmp_path / "second", DANLU_RUNS=str(copy.runs))
        second.join(60)
        assert second.exitcode == 1
        assert "another process is at work" in (tmp_path / "second").read_text("utf-8")
        assert child.is_alive()
    finally:
        child.kill()
        child.join()
    # The lock went with the process that held it.
    assert run(["run", str(copy.recipe), "--until", "tokenizer"]) == 1  # other max_steps: refused, but not for the lock
    shutil.rmtree(copy.run / "02-pretrain")
    assert run(["run", str(copy.recipe), "--until", "tokenizer"]) == 0


# -- gates that do not hold -----------------------------------------------------------------------------------------------


def test_a_failed_gate_stops_the_run(copy: Chain, capfd: pytest.CaptureFixture[str]) -> None:
    cut(copy.run, "reward")
    before = times(copy.run)
    strict = ["run", str(copy.recipe), "--set", "reward.min_accuracy=1.0"]
    assert run(strict) == 1
    said = capfd.readouterr().err
    assert "G-RM" in said and "threshold 1.0" in said and "--force" in said and "Traceback" not in said
    after = times(copy.run)
    assert {p: t for p, t in after.items() if "/04-reward/" not in p} == before
    assert manifest(copy.run, "reward")["gates"][0]["passed"] is False
    assert not (copy.run / "05-ppo").exists()

    assert run(strict) == 1  # the verdict stands, nothing is trained again
    assert "G-RM" in capfd.readouterr().err
    assert times(copy.run) == after
    assert run([*strict, "--force", "--until", "ppo"]) == 0
    assert {p: t for p, t in times(copy.run).items() if "/05-ppo/" not in p} == after
    assert (copy.model("ppo") / "config.json").is_file()


# -- a stage that failed ------------------------------------------------------------------------------------------------


def test_a_failed_stage_can_be_tried_with_corrected_settings(copy: Chain, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing was made, so there is no result that other settings could overwrite."""
    cut(copy.run, "sft")
    assert run(["run", str(copy.recipe), "--until", "sft", "--set", "sft.max_length=8"]) == 1
    assert "raise max_length" in " ".join(capfd.readouterr().err.split())
    assert run(["run", str(copy.recipe), "--until", "sft"]) == 0


def test_a_failed_stage_can_be_tried_with_corrected_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "talk.jsonl"
    shutil.copy(tiny.data()["conversations"], data)
    with data.open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    call = tiny.arguments("sft", tiny.stage("sft", tmp_path / "out", data=str(data), max_steps=2))
    assert run(call) == 1
    assert "talk.jsonl:97" in capfd.readouterr().err
    shutil.copy(tiny.data()["conversations"], data)
    assert run(call) == 0


# -- names --------------------------------------------------------------------------------------------------------------


def test_run_and_stage_names_as_models(copy: Chain) -> None:
    assert Path(resolve_model("runs/tiny")) == Path("runs/tiny/05-ppo/model")
    assert Path(resolve_model("runs/tiny:sft")) == Path("runs/tiny/03-sft/model")
    with pytest.raises(RunError, match="no stage 'stf'"):
        resolve_model("runs/tiny:stf")
    shutil.rmtree(copy.model("ppo").parent)
    assert Path(resolve_model("runs/tiny")) == Path("runs/tiny/03-sft/model")
    cut(copy.run, "pretrain")
    with pytest.raises(RunError, match="no finished policy"):
        resolve_model("runs/tiny")
    assert resolve_model("runs/elsewhere") == "runs/elsewhere"


def test_labels_of_models_in_the_table(copy: Chain) -> None:
    assert [label(str(copy.model(s))) for s in ("pretrain", "sft", "ppo")] == ["base", "sft", "ppo"]
    assert label("/models/qwen") == "qwen"


def test_runs_are_found_where_danlu_run_puts_them(
    copy: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DANLU_RUNS", str(copy.runs.rename(tmp_path / "elsewhere")))
    assert run(["runs", "tiny", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["stages"]) == 7
    assert run(["runs", "--json"]) == 0
    assert [r["run"] for r in json.loads(capfd.readouterr().out)] == ["tiny"]


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", ""])
def test_a_run_name_is_one_folder(copy: Chain, name: str) -> None:
    before = sorted(copy.runs.parent.iterdir())
    status = run(["run", str(copy.recipe), "--name", name, "--until", "tokenizer"])
    assert status == 2 if name else status in (0, 2)  # an empty name is the default or refused
    assert sorted(copy.runs.parent.iterdir()) == before


def test_an_unknown_stage_for_until(copy: Chain, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["run", str(copy.recipe), "--until", "ppp"]) == 1
    assert "no stage 'ppp'" in capfd.readouterr().err


# -- the invented town and single stages ------------------------------------------------------------------------------------


def test_town_files_are_written_into_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("danlu.pipeline.run.write_town", lambda folder, seed: tiny.write_town(folder, seed, scale=0.02))
    recipe = tmp_path / "t.yaml"
    recipe.write_text("stages:\n  - {kind: tokenizer, data: 'town:sft', vocab_size: 300}\n", "utf-8")
    assert run(["run", str(recipe)]) == 0
    assert (tmp_path / "runs" / "t" / "town" / "sft.jsonl").is_file()
    # Moved as a whole, it is still done.
    (tmp_path / "runs").rename(tmp_path / "moved")
    monkeypatch.setenv("DANLU_RUNS", str(tmp_path / "moved"))
    forbid_work(monkeypatch)
    assert run(["run", str(recipe)]) == 0
    assert run(["run", str(recipe), "--set", "tokenizer.data=town:stf", "--name", "x"]) == 1


def test_stages_by_hand_do_what_the_recipe_does(copy: Chain, tmp_path: Path) -> None:
    """`danlu sft ...` with a recipe's settings gives the recipe's weights."""
    settings = yaml.safe_load((copy.run / "03-sft" / "settings.yaml").read_text("utf-8"))
    settings |= {"out": str(tmp_path / "by-hand"), "model": str(copy.model("pretrain"))}
    run_stage("sft", "sft", parse(KINDS_SETTINGS["sft"], settings))
    assert tiny.weights(tmp_path / "by-hand" / "model") == tiny.weights(copy.model("sft"))


def test_manifest_of_a_newer_danlu_is_refused(copy: Chain, capfd: pytest.CaptureFixture[str]) -> None:
    path = copy.run / "01-tokenizer" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"schema": 2}), "utf-8")
    assert run(["run", str(copy.recipe)]) == 1
    assert "update danlu" in capfd.readouterr().err
