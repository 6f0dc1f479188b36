"""Bad steps: what counts as one, by hand; and real stages that meet them, recover, give up, or are killed meanwhile."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_resume import RELATIVES

from danlu.cli.main import run
from danlu.train_config import Defence
from danlu.trainers import classify, dpo, grpo, kto, mask_sft, online_dpo, ppo, raft, reward_model, seq2seq_sft, sft
from danlu.training.monitor import Monitor, robust_z
from danlu.training.session import Session
from danlu.training.step import accumulate, language_loss

# -- by hand --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "least", "expected"),
    [
        # Median 3, distances 2 1 0 1 97: their median is 1, so one deviation is 1.4826.
        (3 + 1.4826 * 4, 0.01, 4.0),
        (3 - 1.4826, 0.01, -1.0),
        (4.0, 2.0, 0.5),  # the least deviation counts
    ],
)
def test_robust_z(value: float, least: float, expected: float) -> None:
    assert robust_z(value, [1, 2, 3, 4, 100], least) == pytest.approx(expected)


def step(monitor: Monitor, number: int, loss: float, norm: float = 1.0) -> tuple[bool, bool]:
    """(whether the update was made, whether a checkpoint is wanted)."""
    monitor.begin_step(number)
    return monitor.check("", loss, norm), monitor.end_step()


def settled(**settings: Any) -> Monitor:
    """A monitor after ten good steps: losses 2.0 and 2.2, gradient norms around 1."""
    monitor = Monitor(Defence(window=16, **settings))
    for i in range(10):
        assert step(monitor, i, 2.0 + 0.2 * (i % 2), 1.0 + 0.1 * (i % 2)) == (True, False)
    return monitor


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "loss is nan"),
        (math.inf, 1.0, "loss is inf"),
        (2.0, math.nan, "gradient norm is nan"),
        (2.0, math.inf, "gradient norm is inf"),
        # Median 2.1, distances 0.1: one deviation is 0.14826, and 20 of them are 2.97.
        (5.08, 1.0, "loss is 5.08, 20 deviations above its median"),
        (5.06, 1.0, ""),
        (-9.0, 1.0, ""),  # better is no fault
        # log 1 and log 1.1: a deviation of 0.0707 is below the least one, 0.2; e^(0.0477 + 20 * 0.2) = 57.3.
        (2.0, 57.4, "gradient norm is 57.4, 20 deviations above its median"),
        (2.0, 57.2, ""),
        (2.0, 0.0, ""),
    ],
)
def test_what_is_bad(loss: float, norm: float, reason: str) -> None:
    monitor = settled()
    made, _ = step(monitor, 10, loss, norm)
    assert (made, monitor.bad) == (not reason, reason)


def test_nothing_is_a_spike_before_the_window_is_filled() -> None:
    monitor = Monitor(Defence(window=16))
    assert [step(monitor, i, loss)[0] for i, loss in enumerate([2.0, 900.0, 2.0, 2.0, 900.0])] == [True] * 4 + [False]
    assert not step(Monitor(Defence()), 0, math.nan)[0], "what is no number is bad at once"


def test_a_bad_value_does_not_move_the_median() -> None:
    monitor = settled(patience=9)
    assert not any(step(monitor, 10 + i, 50.0)[0] for i in range(8))


def test_roles_are_judged_apart() -> None:
    monitor = Monitor(Defence(window=16))
    for i in range(8):
        monitor.begin_step(i)
        assert monitor.check("policy", 0.001 * i, 1.0) and monitor.check("critic", 40.0 + i, 900.0)
        monitor.end_step()
    monitor.begin_step(8)
    assert monitor.check("critic", 44.0, 900.0) and not monitor.check("policy", 44.0, 1.0)
    assert monitor.bad.startswith("policy loss")


def test_the_rate_is_lowered_for_a_while() -> None:
    """Halved for 3 steps after the last bad one, however many there were, and whole afterwards."""
    monitor = settled(cooldown_steps=3, cooldown_rate=0.5)
    shares = []
    for number in range(10, 20):
        monitor.begin_step(number)
        shares.append(monitor.rate_share)
        monitor.check("", math.nan if number in (10, 12) else 2.1, 1.0)
        monitor.end_step()
    assert shares == [1, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1]


def test_several_in_a_row_want_a_checkpoint_and_too_many_are_the_end() -> None:
    monitor = settled(patience=2, max_skipped=3)
    wanted = [step(monitor, i, loss)[1] for i, loss in enumerate([math.nan, 2.0, math.nan, math.nan], start=10)]
    assert wanted == [False, False, False, True] and not monitor.exhausted
    monitor.rolled_back(5, {"windows": {"loss": [1.0]}})
    assert monitor.state["windows"] == {"loss": [1.0]} and monitor.skipped == {10, 12, 13}
    assert monitor.goes_back_to(5) and not monitor.goes_back_to(4)
    monitor.begin_step(5)
    assert monitor.rate_share == 0.25, "once more for going back"
    step(monitor, 14, math.nan)
    assert monitor.exhausted
    assert monitor.report().splitlines()[-1] == "  step 14: back to step 5"


def test_off_means_off() -> None:
    monitor = Monitor(Defence(on=False))
    assert step(monitor, 0, math.nan, math.inf) == (True, False) and monitor.facts() == {}


def test_its_state_survives_json() -> None:
    one = settled()
    step(one, 10, math.nan)
    other = Monitor(Defence(window=16), json.loads(json.dumps(one.state)))
    for i in range(11, 40):
        loss = random.Random(i).choice([2.0, 2.3, 60.0, math.nan])
        assert step(one, i, loss) == step(other, i, loss)
    assert one.state == other.state


# -- real stages ----------------------------------------------------------------------------------------------------------

POISON = "The hat is pois"
STEPS = 40


tokenizer = functools.cache(tiny.tokenizer)


def poisoned(folder: Path, rows: int = 1) -> Path:
    """The toy conversations and some whose text `poisonous_loss` turns into a loss that is no number."""
    lines = tiny.data()["conversations"].read_text("utf-8").splitlines()
    given = [json.loads(line) for line in lines]
    for i in range(rows):
        given.insert(20 * i, {"messages": tiny.user(f"{i}: which hat?") + tiny.assistant(POISON + "oned.")})
    return tiny.write_rows(folder / "poisoned.jsonl", given)


def poisonous_loss(out: Any, denominator: float) -> Any:
    """The real loss, NaN for a batch that holds the poison."""
    text = tokenizer().decode(out.tree.input_ids_T.tolist())
    loss, metrics = language_loss(out, denominator)
    return (loss * math.nan, metrics) if POISON in text else (loss, metrics)


def child(log: Path, arguments: list[str]) -> Any:
    """`danlu ARGUMENTS` in a process of its own, with the loss above."""
    process = tiny._server().Process(target=_poisoned_child, args=(arguments, str(log)), daemon=True)
    process.start()
    return process


def _poisoned_child(arguments: list[str], log: str) -> None:
    sft.language_loss = poisonous_loss
    tiny._in_child(arguments, log, {})


def command(out: Path, data: Path, **changes: Any) -> list[str]:
    defence = {"cooldown_steps": 20, "window": 16, **changes.pop("defence", {})}
    values = {
        "data": str(data),
        "max_steps": STEPS,
        "save_every": 7,
        "eval_every": 20,
        "learning_rate": 6e-3,
        "defence": defence,
        **changes,
    }
    return tiny.arguments("sft", tiny.stage("sft", out, **values))


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text("utf-8"))
    return found


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "language_loss", poisonous_loss)


@pytest.mark.usefixtures("poison")
def test_a_poisoned_batch_is_skipped_and_the_stage_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(command(out, poisoned(tmp_path))) == 0
    rows = {r["step"]: r for r in tiny.metrics_of(out) if "grad_norm" in r or "skipped" in r}
    assert list(rows) == list(range(1, STEPS + 1)), "every step is told of once"
    skipped = manifest(out)["facts"]["skipped"]
    assert [s["reason"] for s in skipped] == ["loss is nan"] * len(skipped) and len(skipped) >= 2
    for number, fact in enumerate(skipped, start=1):
        assert rows[fact["step"]]["skipped"] == number and "loss" not in rows[fact["step"]]
    # The rate is half of what the schedule says after the first one, and itself again 20 steps later.
    first = skipped[0]["step"]
    plain = tiny.metrics_of(_plain(tmp_path))
    rates = {r["step"]: r["learning_rate"] for r in plain if "learning_rate" in r}
    assert rows[first + 1]["learning_rate"] == pytest.approx(rates[first + 1] / 2)
    final = manifest(out)["metrics"]
    assert math.isfinite(final["loss"]) and final["eval_loss"] < 0.6 * final["first_eval_loss"]


def _plain(tmp_path: Path) -> Path:
    """The same rows with the ordinary loss."""
    out = tmp_path / "plain"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "language_loss", language_loss)
        assert run(command(out, tmp_path / "poisoned.jsonl")) == 0
    assert "skipped" not in manifest(out)["facts"]
    return out


@pytest.mark.usefixtures("poison")
def test_weights_are_those_of_a_stage_that_never_saw_the_batch(tmp_path: Path) -> None:
    """Skipping is exact: weights, averages and counts stay as they were."""
    out = tmp_path / "out"
    settings = {"schedule": "constant", "warmup": 0, "defence": {"cooldown_rate": 1.0}, "max_steps": 12}
    assert run(command(out, poisoned(tmp_path), **settings)) == 0
    bad = {s["step"] for s in manifest(out)["facts"]["skipped"]}
    assert bad and max(bad) <= 12

    real, made = sft.Session.steps, []

    def without_the_bad(self: Any) -> Any:
        for number in real(self):
            if number + 1 not in bad:
                made.append(number)
                yield number

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.Session, "steps", without_the_bad)
        assert run(command(tmp_path / "other", tmp_path / "poisoned.jsonl", **settings)) == 0
    assert len(made) == 12 - len(bad)
    assert tiny.weights(out / "model") == tiny.weights(tmp_path / "other" / "model")


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
def test_killed_in_the_cooldown(tmp_path: Path) -> None:
    data, whole, out = poisoned(tmp_path), tmp_path / "whole", tmp_path / "out"
    assert run(command(whole, data)) == 0
    first = manifest(whole)["facts"]["skipped"][0]["step"]
    process = child(tmp_path / "log", command(out, data))
    tiny.wait_for(lambda: (tiny.steps_of(out) or [0])[-1] >= first + 8, process)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text("utf-8")
    assert run(command(out, data)) == 0
    assert tiny.weights(out / "model") == tiny.weights(whole / "model")
    assert (out / "metrics.jsonl").read_text("utf-8") == (whole / "metrics.jsonl").read_text("utf-8")
    assert manifest(out)["facts"]["skipped"] == manifest(whole)["facts"]["skipped"]


class Damage:
    """A loss whose weights go bad after the n-th update: everything that follows is no number, until they are put back."""

    def __init__(self, after: int) -> None:
        self.after, self.calls = after, 0

    def __call__(self, out: Any, denominator: float) -> Any:
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls == self.after:
                with torch.no_grad():
                    out.linear.weight.fill_(math.inf)
        return language_loss(out, denominator)


def test_damaged_weights_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bad steps in a row: back to the last checkpoint, and its steps come again without them."""
    out = tmp_path / "out"
    monkeypatch.setattr(sft, "language_loss", Damage(53))
    assert run(command(out, tiny.data()["conversations"], tokens_per_step=512)) == 0
    facts = manifest(out)["facts"]
    bad = [s["step"] for s in facts["skipped"]]
    assert bad == [bad[0], bad[0] + 1, bad[0] + 2]
    # Checkpoints are made every 7 steps, and after step 16 as soon as the window is full.
    assert facts["rollbacks"] == [{"from": bad[-1], "to": max(c for c in (7, 14, 16, 21, 28) if c < bad[0])}]
    steps = [r["step"] for r in tiny.metrics_of(out) if "grad_norm" in r or "skipped" in r]
    assert steps == list(range(1, STEPS + 1))
    final = manifest(out)["metrics"]
    assert final["eval_loss"] < 0.6 * final["first_eval_loss"]


def test_what_does_not_recover_ends_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sft, "language_loss", lambda out, d: (language_loss(out, d)[0] * math.inf, {}))
    out = tmp_path / "out"
    assert run(command(out, tiny.data()["conversations"])) == 1
    said = capfd.readouterr().err
    assert "step 1: loss is inf" in said and "step 3: loss is inf" in said and "lower learning_rate" in said
    assert manifest(out)["status"] == "failed"


def test_without_defence_the_first_bad_number_is_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sft, "language_loss", poisonous_loss)
    call = [*command(tmp_path / "out", poisoned(tmp_path)), "--no-defence.on"]
    assert run(call) == 1
    assert "loss is nan at step" in capfd.readouterr().err


def test_a_critic_is_judged_by_the_size_of_its_loss() -> None:
    """Its squared error falls to nearly nothing; thirty times of that is no spike, a number that is none is."""
    monitor = Monitor(Defence(window=16))
    for step in range(16):
        monitor.begin_step(step)
        assert monitor.check("critic", 0.001 * (1 + step % 3 / 10), 1.0)
    assert monitor.check("critic", 0.05, 1.0)
    assert not monitor.check("critic", math.nan, 1.0) and not monitor.check("critic", 1e6, 1.0)


# -- the other stages -----------------------------------------------------------------------------------------------------

LONG, SHORT = {"max_steps": 24, "save_every": 5}, {"max_steps": 14, "save_every": 3}
# Of each: its module, the role that learns, its length, and how often it saves.
OTHERS: dict[str, tuple[Any, str, dict[str, int]]] = {
    "reward": (reward_model, "reward", LONG),
    "dpo": (dpo, "policy", LONG),
    "kto": (kto, "policy", LONG),
    "classify": (classify, "policy", LONG),
    "mask_sft": (mask_sft, "policy", LONG),
    "seq2seq": (seq2seq_sft, "policy", LONG),
    "grpo": (grpo, "policy", SHORT),
    "ppo": (ppo, "policy", SHORT),
    "raft": (raft, "policy", SHORT),
    "online-dpo": (online_dpo, "policy", SHORT),
}


def other(kind: str, out: Path, **changes: Any) -> list[str]:
    defence = {"cooldown_steps": 4, "window": 16, **changes.pop("defence", {})}
    values = {"learning_rate": 1e-3, "eval_every": 7, "schedule": "constant", "warmup": 0, "defence": defence}
    verb, own = RELATIVES.get(kind, (kind, dict[str, Any]))
    arguments = tiny.arguments(verb, tiny.stage(verb, out, **values | own() | OTHERS[kind][2] | changes))
    return [*arguments, "--force"] if kind == "reward" else arguments  # G-RM is not what is asked here


class Fault:
    """Spoils what a stage accumulates in 1-based steps, or its weights before that; each step once."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: str, what: str, steps: set[int]) -> None:
        self.role, self.what, self.left, self.step = OTHERS[kind][1], what, set(steps), 0
        begin = Monitor.begin_step

        def begun(monitor: Monitor, number: int) -> None:
            self.step = number + 1
            begin(monitor, number)

        patch.setattr(Monitor, "begin_step", begun)
        patch.setattr(OTHERS[kind][0], "accumulate", self.accumulate)

    def accumulate(self, root: Any, role: str, *args: Any, **options: Any) -> dict[str, float]:
        due = role == self.role and self.step in self.left
        learn = [p for n, p in root.named_parameters() if p.requires_grad and ".critic." not in n]
        if due and self.what == "weights":
            with torch.no_grad():
                learn[-1].fill_(math.inf)
        sums = accumulate(root, role, *args, **options)
        if due:
            self.left.discard(self.step)
            for parameter in learn if self.what != "weights" else ():
                if parameter.grad is not None:
                    parameter.grad.mul_(math.nan if self.what == "loss" else 1e18)
            sums = sums | {"loss": math.nan} if self.what == "loss" else sums
        return sums


def rows_of_steps(out: Path) -> dict[int, dict[str, Any]]:
    """Rows of training steps; each step is told of once, in order."""
    rows = [r for r in tiny.metrics_of(out) if not any(k.startswith("eval_") for k in r)]
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    return {r["step"]: r for r in rows}


def learnt_without(kind: str, steps: set[int], out: Path) -> None:
    """The stage, as if these 1-based steps did not exist."""
    real = Session.steps

    def others(self: Any) -> Any:
        return (number for number in real(self) if number + 1 not in steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "steps", others)
        assert run(other(kind, out, defence={"cooldown_rate": 1.0})) == 0


@pytest.mark.parametrize(
    ("kind", "what"),
    tiny.mostly_slow(
        [("ppo", "loss")], [(k, w) for k in OTHERS for w in ("loss", "gradient") if (k, w) != ("ppo", "loss")]
    ),
)
def test_a_bad_batch_of_any_stage_is_skipped(
    kind: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fault = Fault(patch, kind, what, {9})
        assert run(other(kind, out)) == 0
    assert not fault.left
    facts, rows = manifest(out)["facts"], rows_of_steps(out)
    assert [s["step"] for s in facts["skipped"]] == [9] and "rollbacks" not in facts
    expected = {"loss": "loss is nan", "gradient": "gradient norm is "}[what]
    assert facts["skipped"][0]["reason"].removeprefix("policy ").startswith(expected)
    assert [s for s in rows if "skipped" in rows[s]] == [9] and rows[9]["skipped"] == 1
    assert len(rows) == OTHERS[kind][2]["max_steps"]
    if OTHERS[kind][2] == LONG:
        rates = [rows[s]["learning_rate"] for s in (8, 10, 13, 14)]
        assert rates == pytest.approx([1e-3, 5e-4, 5e-4, 1e-3])
    if kind == "ppo":  # whose critic learns from the answers all the same
        return
    with monkeypatch.context() as patch:
        Fault(patch, kind, what, {9})
        assert run(other(kind, tmp_path / "even", defence={"cooldown_rate": 1.0})) == 0
    learnt_without(kind, {9}, tmp_path / "without")
    assert tiny.weights(tmp_path / "even" / "model") == tiny.weights(tmp_path / "without" / "model")


@pytest.mark.parametrize(
    ("kind", "eval_every"),
    tiny.mostly_slow(
        [("grpo", 7)],
        [*((k, 7) for k in OTHERS if k != "grpo"), ("grpo", 8), ("ppo", 8)],
    ),
)
def test_damaged_weights_of_any_stage_are_put_back(
    kind: str, eval_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once where answers are drawn from them, for the next step or for an evaluation; else three bad losses tell."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fault = Fault(patch, kind, "weights", {8})
        assert run(other(kind, out, eval_every=eval_every)) == 0
    assert not fault.left
    facts, rows = manifest(out)["facts"], rows_of_steps(out)
    [back] = facts["rollbacks"]
    bad = [s["step"] for s in facts["skipped"]]
    assert bad == ([8, 9, 10] if OTHERS[kind][2] == LONG else [8, 9] if eval_every == 7 else [8])
    saved = OTHERS[kind][2]["save_every"]
    assert back == {"from": bad[-1], "to": 7 // saved * saved}
    assert len(rows) == OTHERS[kind][2]["max_steps"] and [s for s in rows if "skipped" in rows[s]] == bad
    assert all(math.isfinite(v) for v in manifest(out)["metrics"].values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_any_stage_that_does_not_recover_ends_with_a_report(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last good state is there to go on from."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Fault(patch, kind, "loss", set(range(7, 99)))
        assert run(other(kind, out, defence={"max_rollbacks": 1})) == 1
    said = capfd.readouterr().err
    assert "does not recover" in said and "step 7: " in said and "loss is nan" in said and "back to step" in said
    assert manifest(out)["status"] == "failed"
    assert run(other(kind, out, defence={"max_rollbacks": 1})) == 0
    assert len(rows_of_steps(out)) == OTHERS[kind][2]["max_steps"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_no_stage_ends_with_damaged_weights(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = OTHERS[kind][2]["max_steps"]
    with monkeypatch.context() as patch:
        Fault(patch, kind, "weights", {last})
        assert run(other(kind, tmp_path)) == 0
    assert [s["step"] for s in manifest(tmp_path)["facts"]["skipped"]] == [last]
    assert len(manifest(tmp_path)["facts"]["rollbacks"]) == 1
    assert all(bool(w.isfinite().all()) for w in load_file(tmp_path / "model" / "model.safetensors").values())
