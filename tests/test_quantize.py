"""Weight-only int8: error bound, what is written is what is loaded, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny as small
import torch
from families import make
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from danlu.cli.main import run
from danlu.exceptions import ModelError
from danlu.models.load import save_model
from danlu.models.quantize import (
    FILE,
    Int8Linear,
    is_quantized,
    load_quantized,
    quantize_model,
    quantize_rows,
    save_quantized,
)
from danlu.pipeline.footprint import shape_of_folder

Tiny = Callable[..., Any]
Near = Callable[..., None]
IDS = torch.tensor([[5, 9, 30, 7, 44]])
ROW = st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def folder_size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


@given(st.lists(ROW, min_size=1, max_size=4))
def test_round_trip_is_within_half_a_step(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows)
    q, scale = quantize_rows(weight)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and int(q.abs().max()) <= 127
    error = (q.float() * scale[:, None] - weight).abs()
    largest = weight.abs().amax(1, keepdim=True)
    rounded = 127 * 2.0**-150  # what a scale below fp32's normal range may be off by, for the largest q
    assert (error <= largest / 254 * 1.0001 + rounded).all()  # steps of max / 127


def test_rows_by_hand() -> None:
    # Row 1: scale 254 / 127 = 2, so -254, 3, 100 -> -127, 2 (1.5 to even), 50. Row 2: zeros keep scale 1.
    q, scale = quantize_rows(torch.tensor([[-254.0, 3.0, 100.0], [0.0, 0.0, 0.0]]))
    assert q.tolist() == [[-127, 2, 50], [0, 0, 0]] and scale.tolist() == [2.0, 1.0]


def test_linear_computes_with_the_rounded_weights(near: Near) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(s, generator=generator) for s in ((6, 4), (6,), (3, 4)))
    q, scale = quantize_rows(weight)
    layer = Int8Linear(q, scale, bias)
    near(layer(x), x @ (q.float() * scale[:, None]).T + bias)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_quantised_model_is_near_the_exact_one(tiny: Tiny) -> None:
    exact, model = tiny("llama"), quantize_model(tiny("llama"))
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == 14
    assert isinstance(model.lm_head, torch.nn.Linear)
    error = (logits(model) - logits(exact)).abs().max() / logits(exact).abs().max()
    assert 0 < error < 0.03


@pytest.mark.parametrize("family", ["llama", "qwen3", "bloom"])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_equals_loaded(family: str, tied: bool, tiny: Tiny, tmp_path: Path) -> None:
    model = quantize_model(tiny(family, tie_word_embeddings=tied))
    folder = save_quantized(model, None, tmp_path / "int8")
    assert is_quantized(folder) and not (tmp_path / "int8.partial").exists()
    loaded = load_quantized(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    stored = load_file(folder / FILE)
    assert ("lm_head.weight" in stored) is not tied
    assert {t.dtype for n, t in stored.items() if n.endswith("weight_int8")} == {torch.int8}


def test_int8_is_a_quarter_of_fp32(tiny: Tiny, tmp_path: Path) -> None:
    options = {"hidden_size": 128, "intermediate_size": 512}
    plain = save_model(tiny("llama", **options), None, tmp_path / "plain")
    small = save_quantized(quantize_model(tiny("llama", **options)), None, tmp_path / "int8")
    assert not is_quantized(plain)
    assert folder_size(small) < 0.3 * folder_size(plain)


def test_loading_in_bf16(tiny: Tiny, tmp_path: Path) -> None:
    folder = save_quantized(quantize_model(tiny("llama")), None, tmp_path / "int8")
    loaded = load_quantized(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {b.dtype for n, b in loaded.named_buffers() if n.endswith(".scale")} == {torch.float32}
    exact = logits(load_quantized(folder))
    assert (logits(loaded).float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_quantising_twice_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = quantize_model(tiny("llama"))
    with pytest.raises(ModelError, match="already"):
        quantize_model(model)
    with pytest.raises(ModelError, match="already"):
        quantize_model(load_quantized(save_quantized(model, None, tmp_path / "int8")))


def test_models_without_linear_layers_are_refused(tiny: Tiny) -> None:
    model = tiny("llama")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="LlamaForCausalLM has no linear layers"):
        quantize_model(model)


def test_an_older_folder_is_replaced(tiny: Tiny, tmp_path: Path) -> None:
    save_quantized(quantize_model(tiny("llama", seed=1)), None, tmp_path / "int8")
    (tmp_path / "int8" / "leftover").touch()
    (tmp_path / "int8.partial").mkdir()
    model = quantize_model(tiny("llama"))
    folder = save_quantized(model, None, tmp_path / "int8")
    assert torch.equal(logits(load_quantized(folder)), logits(model))
    assert not (folder / "leftover").exists()


@pytest.mark.parametrize("odd", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight_int8", "extra"])
def test_weights_that_do_not_fit_are_refused(odd: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = save_quantized(quantize_model(tiny("llama")), None, tmp_path / "int8")
    state = load_file(folder / FILE)
    state = {**state, odd: torch.zeros(1)} if odd == "extra" else {n: t for n, t in state.items() if n != odd}
    save_file(state, folder / FILE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not fit"):
        load_quantized(folder)


def test_config_of_another_shape_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = save_quantized(quantize_model(tiny("llama")), None, tmp_path / "int8")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), "utf-8")
    with pytest.raises(ModelError, match="do not fit"):
        load_quantized(folder)


def test_experts_that_stay_whole_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = small.tokenizer()
    model = make("qwen3_moe", vocab_size=len(tokenizer))
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    folder = save_model(model, tokenizer, tmp_path / "moe")
    assert run(["quantize", str(folder), "--bits", "4", "--out", str(tmp_path / "out")]) == 0
    assert "the experts of this mixture stay in 16 bits: 0.0 MB" in capfd.readouterr().err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))
    assert manifest["facts"]["bytes_of_experts"] == 2 * experts > 0
    shape = shape_of_folder(str(folder))
    assert shape is not None and (shape.tables, shape.experts) == (2 * shape.head, experts)
