"""A stage that was killed goes on as if nothing had happened: the same weights bit for bit, no step twice, none missing."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import seq2seq_models
import tiny
import torch
from safetensors.torch import load_file
from test_ppo import everything
from torch import nn

from danlu.cli.main import run
from danlu.exceptions import CheckpointError
from danlu.training import checkpoint

# Steps of a whole stage, and between checkpoints: no divisor of it, so that a kill falls between two of them.
LENGTHS = {"pretrain": (60, 7), "sft": (60, 7), "reward": (60, 7), "dpo": (40, 7), "ppo": (12, 2), "grpo": (16, 2)}
LENGTHS |= {"kto": (40, 7), "classify": (60, 7), "mask_sft": (40, 7), "seq2seq": (40, 7)}
LENGTHS |= {"raft": (12, 2), "online-dpo": (12, 2)}
KINDS = tuple(LENGTHS)


@functools.cache
def labelled() -> str:
    """Notes of `toy` data, each with the colour that it tells of."""
    rows = [json.loads(line) for line in tiny.data()["documents"].read_text("utf-8").splitlines()]
    labels = [next(c for c in tiny.COLOURS if c in row["text"]) for row in rows]
    path = tiny.home() / "labelled.jsonl"
    return str(tiny.write_rows(path, [{**row, "label": c} for row, c in zip(rows, labels, strict=True)]))


@functools.cache
def unilm() -> str:
    out = tiny.home() / "unilm"
    assert run(tiny.arguments("pretrain", tiny.stage("pretrain", out, objective="unilm", max_steps=1))) == 0
    return str(out / "model")


@functools.cache
def encoder_decoder() -> str:
    return str(seq2seq_models.folder(tiny.home() / "t5", "t5", scale=0.1))


# Stages that a setting or a kind of model makes of another one: what they are called on the command line, and with what.
RELATIVES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "kto": ("dpo", lambda: {"loss": "kto"}),
    "classify": ("sft", lambda: {"task": "classify", "data": labelled()}),
    "mask_sft": ("sft", lambda: {"model": unilm()}),
    "seq2seq": ("sft", lambda: {"model": encoder_decoder()}),
    "raft": ("grpo", lambda: {"method": "raft", "raft": {"unfinished": True}}),
    "online-dpo": ("grpo", lambda: {"method": "online-dpo"}),
}


def command(kind: str, out: Path, **changes: Any) -> list[str]:
    steps, every = LENGTHS[kind]
    verb, own = RELATIVES.get(kind, (kind, dict[str, Any]))
    options = {"max_steps": steps, "save_every": every, "eval_every": every + 2, **own(), **changes}
    return tiny.arguments(verb, tiny.stage(verb, out, **options))


@functools.cache
def uninterrupted(kind: str) -> Path:
    """The stage run in one go, once per process."""
    out = tiny.home() / f"whole-{kind}"
    assert run(command(kind, out)) == 0
    return out


def kill_at(step: int, arguments: list[str], out: Path, number: int = signal.SIGKILL) -> Any:
    """Starts a stage and sends it a signal as soon as it has logged `step`; returns the ended process."""
    child = tiny.start(arguments, out.with_suffix(".log"))
    tiny.wait_for(lambda: (tiny.steps_of(out) or [0])[-1] >= step, child)
    os.kill(child.pid, number)
    child.join(60)
    return child


def assert_same_stage(out: Path, whole: Path) -> None:
    assert tiny.weights(out / "model") == tiny.weights(whole / "model")
    assert (out / "metrics.jsonl").read_text("utf-8") == (whole / "metrics.jsonl").read_text("utf-8")
    found, expected = (json.loads((f / "manifest.json").read_text("utf-8")) for f in (out, whole))
    assert found["metrics"] == expected["metrics"] and found["gates"] == expected["gates"]
    for name in ("selected.jsonl", "health.jsonl", "samples.jsonl"):  # what some stages write beside
        told = [(f / name).read_text("utf-8") if (f / name).is_file() else "" for f in (out, whole)]
        assert told[0] == told[1], name


def assert_all_steps(out: Path, kind: str) -> None:
    assert tiny.steps_of(out) == list(range(1, LENGTHS[kind][0] + 1))


# -- SIGKILL ------------------------------------------------------------------------------------------------------------


OFTEN = ("sft", "reward", "ppo")


@pytest.mark.parametrize("kind", tiny.mostly_slow(OFTEN, [k for k in KINDS if k not in OFTEN]))
def test_a_killed_stage_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    steps, every = LENGTHS[kind]
    step = random.Random(f"kill/{kind}").randint(every + 1, steps // 2)
    call = command(kind, tmp_path / "out")
    assert kill_at(step, call, tmp_path / "out").exitcode == -signal.SIGKILL
    assert not (tmp_path / "out" / "model").exists()
    saved = checkpoint.latest(tmp_path / "out" / "checkpoints")
    assert saved is not None, "nothing was saved: the test would only show that a stage can be begun again"
    assert run(call) == 0
    assert_all_steps(tmp_path / "out", kind)
    assert_same_stage(tmp_path / "out", uninterrupted(kind))


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_killed_again_and_again(kind: str, trial: int, tmp_path: Path) -> None:
    steps, every = LENGTHS[kind]
    rng = random.Random(f"kills/{kind}/{trial}")
    call, out = command(kind, tmp_path / "out", keep_checkpoints=1), tmp_path / "out"
    step = 0
    for _ in range(4):
        step = min(step + rng.randint(1, 2 * every), steps - 2)
        kill_at(step, call, out)
    assert run(call) == 0
    assert_all_steps(out, kind)
    assert_same_stage(out, uninterrupted(kind))


CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def _killed_at_change(arguments: list[str], out: str, number: int, log: str) -> None:
    """`danlu ARGUMENTS` until it is about to make the number-th change to a file or folder under `out`."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        reading = event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+"))
        if event in CHANGES and not reading and str(args[0]).startswith(out):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    tiny._in_child(arguments, log, {})


@pytest.mark.parametrize("kind", tiny.mostly_slow(["ppo"], ["sft", "reward", "kto", "raft"]))
def test_killed_while_files_are_written(kind: str, tmp_path: Path) -> None:
    """Before any change to the stage's folder: manifest, metrics, in the middle of a checkpoint, of pruning, of the model."""
    call, out = command(kind, tmp_path / "out", save_every=2, keep_checkpoints=1), tmp_path / "out"
    rng = random.Random(f"writing/{kind}")
    for _ in range(3):
        number = rng.randint(10, 30)
        child = tiny._server().Process(
            target=_killed_at_change, args=(call, str(out), number, str(tmp_path / "log")), daemon=True
        )
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text("utf-8")
    assert run(call) == 0
    assert_all_steps(out, kind)
    assert_same_stage(out, uninterrupted(kind))


@pytest.mark.slow
def test_killed_with_adapters_and_dropout(tmp_path: Path) -> None:
    """Dropout draws are a function of (seed, step), not of what was drawn before."""
    lora = {"adapter": "lora", "lora": {"r": 4, "dropout": 0.3}}
    # --force: a base that knows nothing cannot learn its stop token by adapters, and G-STOP says so.
    call = [*command("sft", tmp_path / "out", **lora), "--force"]
    assert kill_at(23, call, tmp_path / "out").exitcode == -signal.SIGKILL
    assert run(call) == 0
    assert run([*command("sft", tmp_path / "whole", **lora), "--force"]) == 0
    assert_same_stage(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("kind", tiny.mostly_slow(["grpo"], ["ppo"]))
def test_natural_steps_killed(kind: str, tmp_path: Path) -> None:
    """Between two measurements of the metric, which the checkpoint holds with the mean of the gradients."""
    options = {"optimizer": "natural", "natural.every": 5, "natural.trust": 1e-4}
    assert run(command(kind, tmp_path / "whole", **options)) == 0
    call = command(kind, tmp_path / "out", **options)
    assert kill_at(9, call, tmp_path / "out").exitcode == -signal.SIGKILL
    assert run(call) == 0
    assert_all_steps(tmp_path / "out", kind)
    assert_same_stage(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("adapter", tiny.mostly_slow(["lora"], ["full"]))
def test_ppo_with_everything_killed(adapter: str, tmp_path: Path) -> None:
    """Average of weights, PTX, an adaptive KL, scores so far, answers in files that are used twice, warm-up."""
    options = everything() | {"adapter": adapter, "rollout.per_update": 3}
    assert run(command("ppo", tmp_path / "whole", **options)) == 0
    call = command("ppo", tmp_path / "out", **options)
    assert kill_at(9, call, tmp_path / "out").exitcode == -signal.SIGKILL
    saved = checkpoint.latest(tmp_path / "out" / "checkpoints")
    assert saved is not None
    waiting = torch.load(saved / "buffer.pt", weights_only=True)["answers"]
    assert len(waiting) >= 8 and any(a["uses"] == 1 for a in waiting), "or the test does not show much"
    assert run(call) == 0
    assert_all_steps(tmp_path / "out", "ppo")
    assert_same_stage(tmp_path / "out", tmp_path / "whole")
    assert tiny.weights(tmp_path / "out" / "ema") == tiny.weights(tmp_path / "whole" / "ema")


REFERENCE = {
    "dpo": ("margin", {"reference": "online"}),
    "ppo": ("kl", {}),
    "grpo": ("kl", {}),
    "online-dpo": ("kl", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFERENCE)
def test_a_reference_of_eight_bits(kind: str, tmp_path: Path) -> None:
    """A stage with it goes as one with the whole reference but for rounding, holds its gates, and goes on when it was killed."""
    name, options = REFERENCE[kind]
    options = {**options, "max_steps": 10, "save_every": 2}
    found = []
    for bits in (8, 32):
        out = tmp_path / str(bits)
        assert run(command(kind, out, ref_bits=bits, **options)) == 0
        found.append([r[name] for r in tiny.metrics_of(out) if name in r])
    assert found[0] == pytest.approx(found[1], abs=0.01) and found[0] != found[1]
    assert max(map(abs, found[1])) > 0.1, "policy and reference have parted"
    call = command(kind, tmp_path / "out", ref_bits=8, **options)
    assert kill_at(5, call, tmp_path / "out").exitcode == -signal.SIGKILL
    assert run(call) == 0
    assert_same_stage(tmp_path / "out", tmp_path / "8")


def test_killed_before_the_first_checkpoint(tmp_path: Path) -> None:
    call = command("sft", tmp_path / "out")
    kill_at(2, call, tmp_path / "out")
    # However far it came: as if no checkpoint had been made yet.
    shutil.rmtree(tmp_path / "out" / "checkpoints", ignore_errors=True)
    assert run(call) == 0
    assert_same_stage(tmp_path / "out", uninterrupted("sft"))


@pytest.mark.slow
def test_killed_with_early_stopping(tmp_path: Path) -> None:
    """The best value so far, the patience left and the best weights survive."""
    rule = {"early_stopping": {"monitor": "eval_loss", "patience": 1}, "learning_rate": 0.2}
    assert run(command("sft", tmp_path / "whole", **rule)) == 0
    whole = tiny.steps_of(tmp_path / "whole")
    assert 20 < whole[-1] < 60, "it does stop early"
    call = command("sft", tmp_path / "out", **rule)
    kill_at(whole[-1] - 5, call, tmp_path / "out")
    assert run(call) == 0
    assert_same_stage(tmp_path / "out", tmp_path / "whole")


def test_the_same_stage_twice_is_the_same(tmp_path: Path) -> None:
    """In another process, elsewhere: the weights depend on settings and inputs alone."""
    child = tiny.start(command("ppo", tmp_path / "out"), tmp_path / "log")
    child.join(120)
    assert child.exitcode == 0, (tmp_path / "log").read_text("utf-8")
    assert_same_stage(tmp_path / "out", uninterrupted("ppo"))


def test_saving_more_often_changes_nothing(tmp_path: Path) -> None:
    assert run(command("sft", tmp_path / "out", save_every=1, keep_checkpoints=1)) == 0
    assert_same_stage(tmp_path / "out", uninterrupted("sft"))


# -- Ctrl-C -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", tiny.mostly_slow([signal.SIGINT], [signal.SIGTERM]))
def test_ctrl_c_saves_and_says_how_to_go_on(number: int, tmp_path: Path) -> None:
    call, out = command("sft", tmp_path / "out", save_every=1000), tmp_path / "out"
    child = kill_at(11, call, out, number)
    said = " ".join((tmp_path / "out.log").read_text("utf-8").split())
    assert child.exitcode == 130, said
    assert "interrupted; saved after step" in said and "again to go on" in said and "Traceback" not in said
    saved = checkpoint.latest(out / "checkpoints")
    assert saved is not None and saved.name == f"step-{tiny.steps_of(out)[-1]:08d}"
    assert json.loads((out / "manifest.json").read_text("utf-8"))["status"] == "interrupted"
    before = (out / "metrics.jsonl").read_text("utf-8")
    assert run(call) == 0
    assert (out / "metrics.jsonl").read_text("utf-8").startswith(before)
    assert_same_stage(out, uninterrupted("sft"))


@pytest.mark.slow
def test_seconds_of_an_interrupted_stage_add_up(tmp_path: Path) -> None:
    call, out = command("sft", tmp_path / "out"), tmp_path / "out"
    kill_at(20, call, out, signal.SIGINT)
    first = json.loads((out / "manifest.json").read_text("utf-8"))
    assert run(call) == 0
    second = json.loads((out / "manifest.json").read_text("utf-8"))
    assert second["seconds"] > first["seconds"] > 0
    assert second["started"] == first["started"] and second["status"] == "done"


# -- torn and foreign checkpoints -----------------------------------------------------------------------------------------


def stopped_halfway(tmp_path: Path) -> tuple[list[str], Path]:
    """An sft stage of which all but the first half of its checkpoints and its model are gone."""
    call, out = command("sft", tmp_path / "out"), tmp_path / "out"
    shutil.copytree(uninterrupted("sft"), out)
    shutil.rmtree(out / "model")
    path = out / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"status": "running"}), "utf-8")
    return call, out


def test_torn_checkpoints_are_passed_over(tmp_path: Path) -> None:
    call, out = stopped_halfway(tmp_path)
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept == ["step-00000049", "step-00000056"]
    newest = out / "checkpoints" / kept[-1]
    (newest / "state.json").unlink()
    (newest / "weights.safetensors").write_bytes(b"torn")
    shutil.copytree(out / "checkpoints" / kept[0], out / "checkpoints" / ".step-00000057.99.partial")
    assert run(call) == 0
    assert_same_stage(out, uninterrupted("sft"))
    assert not list((out / "checkpoints").glob(".*"))


def test_a_torn_checkpoint_is_not_among_those_to_keep(tmp_path: Path) -> None:
    """Else keeping the torn one, which is the newest by name, would cost the only whole one."""
    model = nn.Linear(2, 2)
    torn = tmp_path / "step-00000009"
    torn.mkdir()
    checkpoint.save(tmp_path, 5, model, {}, {})
    checkpoint.prune(tmp_path, 1)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.name == "step-00000005"


def damaged(change: Callable[[Path], object], folder: Path) -> CheckpointError:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    path = checkpoint.save(folder, 5, model, {"optimizer": optimizer}, {})
    change(path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, model, {"optimizer": optimizer})
    assert caught.value.file == str(path)
    return caught.value


def set_schema(path: Path) -> None:
    state = json.loads((path / "state.json").read_text("utf-8"))
    (path / "state.json").write_text(json.dumps(state | {"schema": 99}), "utf-8")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: (p / "state.json").write_text("{"), "state.json cannot be read"),
        (lambda p: (p / "weights.safetensors").write_bytes(b"torn"), "damaged"),
        (lambda p: (p / "optimizer.pt").unlink(), "damaged"),
        (set_schema, "schema 99"),
        (lambda p: checkpoint.save_file({"other": torch.ones(2)}, p / "weights.safetensors"), "on one side only"),
        (
            lambda p: checkpoint.save_file(
                {"weight": torch.ones(3, 2), "bias": torch.ones(2)}, p / "weights.safetensors"
            ),
            r"shape \(3, 2\), expected \(2, 2\)",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named(change: Callable[[Path], object], sentence: str, tmp_path: Path) -> None:
    assert re.search(sentence, damaged(change, tmp_path).message)


def test_a_checkpoint_gives_back_weights_optimizer_and_counters(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.Linear(3, 1)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    def step(pairs: Iterable[tuple[nn.Module, torch.optim.Optimizer]]) -> None:
        for module, optimizer in pairs:
            module(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    one, other = made(), made()
    step([one])
    path = checkpoint.save(tmp_path, 1, one[0], {"o": one[1]}, {"best": 0.5})
    found = checkpoint.load(path, other[0], {"o": other[1]})
    assert (found.step, found.extra) == (1, {"best": 0.5})
    step([one, other])
    assert torch.equal(one[0].weight, other[0].weight) and torch.equal(one[0].bias, other[0].bias)


# -- best weights ---------------------------------------------------------------------------------------------------------

# The rate grows from helpful to ruinous, so the best weights are not the last ones, on any machine.
RESTLESS = {
    "learning_rate": 5.0,
    "warmup": 24,
    "max_steps": 24,
    "eval_every": 3,
    "save_every": 5,
    "schedule": "constant",
}


def heldout(out: Path, metric: str = "eval_loss") -> dict[int, float]:
    return {r["step"]: r[metric] for r in tiny.metrics_of(out) if metric in r}


@pytest.mark.parametrize("restore", [True, False])
def test_the_best_weights_are_kept(restore: bool, tmp_path: Path) -> None:
    rule = [] if restore else ["--no-checkpoint-best.restore"]
    call = command("sft", tmp_path / "out", checkpoint_best={"keep": 2}, **RESTLESS)
    assert run([*call, *rule]) == 0
    held = heldout(tmp_path / "out")
    best = sorted(held, key=lambda step: (held[step], step))[:2]
    assert best[0] != 24, "the last weights are not the best ones, or the test shows nothing"
    kept = sorted((tmp_path / "out" / "checkpoints").glob("best-*"))
    assert [p.name for p in kept] == [f"best-{step:08d}" for step in sorted(best)]
    metrics = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))["metrics"]
    assert metrics["eval_loss"] == held[best[0] if restore else 24]
    saved = load_file(tmp_path / "out" / "checkpoints" / f"best-{best[0]:08d}" / "weights.safetensors")
    model = load_file(tmp_path / "out" / "model" / "model.safetensors")
    same = [torch.equal(w, model[n.removeprefix("trunks.models.policy.")]) for n, w in saved.items()]
    assert all(same) if restore else not any(same)


@pytest.mark.parametrize(
    ("monitor", "mode", "pick"),
    tiny.mostly_slow([("eval_accuracy", "max", max)], [("eval_margin", "min", min), ("grad_norm", "min", min)]),
)
def test_the_best_by_any_metric(monitor: str, mode: str, pick: Callable[..., float], tmp_path: Path) -> None:
    """Of the held-out evaluation, or of the training step before it."""
    call = command("reward", tmp_path, checkpoint_best={"monitor": monitor, "mode": mode}, **RESTLESS)
    assert run([*call, "--force"]) == 0
    rows = {r["step"]: r[monitor] for r in tiny.metrics_of(tmp_path) if monitor in r and r["step"] % 3 == 0}
    best = next(step for step, value in rows.items() if value == pick(rows.values()))
    assert [p.name for p in (tmp_path / "checkpoints").glob("best-*")] == [f"best-{best:08d}"]


@pytest.mark.slow
def test_killed_with_best_weights(tmp_path: Path) -> None:
    rule = {**RESTLESS, "checkpoint_best": {"keep": 2}}
    assert run(command("sft", tmp_path / "whole", **rule)) == 0
    call = command("sft", tmp_path / "out", **rule)
    kill_at(14, call, tmp_path / "out")
    assert run(call) == 0
    assert_same_stage(tmp_path / "out", tmp_path / "whole")
    names = [sorted(p.name for p in (tmp_path / n / "checkpoints").iterdir()) for n in ("out", "whole")]
    assert names[0] == names[1]
