"""Packed layers: codes by hand, every path against the plain product, gradients, what is saved, layers side by side."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from danlu.exceptions import ModelError
from danlu.models import packed_kernels
from danlu.models.packed import (
    Int4Linear,
    Int8Linear,
    PackedLinear,
    from_chatglm,
    group_of,
    joined,
    pack,
    pack4,
    quantize_groups,
    unpack4,
)

Near = Callable[..., None]
SHAPES = [(128, 64), (64, 64), (192, 96), (100, 48), (64, 40), (48, 32)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[True, False], ids=["kernels", "plain"])
def with_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not request.param:
        monkeypatch.setattr(packed_kernels, "has_int8", lambda device: False)
        monkeypatch.setattr(packed_kernels, "int4_block", lambda device: 0)
    yield


def test_two_codes_lie_in_a_byte() -> None:
    # 1 + 16 * 15 = 241; 7 + 16 * 0 = 7.
    codes = torch.tensor([[1, 15, 7, 0]], dtype=torch.uint8)
    assert pack4(codes).tolist() == [[241, 7]] and torch.equal(unpack4(pack4(codes)), codes)


def test_groups_by_hand() -> None:
    # Asymmetric: -1 to 14 in 15 steps of 1, zero 1. Symmetric: 2 * 15 / 15 = 2; -15/2 + 8 = 0.5 -> 0, 7.5/2 + 8 = 11.75 -> 12.
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([-1.0, 14.0, 0.4, 3.0])
    weight[0, 16:18] = torch.tensor([-15.0, 7.5])
    codes, scale, zero = quantize_groups(weight, 16)
    assert zero is not None and (scale[0, 0], zero[0, 0]) == (1, 1) and codes[0, :5].tolist() == [0, 15, 1, 4, 1]
    codes, scale, zero = quantize_groups(weight, 16, symmetric=True)
    assert zero is None and scale[0, 1] == 2 and codes[0, 16:19].tolist() == [0, 12, 8]


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_is_within_half_a_step(symmetric: bool) -> None:
    weight = noise(8, 64)
    layer = pack(weight, None, 4, group_size=32, symmetric=symmetric)
    assert isinstance(layer, Int4Linear) and (layer.zero is None) is symmetric
    step = layer.scale.float().repeat_interleave(32, dim=1)
    # At the ends of a range the rounded scale and zero may cut off up to another half step.
    assert ((layer.dequantized() - weight).abs() <= step * (1.01 if not symmetric else 1.05)).all()
    assert ((layer.dequantized() - weight).abs() <= step * 0.51).float().mean() > 0.95


def test_rows_without_a_group_stay_in_8_bits() -> None:
    assert (group_of(96, 64), group_of(64, 64), group_of(40, 64), group_of(352, 128)) == (32, 64, 0, 32)
    assert isinstance(pack(noise(8, 40), None, 4), Int8Linear)
    with pytest.raises(ModelError, match="3 bits"):
        pack(noise(8, 32), None, 3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_path_gives_the_plain_product(bits: int, rows: int, columns: int, with_kernels: None, near: Near) -> None:
    bias = noise(rows, seed=1)
    layer = pack(noise(rows, columns), bias, bits)
    weight, saved = layer.dequantized(), {n: t.clone() for n, t in layer.state_dict().items()}
    for count in (1, 5, 40):
        x = noise(count, columns, seed=count)
        near(layer(x), x @ weight.T + bias)
        half = x.bfloat16()
        found = layer(half)
        assert found.dtype == torch.bfloat16
        near(found.float(), half.float() @ weight.T + bias, 0.012)
    # The kernels' order of bytes is never seen from outside.
    assert all(torch.equal(t, saved[n]) for n, t in layer.state_dict().items())
    assert torch.equal(layer.dequantized(), weight)
    fresh = pack(noise(rows, columns, seed=7), noise(rows), bits)
    fresh(noise(1, columns).bfloat16())
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.dequantized(), weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_do_not_depend_on_the_batch_in_float32(bits: int) -> None:
    layer, x = pack(noise(128, 64), None, bits), noise(40, 64)
    whole = layer(x)
    for first, last in ((0, 4), (8, 16), (20, 40)):
        assert torch.equal(layer(x[first:last]), whole[first:last])


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_of_the_input(bits: int, near: Near) -> None:
    layer = pack(noise(128, 64), noise(128), bits)
    given = noise(2, 5, 64).requires_grad_()
    layer(given).square().sum().backward()
    plain = given.detach().clone().requires_grad_()
    (plain @ layer.dequantized().T + layer.bias).square().sum().backward()
    assert given.grad is not None and plain.grad is not None
    near(given.grad, plain.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(given)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()


def test_scales_keep_their_dtype() -> None:
    layer = pack(noise(64, 32), noise(64), 8).to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32 and layer.bias is not None and layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_side_by_side(bits: int, with_kernels: None, near: Near) -> None:
    parts = [pack(noise(n, 64, seed=n), noise(n), bits) for n in (128, 64)]
    x = noise(3, 64).bfloat16()
    expected = torch.cat([p(x) for p in parts], dim=-1)
    weights = [p.dequantized() for p in parts]
    layer = joined(parts)
    if layer is None:
        assert bits == 4 and not packed_kernels.int4_block("cpu")
        return
    near(layer(x).float(), expected.float(), 0.01)
    assert [torch.equal(p.dequantized(), w) for p, w in zip(parts, weights, strict=True)] == [True, True]
    assert (
        parts[1].codes_as_stored().untyped_storage().data_ptr() == layer.codes_as_stored().untyped_storage().data_ptr()
    )
    again = copy.deepcopy(parts)
    near(torch.cat([p(x) for p in again], dim=-1).float(), expected.float(), 0.01)
    assert joined([parts[0], pack(noise(64, 32), None, bits)]) is None


# -- ChatGLM's layout -------------------------------------------------------------------------------------------------------


def test_chatglm_codes_by_hand() -> None:
    # -8 and 7 make 0x87, -1 and 0 make 0xf0; high half first.
    packed = torch.tensor([[0x87 - 256, 0xF0 - 256]], dtype=torch.int8)
    layer = from_chatglm(packed, torch.tensor([0.5], dtype=torch.float16), 4)
    assert layer.dequantized().tolist() == [[-4.0, 3.5, -0.5, 0.0]]
    with pytest.raises(ModelError, match="one scale a row"):
        from_chatglm(packed, torch.ones(2, 2), 4)


@pytest.mark.parametrize("name", ["chatglm_v1_int8", "chatglm_v1_int4", "chatglm2_int8", "chatglm2_int4"])
def test_chatglm_fixtures(name: str) -> None:
    root = Path(os.environ.get("DANLU_SHARED", Path(__file__).parents[2] / "shared")) / "fixtures"
    if not (root / name).is_dir():
        pytest.skip(f"CHATGLM'S WEIGHTS NOT TESTED: {root / name} is missing")
    bits = json.loads((root / name / "config.json").read_text("utf-8"))["quantization_bit"]
    state = load_file(root / name / "model.safetensors")
    scales = [n for n in state if n.endswith("weight_scale")]
    assert scales
    for key in scales:
        codes, scale = state[key.removesuffix("_scale")], state[key]
        layer = from_chatglm(codes, scale, bits)
        expected = _chatglm_slowly(codes, scale, bits)
        assert torch.equal(layer.dequantized(torch.float16), expected)


def _chatglm_slowly(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    rows: list[list[int]] = []
    for row in codes.tolist():
        halves = [h for byte in row for h in ((byte & 255) >> 4, byte & 15)] if bits == 4 else row
        rows.append([h - 16 if bits == 4 and h > 7 else h for h in halves])
    return torch.tensor(rows).to(torch.float16) * scale.to(torch.float16)[:, None]


def test_a_layer_says_what_it_is() -> None:
    layer: Any = pack(noise(64, 64), None, 4, group_size=32)
    assert isinstance(layer, PackedLinear) and "bits=4, groups=2" in repr(layer)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_is_where_its_weight_was(bits: int) -> None:
    layer = pack(torch.empty(8, 64, device="meta"), None, bits)
    assert {b.device.type for b in layer.buffers()} == {"meta"}
