"""Lean layers against transformers' own forward: results, gradients, and when they stand back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import make
from torch import Tensor

from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models import lean
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


def test_adapters_and_generation_take_transformers_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = lean._forward
    monkeypatch.setattr(lean, "_forward", lambda *a: (calls.append(1), own(*a))[1])
    root, model = built("llama", own=True)
    step(root, model)
    assert len(calls) == 2  # layers
    engine = LocalEngine(model)
    calls.clear()  # preparing tries the trunk
    generate(engine, [Request([5, 6, 7], SamplingParams(max_new_tokens=2))])
    assert not calls
    adapters = RootModel(AdapterRoles(make("llama"), ["policy"]))
    calls.clear()
    adapters(TREE, "policy", lambda out: out.hidden_TD)
    assert not calls


def test_other_activations_keep_transformers_forward() -> None:
    model = prepare(make("llama", hidden_act="gelu"))
    assert all(type(layer) in lean.LAYERS for layer in model.model.layers)
    assert prepare(make("qwen3")).base_model.danlu_fast_path


def test_parameters_stay_what_they_are() -> None:
    model = make("llama")
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    prepare(prepare(model))
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before
    model.set_attn_implementation("eager")
    assert model(input_ids=torch.tensor([[3, 4]]), use_cache=True).past_key_values.get_seq_length() == 2
