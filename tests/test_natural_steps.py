"""Natural policy gradients: a step by hand in its metric, what is saved, what moves, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from danlu.config import KINDS
from danlu.exceptions import SettingsError, TrainingError
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.train_config import NaturalSteps
from danlu.training.fisher import DAMPING, Moments
from danlu.training.natural import NaturalGradient

PEAK = 2e-3


class Two(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(4, 3, bias=False), nn.Linear(3, 5, bias=False)


def moments(model: Two) -> dict[str, Moments]:
    def positive(width: int, seed: int) -> Tensor:
        rows = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(seed))
        return rows.T @ rows

    first, second = model.first, model.second
    return {
        "first": Moments(positive(first.in_features, 0), positive(first.out_features, 9)),
        "second": Moments(positive(second.in_features, 1), positive(second.out_features, 10)),
    }


def made(model: Two, **options: Any) -> NaturalGradient:
    found = NaturalGradient(dict(model.named_children()), PEAK, NaturalSteps(**options))
    found.look(moments(model))
    return found


def gradients(model: Two, seed: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    found = {n: torch.randn(p.shape, generator=draws) for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.grad = found[n].clone()
    return found


def damped(moment: Tensor) -> Tensor:
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment))


def test_two_steps_by_hand() -> None:
    model = Two()
    known = moments(model)
    optimizer = made(model, trust=1e-4, momentum=0.5)
    mean: dict[str, Tensor] = {}
    for number, share in enumerate((1.0, 0.25)):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for n, g in gradients(model, number).items():
            mean[n] = g + 0.5 * mean.get(n, torch.zeros_like(g))
        optimizer.param_groups[0]["lr"] = share * PEAK
        optimizer.step()
        price, along, moved = 0.0, [], []
        for n, p in model.named_parameters():
            c, g = (damped(m) for m in (known[n.split(".")[0]].inner, known[n.split(".")[0]].outer))
            change = p.detach() - before[n]
            price += float(torch.trace(g @ change @ c @ change.T))
            along.append((torch.linalg.inv(g) @ mean[n] @ torch.linalg.inv(c)).flatten())
            moved.append(change.flatten())
        # As far as it may, twice the divergence; the schedule's share counts squared. And straight downhill in all layers at once.
        assert price == pytest.approx(1e-4 * share**2, rel=1e-3)
        cosine = torch.cosine_similarity(torch.cat(along), torch.cat(moved), dim=0)
        assert float(cosine) == pytest.approx(-1.0, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_nothing_moves_without_a_slope(value: float) -> None:
    model = Two()
    optimizer = made(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    if value:
        with pytest.raises(TrainingError, match="no number"):
            optimizer.step()
    else:
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_layer_that_no_answer_reached_waits_for_the_next_metric() -> None:
    model = Two()
    optimizer, known = made(model), moments(model)
    optimizer.look(known | {"first": Moments(torch.zeros(4, 4), torch.zeros(3, 3))})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients(model, 0)
    optimizer.step()
    assert torch.equal(model.first.weight, before["first.weight"])
    assert not torch.equal(model.second.weight, before["second.weight"])
    optimizer.look(known)
    gradients(model, 1)
    optimizer.step()
    assert not torch.equal(model.first.weight, before["first.weight"])


def test_the_metric_is_due_at_first_and_every_so_often() -> None:
    model = Two()
    optimizer = NaturalGradient(dict(model.named_children()), PEAK, NaturalSteps(every=2))
    seen = []
    for number in range(5):
        seen.append(optimizer.due)
        if optimizer.due:
            optimizer.look(moments(model))
        gradients(model, number)
        optimizer.step()
    assert seen == [True, False, True, False, True]


def test_what_was_saved_goes_on_exactly() -> None:
    model, other = Two(), Two()
    optimizer = made(model, every=3)
    gradients(model, 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    again = NaturalGradient(dict(other.named_children()), PEAK, NaturalSteps(every=3))
    again.look({n: Moments(2 * m.outer.new_ones(m.inner.shape), m.outer) for n, m in moments(other).items()})
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    for number in (1, 2):
        assert again.due == optimizer.due
        for m, o in ((model, optimizer), (other, again)):
            gradients(m, number)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert again.due and optimizer.due


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_stage_moves_the_linear_layers_alone(kind: str, tmp_path: Path) -> None:
    options = {"optimizer": "natural", "natural": {"trust": 1e-3, "every": 2}, "max_steps": 3}
    STAGES[kind].run(parse(KINDS[kind], tiny.stage(kind, tmp_path, **options)))
    before, after = (load_file(f / "model.safetensors") for f in (tiny.model(), tmp_path / "model"))
    moved = {n for n, w in before.items() if not torch.equal(w, after[n])}
    assert moved == {n for n in before if "_proj." in n}
    told = [row["kl"] for row in tiny.metrics_of(tmp_path) if "kl" in row]
    assert told[0] == pytest.approx(0.0, abs=1e-6) and abs(told[1]) > 0.01


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_shorter_steps_move_the_policy_less(kind: str, tmp_path: Path) -> None:
    told = []
    for trust in (1e-3, 1e-5):
        options = {"optimizer": "natural", "natural": {"trust": trust}, "max_steps": 2, "schedule": "constant"}
        STAGES[kind].run(parse(KINDS[kind], tiny.stage(kind, tmp_path / str(trust), **options)))
        told.append(tiny.metrics_of(tmp_path / str(trust))[1]["kl_k3"])
    assert 0 < told[1] < 0.1 * told[0]  # a hundredth, to first order


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("sft", {}, "is for policy gradients"),
        ("dpo", {}, "is for policy gradients"),
        ("grpo", {"method": "online-dpo"}, "is for policy gradients"),
        ("grpo", {"method": "best-of-n"}, "is for policy gradients"),
        ("grpo", {"adapter": "lora"}, "adapter: lora leaves them"),
        ("ppo", {"strategy": "fsdp2"}, "strategy: fsdp2 shards them"),
        ("ppo", {"ppo": {"keep_graphs": True}}, "keeps their graphs"),
    ],
)
def test_where_there_are_no_natural_steps(kind: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Said by the settings, so before anything is loaded."""
    with pytest.raises(SettingsError, match=said):
        parse(KINDS[kind], tiny.stage(kind, tmp_path, optimizer="natural", **changes))
