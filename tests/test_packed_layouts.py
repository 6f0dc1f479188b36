"""Packed checkpoints of others: written here by slow packers of their own, read exactly; and what danlu writes for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from danlu.exceptions import ModelError
from danlu.models.load import save_model
from danlu.models.packed import pack
from danlu.models.packed_layouts import layout_of
from danlu.models.quantize import is_quantized, load_quantized, quantize_model, save_quantized

Tiny = Callable[..., Any]
IDS = torch.tensor([[5, 9, 30, 7, 44]])
N, K, GROUP = 16, 64, 32


def word(codes: list[int], bits: int) -> int:
    """Codes in an int32, the first lowest."""
    value = sum(c << (bits * i) for i, c in enumerate(codes))
    return value - 2**32 if value >= 2**31 else value


def case(bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[K, N]`, zeros `[G, N]` and scales `[G, N]`."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (K, N), generator=generator)
    zeros = torch.randint(1, 2**bits, (K // GROUP, N), generator=generator)
    scales = (0.01 + torch.rand(K // GROUP, N, generator=generator)).half()
    return codes, zeros, scales


def plain(codes: Tensor, zeros: Tensor, scales: Tensor, group_K: list[int]) -> Tensor:
    """The weight `[N, K]`, entry by entry."""
    weight = torch.empty(N, K)
    for n in range(N):
        for k in range(K):
            g = group_K[k]
            weight[n, k] = float(scales[g, n]) * float(codes[k, n] - zeros[g, n])
    return weight


def along_rows(codes: Tensor, bits: int) -> Tensor:
    count = 32 // bits
    lists = codes.tolist()
    return torch.tensor(
        [
            [word([lists[r + i][n] for i in range(count)], bits) for n in range(len(lists[0]))]
            for r in range(0, len(lists), count)
        ],
        dtype=torch.int32,
    )


def along_columns(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    count = 32 // bits
    places = order or tuple(range(count))
    return torch.tensor(
        [[word([row[c + p] for p in places], bits) for c in range(0, len(row), count)] for row in codes.tolist()],
        dtype=torch.int32,
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq(bits: int, version: str, ordered: bool) -> None:
    codes, zeros, scales = case(bits)
    group_K = [k // GROUP for k in range(K)] if ordered else [(k * 7 % K) // GROUP for k in range(K)]
    config = {
        "quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
    }
    layout = layout_of(config)
    assert layout is not None and layout.name == "gptq" and layout.bits == bits
    layer = layout.build(
        {
            "qweight": along_rows(codes, bits),
            "qzeros": along_columns(zeros - int(version == "gptq"), bits),
            "scales": scales,
            "g_idx": torch.tensor(group_K, dtype=torch.int32),
        }
    )
    expected = plain(codes, zeros, scales, group_K)
    assert torch.equal(layer.dequantized(), expected)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1))
    assert (layer(x) - x @ expected.T).abs().max() < 1e-3
    assert (layer(x.bfloat16()).float() - x @ expected.T).abs().max() < 0.02 * (x @ expected.T).abs().max()


def test_awq() -> None:
    codes, zeros, scales = case(4)
    layout = layout_of(
        {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "GEMM", "group_size": GROUP}}
    )
    assert layout is not None
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {"qweight": along_columns(codes, 4, order), "qzeros": along_columns(zeros, 4, order), "scales": scales}
    assert torch.equal(layout.build(parts).dequantized(), plain(codes, zeros, scales, [k // GROUP for k in range(K)]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(bits: int, symmetric: bool) -> None:
    codes, zeros, scales = case(bits)
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": GROUP, "strategy": "group"}
    given = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    layout = layout_of({"quantization_config": given | {"config_groups": {"group_0": {"weights": weights}}}})
    assert layout is not None
    parts = {
        "weight_packed": along_columns(codes.T, bits),
        "weight_scale": scales.T.contiguous(),
        "weight_shape": torch.tensor([N, K]),
    }
    if not symmetric:
        parts["weight_zero_point"] = along_rows(zeros.T, bits)
    assert torch.equal(layout.build(parts).dequantized(), plain(codes, zeros, scales, [k // GROUP for k in range(K)]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quant_method": "gptq", "bits": 3}, "GPTQ weights of 3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemv"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}},
            },
            "type float",
        ),
    ],
)
def test_what_is_not_read_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        layout_of({"quantization_config": given})


def test_other_quantisation_is_left_to_transformers() -> None:
    assert layout_of({}) is None
    assert layout_of({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}) is None


def test_a_whole_awq_model(tiny: Tiny, tmp_path: Path) -> None:
    """A folder as AutoAWQ writes it: the logits are those of a plain model with the unpacked weights."""
    model = tiny("llama", hidden_size=64, intermediate_size=128)
    folder = save_model(model, None, tmp_path / "awq")
    state = load_file(folder / "model.safetensors")
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    for name in [n for n in state if "_proj.weight" in n]:
        layer = pack(state.pop(name), None, 4, group_size=32)
        codes, zero = layer.codes(), layer.zero  # type: ignore[operator]
        base = name.removesuffix(".weight")
        state[f"{base}.qweight"] = along_columns(codes.T, 4, order)
        state[f"{base}.qzeros"] = along_columns(zero.T, 4, order)  # type: ignore[union-attr]
        state[f"{base}.scales"] = layer.scale.T.contiguous().half()
        model.get_submodule(base).weight.data = (
            (codes.view(len(codes), -1, 32).float() - zero[..., None].float()) * layer.scale.half().float()[..., None]  # type: ignore[index]
        ).flatten(1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert is_quantized(folder)
    loaded = load_quantized(folder)
    with torch.no_grad():
        assert (loaded(input_ids=IDS).logits - model(input_ids=IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_written_for_others(bits: int, tiny: Tiny, tmp_path: Path) -> None:
    """Unpacked slowly, entry by entry, and by danlu itself."""
    model = quantize_model(tiny("llama", hidden_size=64, intermediate_size=128), bits, group_size=32, symmetric=True)
    folder = save_quantized(model, None, tmp_path / "gptq", layout="gptq")
    config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    assert (config["quant_method"], config["bits"], config["sym"], config["desc_act"]) == ("gptq", bits, True, False)
    assert config["group_size"] == (32 if bits == 4 else -1)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    words, zeros, scales, groups = (state[f"{name}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx"))
    layer = model.get_submodule(name)
    count, mask = 32 // bits, 2**bits - 1
    exact = layer.dequantized()
    for n in (0, 5, layer.out_features - 1):
        for k in (0, 1, 9, layer.in_features - 1):
            code = (int(words[k // count, n]) >> (bits * (k % count))) & mask
            group = int(groups[k])
            zero = ((int(zeros[group, n // count]) >> (bits * (n % count))) & mask) + 1
            assert float(scales[group, n]) * (code - zero) == pytest.approx(float(exact[n, k]), rel=1e-3, abs=1e-6)
    loaded = load_quantized(folder)
    with torch.no_grad():
        near, far = loaded(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert (near - far).abs().max() < 0.01 * far.abs().max()


def test_zeros_cannot_be_written_for_others(tiny: Tiny, tmp_path: Path) -> None:
    model = quantize_model(tiny("llama"), 4, group_size=32)
    with pytest.raises(ModelError, match="GPTQ's layout"):
        save_quantized(model, None, tmp_path / "gptq", layout="gptq")
    assert list(tmp_path.iterdir()) == []


def test_a_packed_model_of_the_hub_is_opened_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny as small

    from danlu import assistant
    from danlu.models import quantize
    from danlu.models.load import load_model

    model = quantize.quantize_model(load_model(small.model()), 4, group_size=32, symmetric=True)
    folder = quantize.save_quantized(model, small.tokenizer(), tmp_path / "gptq", layout="gptq")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    monkeypatch.setattr(quantize, "raw_config", lambda name, local: config)
    monkeypatch.setattr(quantize, "_downloaded", lambda name: folder)
    for bits in (None, 4):
        loaded = assistant.load("hf:owner/name", bits=bits)
        assert any(isinstance(m, quantize.Int4Linear) for m in loaded.model.modules()) and loaded.tokenizer is not None
