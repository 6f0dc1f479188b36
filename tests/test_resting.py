"""Frozen weights in the dtype of products: the same numbers, in half the memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, make
from safetensors.torch import load_file
from torch import Tensor

from danlu.config import KINDS
from danlu.models.load import load_model, save_model
from danlu.models.resting import embedded_dtype, rest
from danlu.models.roles import AdapterRoles, SeparateModels
from danlu.models.root import RootModel
from danlu.parsing import parse
from danlu.trainers import sft
from danlu.training.logprobs import logprobs
from danlu.tree import TreeBatch, branches, conversation, forest


def _tree() -> TreeBatch:
    return TreeBatch.of(forest([branches([5, 6, 7], [[8, 9], [10, 3, 4]]), conversation([4, 5, 6, 7], [1.0] * 4)]))


def _read(root: RootModel, role: Any = "policy") -> tuple[Tensor, dict[str, Tensor]]:
    root.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = root(_tree(), role, lambda out: logprobs(out, out.tree.loss_index()))
    if found.requires_grad:
        found.sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in root.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_resting_base_gives_the_same_bits_under_autocast(family: str) -> None:
    roles = AdapterRoles(make(family), ["policy", "ref"])
    for name, parameter in roles.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    root = RootModel(roles).eval()
    before, gradients = _read(root)
    reference, _ = _read(root, "ref")
    assert rest(roles.base, torch.bfloat16), "random fp32 weights have more digits"
    after, again = _read(root)
    assert torch.equal(before, after)
    assert torch.equal(reference, _read(root, "ref")[0])
    assert gradients.keys() == again.keys() and all(torch.equal(gradients[n], again[n]) for n in gradients)
    assert all(p.dtype == torch.float32 for p in root.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_products_rest_and_what_is_outside_of_them_does_not(family: str) -> None:
    model = make(family).requires_grad_(False)
    assert rest(model, torch.bfloat16)
    inside = [m for m in model.base_model.modules() if hasattr(m, "weight") and m.weight.dim() == 2]
    products = [m for m in inside if not isinstance(m, torch.nn.Embedding)]
    assert products and all(m.weight.dtype == torch.bfloat16 for m in products)
    norms = [p for p in model.parameters() if p.dim() == 1 and p.dtype == torch.float32]
    assert norms, "norms stay exact"
    assert model.get_input_embeddings().weight.dtype == torch.float32, "a table of fp32 numbers would be rounded"
    assert embedded_dtype(model.base_model) == torch.float32


def test_a_table_of_bf16_numbers_rests_and_gives_fp32() -> None:
    model = make("llama", tie_word_embeddings=True).bfloat16().requires_grad_(False)
    exact = make("llama", tie_word_embeddings=True).bfloat16().float()
    assert not rest(model, torch.bfloat16), "nothing was rounded"
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.get_input_embeddings()(torch.tensor([3])).dtype == embedded_dtype(model.base_model) == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    roots = [RootModel(SeparateModels({"policy": m}, [])).eval() for m in (exact, model)]
    assert torch.equal(_read(roots[0])[0], _read(roots[1])[0])


def test_in_float32_everything_is_float32() -> None:
    model = make("llama").bfloat16()
    assert not rest(model, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_scalar_head_stays_exact(tmp_path: Path) -> None:
    model = load_model(tiny.reward_model(), scalar=True).requires_grad_(False)
    rest(model, torch.bfloat16)
    assert model.score.weight.dtype == torch.float32


def _trained(model: Path, out: Path) -> Path:
    settings = {"model": str(model), "data": str(tiny.data()["conversations"]), "out": str(out), "adapter": "lora"}
    settings |= {
        "dtype": "bfloat16",
        "max_steps": 2,
        "tokens_per_step": 128,
        "learning_rate": 1e-3,
        "eval_fraction": 0.0,
    }
    return Path(sft.train(parse(KINDS["sft"], settings)).model)


def test_what_is_merged_is_added_to_the_exact_weights(tmp_path: Path) -> None:
    base = load_file(tiny.model() / "model.safetensors")
    merged = load_file(_trained(tiny.model(), tmp_path / "out") / "model.safetensors")
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text("utf-8"))
    name = "model.layers.0.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    expected = base[f"{name}.weight"] + config["lora_alpha"] / config["r"] * (b @ a)
    assert merged[f"{name}.weight"].dtype == torch.float32
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-7)
    assert not torch.equal(merged[f"{name}.weight"], base[f"{name}.weight"])
    name = "model.embed_tokens.weight"
    assert torch.equal(merged[name], base[name]), "what has no adapter is what it was"


def test_a_base_of_bf16_numbers_trains_as_the_same_numbers_in_fp32(tmp_path: Path) -> None:
    low = load_model(tiny.model()).bfloat16()
    tokenizer = tiny.tokenizer()
    folders = [save_model(low, tokenizer, tmp_path / "low"), save_model(low.float(), tokenizer, tmp_path / "high")]
    found = [load_file(_trained(f, tmp_path / f"out-{f.name}") / "model.safetensors") for f in folders]
    for name, value in found[0].items():
        # The adapter's first numbers are drawn in the base's dtype.
        torch.testing.assert_close(value.float(), found[1][name], rtol=0, atol=2e-3, msg=name)
