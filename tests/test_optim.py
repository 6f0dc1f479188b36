"""Schedules by hand; the optimizers against torch's AdamW: same numbers where they must be, near where they are rounded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from danlu.cli.main import run
from danlu.config import SftSettings
from danlu.training.adamw8bit import BLOCK, SMALL, AdamW8bit, dynamic_codes, pack, unpack
from danlu.training.adamw_offload import AdamWOffload
from danlu.training.optim import optimizer_of, rate_factor

# -- schedules ----------------------------------------------------------------------------------------------------------


def factors(total: int, **settings: Any) -> list[float]:
    return [rate_factor(s, total, SftSettings(**settings)) for s in range(total)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 2 of 6 steps warm up: 1/3, 2/3; then 4 steps at progress 0, 1/4, 2/4, 3/4.
        ({"schedule": "constant", "warmup": 2}, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup": 2}, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup": 2, "min_rate": 0.2}, [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4]),
        # 0.1 + 0.9 (1 + cos(pi p)) / 2 with cos = 1, 0.70711, 0, -0.70711.
        ({"schedule": "cosine", "warmup": 1 / 3}, [1 / 3, 2 / 3, 1, 0.868198, 0.55, 0.231802]),
        ({"schedule": "cosine", "warmup": 2, "min_rate": 0}, [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
        # The last half decays at progress 1/4, 2/4, 3/4: 1 - sqrt = 0.5, 0.292893, 0.133975.
        ({"schedule": "wsd", "warmup": 1, "decay": 0.5}, [0.5, 1, 1, 0.5, 0.292893, 0.133975]),
        ({"schedule": "wsd", "warmup": 1, "decay": 3, "min_rate": 0.5}, [0.5, 1, 1, 0.75, 0.646447, 0.566987]),
        ({"schedule": "wsd", "warmup": 0, "decay": 0}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_schedules(settings: dict[str, Any], expected: list[float]) -> None:
    assert factors(6, **settings) == pytest.approx(expected, abs=1e-6)


@given(
    total=st.integers(1, 60),
    warmup=st.floats(0, 1) | st.integers(0, 80),
    decay=st.floats(0, 1) | st.integers(0, 80),
    low=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
)
def test_a_rate_rises_then_falls_between_its_bounds(
    total: int, warmup: float, decay: float, low: float, schedule: str
) -> None:
    found = factors(total, schedule=schedule, warmup=warmup, decay=decay, min_rate=low)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert all(0 < f <= 1 for f in found[:top]) and all(low <= f <= 1 for f in found[top + 1 :])


# -- 8 bits ---------------------------------------------------------------------------------------------------------------


def test_the_dynamic_codes() -> None:
    """7 bits of magnitude: with e leading zeros, 2^(6 - e) middles of equal parts of (0.1, 1), times 10^-e; and 0 and 1."""
    signed, unsigned = dynamic_codes(signed=True), dynamic_codes(signed=False)
    for codes in (signed, unsigned):
        assert len(set(codes.tolist())) == 256 and torch.equal(codes, codes.sort().values) and codes[-1] == 1
    # e = 6 leaves one part: 0.55e-6. e = 5 leaves two, 0.325e-5 and 0.775e-5.
    assert signed[signed > 0][:3].tolist() == pytest.approx([0.55e-6, 0.325e-5, 0.775e-5])
    assert unsigned[:3].tolist() == pytest.approx([0, 0.325e-6, 0.775e-6])
    # e = 0 cuts (0.1, 1) into 64: the last middle is 1 - 0.9 / 128.
    assert signed[-2].item() == pytest.approx(1 - 0.9 / 128) == -signed[0].item()


def nearest(values: Tensor, signed: bool) -> Tensor:
    """Slow reference: each number's nearest code, block by block."""
    codes = dynamic_codes(signed=signed)
    if not signed:
        codes = codes[1:]  # positive averages never become 0
    out = torch.empty_like(values)
    for begin in range(0, values.numel(), BLOCK):
        block = values[begin : begin + BLOCK]
        scale = block.abs().max()
        for i, v in enumerate(block.tolist()):
            out[begin + i] = 0.0 if v == 0 else codes[(codes - v / scale).abs().argmin()] * scale
    return out


@pytest.mark.parametrize("signed", [True, False])
def test_packing_finds_the_nearest_code(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3 * BLOCK + 17, generator=generator) * 10.0 ** torch.randint(
        -6, 1, (3 * BLOCK + 17,), generator=generator
    )
    values = values if signed else values.square()
    values[::50] = 0
    found, expected = unpack(pack(values, signed=signed), signed=signed), nearest(values, signed)
    # A number halfway between two codes may go to either, as it is rounded to bf16 (by 2^-8 at most) first.
    scale = values.abs().max()
    off = (found - values).abs() - (expected - values).abs()
    assert float((off / (values.abs() + 1e-7 * scale)).max()) < 2**-7
    assert (found == expected).float().mean() > 0.9
    assert torch.equal(found == 0, (values == 0) | (expected == 0))


@given(st.lists(st.floats(2.0**-100, 2.0**40, width=32), min_size=1, max_size=300))
def test_a_positive_second_average_never_becomes_zero(values: list[float]) -> None:
    """Else the step would be divided by eps alone. Only what is 2^-100 of its block's largest may vanish."""
    given_values = torch.tensor(values)
    found = unpack(pack(given_values, signed=False), signed=False)
    small = given_values < given_values.max() * 2.0**-100
    assert bool(((found > 0) | small).all())


# -- optimizers -----------------------------------------------------------------------------------------------------------


def problem(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A regression whose matrices are packed (more than SMALL numbers) and whose biases are not."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48))
    assert sum(p.numel() > SMALL for p in module.parameters()) == 2
    truth = torch.randn(48, 48) / 7
    batches = [(x, x @ truth) for x in torch.randn(40, 32, 48)]
    return module, batches


def losses(module: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    found = []
    for x, y in batches:
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def made(kind: str, module: nn.Module) -> torch.optim.Optimizer:
    return optimizer_of(module, 3e-3, SftSettings(optimizer=kind, weight_decay=0.01))  # type: ignore[arg-type]


def test_offloaded_averages_change_nothing() -> None:
    module, batches = problem()
    other, _ = problem()
    expected = losses(module, made("adamw", module), batches)
    offloaded = made("adamw_offload", other)
    assert isinstance(offloaded, AdamWOffload)
    assert losses(other, offloaded, batches) == expected
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_packed_averages_follow_adamw() -> None:
    module, batches = problem()
    other, _ = problem()
    plain, packed = losses(module, made("adamw", module), batches), losses(other, made("adamw8bit", other), batches)
    assert plain[-1] < 0.5 * plain[0], "there is something to follow"
    assert packed == pytest.approx(plain, rel=0.03)
    assert packed != plain


def test_small_tensors_are_not_packed() -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(16, 16), nn.Linear(16, 16)
    other.load_state_dict(one.state_dict())
    batches = [(x, x.flip(1)) for x in torch.randn(5, 8, 16)]
    assert losses(one, made("adamw", one), batches) == losses(other, made("adamw8bit", other), batches)


def test_packed_averages_are_a_quarter_of_the_size() -> None:
    module = nn.Linear(512, 512, bias=False)
    optimizer = made("adamw8bit", module)
    losses(module, optimizer, [(torch.ones(2, 512), torch.zeros(2, 512))])
    assert isinstance(optimizer, AdamW8bit)
    held = sum(t.numel() * t.element_size() for t in optimizer.state[module.weight].values())
    # Two codes and two shares of a scale a parameter, and the count of steps.
    assert held == 512 * 512 * (2 + 2 * 4 / BLOCK) + 4


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "adamw_offload"])
def test_a_saved_optimizer_goes_on_exactly(kind: str) -> None:
    module, batches = problem()
    optimizer = made(kind, module)
    losses(module, optimizer, batches[:10])
    file = io.BytesIO()
    torch.save((module.state_dict(), optimizer.state_dict()), file)
    expected = losses(module, optimizer, batches[10:])
    other, _ = problem(seed=1)
    again = made(kind, other)
    losses(other, again, batches[:2])  # what it did before must not matter
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    assert losses(other, again, batches[10:]) == expected


@pytest.mark.parametrize("kind", tiny.mostly_slow(["adamw8bit"], ["adamw_offload"]))
def test_a_stage_with_another_optimizer(kind: str, tmp_path: Path) -> None:
    """The loss curve of real fine-tuning is that of AdamW, within 2% of 8-bit averages."""
    model = tiny.model_folder(tmp_path / "model", hidden_size=64, heads=2, kv_heads=1)
    curves = {}
    for name in ("adamw", kind):
        values = tiny.stage("sft", tmp_path / name, model=str(model), max_steps=40, optimizer=name)
        assert run([*tiny.arguments("sft", values), "--force"]) == 0
        curves[name] = [r["loss"] for r in tiny.metrics_of(tmp_path / name) if "grad_norm" in r]
    assert curves["adamw"][-1] < 0.6 * curves["adamw"][0]
    if kind == "adamw_offload":
        assert curves[kind] == curves["adamw"]
    assert curves[kind] == pytest.approx(curves["adamw"], rel=0.02)
