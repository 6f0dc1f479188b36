"""What is done about findings: by hand, with states cut and put together again, and in real stages that stop, adapt and go on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from danlu.alignment_config import GrpoSettings, PpoSettings
from danlu.config import KINDS
from danlu.health_config import HealthSettings
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.rewards.model import ModelReward
from danlu.rewards.protocol import Episode, Score
from danlu.train_config import Best
from danlu.trainers import grpo, ppo
from danlu.training import experience
from danlu.training.health import CORRECTIONS, HEAD, MOST, PAUSE, TAIL, Health
from danlu.training.heldout import Heldout
from danlu.training.interval import wilson
from danlu.training.progress import Bar
from danlu.training.session import Session
from danlu.training.tracking import Tracker, read_metrics

Row = dict[str, float]


class Stub:
    """As much of a session as `Health` uses. What is said and noted is kept here."""

    def __init__(self, **extra: Any) -> None:
        self.extra: dict[str, Any] = extra
        self.best: Best | None = None
        self.monitor = SimpleNamespace(bad="")
        self.said: list[str] = []
        self.noted: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def note(self, name: str, step: int, row: Any) -> None:
        assert name == "health.jsonl"
        self.noted.append({"step": step + 1, **row})

    def end_early(self) -> None:
        self.extra["stopped_early"] = True


def health(stub: Stub, **actions: str) -> Health:
    given_actions = {code.replace("_", "-"): action for code, action in actions.items()}
    return Health(HealthSettings(actions=given_actions), stub)  # type: ignore[arg-type]


def clipped(step: int) -> Row:
    return {"clip_fraction": 0.5, "kl": 1.0 + 0.1 * step, "score": 0.1 * step}


# -- by hand ------------------------------------------------------------------------------------------------------------


def test_a_warning_is_said_once() -> None:
    stub = Stub()
    watcher = health(stub)
    for step in range(40):
        assert watcher.watch(step, clipped(step)) == {"kl_coef": 1.0, "learning_rate": 1.0}
    assert [(r["code"], r["step"], r["action"]) for r in stub.noted] == [("P-CLIP-HIGH", 10, "warn")]
    assert len(stub.said) == 1 and "P-CLIP-HIGH at step 10: 50% of the tokens" in stub.said[0]
    assert "lower learning_rate" in stub.said[0] and not watcher.stopped
    assert watcher.facts() == {"findings": [f"P-CLIP-HIGH at step 10: {stub.noted[0]['seen']}"]}


def test_a_correction_is_made_again_until_its_bound() -> None:
    stub = Stub()
    watcher = health(stub, P_CLIP_HIGH="adapt")
    rates = [watcher.watch(step, clipped(step))["learning_rate"] for step in range(80)]
    # At iterations 10, 20, 30, 40: 1/2, 1/4, 1/8, 1/16, which is the bound.
    assert rates == [1.0] * 9 + [0.5] * PAUSE + [0.25] * PAUSE + [0.125] * PAUSE + [0.0625] * 41
    assert [r["step"] for r in stub.noted] == [10, 20, 30, 40]
    assert watcher.facts()["corrections"] == {"learning_rate": 0.0625}


def test_the_kl_s_weight_grows_to_its_bound() -> None:
    watcher = health(Stub())
    shares = [watcher.watch(step, {"kl": 2.0 * step})["kl_coef"] for step in range(90)]
    assert [v for i, v in enumerate(shares) if i == 0 or v != shares[i - 1]] == pytest.approx(
        [1.0, *(1.5**n for n in range(1, 6)), 10.0]
    )


def test_the_stage_is_stopped_and_the_best_weights_are_wanted() -> None:
    stub = Stub(start={"metrics": {"eval_score": 0.1, "eval_gold": 0.2}})
    watcher = health(stub, P_CLIP_HIGH="stop")
    assert stub.best == Best(monitor="eval_gold", mode="max", restore=False)
    for step in range(10):
        watcher.watch(step, clipped(step))
    assert watcher.stopped == "P-CLIP-HIGH" and stub.extra["stopped_early"] and stub.best.restore
    stub.extra["bests"] = [{"step": 4}]
    assert watcher.facts()["stopped"].startswith("P-CLIP-HIGH at step 10: 50%")
    assert watcher.facts()["kept"] == "the weights after step 4"


def test_best_weights_are_kept_only_where_a_finding_may_stop_the_stage() -> None:
    start = {"metrics": {"eval_score": 0.1}}
    stub = Stub(start=start)
    health(stub)
    assert stub.best is not None and stub.best.monitor == "eval_score"  # P-REWARD-HACK stops unless told otherwise
    stub = Stub(start=start)
    health(stub, P_REWARD_HACK="warn")
    assert stub.best is None
    own = Best(monitor="kl", mode="min")
    stub = Stub(start=start)
    stub.best = own
    health(stub)
    assert stub.best is own


@pytest.mark.parametrize("rules", [HealthSettings(on=False), HealthSettings(actions={"P-CLIP-HIGH": "off"})])
def test_what_is_off_says_nothing(rules: HealthSettings) -> None:
    stub = Stub()
    watcher = Health(rules, stub)  # type: ignore[arg-type]
    for step in range(30):
        watcher.watch(step, clipped(step))
    assert stub.noted == stub.said == []


def test_refused_iterations_are_left_out() -> None:
    stub = Stub()
    watcher = health(stub)
    for step in range(30):
        stub.monitor.bad = "loss is nan" if step % 2 else ""
        watcher.watch(step, clipped(step))
    assert [r["step"] for r in stub.noted] == [19] and len(watcher.state["rows"]) == 15


def test_the_start_model_is_the_first_point_of_the_held_out_curve() -> None:
    watcher = health(Stub(start={"metrics": {"eval_score": 0.25, "spread": 1.0}}))
    watcher.evaluated(4, {"eval_score": 0.5, "eval_length": 7.0})
    watcher.evaluated(9, {"eval_score": 0.75})
    assert watcher.state["held"] == [
        {"step": 0, "eval_score": 0.25},
        {"step": 5, "eval_score": 0.5},
        {"step": 10, "eval_score": 0.75},
    ]


def test_a_hack_is_found_after_evaluations() -> None:
    stub = Stub(start={"metrics": {"eval_score": 0.0, "eval_gold": 0.0}})
    watcher = health(stub)
    ways = (i / 30 for i in range(1, 30))
    gold = [4 * d * (1 - d) for d in ways]  # 1 at the fifteenth
    for i, value in enumerate(gold):
        watcher.evaluated(10 * i + 9, {"eval_score": 0.3 * i, "eval_gold": value})
        if watcher.stopped:
            break
    assert watcher.stopped == "P-REWARD-HACK" and i > 14
    assert value > 0.9, "a tenth of the peak is lost"


def test_rows_are_thinned_in_the_middle() -> None:
    watcher = health(Stub())
    for step in range(1000):
        watcher._keep("rows", step + 1, {"kl": 0.0, "of no use": 1.0})
        assert watcher.state["rows"][-1] == {"step": step + 1, "kl": 0.0}
        steps = [r["step"] for r in watcher.state["rows"]]
        assert len(steps) <= MOST and steps == sorted(steps)
        assert steps[:HEAD] == list(range(1, min(step + 1, HEAD) + 1))
        assert steps[-min(len(steps), TAIL) :] == list(range(step + 2 - min(len(steps), TAIL), step + 2))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 59))
def test_a_state_read_from_json_decides_the_same(seed: int, cut: int) -> None:
    """Whatever the curves are and wherever the stage is cut: findings, corrections and the end are those of one piece."""
    draw = random.Random(seed)
    slope = {k: draw.uniform(-1, 1) for k in ("kl", "score", "length", "clip_fraction", "entropy", "eval_score")}
    rows = [{k: 1 + s * t / 20 + draw.gauss(0, 0.05) for k, s in slope.items()} for t in range(60)]
    actions = {"P_CLIP_HIGH": "adapt", "P_SCORE_FALLS": "stop", "P_ENTROPY_LOST": "adapt"}

    def part(stub: Stub, first: int, last: int) -> None:
        watcher = health(stub, **actions)
        for step in range(first, last):
            if stub.extra.get("stopped_early"):
                return
            watcher.watch(step, rows[step])
            if step % 5 == 4:
                watcher.evaluated(step, rows[step])

    whole, first = Stub(), Stub()
    part(whole, 0, 60)
    part(first, 0, cut)
    second = Stub(**json.loads(json.dumps(first.extra)))
    part(second, cut, 60)
    assert second.extra == whole.extra
    assert first.noted + second.noted == whole.noted


# -- wins -----------------------------------------------------------------------------------------------------------------


def heldout(monkeypatch: pytest.MonkeyPatch, answers: Sequence[list[float]]) -> Heldout:
    """Held-out prompts whose judged scores are those given, one list an evaluation."""
    rounds = iter(answers)

    def answer(self: Heldout, session: Any, step: int) -> tuple[Row, list[float]]:
        scores = next(rounds)
        return {"eval_score": sum(scores) / len(scores)}, scores

    monkeypatch.setattr(Heldout, "_answer", answer)
    prompts: Any = [None] * len(answers[0])
    return Heldout(prompts, None, None, parse(GrpoSettings, {}), None, None)  # type: ignore[arg-type]


def test_win_rate_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Won, tied, lost, won: (1 + 1/2 + 0 + 1) / 4.
    held = heldout(monkeypatch, [[1, 1, 2, 2], [2, 1, 1, 3]])
    session = SimpleNamespace(extra={}, start=0)
    held.begin(session)  # type: ignore[arg-type]
    assert session.extra["start"] == {"metrics": {"eval_score": 1.5, "spread": 0.5}, "judged": [1, 1, 2, 2]}
    found = held.evaluate(session, 3)  # type: ignore[arg-type]
    assert found["eval_win_rate"] == 0.625
    assert (found["eval_win_rate_low"], found["eval_win_rate_high"]) == wilson(0.625, 4)


def test_the_start_model_answers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    held = heldout(monkeypatch, [[0, 0], [1, 1]])
    session = SimpleNamespace(extra={"start": {"metrics": {}, "judged": [1, 1]}}, start=4)
    held.begin(session)  # type: ignore[arg-type]
    assert held.evaluate(session, 5)["eval_win_rate"] == 0.0  # type: ignore[arg-type]


def test_what_is_not_known_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint without the start model's answers: the weights are others by now."""
    held = heldout(monkeypatch, [[0, 0]])
    session = SimpleNamespace(extra={}, start=4)
    held.begin(session)  # type: ignore[arg-type]
    assert "eval_win_rate" not in held.evaluate(session, 5)  # type: ignore[arg-type]


# -- files and the console ----------------------------------------------------------------------------------------------


def test_notes_go_back_with_the_metrics(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, [], name="x", start_step=0)
    for step in range(5):
        tracker.note("samples.jsonl", step, {"answer": f"第{step}\u2028"})
    tracker.rewind(3)
    tracker.note("samples.jsonl", 4, {"answer": "new"})
    tracker.close()
    found = read_metrics(tmp_path / "samples.jsonl")
    assert [r["answer"] for r in found] == ["第0\u2028", "第1\u2028", "第2\u2028", "第3\u2028", "new"]
    assert not (tmp_path / "health.jsonl").exists()
    Tracker(tmp_path, [], name="x", start_step=0).close()
    assert read_metrics(tmp_path / "samples.jsonl") == []  # begun again from nothing


def test_a_sentence_for_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("ppo", 10) as bar:
        bar.say("P-X at step 3: [seen]")
    assert capsys.readouterr().err == "P-X at step 3: [seen]\n"
    with Bar("ppo", 10, quiet=True) as bar:
        bar.say("not by this rank")
    assert capsys.readouterr().err == ""


def test_what_reads_no_tokens_tells_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    for tokens, said in ((0, "eval: 1/1  answers  0 s left\n"), (50, " tok/s  answers  0 s left\n")):
        with Bar("eval", 1) as bar:
            bar.advance(tokens, "answers")
        assert capsys.readouterr().err.endswith(said)


# -- in real stages -------------------------------------------------------------------------------------------------------


def even(self: ModelReward, episodes: Sequence[Episode], **_: Any) -> list[Score]:
    """Likes even tokens: the share of them, from -1 to 1."""
    return [Score(2 * sum(i % 2 == 0 for i in e.response_ids) / len(e.response_ids) - 1) for e in episodes]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelReward, "score", even)


RESTLESS: dict[str, dict[str, Any]] = {
    # A range this narrow is left by most tokens, so that P-CLIP-HIGH is found as soon as it can be: after 10 iterations.
    "ppo": {"ppo": {"clip_range": 1e-4, "critic_learning_rate": 1e-3}, "rollout": {"batch": 8, "max_new_tokens": 8}},
    "grpo": {"grpo": {"clip_range": 1e-4, "group_size": 4, "epochs": 4}, "rollout": {"batch": 8, "max_new_tokens": 8}},
}


def train(kind: str, out: Path, **changes: Any) -> Any:
    options = {"eval_every": 4, "save_every": 3, "learning_rate": 1e-2, **RESTLESS[kind], **changes}
    return STAGES[kind].run(parse(KINDS[kind], tiny.stage(kind, out, **options)))


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_stage_stops_with_its_best_weights(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(kind, tmp_path, max_steps=30, health={"actions": {"P-CLIP-HIGH": "stop"}})
    assert tiny.steps_of(tmp_path) == list(range(1, 11))
    told = result.facts["health"]
    assert told["stopped"].startswith("P-CLIP-HIGH at step 10") and "P-CLIP-HIGH at step 10" in capsys.readouterr().err
    (finding,) = [r for r in read_metrics(tmp_path / "health.jsonl") if r["action"] == "stop"]
    assert finding["step"] == 10 and finding["done"] and "clip" in finding["seen"]
    held = {r["step"]: r["eval_score"] for r in tiny.metrics_of(tmp_path) if "eval_score" in r}
    assert list(held) == [4, 8, 10]  # the end is evaluated
    best = max(held, key=lambda step: held[step])
    assert told["kept"] == f"the weights after step {best}" and result.metrics["eval_score"] == held[best]
    saved = load_file(tmp_path / "checkpoints" / f"best-{best:08d}" / "weights.safetensors")
    model = load_file(tmp_path / "model" / "model.safetensors")
    mine = {n.removeprefix("trunks.models.policy."): w for n, w in saved.items() if ".policy." in n}
    assert mine and all((w == model[n]).all() for n, w in mine.items())


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_the_answers_of_a_finding_are_kept(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy that stops producing stops: what it answered can be read."""

    def told(self: Health, step: int, metrics: Row) -> dict[str, float]:
        return watch(self, step, {**metrics, "stop_rate": 0.9 if step < 6 else 0.1})

    watch = Health.watch
    monkeypatch.setattr(Health, "watch", told)
    train(kind, tmp_path, max_steps=11, eval_fraction=0)
    (finding,) = [r for r in read_metrics(tmp_path / "health.jsonl") if r["code"] == "P-STOP-LOST"]
    path = tmp_path / "findings" / f"P-STOP-LOST-step-{finding['step']}.jsonl"
    assert str(path) in capsys.readouterr().err
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    logged = next(r for r in tiny.metrics_of(tmp_path) if r["step"] == finding["step"])
    assert len(rows) == 8 and sum(r["score"] for r in rows) / 8 == pytest.approx(logged["score"])
    assert sum(r["tokens"] for r in rows) / 8 == logged["length"]
    assert all("which colour" in r["prompt"] and isinstance(r["response"], str) for r in rows)
    assert all(isinstance(r["finished"], bool) for r in rows)


@pytest.mark.usefixtures("toy")
def test_a_stage_that_is_not_stopped_ends_with_its_last_weights(tmp_path: Path) -> None:
    """The best weights are there in case of a stop; without one nothing is put back."""
    kept = train("grpo", tmp_path / "kept", max_steps=6)
    none = train("grpo", tmp_path / "none", max_steps=6, health={"on": False})
    assert kept.facts["health"] == none.facts["health"] == {"findings": []}
    assert tiny.weights(tmp_path / "kept" / "model") == tiny.weights(tmp_path / "none" / "model")
    assert list((tmp_path / "kept" / "checkpoints").glob("best-*"))
    assert not list((tmp_path / "none" / "checkpoints").glob("best-*"))


class KilledError(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("kind", "action", "at"),
    [
        ("ppo", "stop", 9),
        pytest.param("grpo", "adapt", 11, marks=pytest.mark.slow),
        pytest.param("ppo", "adapt", 13, marks=pytest.mark.slow),
        pytest.param("grpo", "adapt", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_stage_decides_the_same(
    kind: str, action: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with findings, samples and win rates; killed before, at or after what was decided."""
    options = {"max_steps": 15, "health": {"actions": {"P-CLIP-HIGH": action}}}
    whole = train(kind, tmp_path / "whole", **options)
    log: Callable[..., None] = Session.log

    def killed(self: Session, step: int, *args: Any, **rest: Any) -> None:
        if step == at:
            raise KilledError
        log(self, step, *args, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "log", killed)
        with pytest.raises(KilledError):
            train(kind, tmp_path / "out", **options)
    again = train(kind, tmp_path / "out", **options)
    assert any(f.startswith("P-CLIP-HIGH at step 10") for f in whole.facts["health"]["findings"])
    assert tiny.weights(tmp_path / "out" / "model") == tiny.weights(tmp_path / "whole" / "model")
    for name in ("metrics.jsonl", "samples.jsonl", "health.jsonl"):
        assert (tmp_path / "out" / name).read_text("utf-8") == (tmp_path / "whole" / name).read_text("utf-8"), name
    assert again.metrics == whole.metrics and again.gates == whole.gates
    assert again.facts["health"] == whole.facts["health"]


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_corrections_reach_the_rate_and_the_kl(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = {"ppo": ppo, "grpo": grpo}[kind]
    rates: list[float] = []
    weights: list[float] = []
    set_rate = trainer.set_rate
    name = {"ppo": "token_rewards", "grpo": "clipped_with_kl"}[kind]
    module: Any = {"ppo": experience, "grpo": grpo}[kind]
    original = getattr(module, name)

    def seen_rate(optimizer: Any, rate: float) -> None:
        rates.append(rate)
        set_rate(optimizer, rate)

    def seen_weight(*args: Any, kl_coef: float, **rest: Any) -> Tensor:
        weights.append(kl_coef)
        return original(*args, kl_coef=kl_coef, **rest)

    monkeypatch.setattr(trainer, "set_rate", seen_rate)
    monkeypatch.setattr(module, name, seen_weight)
    watch = Health.watch

    def corrected(self: Health, step: int, metrics: Any) -> dict[str, float]:
        found = watch(self, step, metrics)
        if step == 1:
            self.state["corrections"] |= {"kl_coef": 1.5, "learning_rate": 0.5}
        return found

    monkeypatch.setattr(Health, "watch", corrected)
    train(kind, tmp_path, max_steps=4, schedule="constant", warmup=0)
    size = {"ppo": 2, "grpo": 1}[kind]  # optimizers
    assert [r / rates[i % size] for i, r in enumerate(rates)] == [1.0] * 2 * size + [0.5] * 2 * size
    half = len(weights) // 2
    base = weights[0]
    assert set(weights[:half]) == {base} and set(weights[half:]) == {base * 1.5}


@pytest.mark.usefixtures("toy")
def test_samples_and_signs_of_a_stage(tmp_path: Path) -> None:
    result = train("ppo", tmp_path, max_steps=6)
    rows = read_metrics(tmp_path / "samples.jsonl")
    by_step = {s: [r for r in rows if r["step"] == s] for s in (0, 4, 6)}
    assert sum(map(len, by_step.values())) == len(rows) and len(by_step[0]) == 4
    prompts = [[r["prompt"] for r in found] for found in by_step.values()]
    assert prompts[0] == prompts[1] == prompts[2] and prompts[0][0][-1]["role"] == "user"
    assert all(isinstance(r["answer"], str) and isinstance(r["score"], float) for r in rows)
    logged = [r for r in tiny.metrics_of(tmp_path) if "grad_norm" in r]
    assert all(0 <= r[k] <= 1 for r in logged for k in ("repetition", "distinct_1", "distinct_2", "empty_rate"))
    assert (
        result.metrics["eval_win_rate_low"] <= result.metrics["eval_win_rate"] <= result.metrics["eval_win_rate_high"]
    )
    assert result.metrics["first_eval_score"] == result.facts["start"]["eval_score"]


@pytest.mark.usefixtures("toy")
def test_without_held_out_prompts_there_is_nothing_to_compare(tmp_path: Path) -> None:
    result = train("grpo", tmp_path, max_steps=2, eval_fraction=0)
    gate = result.gates[1]
    assert (gate.code, gate.passed, gate.warning) == ("G-PPO", False, True) and "not decided" in gate.sentence
    assert not (tmp_path / "samples.jsonl").exists() and result.facts["start"] == {}


def test_corrections_are_bounded_on_the_side_they_go_to() -> None:
    assert all(bound > 1 if factor > 1 else bound < 1 for _, factor, bound in CORRECTIONS.values())
    assert parse(PpoSettings, {}).health.on
