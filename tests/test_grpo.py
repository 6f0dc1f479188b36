"""GRPO: goldens worked by hand, a slow reference of the whole objective, rewards that rise, and what must not change numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny as small
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from danlu.alignment_config import DpoSettings, GrpoSettings
from danlu.exceptions import DataError, SettingsError, TrainingError
from danlu.losses.baselines import group_advantages
from danlu.losses.grpo import clipped_with_kl
from danlu.models.load import load_model, save_model
from danlu.parsing import parse
from danlu.pipeline.ranks import Runner
from danlu.pipeline.stages import STAGES
from danlu.rewards.model import ModelReward
from danlu.rewards.protocol import Episode, Score
from danlu.rewards.verifiers import Verifier
from danlu.trainers import grpo
from danlu.training.groups import Drawn, group_batches
from danlu.training.session import Session
from danlu.tree import Segment, Trajectory, TreeBatch, group


def settings_of(out: Path, **changes: Any) -> GrpoSettings:
    return parse(GrpoSettings, small.stage("grpo", out, **changes))


def train(out: Path, **changes: Any) -> Any:
    """What the stage reports, gates and all."""
    return STAGES["grpo"].run(settings_of(out, **changes))


def updates(out: Path) -> list[dict[str, float]]:
    return [r for r in small.metrics_of(out) if "grad_norm" in r]


def t(*values: float) -> Tensor:
    return torch.tensor(values)


# -- advantages and loss ------------------------------------------------------------------------------------------------


def test_group_advantages_by_hand() -> None:
    # mean 2, deviations -2, 0, 2, variance (4 + 0 + 4) / 2 = 4
    assert group_advantages([0.0, 2.0, 4.0], eps=1e-9) == pytest.approx([-1.0, 0.0, 1.0])
    assert group_advantages([0.0, 2.0, 4.0], eps=2.0) == pytest.approx([-0.5, 0.0, 0.5])


def test_equal_rewards_teach_exactly_nothing() -> None:
    assert group_advantages([0.1] * 7) == [0.0] * 7  # 0.1 has no exact mean


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9), st.floats(-10, 10))
def test_advantages_are_centred_and_do_not_see_a_shift(rewards: list[float], shift: float) -> None:
    found = group_advantages(rewards)
    assert sum(found) == pytest.approx(0.0, abs=1e-6)
    assert max(map(abs, found)) <= len(rewards) ** 0.5
    if max(rewards) - min(rewards) > 1e-3:
        assert group_advantages([r + shift for r in rewards]) == pytest.approx(found, abs=1e-4)


def test_loss_by_hand() -> None:
    # Two answers of 1 and 2 tokens, advantages 1 and -2. Ratios 1.5 (clipped to 1.2), 1 and 1/2 (a loss below the range: 0.8).
    # pi/ref: 1, 2, 1: k3 = 0, 1/2 - 1 + ln 2, 0.
    ratios, over_ref = t(1.5, 1.0, 0.5), t(1.0, 2.0, 1.0)
    old = t(-1.0, -1.0, -1.0)
    logp = old + ratios.log()
    terms = [-1.2, 2.0, 1.6]
    k3 = math.log(2) - 0.5
    advantages = t(1.0, -2.0, -2.0)
    by_answer, metrics = clipped_with_kl(
        logp, old, logp - over_ref.log(), advantages, t(1, 0.5, 0.5), 2.0, clip_range=0.2, kl_coef=0.1
    )
    assert by_answer.item() == pytest.approx((terms[0] + (terms[1] + terms[2]) / 2 + 0.1 * k3 / 2) / 2, rel=1e-5)
    assert metrics["kl_loss"] == pytest.approx(k3 / 4, rel=1e-5)
    assert metrics["clip_fraction"] == pytest.approx((1 + 0.5) / 2)
    by_token, _ = clipped_with_kl(
        logp, old, logp - over_ref.log(), advantages, t(1, 1, 1), 3.0, clip_range=0.2, kl_coef=0.1
    )
    assert by_token.item() == pytest.approx((sum(terms) + 0.1 * k3) / 3, rel=1e-5)


def test_the_gradient_of_the_kl_is_that_of_its_estimator() -> None:
    # d/d logp of k3 = exp(ref - logp) - 1 - (ref - logp): 1 - ref/pi = 1 - 1/2
    logp = t(math.log(0.5)).requires_grad_()
    loss, _ = clipped_with_kl(logp, logp.detach(), t(math.log(0.25)), t(0.0), t(1.0), 1.0, clip_range=0.2, kl_coef=0.2)
    loss.backward()
    assert logp.grad is not None and logp.grad.item() == pytest.approx(0.2 * 0.5, rel=1e-5)


# -- groups -------------------------------------------------------------------------------------------------------------


def trajectory(prompt: Sequence[int], answer: Sequence[int]) -> Trajectory:
    segments = (Segment(tuple(prompt), False), Segment(tuple(answer), True, (-1.0,) * len(answer)))
    return Trajectory(segments, 0, True)


def test_a_group_is_one_tree() -> None:
    tree = TreeBatch.of(group([trajectory([5, 6], [7, 1]), trajectory([5, 6], [8]), trajectory([5, 6], [9, 9, 1])]))
    assert tree.input_ids_T.tolist() == [5, 6, 7, 1, 8, 9, 9, 1]
    assert tree.node_parent_N.tolist() == [-1, 0, 0, 0]
    assert tree.position_ids_T.tolist() == [0, 1, 2, 3, 2, 2, 3, 4]
    assert tree.predictor_T.tolist() == [-1, 0, 1, 2, 1, 1, 5, 6]
    assert tree.action_index().tolist() == [2, 3, 4, 5, 6, 7]


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=2, max_size=2)), min_size=1, max_size=5
    ),
    st.integers(4, 40),
)
def test_micro_batches_hold_every_answer_once(groups: list[tuple[int, list[int]]], micro_tokens: int) -> None:
    made = [trajectory([n] * prompt, [3] * length) for n, (prompt, answers) in enumerate(groups) for length in answers]
    members = [[2 * n, 2 * n + 1] for n in range(len(groups))]
    batches = group_batches(made, members, micro_tokens)
    assert sorted(i for batch in batches for piece in batch for i in piece) == list(range(len(made)))
    for batch in batches:
        tokens = TreeBatch.of([n for piece in batch[:1] for n in group([made[i] for i in piece])]).tokens
        assert all(len({made[i].prompt for i in piece}) == 1 for piece in batch)
        # Only an answer that is too long by itself exceeds the limit.
        assert tokens <= micro_tokens or len(batch) == len(batch[0]) == 1


# -- the whole objective against a slow reference -------------------------------------------------------------------------


class Recorder:
    """What a stage rolled out and how it scored, by iteration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rollouts: list[list[Trajectory]] = []
        self.scores: list[list[float]] = []
        build = grpo._experience

        def recorded(players: Any, drawn: Drawn, *rest: Any) -> Any:
            self.rollouts.append(drawn.trajectories)
            self.scores.append(drawn.scores)
            return build(players, drawn, *rest)

        monkeypatch.setattr(grpo, "_experience", recorded)


def row_logprobs(model: Any, found: Trajectory) -> Tensor:
    """Of an answer's tokens, one row at a time with transformers' own forward."""
    ids = [*found.prompt, *found.actions]
    logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return torch.stack([logp[len(found.prompt) + i - 1, token] for i, token in enumerate(found.actions)])


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_the_first_update_is_the_gradient_of_equation_3(
    average: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient norm of an iteration from its roll-outs alone, row by row, group by group.

    On the first pass all ratios are 1 and the KL's gradient is 0, so only advantages and averages count.
    """
    seen = Recorder(monkeypatch)
    options = {"group_size": 4, "loss_average": average, "kl_coef": 0.5}
    train(tmp_path, max_steps=1, grpo=options, rollout={"batch": 16, "max_new_tokens": 30}, max_grad_norm=1e9)
    model = AutoModelForCausalLM.from_pretrained(small.model()).eval()
    answers, scores = seen.rollouts[0], seen.scores[0]
    terms: list[Tensor] = []
    for start in range(0, 16, 4):
        r = torch.tensor(scores[start : start + 4])
        for found, advantage in zip(answers[start : start + 4], (r - r.mean()) / (r.std() + 1e-4), strict=True):
            logp = row_logprobs(model, found)
            terms.append(-advantage * (logp - logp.detach()).exp())
    assert len({len(x) for x in terms}) > 1, "with answers of one length both averages are the same"
    loss = torch.stack([x.mean() for x in terms]).mean() if average == "sequence" else torch.cat(terms).mean()
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    (logged,) = updates(tmp_path)
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert logged["score"] == pytest.approx(sum(scores) / 16) and logged["ratio_error_first"] == 0.0


def test_metrics_of_roll_outs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Recorder(monkeypatch)
    train(tmp_path, max_steps=3, learning_rate=3e-2, rollout={"batch": 8, "max_new_tokens": 12})
    first, plain = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (small.model(), small.model()))
    for step, (row, answers) in enumerate(zip(updates(tmp_path), seen.rollouts, strict=True)):
        assert row["length"] == sum(len(a.actions) for a in answers) / 8
        assert row["stop_rate"] == sum(a.finished for a in answers) / 8
        assert row["engine_gap"] < 1e-5
        # A group's prompt is the same for all, and counts once among the tokens.
        assert all(len({a.prompt for a in answers[g : g + 4]}) == 1 for g in (0, 4))
        assert row["tokens"] == sum(len(answers[g].prompt) for g in (0, 4)) + sum(len(a.actions) for a in answers)
        if step == 0:
            assert row["kl"] == row["kl_k3"] == row["kl_loss"] == 0.0
        with torch.no_grad():
            ref = [row_logprobs(plain, a) for a in answers]
            old = [torch.tensor(a.logprobs) for a in answers]
        assert row["kl"] == pytest.approx(
            sum(float((o - r).sum()) for o, r in zip(old, ref, strict=True)) / 8, abs=1e-4
        )
    assert first is not plain and updates(tmp_path)[-1]["kl_k3"] > 0.01


# -- it learns ------------------------------------------------------------------------------------------------------------


def toy_judge(self: ModelReward, episodes: Sequence[Episode], **_: Any) -> list[Score]:
    """Likes even tokens: the share of them, from -1 to 1."""
    shares = [sum(i % 2 == 0 for i in e.response_ids) / len(e.response_ids) for e in episodes]
    return [Score(2 * share - 1) for share in shares]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ModelReward, "score", toy_judge)
    yield


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_it_raises_a_toy_reward_and_kl_holds_it_back(tmp_path: Path) -> None:
    found: dict[str, dict[str, float]] = {}
    for name, coefficient in (("free", 0.0), ("held", 5.0)):
        options = {"group_size": 8, "kl_coef": coefficient, "missing_stop_penalty": 0.0, "minibatches": 2}
        rollout = {"batch": 32, "max_new_tokens": 8}
        result = train(tmp_path / name, max_steps=20, learning_rate=2e-2, grpo=options, rollout=rollout)
        assert result.gates[0].code == "G-RATIO" and result.gates[0].value == 0.0
        found[name] = result.metrics
        assert abs(updates(tmp_path / name)[0]["score"]) < 0.3, "fresh weights draw even and odd tokens alike"
    assert found["free"]["score"] > 0.6 and found["free"]["eval_score"] > 0.6 > found["free"]["first_eval_score"] + 0.3
    assert found["free"]["kl"] > 5, "which it can only do by leaving the reference"
    assert found["held"]["kl"] < 1.5 and found["held"]["score"] < 0.4


@pytest.mark.usefixtures("toy")
def test_adapters_learn_too_and_the_bare_base_is_the_reference(tmp_path: Path) -> None:
    model = load_model(small.model())
    with torch.no_grad():
        # Tied to the head, which is frozen: fresh ones hardly tell tokens apart.
        model.get_input_embeddings().weight *= 20
    base = save_model(model, small.tokenizer(), tmp_path / "base")
    out, options = tmp_path / "out", {"group_size": 8, "kl_coef": 0.0, "missing_stop_penalty": 0.0}
    rollout, given = {"batch": 32, "max_new_tokens": 8}, {"model": str(base), "adapter": "lora"}
    result = train(out, max_steps=15, learning_rate=2e-2, grpo=options, rollout=rollout, **given)
    assert result.metrics["score"] > updates(out)[0]["score"] + 0.3
    assert updates(out)[0]["kl"] == 0.0 and result.metrics["kl"] > 0.5
    assert result.gates[0].passed and result.metrics["engine_gap"] < 1e-4


@pytest.mark.usefixtures("toy")
def test_several_epochs_and_minibatches_clip(tmp_path: Path) -> None:
    options = {"group_size": 4, "epochs": 3, "minibatches": 2, "clip_range": 0.01}
    result = train(tmp_path, max_steps=3, learning_rate=2e-2, grpo=options, rollout={"batch": 16, "max_new_tokens": 8})
    rows = updates(tmp_path)
    assert rows[0]["ratio_error_first"] == 0.0 < rows[0]["ratio_error"] and rows[-1]["clip_fraction"] > 0.1
    assert result.gates[0].passed


# -- rewards --------------------------------------------------------------------------------------------------------------


def numbered(folder: Path) -> Path:
    """Prompts with the references that published files give."""
    rows = [
        {"prompt": small.user(f"{n}: how many?"), "reference": {"verifier": "number", "answer": str(n % 7)}}
        for n in range(40)
    ]
    return small.write_rows(folder / "numbers.jsonl", rows)


def test_a_verifier_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Episode] = []
    score = Verifier.score

    def listen(self: Verifier, episodes: Sequence[Episode], **rest: Any) -> list[Score]:
        heard.extend(episodes)
        return score(self, episodes, **rest)

    monkeypatch.setattr(Verifier, "score", listen)
    result = train(tmp_path / "out", data=str(numbered(tmp_path)), reward_model="", max_steps=2)
    assert result.facts["judges"] == ["verifier"]
    assert heard and all(e.reference["answer"] == str(int(e.prompt[-1]["content"].split(":")[0]) % 7) for e in heard)
    # Untrained, no answer is right: 0, or 1 less without a stop token.
    assert result.metrics["score"] == pytest.approx(result.metrics["stop_rate"] - 1)


def test_a_verifier_beside_a_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelReward, "score", lambda self, episodes, **_: [Score(0.25)] * len(episodes))
    monkeypatch.setattr(Verifier, "score", lambda self, episodes, **_: [Score(1.0)] * len(episodes))
    result = train(
        tmp_path / "out",
        data=str(numbered(tmp_path)),
        max_steps=1,
        verifier_weight=2.0,
        grpo={"group_size": 4, "missing_stop_penalty": 0.0},
    )
    assert result.facts["judges"] == ["reward_model", "verifier"]
    (row,) = updates(tmp_path / "out")
    assert row["score"] == 2.25 and row["score_std"] == 0.0 and row["equal_groups"] == 1.0
    assert row["loss"] == row["grad_norm"] == 0.0


def test_nothing_to_judge_by(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing scores the answers") as caught:
        train(tmp_path, reward_model="")  # the toy prompts' references are a rubric's
    assert caught.value.field == "reward_model"
    rows = [json.loads(line) for line in numbered(tmp_path).read_text("utf-8").splitlines()]
    for row in rows[::2]:
        del row["reference"]
    half = small.write_rows(tmp_path / "half.jsonl", rows)
    with pytest.raises(DataError, match=r"\d+ of \d+ prompts have no reference"):
        train(tmp_path / "half", reward_model="", data=str(half))
    for row in rows:
        row["reference"] = {"verifier": "poetry", "answer": "a rhyme"}
    poems = small.write_rows(tmp_path / "poems.jsonl", rows)
    with pytest.raises(DataError, match="the verifier 'poetry', which does not exist"):
        train(tmp_path / "poems", data=str(poems))


def test_the_verifier_of_the_settings_reads_a_rubric_s_references(tmp_path: Path) -> None:
    result = train(tmp_path, reward_model="", verifier="exact", max_steps=1)
    assert result.facts["judges"] == ["verifier"]


# -- what must not change the numbers ---------------------------------------------------------------------------------------


def test_micro_batches_do_not_change_training(tmp_path: Path) -> None:
    """64 tokens hold a part of a group, 1024 all groups."""
    rows = []
    for micro in (64, 1024):
        options = {"group_size": 8, "minibatches": 2, "epochs": 2}
        train(
            tmp_path / str(micro),
            micro_tokens=micro,
            max_steps=2,
            grpo=options,
            rollout={"batch": 32, "max_new_tokens": 8},
        )
        rows.append(updates(tmp_path / str(micro)))
    for parts, whole in zip(*rows, strict=True):
        for key in ("loss", "score", "kl", "entropy", "kl_loss", "approx_kl"):
            assert parts[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


class KilledError(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("adapter", small.mostly_slow(["lora"], ["full"]))
def test_an_interrupted_stage_goes_on_bit_for_bit(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 7, "save_every": 2, "eval_every": 3, "learning_rate": 1e-2, "adapter": adapter}
    options |= {"grpo": {"group_size": 4, "epochs": 2, "minibatches": 2}}
    whole = train(tmp_path / "whole", **options)
    log: Callable[..., None] = Session.log

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
    assert again.metrics == whole.metrics and again.gates == whole.gates
    assert small.metrics_of(tmp_path / "out") == small.metrics_of(tmp_path / "whole")


def test_it_stops_when_the_policy_leaves_the_reference(tmp_path: Path) -> None:
    options = {"group_size": 4, "kl_coef": 0.0, "max_kl": 1e-6}
    with pytest.raises(TrainingError, match=r"max_kl 1e-06") as caught:
        train(tmp_path, max_steps=8, learning_rate=1e-2, grpo=options)
    assert "grpo.kl_coef" in caught.value.hint


def test_published_problems(shared_data: Path, tmp_path: Path) -> None:
    """GSM8K as published: the numbers of its answers are the references."""
    model = small.model_folder(tmp_path / "model", context=1024)
    result = train(
        tmp_path / "out",
        data=str(shared_data / "gsm8k" / "train.jsonl.gz"),
        model=str(model),
        reward_model="",
        max_records=20,
        max_length=1024,
        micro_tokens=2048,
        max_steps=2,
    )
    assert result.facts["prompts"] > 15 and result.facts["judges"] == ["verifier"]
    assert result.gates[0].passed and len(updates(tmp_path / "out")) == 2


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """DPO, GRPO and their relatives over gloo: the losses of one process, and nearly its weights."""
    rollouts = {"max_steps": 3, "learning_rate": 1e-2, "rollout": {"batch": 16, "max_new_tokens": 8}}
    pairs: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-2}
    stages: list[tuple[str, str, dict[str, Any]]] = [
        ("dpo", "sigmoid", pairs),
        ("dpo", "kto", pairs | {"loss": "kto"}),
        ("grpo", "grpo", rollouts),
        ("grpo", "gspo", rollouts | {"method": "gspo"}),
        ("grpo", "reinforce", rollouts | {"method": "reinforce++"}),
        ("grpo", "online-dpo", rollouts | {"method": "online-dpo"}),
        ("grpo", "raft", rollouts | {"method": "raft", "raft": {"unfinished": True}}),
    ]
    with Runner() as runner:
        for kind, name, options in stages:
            cls = {"dpo": DpoSettings, "grpo": GrpoSettings}[kind]
            rows = []
            for processes in (1, 2):
                out = tmp_path / f"{name}-{processes}"
                runner.run(kind, parse(cls, small.stage(kind, out, processes=processes, **options)))
                rows.append(small.metrics_of(out))
            assert len(rows[0]) == len(rows[1]) > 3
            for one, two in zip(*rows, strict=True):
                assert one.keys() == two.keys()
                for key in one.keys() - {"engine_gap", "engine_gap_max"}:
                    assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), (name, key)
    lines = [(tmp_path / f"raft-{n}" / "selected.jsonl").read_text("utf-8").splitlines() for n in (1, 2)]
    one, two = ([json.loads(line)["messages"] for line in part] for part in lines)
    assert one == two != []
