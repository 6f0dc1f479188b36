"""The parts that PPO's loop is made of: buffer, controllers, scores, average of weights, PTX, experience."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from danlu.alignment_config import Ppo, PpoSettings
from danlu.exceptions import CheckpointError, DataError, SettingsError
from danlu.models.load import load_model
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.parsing import parse
from danlu.text.chat_template import ChatTemplate
from danlu.training import checkpoint
from danlu.training.buffer import ReplayBuffer, ScoredAnswer
from danlu.training.compute import Compute
from danlu.training.controller import KlController, RunningMoments, shaped_scores
from danlu.training.ema import Ema
from danlu.training.experience import experience_of
from danlu.training.ptx import PtxLoss, norm_of
from danlu.training.step import accumulate, language_loss
from danlu.tree import Segment, Trajectory, TreeBatch, conversation

CPU = Compute("cpu", "float32", 1)
NUMBERS = st.floats(-100, 100)


# -- buffer -------------------------------------------------------------------------------------------------------------


def answer(number: int, *, version: int = 0, uses: int = 0) -> ScoredAnswer:
    """With a tool's words between two parts of the answer, and log-probabilities that no short decimal is."""
    segments = (
        Segment((5, 6, number), False),
        Segment((7, 8), True, (-1 / 3 - number, -math.pi)),
        Segment((9,), False),
        Segment((10,), True, (-1e-17,)),
    )
    trajectory = Trajectory(segments, version, number % 2 == 0, seed=1 << 62, info={"turns": 2.0})
    return ScoredAnswer(trajectory, number / 7, uses)


def numbers(answers: Sequence[ScoredAnswer]) -> list[int]:
    return [a.trajectory.prompt[-1] for a in answers]


def buffers(folder: Path, reuse: int = 1) -> list[ReplayBuffer]:
    return [ReplayBuffer(reuse), ReplayBuffer(reuse, folder / "buffer")]


def test_answers_wait_in_order(tmp_path: Path) -> None:
    for buffer in buffers(tmp_path):
        buffer.add(answer(n) for n in range(5))
        assert numbers(buffer.take(2)) == [0, 1] and len(buffer) == 3
        buffer.add([answer(5)])
        taken = buffer.take(4)
        assert taken == [answer(n) for n in (2, 3, 4, 5)] and len(buffer) == 0, "exactly what was put in"


def test_answers_are_used_as_often_as_allowed(tmp_path: Path) -> None:
    for buffer in buffers(tmp_path, reuse=2):
        buffer.add(answer(n) for n in range(4))
        taken = [buffer.take(3) for _ in range(2)]
        # 0, 1, 2 go behind 3; after 3, 0, 1 only 2 and 3 have a use left.
        assert [numbers(t) for t in taken] == [[0, 1, 2], [3, 0, 1]]
        assert [a.uses for a in taken[1]] == [0, 1, 1]
        assert numbers(buffer.take(2)) == [2, 3] and len(buffer) == 0


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 3), st.integers(1, 4))
def test_no_answer_is_taken_too_often_or_twice_at_once(batches: list[int], reuse: int, size: int) -> None:
    buffer = ReplayBuffer(reuse)
    added = 0
    seen: list[int] = []
    for count in batches:
        buffer.add(answer(n) for n in range(added, added + count))
        added += count
        while len(buffer) >= size:
            taken = numbers(buffer.take(size))
            assert len(set(taken)) == size
            seen += taken
    uses = [seen.count(n) for n in range(added)]
    assert max(uses) <= reuse
    assert sum(u < reuse for u in uses) == len(buffer) < size


def test_files_hold_what_waits(tmp_path: Path) -> None:
    _, buffer = buffers(tmp_path)
    buffer.add(answer(n) for n in range(3))
    folder = tmp_path / "buffer" / "rank-0"
    assert len(list(folder.glob("*.json"))) == 3
    buffer.take(2)
    [left] = folder.glob("*.json")
    assert json.loads(left.read_text("utf-8"))["segments"][0][0] == [5, 6, 2]
    buffer.clear()
    assert not (tmp_path / "buffer").exists() and len(buffer) == 0


def test_a_checkpoint_holds_the_buffer_exactly(tmp_path: Path) -> None:
    """Through a file that is read with weights_only, and whatever stood in the folder before."""
    for number, buffer in enumerate(buffers(tmp_path, reuse=3)):
        buffer.add(answer(n, version=n, uses=n % 2) for n in range(3))
        buffer.take(1)
        file = io.BytesIO()
        torch.save(buffer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        for other in buffers(tmp_path / f"other{number}", reuse=3):
            other.add([answer(99)])
            other.load_state_dict(state)
            assert len(other) == 3
            assert other.take(3) == [answer(1, version=1, uses=1), answer(2, version=2), answer(0, uses=1)]


# -- controllers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        # e = clip((KL - 6) / 6, +-0.2), times n / horizon = 64 / 1000
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.064),
        (60.0, 1 + 0.2 * 0.064),
        (0.0, 1 - 0.2 * 0.064),
    ],
)
def test_an_adaptive_weight_by_hand(kl: float, factor: float) -> None:
    controller = KlController(Ppo(kl_coef=0.1, kl_controller="adaptive", kl_horizon=1000))
    controller.update(kl, 64)
    assert controller.coef == pytest.approx(0.1 * factor, rel=1e-9)
    other = KlController(Ppo())
    other.load_state_dict(controller.state_dict())
    assert other.coef == controller.coef


def test_a_fixed_weight_stays() -> None:
    controller = KlController(Ppo(kl_coef=0.1))
    controller.update(1e6, 64)
    assert controller.coef == 0.1


def test_an_adaptive_weight_is_not_led_by_what_is_no_number() -> None:
    controller = KlController(Ppo(kl_coef=0.1, kl_controller="adaptive"))
    controller.update(float("nan"), 64)
    assert controller.coef == 0.1


@given(st.lists(st.lists(NUMBERS, max_size=6), min_size=1, max_size=6))
def test_running_moments_are_those_of_everything(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments.update(batch)
    everything = [v for batch in batches for v in batch]
    assert moments.count == len(everything)
    if everything:
        assert moments.mean == pytest.approx(fmean(everything), abs=1e-9)
        assert moments.std == pytest.approx(pstdev(everything), abs=1e-6)
    other = RunningMoments()
    other.load_state_dict(moments.state_dict())
    assert other.state_dict() == moments.state_dict()


def test_shaped_scores_by_hand() -> None:
    raw, done = [1.0, 3.0, 20.0], [True, False, True]
    seen = RunningMoments()
    seen.update([0.0, 4.0])  # mean 2, deviation 2
    options = Ppo(score_clip=5.0, missing_stop_penalty=0.5)
    assert shaped_scores(raw, done, options, "none", seen) == [1.0, 2.5, 5.0]
    # (1 - 2) / 2, (3 - 2) / 2 less 0.5, and (20 - 2) / 2 = 9 is clipped
    assert shaped_scores(raw, done, options, "running", seen) == [-0.5, 0.0, 5.0]
    # mean 8, variance (49 + 25 + 144) / 3
    std = math.sqrt(218 / 3)
    expected = [-7 / std, -5 / std - 0.5, 12 / std]
    assert shaped_scores(raw, done, options, "batch", seen) == pytest.approx(expected)
    assert shaped_scores([2.0, 2.0], [True, True], options, "batch", seen) == [0.0, 0.0]


# -- average of weights --------------------------------------------------------------------------------------------------


def test_an_average_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = Ema([("weight", weight)], 0.75)
    for value in ([5.0, 2.0], [1.0, 6.0]):
        with torch.no_grad():
            weight.copy_(torch.tensor(value))
        ema.update()
    # 1 -> 0.75 + 1.25 = 2 -> 1.5 + 0.25; 2 -> 2 -> 1.5 + 1.5
    assert ema.state_dict()["weight"].tolist() == [1.75, 3.0]
    assert weight.tolist() == [1.0, 6.0]
    ema.put()
    assert weight.tolist() == [1.75, 3.0] and weight.requires_grad


def test_a_checkpoint_holds_the_average_exactly(tmp_path: Path) -> None:
    module, other = nn.Linear(3, 2), nn.Linear(3, 2)
    ema, again = Ema(module.named_parameters(), 0.9), Ema(other.named_parameters(), 0.9)
    with torch.no_grad():
        module.weight.mul_(3)
    ema.update()
    path = checkpoint.save(tmp_path, 1, module, {"ema": ema}, {})
    checkpoint.load(path, other, {"ema": again})
    for name, tensor in ema.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert not torch.equal(again.averages["weight"], other.weight)
    with pytest.raises(CheckpointError, match=r"state 'ema' is that of another model: parameter bias"):
        checkpoint.load(path, other, {"ema": Ema([("weight", other.weight)], 0.9)})


# -- PTX ----------------------------------------------------------------------------------------------------------------


def ptx_of(folder: Path, **options: Any) -> PtxLoss:
    given = {"data": str(tiny.data()["documents"]), "tokens": 60, **options}
    settings = parse(PpoSettings, tiny.stage("ppo", folder, ptx=given))
    return PtxLoss(settings, ChatTemplate(tiny.tokenizer(), None), CPU, stage="ppo")


def root_of_policy() -> tuple[RootModel, list[nn.Parameter]]:
    root = RootModel(SeparateModels({"policy": load_model(tiny.model())}, ["policy"])).eval()
    return root, list(root.parameters())


@pytest.mark.parametrize(("source", "kind"), [("documents", "document"), ("conversations", "conversation")])
def test_ptx_takes_what_it_finds(source: str, kind: str, tmp_path: Path) -> None:
    ptx = ptx_of(tmp_path, data=str(tiny.data()[source]))
    assert ptx.facts["ptx"] == {"kind": kind, "records": 96, "items": 96}


def test_comparisons_are_imitated_by_their_better_answer(tmp_path: Path) -> None:
    ptx = ptx_of(tmp_path, data=str(tiny.data()["comparisons"]))
    assert ptx.facts["ptx"]["kind"] == "conversation"
    text = tiny.tokenizer().decode([i for n in ptx.trees.items[0] for i in n.ids])
    assert "Gladly" in text and "No idea" not in text


def test_ptx_draws_are_a_function_of_step_and_update(tmp_path: Path) -> None:
    ptx = ptx_of(tmp_path)
    draws = {(s, u): ptx.draw(s, u) for s in range(4) for u in range(4)}
    assert all(ptx_of(tmp_path).draw(s, u) == draw for (s, u), draw in draws.items())
    assert len({tuple(d) for d in draws.values()}) == 16
    for draw in draws.values():
        assert len(set(draw)) == len(draw)
        assert sum(ptx.lengths[draw]) >= 60 > sum(ptx.lengths[draw[:-1]])
    assert sorted(ptx_of(tmp_path, tokens=10**6).draw(0, 0)) == list(range(96)), "all there is, once"


@pytest.mark.parametrize(("form", "weights"), [("additive", (1.0, 0.4)), ("convex", (0.6, 0.4))])
def test_gradients_of_policy_and_ptx_add_up(form: str, weights: tuple[float, float], tmp_path: Path) -> None:
    ptx = ptx_of(tmp_path, form=form, coef=0.4)
    assert ptx.policy_weight == pytest.approx(weights[0])
    root, parameters = root_of_policy()
    tree = TreeBatch.of(conversation([5, 9, 70, 3], [0.0, 1.0, 1.0, 1.0]))
    drawn = ptx.trees.batch(ptx.draw(3, 1))
    apart = []
    for batch in (tree, drawn):
        total = float(batch.loss_weight_T.sum())
        sums = accumulate(root, "policy", [(batch, total)], language_loss, CPU)
        apart.append([p.grad.clone() for p in parameters if p.grad is not None])
        root.zero_grad(set_to_none=True)
    accumulate(root, "policy", [(tree, 3.0 / ptx.policy_weight)], language_loss, CPU)  # times the policy's weight
    found = ptx.add(root, parameters, 3, 1)
    for parameter, policy, imitation in zip(parameters, *apart, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, weights[0] * policy + weights[1] * imitation, atol=1e-6)
    norms = weights[0] * norm_of(apart[0]), weights[1] * norm_of(apart[1])
    assert found["ptx_share"] == pytest.approx(norms[1] / sum(norms), rel=1e-4)
    assert found["ptx_loss"] == pytest.approx(sums["loss"], rel=1e-5)
    assert found["loss"] == pytest.approx(0.4 * sums["loss"], rel=1e-5)


def test_ptx_without_data(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        ptx_of(tmp_path, data="")
    assert caught.value.field == "ptx.data"
    with pytest.raises(DataError, match="prompts"):
        ptx_of(tmp_path, data=str(tiny.data()["prompts"]))


# -- experience ---------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A root whose roles say what the test wants of every action token, in order of their ids."""

    def __init__(self, table: dict[str, Tensor]) -> None:
        super().__init__()
        self.table = table

    def forward(self, tree: TreeBatch, role: str, head_fn: Any, **_: Any) -> Any:
        found = self.table[role][tree.input_ids_T[tree.action_index()]]
        return found if role == "critic" else (found, torch.full_like(found, 0.5))


def trajectory(ids: Sequence[int], sampled: Sequence[float], *, version: int = 4, finished: bool = True) -> Trajectory:
    return Trajectory((Segment((1, 2), False), Segment(tuple(ids), True, tuple(sampled))), version, finished)


def test_experience_by_hand() -> None:
    """Two answers, [10, 11] and [12], gamma = lambda = 1."""
    table = {name: torch.zeros(13) for name in ("policy", "ref", "critic")}
    table["policy"][10:] = torch.tensor([-1.0, -2.0, -3.0])
    table["ref"][10:] = torch.tensor([-1.5, -1.0, -3.0])
    table["critic"][10:] = torch.tensor([0.5, 1.0, 2.0])
    answers = [
        ScoredAnswer(trajectory([10, 11], [-1.0, -2.0]), 7.0),
        ScoredAnswer(trajectory([12], [-3.0 - math.log(8)], version=1, finished=False), -1.0),
    ]
    settings = PpoSettings(ppo={"gae_lambda": 1.0, "minibatches": 1}, max_length=64, micro_tokens=64)
    root: Any = Fixed(table)
    [[part]], stats = experience_of(root, answers, [2.0, -2.0], settings, CPU, kl_coef=0.1, version=4)
    # Rewards -0.05, 2.1 and -2; to go 2.05, 2.1 and -2; advantages 1.55, 1.1 and -4.
    assert part.returns.tolist() == pytest.approx([2.05, 2.1, -2.0], rel=1e-5)
    advantages = [1.55, 1.1, -4.0]
    mean, std = fmean(advantages), pstdev(advantages)
    assert part.advantages.tolist() == pytest.approx([(a - mean) / std for a in advantages], rel=1e-4)
    # The second answer was sampled with an eighth of its probability now: 8, cut to 2.
    assert part.importance is not None and part.importance.tolist() == pytest.approx([1.0, 1.0, 2.0], rel=1e-5)
    assert stats == pytest.approx(
        {
            "score": 0.0,
            "score_raw": 3.0,
            "kl": (0.5 - 1.0 + 0.0) / 2,
            "kl_k3": (math.exp(-0.5) - 0.5 + math.e - 2) / 2,
            "reward_total": 0.0 + 0.1 * 0.25,
            "entropy": 0.5,
            "length": 1.5,
            "stop_rate": 0.5,
            "staleness": 1.5,  # versions 4 and 1 under version 4
            "engine_gap": 0.0,  # of the fresh answer
            "engine_gap_max": 0.0,
            "importance_mean": 4 / 3,
            "importance_clipped": 1 / 3,
            # R - V = 1.55, 1.1, -4 again
            "explained_variance": 1 - std**2 / pstdev([2.05, 2.1, -2.0]) ** 2,
            "advantage_std": std,
            "advantage_max": 4.0,
            "kl_coef": 0.1,
            "tokens": 7.0,
        },
        abs=1e-5,
    )


def test_options_of_the_experience_by_hand() -> None:
    table = {name: torch.zeros(13) for name in ("policy", "ref", "critic")}
    table["policy"][10:] = torch.tensor([-1.0, -2.0, -3.0])
    table["ref"][10:] = torch.tensor([-1.5, -1.0, -3.0])
    answers = [ScoredAnswer(trajectory([10, 11], [-1.2, -2.0]), 0.0), ScoredAnswer(trajectory([12], [-3.0]), 0.0)]

    def read(**options: Any) -> tuple[list[float], dict[str, float]]:
        root: Any = Fixed(table)
        settings = PpoSettings(ppo={"gae_lambda": 1.0, "minibatches": 1, **options}, max_length=64, micro_tokens=64)
        [[part]], stats = experience_of(root, answers, [2.0, -2.0], settings, CPU, kl_coef=0.1, version=4)
        assert (part.importance is None) == (options.get("importance_clip", 0) is None)
        return part.returns.tolist(), stats

    # The KL in the loss leaves the scores alone; the total tells it all the same.
    returns, stats = read(kl_in="loss", kl_estimator="k2")
    assert returns == pytest.approx([2.0, 2.0, -2.0])
    assert stats["reward_total"] == pytest.approx(-0.1 * (0.125 + 0.5) / 2)
    # Rewards -0.05, 2.1, -2 have deviation s: they become x / s with the mean m put back, m - m / s.
    rewards = [-0.05, 2.1, -2.0]
    m, s = fmean(rewards), pstdev(rewards)
    first, second, third = (r / s + m - m / s for r in rewards)
    returns, _ = read(whiten_rewards=True)
    assert returns == pytest.approx([first + second, second, third], rel=1e-4)
    _, stats = read(importance_clip=None)
    assert "importance_mean" not in stats
    # Of three fresh tokens one is off by 0.2.
    assert stats["engine_gap"] == pytest.approx(0.2 / 3) and stats["engine_gap_max"] == pytest.approx(0.2)
    assert stats["engine_gap_high"] == 1.0
