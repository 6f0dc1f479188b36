"""The relatives of GRPO: baselines and objective by hand and against slow references, presets, what they draw, learn and resume."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import tiny as small
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from danlu.alignment_config import SWITCHES, GrpoSettings
from danlu.losses.baselines import group_advantages, leave_one_out, overlong_penalty, returns_to_go
from danlu.losses.grpo import clipped_with_kl
from danlu.losses.policy import importance, kl_k2
from danlu.losses.reduce import mean_by_answer
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.rewards.model import ModelReward
from danlu.rewards.protocol import Episode, Score
from danlu.trainers import grpo
from danlu.training.groups import Drawn, Reading
from danlu.training.methods import METHODS, Method, method_of
from danlu.training.session import Session
from danlu.tree import Segment, Trajectory, TreeBatch, group

POLICY_GRADIENT = [m for m in METHODS if m not in ("online-dpo", "raft")]


def settings_of(out: Path, **changes: Any) -> GrpoSettings:
    return parse(GrpoSettings, small.stage("grpo", out, **changes))


def train(out: Path, **changes: Any) -> Any:
    """What the stage reports, gates and all."""
    return STAGES["grpo"].run(settings_of(out, **changes))


def updates(out: Path) -> list[dict[str, float]]:
    return [r for r in small.metrics_of(out) if "grad_norm" in r]


def t(*values: float) -> Tensor:
    return torch.tensor(values)


# -- baselines ----------------------------------------------------------------------------------------------------------


def test_the_mean_alone_by_hand() -> None:
    assert group_advantages([0.0, 1.0, 5.0], scale=False) == [-2.0, -1.0, 3.0]
    assert group_advantages([0.1] * 7, scale=False) == [0.0] * 7


def test_leave_one_out_by_hand() -> None:
    # 0 - (1 + 5) / 2, 1 - (0 + 5) / 2, 5 - (0 + 1) / 2
    assert leave_one_out([0.0, 1.0, 5.0]) == [-3.0, -1.5, 4.5]
    assert leave_one_out([0.1] * 7) == [0.0] * 7


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_leave_one_out_is_the_distance_to_the_mean_scaled(rewards: list[float]) -> None:
    size = len(rewards)
    expected = [size / (size - 1) * a for a in group_advantages(rewards, scale=False)]
    assert leave_one_out(rewards) == pytest.approx(expected, abs=1e-6)


def test_returns_to_go_by_hand() -> None:
    # 1/2 of the log-ratios from a token on: 1 - 2 = -1; 2 - 1 = 1 less half; 3
    found = returns_to_go(2.0, t(1.0, -4.0, 2.0), kl_coef=0.5)
    assert found.tolist() == [2.5, 3.0, 1.0]  # 2 - (1 - 4 + 2) / 2, 2 - (-4 + 2) / 2, 2 - 2 / 2


def test_overlong_penalty_by_hand() -> None:
    # 100 tokens, the last 20 of them count: 80 is free, 90 is half-way, 100 is all of it
    assert [overlong_penalty(n, 100, 20) for n in (1, 80, 85, 90, 100, 130)] == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert overlong_penalty(100, 100, 0) == 0.0


# -- the objective --------------------------------------------------------------------------------------------------------


def test_clip_higher_by_hand() -> None:
    # Ratios 1.4 and 0.5 with A = 1: clipped to 1.28 and to 0.8, but the smaller objective counts: 0.5.
    old, logp = t(0.0, 0.0), t(math.log(1.4), math.log(0.5))
    loss, metrics = clipped_with_kl(
        logp, old, old, t(1.0, 1.0), t(1.0, 1.0), 2.0, clip_range=0.2, clip_range_high=0.28, kl_coef=0.0
    )
    assert loss.item() == pytest.approx(-(1.28 + 0.5) / 2, rel=1e-6)
    assert metrics["clip_fraction"] == 0.5
    assert metrics["ratio_mean"] == pytest.approx(0.95) and metrics["ratio_max"] == pytest.approx(1.4)
    assert metrics["ratio_error"] == pytest.approx(0.5)


def test_sequence_ratio_by_hand() -> None:
    # Answer 0: log-ratios ln 4 and 0, mean ln 2, ratio 2. Answer 1: one token, ratio 1/2. A = 1 and -1, clip 0.6.
    old, logp = t(0.0, 0.0, 0.0), t(math.log(4), 0.0, math.log(0.5))
    weights, answers = t(0.5, 0.5, 1.0), torch.tensor([0, 0, 1])
    loss, metrics = clipped_with_kl(
        logp, old, old, t(1.0, 1.0, -1.0), weights, 2.0, clip_range=0.6, kl_coef=0.0, answer_T=answers
    )
    # min(2, 1.6) gives -1.6; min(-0.5, -0.5): 0.5 is inside of the range
    assert loss.item() == pytest.approx((-1.6 + 0.5) / 2, rel=1e-6) and metrics["clip_fraction"] == 0.5


def test_importance_weights_by_hand() -> None:
    found = importance(t(0.0, math.log(3), math.log(0.25)), t(0.0, 0.0, 0.0), 2.0)
    assert found.tolist() == pytest.approx([1.0, 2.0, 0.25])
    logp, zero = t(0.0, 0.0), t(0.0, 0.0)
    loss, _ = clipped_with_kl(
        logp, zero, zero - 1, t(1.0, 1.0), t(1.0, 1.0), 1.0, clip_range=0.2, kl_coef=0.1, importance_T=t(0.5, 2.0)
    )
    # The policy's term is weighed, the KL's is not: -0.5 - 2 + 0.1 * 2 (exp(-1) - 1 + 1)
    assert loss.item() == pytest.approx(-2.5 + 0.2 * math.exp(-1), rel=1e-5)


def test_k2_by_hand_and_its_gradient() -> None:
    logp = t(math.log(0.5)).requires_grad_()
    found = kl_k2(logp, t(math.log(0.25)))
    found.sum().backward()
    assert found.item() == pytest.approx(math.log(2) ** 2 / 2)
    assert logp.grad is not None and logp.grad.item() == pytest.approx(math.log(2))


@given(st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=5), min_size=1, max_size=4))
def test_mean_by_answer(rows: list[list[float]]) -> None:
    answers = torch.tensor([n for n, row in enumerate(rows) for _ in row])
    found = mean_by_answer(torch.tensor([v for row in rows for v in row], dtype=torch.float64), answers)
    assert found.tolist() == pytest.approx([fmean(row) for row in rows], abs=1e-12)


TOKEN = st.tuples(*[st.floats(-1, 1)] * 3)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
@given(rows=st.lists(st.tuples(st.floats(-2, 2), st.lists(TOKEN, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_the_objective_is_its_formula(
    ratio: str, estimator: str, rows: list[tuple[float, list[tuple[float, float, float]]]]
) -> None:
    total = 0.0
    for advantage, tokens in rows:
        whole = math.exp(fmean(logp - old for logp, old, _ in tokens))
        for logp, old, ref in tokens:
            rho = whole if ratio == "sequence" else math.exp(logp - old)
            objective = min(advantage * rho, advantage * min(max(rho, 0.9), 1.3))
            kl = (logp - ref) ** 2 / 2 if estimator == "k2" else math.exp(ref - logp) - 1 - (ref - logp)
            total += (0.7 * kl - objective) / len(tokens)
    flat = torch.tensor([token for _, tokens in rows for token in tokens], dtype=torch.float64)
    sizes = torch.tensor([len(tokens) for _, tokens in rows])
    advantages = torch.tensor([a for a, _ in rows], dtype=torch.float64).repeat_interleave(sizes)
    answers = torch.arange(len(rows)).repeat_interleave(sizes) if ratio == "sequence" else None
    loss, _ = clipped_with_kl(
        *flat.unbind(1),
        advantages,
        (1 / sizes.double()).repeat_interleave(sizes),
        float(len(rows)),
        clip_range=0.1,
        clip_range_high=0.3,
        kl_coef=0.7,
        kl_estimator=estimator,  # type: ignore[arg-type]
        answer_T=answers,
    )
    assert loss.item() == pytest.approx(total / len(rows), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradients_in_float64(sequence: bool, estimator: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    logp, old, ref, advantages = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    answers = torch.tensor([0, 0, 1, 1, 1, 2]) if sequence else None

    def loss(x: Tensor) -> Tensor:
        options: dict[str, Any] = {"clip_range": 0.2, "kl_coef": 0.3, "kl_estimator": estimator, "answer_T": answers}
        return clipped_with_kl(
            x, old, ref, advantages, torch.ones(6), 2.0, importance_T=torch.full((6,), 0.5), **options
        )[0]

    assert torch.autograd.gradcheck(loss, logp.requires_grad_())


# -- presets --------------------------------------------------------------------------------------------------------------


def test_every_method_has_a_preset() -> None:
    named = set(GrpoSettings.model_fields["method"].annotation.__args__)  # type: ignore[union-attr]
    assert set(METHODS) == named - {"best-of-n"}, "which is raft"
    names = set(Method.__dataclass_fields__)
    assert names == {*SWITCHES, "missing_stop_penalty"}


def test_what_is_given_wins_and_the_rest_is_the_method_s() -> None:
    dapo = method_of(GrpoSettings(method="dapo"))
    assert (dapo.clip_range, dapo.clip_range_high, dapo.loss_average, dapo.max_resample) == (0.2, 0.28, "token", 3)
    changed = GrpoSettings.model_validate({"method": "dapo", "grpo": {"clip_range_high": 0.4, "max_resample": 0}})
    assert method_of(changed) == Method(**{**vars(dapo), "clip_range_high": 0.4, "max_resample": 0})
    plain = method_of(GrpoSettings())
    assert plain == Method() and plain.kl_coef == 0.04 and plain.missing_stop_penalty == 1.0


def test_the_manifest_and_the_log_say_what_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(tmp_path, method="dr_grpo", max_steps=1, grpo={"group_size": 4, "kl_coef": 0.01})
    assert result.facts["method"] == "dr_grpo"
    expected = {"advantage": "group-mean", "loss_average": "constant", "kl_coef": 0.01, "clip_range": 0.2}
    assert expected.items() <= result.facts["switches"].items()
    assert "grpo: dr_grpo: advantage group-mean, loss_average constant, ratio token, clip_range 0.2, kl_coef 0.01" in (
        capsys.readouterr().err
    )


# -- advantages of roll-outs ----------------------------------------------------------------------------------------------


def trajectory(answer: Sequence[int]) -> Trajectory:
    segments = (Segment((5, 6), False), Segment(tuple(answer), True, (-1.0,) * len(answer)))
    return Trajectory(segments, 0, True)


def drawn_of(scores: list[float], log_ratios: list[list[float]]) -> tuple[Drawn, list[list[Reading]]]:
    """Two groups of two answers to one prompt, each group its own micro-batch, the second one before the first."""
    made = [trajectory([7] * len(r)) for r in log_ratios]
    drawn = Drawn([], made, scores, 2, {})
    readings = []
    for places in reversed(drawn.groups):
        ratios = torch.tensor([v for i in places for v in log_ratios[i]])
        tree = TreeBatch.of(group([made[i] for i in places]))
        lengths, zeros = [len(log_ratios[i]) for i in places], torch.zeros_like(ratios)
        readings.append(Reading(list(places), lengths, tree, ratios, zeros, zeros, zeros))
    return drawn, [readings]


SCORES = [1.0, 0.0, 3.0, 2.5]
RATIOS = [[0.5, -0.2], [0.1], [0.0, 0.3, 0.2], [-0.4]]


@pytest.mark.parametrize("method", POLICY_GRADIENT)
def test_advantages_of_each_method(method: str) -> None:
    """As the papers say it, answer by answer."""
    rule = METHODS[method]
    found = grpo._advantages(*drawn_of(SCORES, RATIOS), rule)
    coefficient = rule.kl_coef if rule.kl_in == "reward" else 0.0
    rewards = [s - coefficient * sum(r) for s, r in zip(SCORES, RATIOS, strict=True)]
    if method == "reinforce++":
        expected = [[SCORES[i] - 0.01 * sum(RATIOS[i][n:]) for n in range(len(RATIOS[i]))] for i in range(4)]
    else:
        of_answer = []
        for i, reward in enumerate(rewards):
            other = rewards[i ^ 1]
            mean, std = (reward + other) / 2, abs(reward - other) / math.sqrt(2)
            above = {"group": (reward - mean) / (std + 1e-4), "leave-one-out": reward - other}
            of_answer.append(above.get(rule.advantage, reward - mean))
        expected = [[a] * len(r) for a, r in zip(of_answer, RATIOS, strict=True)]
    if rule.advantage in ("batch", "group-batch"):
        tokens = [v for row in expected for v in row]
        expected = [[(v - fmean(tokens)) / pstdev(tokens) for v in row] for row in expected]
    for i, row in enumerate(expected):
        assert found[i].tolist() == pytest.approx(row, abs=1e-5), i


class Recorder:
    """What a stage trained on and how it scored, by iteration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[Drawn] = []
        build = grpo._experience

        def recorded(players: Any, drawn: Drawn, *rest: Any) -> Any:
            self.drawn.append(drawn)
            return build(players, drawn, *rest)

        monkeypatch.setattr(grpo, "_experience", recorded)


def row_logprobs(model: Any, found: Trajectory) -> Tensor:
    """Of an answer's tokens, one row at a time with transformers' own forward."""
    ids = [*found.prompt, *found.actions]
    logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return torch.stack([logp[len(found.prompt) + i - 1, token] for i, token in enumerate(found.actions)])


@pytest.mark.parametrize("method", POLICY_GRADIENT)
def test_the_first_update_is_the_gradient_of_the_paper(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an iteration from its roll-outs alone, row by row: on the first pass all ratios are 1 and the KL is 0."""
    seen = Recorder(monkeypatch)
    options = {"group_size": 4, "max_resample": 0}
    train(
        tmp_path,
        method=method,
        max_steps=1,
        grpo=options,
        rollout={"batch": 16, "max_new_tokens": 30},
        max_grad_norm=1e9,
    )
    model = AutoModelForCausalLM.from_pretrained(small.model()).eval()
    drawn = seen.drawn[0]
    lengths = [len(a.actions) for a in drawn.trajectories]
    assert len(set(lengths)) > 1
    rule = METHODS[method]
    above: list[float] = []
    for g in range(0, 16, 4):
        r = torch.tensor(drawn.scores[g : g + 4])
        above += {
            "group": (r - r.mean()) / (r.std() + 1e-4),
            "leave-one-out": (r - r.mean()) * 4 / 3,
            "batch": r,
        }.get(rule.advantage, r - r.mean()).tolist()
    if rule.advantage in ("batch", "group-batch"):
        tokens = [a for a, n in zip(above, lengths, strict=True) for _ in range(n)]
        above = [(a - fmean(tokens)) / pstdev(tokens) for a in above]
    loss = torch.zeros(())
    for answer, advantage, length in zip(drawn.trajectories, above, lengths, strict=True):
        share = {"sequence": 16 * length, "token": sum(lengths), "constant": 16 * 30, "sum": 16}[rule.loss_average]
        loss = loss - advantage * row_logprobs(model, answer).sum() / share
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    (logged,) = updates(tmp_path)
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert logged["ratio_error_first"] == 0.0 and logged["ratio_mean"] == pytest.approx(1.0)
    # One model drew and reads the tokens: nothing is to be weighed.
    assert logged["importance_mean"] == pytest.approx(1.0, abs=1e-5) and logged["importance_clipped"] == 0.0


# -- what is drawn --------------------------------------------------------------------------------------------------------


def numbered_judge(every: int) -> Any:
    """Groups whose prompt's number is a multiple of `every` get different scores, all others one score."""

    def score(self: ModelReward, episodes: Sequence[Episode], **_: Any) -> list[Score]:
        numbers = [int(e.prompt[-1]["content"].split(":")[0]) for e in episodes]
        return [Score(float(i % 4) if n % every == 0 else 1.0) for i, n in enumerate(numbers)]

    return score


def numbered(folder: Path) -> str:
    rows = [{"prompt": small.user(f"{n}: which colour has the door?")} for n in range(40)]
    return str(small.write_rows(folder / "prompts.jsonl", rows))


def drawn_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, **options: Any) -> tuple[Any, Recorder]:
    seen = Recorder(monkeypatch)
    monkeypatch.setattr(ModelReward, "score", numbered_judge(every))
    result = train(
        tmp_path / "out",
        data=numbered(tmp_path),
        eval_fraction=0.0,
        method="dapo",
        max_steps=2,
        rollout={"batch": 16, "max_new_tokens": 8},
        grpo={"group_size": 4, "overlong": 0.0, **options},
    )
    return result, seen


def test_groups_of_equal_scores_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, seen = drawn_by(tmp_path, monkeypatch, 2, max_resample=8)
    for drawn, row in zip(seen.drawn, updates(tmp_path / "out"), strict=True):
        assert len(drawn.trajectories) == 16
        assert all(len({drawn.scores[i] for i in g}) > 1 for g in drawn.groups)
        numbers = [drawn.prompts[g[0]].messages[-1]["content"] for g in drawn.groups]
        assert all(int(n.split(":")[0]) % 2 == 0 for n in numbers)
        assert row["batches"] > 1 and 0 < row["equal_groups"] < 1


def test_what_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, seen = drawn_by(tmp_path, monkeypatch, 100, max_resample=2)  # only prompt 0 tells anything
    for drawn, row in zip(seen.drawn, updates(tmp_path / "out"), strict=True):
        assert len(drawn.trajectories) == 16 and row["batches"] == 3.0 and row["equal_groups"] > 0.7


def test_without_resampling_one_batch_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, seen = drawn_by(tmp_path, monkeypatch, 2, max_resample=0)
    assert any(len({d.scores[i] for i in g}) == 1 for d in seen.drawn for g in d.groups)
    assert all("batches" not in row for row in updates(tmp_path / "out"))


def test_long_answers_are_punished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Recorder(monkeypatch)
    monkeypatch.setattr(ModelReward, "score", lambda self, episodes, **_: [Score(0.0)] * len(episodes))
    grpo_options = {"group_size": 4, "overlong": 0.5, "max_resample": 0}
    train(tmp_path, method="dapo", max_steps=1, grpo=grpo_options, rollout={"batch": 16, "max_new_tokens": 30})
    drawn = seen.drawn[0]
    lengths = [len(a.actions) for a in drawn.trajectories]
    assert drawn.scores == [max(-1.0, min(0.0, (15 - n) / 15)) for n in lengths] and len(set(lengths)) > 1


# -- they learn -----------------------------------------------------------------------------------------------------------


def toy_judge(self: ModelReward, episodes: Sequence[Episode], **_: Any) -> list[Score]:
    """Likes even tokens: the share of them, from -1 to 1."""
    shares = [sum(i % 2 == 0 for i in e.response_ids) / len(e.response_ids) for e in episodes]
    return [Score(2 * share - 1) for share in shares]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ModelReward, "score", toy_judge)
    yield


QUICK = ("dr_grpo", "rloo", "gspo")


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    "method",
    [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in POLICY_GRADIENT if m != "grpo"],
)
def test_every_method_raises_a_toy_reward(method: str, tmp_path: Path) -> None:
    # GSPO's range of 3e-4 is made for many small steps.
    wide = {"clip_range": 0.2, "clip_range_high": 0.2} if method == "gspo" else {}
    options = {"group_size": 8, "minibatches": 2, "missing_stop_penalty": 0.0, "overlong": 0.0, **wide}
    rollout = {"batch": 32, "max_new_tokens": 8}
    result = train(tmp_path, method=method, max_steps=15, learning_rate=2e-2, grpo=options, rollout=rollout)
    first = updates(tmp_path)[0]
    assert abs(first["score"]) < 0.3 and result.metrics["score"] > 0.5
    assert result.metrics["eval_score"] > result.metrics["first_eval_score"] + 0.3
    assert result.gates[0].code == "G-RATIO" and result.gates[0].passed
    assert first["advantage_std"] > 0 and first["ratio_max"] >= first["ratio_mean"]


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_kl_in_the_reward_holds_the_policy_back(tmp_path: Path) -> None:
    found = {}
    for coefficient in (0.0, 2.0):
        options = {"group_size": 8, "kl_coef": coefficient, "missing_stop_penalty": 0.0}
        out = tmp_path / str(coefficient)
        rollout = {"batch": 32, "max_new_tokens": 8}
        found[coefficient] = train(
            out, method="rloo", max_steps=12, learning_rate=2e-2, grpo=options, rollout=rollout
        ).metrics
    assert found[2.0]["kl"] < 0.3 * found[0.0]["kl"] and found[2.0]["score"] < found[0.0]["score"]
    for coefficient, row in found.items():
        assert row["reward_total"] == pytest.approx(row["score"] - coefficient * row["kl"])


# -- resume ---------------------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Stands for SIGKILL."""


def killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Any]:
    """Outcomes of a stage in one go (in `whole`), and killed at its sixth step and run again (in `out`)."""
    options = {"max_steps": 7, "save_every": 2, "eval_every": 3, "learning_rate": 1e-2, **options}
    whole = train(tmp_path / "whole", **options)
    log = Session.log

    def killed(self: Session, step: int, *args: Any, **rest: Any) -> None:
        if step == 5:
            raise KilledError
        log(self, step, *args, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "log", killed)
        with pytest.raises(KilledError):
            train(tmp_path / "out", **options)
    again = train(tmp_path / "out", **options)
    assert small.weights(tmp_path / "out" / "model") == small.weights(tmp_path / "whole" / "model")
    assert small.metrics_of(tmp_path / "out") == small.metrics_of(tmp_path / "whole")
    return whole, again


@pytest.mark.parametrize(
    "method", ["dapo", *(pytest.param(m, marks=pytest.mark.slow) for m in ("gspo", "rloo", "reinforce++"))]
)
def test_an_interrupted_stage_goes_on_bit_for_bit(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelReward, "score", toy_judge)
    options = {"group_size": 2, "epochs": 2, "minibatches": 2}
    whole, again = killed_and_resumed(
        tmp_path, monkeypatch, method=method, grpo=options, rollout={"batch": 8, "max_new_tokens": 3}
    )
    assert again.metrics == whole.metrics and again.gates == whole.gates and again.facts == whole.facts
