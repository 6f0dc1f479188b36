"""Lean layers against transformers' own forward: results, gradients, and when they stand back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make
from safetensors.torch import load_file
from torch import Tensor

from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models import lean
from danlu.models.load import save_model
from danlu.models.roles import AdapterRoles, SeparateModels
from danlu.models.root import RootModel, prepare
from danlu.training.compute import Compute
from danlu.training.step import accumulate, language_loss
from danlu.tree import TreeBatch, branches, conversation, forest

Near = Callable[..., None]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {},
    "qwen2": {},
}
TREE = TreeBatch.of(
    forest([conversation([5] * 3 + list(range(3, 20)), [1.0] * 20), branches([9, 8, 7], [[6, 5], list(range(20, 32))])])
)


def built(family: str, *, own: bool) -> tuple[RootModel, Any]:
    """A root with lean layers, or with those of transformers."""
    model = make(family.split("_")[0], **FAMILIES[family])
    root = RootModel(SeparateModels({"policy": model}, ["policy"]))
    assert all(type(layer) not in lean.LAYERS for layer in model.model.layers)
    if not own:
        for layer in model.model.layers:
            layer.__class__ = type(layer).__mro__[1]
    return root, model


def step(root: RootModel, model: Any, dtype: Any = "float32") -> tuple[float, dict[str, Tensor]]:
    total = float(TREE.loss_weight_T.sum())
    loss = accumulate(root, "policy", [(TREE, total)], language_loss, Compute("cpu", dtype, 1))["loss"]
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", ["", "norm", "q_proj", "up_proj", "bias", "embed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lean_layers_equal_transformers(family: str, frozen: str, near: Near) -> None:
    found = []
    for own in (True, False):
        root, model = built(family, own=own)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen or frozen not in name)
        found.append(step(root, model))
    (loss, grads), (plain_loss, plain) = found
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert grads.keys() == plain.keys()
    for name, gradient in plain.items():
        near(grads[name], gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_lean_layers_lose_no_more_to_bf16_than_transformers(family: str) -> None:
    exact_loss, exact = step(*built(family, own=True))

    def errors(own: bool) -> tuple[float, float]:
        loss, rough = step(*built(family, own=own), dtype="bfloat16")
        assert all(g.dtype == torch.float32 for g in rough.values())
        apart = [float((rough[n] - g).norm() / g.norm()) for n, g in exact.items()]
        return abs(loss - exact_loss) / exact_loss, sum(apart) / len(apart)

    (loss, grads), (plain_loss, plain_grads) = errors(True), errors(False)
    assert loss < max(2 * plain_loss, 2e-3) and grads < 1.2 * plain_grads


def test_adapters_take_transformers_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = lean._forward
    monkeypatch.setattr(lean, "_forward", lambda *a: (calls.append(1), own(*a))[1])
    root, model = built("llama", own=True)
    step(root, model)
    assert len(calls) == 2  # layers
    adapters = RootModel(AdapterRoles(make("llama"), ["policy"]))
    calls.clear()
    adapters(TREE, "policy", lambda out: out.hidden_TD)
    assert not calls


LONG = [Request([3 + (i * k) % 30 for i in range(40 + k)], SamplingParams(max_new_tokens=12, seed=k)) for k in range(6)]


@pytest.mark.parametrize("family", FAMILIES)
def test_lean_generation_equals_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    lean_layer = lean._generate
    monkeypatch.setattr(lean, "_generate", lambda *a: (calls.append(1), lean_layer(*a))[1])
    found = []
    for own in (True, False):
        engine = LocalEngine(built(family, own=True)[1])
        if not own:
            for layer in engine.model.model.layers:
                layer.__class__ = type(layer).__mro__[1]
        calls.clear()
        found.append(generate(engine, LONG))
        assert bool(calls) == own
    assert [c.ids for c in found[0]] == [c.ids for c in found[1]]
    for lean_one, plain in zip(*found, strict=True):
        assert lean_one.logprobs == pytest.approx(plain.logprobs, abs=1e-5)


def test_weights_that_lie_side_by_side_are_the_layers_own(tmp_path: Path, near: Near) -> None:
    root, model = built("qwen2", own=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = LocalEngine(model)
    first = generate(engine, LONG)
    layer = model.model.layers[0].self_attn
    assert layer.q_proj.weight.untyped_storage().data_ptr() == layer.v_proj.weight.untyped_storage().data_ptr()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) == sum(p.numel() * 4 for p in model.parameters()), "nothing is held twice"

    # New weights reach the products, also where a layer got other memory in between.
    engine.update_weights([(n, p * 1.5) for n, p in before.items()], 1)
    layer.k_proj.weight.data = layer.k_proj.weight.data.clone()
    other = make("qwen2")
    other.load_state_dict({n: p * 1.5 for n, p in before.items()})
    assert [c.ids for c in generate(engine, LONG)] == [c.ids for c in generate(LocalEngine(other), LONG)]
    engine.update_weights(before.items(), 2)
    assert [c.ids for c in generate(engine, LONG)] == [c.ids for c in first]

    # The model can still be saved, copied and trained.
    save_model(copy.deepcopy(model), None, tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[n], p) for n, p in before.items() if n in saved) and "model.norm.weight" in saved
    fresh, fresh_model = built("qwen2", own=True)
    fresh_model.load_state_dict(before)
    (loss, grads), (plain_loss, plain) = step(root, model), step(fresh, fresh_model)
    assert loss == plain_loss
    for name, gradient in plain.items():
        near(grads[name], gradient)


def test_other_activations_keep_transformers_forward() -> None:
    model = prepare(make("llama", hidden_act="gelu"))
    assert all(type(layer) in lean.LAYERS for layer in model.model.layers)
    assert prepare(make("qwen3")).base_model.danlu_fast_path


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_parameters_stay_what_they_are(family: str) -> None:
    model = make(family)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    kinds = [type(layer) for layer in prepare(model).model.layers]
    assert [type(layer) for layer in prepare(model).model.layers] == kinds
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before
    model.set_attn_implementation("eager")
    assert model(input_ids=torch.tensor([[3, 4]]), use_cache=True).past_key_values.get_seq_length() == 2
