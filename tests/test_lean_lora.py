"""The lean LoRA product against PEFT's own, in values and gradients."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from families import make
from torch import Tensor

from danlu.models.lean_lora import _Added, install


def _adapted(base: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft 0.21 reads an attribute that transformers 5.23 renamed
        model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _read(model: Any, *, low: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        logits = model(input_ids=torch.arange(3, 23).view(2, 10)).logits.float()
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


OPTIONS: list[dict[str, Any]] = [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.3}]


@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_are_those_of_peft(options: dict[str, Any]) -> None:
    plain = _adapted(make("llama"), **options).eval()
    lean = copy.deepcopy(plain)
    assert install(lean) == 4
    (expected, wanted), (found, own) = _read(plain, low=False), _read(lean, low=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert own.keys() == wanted.keys() and wanted
    for name, gradient in wanted.items():
        assert float((own[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_under_autocast_it_is_as_near_to_the_exact_numbers_as_peft(options: dict[str, Any]) -> None:
    """Rounding is noise: over several models."""
    off = torch.zeros(2, 2)  # [logits, gradients] x [lean, PEFT]
    for seed in range(4):
        plain = _adapted(make("llama", seed=seed), **options).eval()
        lean = copy.deepcopy(plain)
        install(lean)
        exact, exact_grads = _read(plain, low=False)
        for side, (found, own) in enumerate((_read(lean, low=True), _read(plain, low=True))):
            off[0, side] += float((found - exact).norm())
            off[1, side] += sum(float((own[n] - e).norm()) for n, e in exact_grads.items())
    assert (off[:, 0] <= 1.25 * off[:, 1]).all(), off


def test_dropout_while_training_is_left_to_peft() -> None:
    plain = _adapted(make("llama"), lora_dropout=0.5).train()
    lean = copy.deepcopy(plain)
    install(lean)
    torch.manual_seed(0)
    expected, _ = _read(plain, low=False)
    torch.manual_seed(0)
    assert torch.equal(_read(lean, low=False)[0], expected)


def test_a_disabled_adapter() -> None:
    base = make("llama")
    lean = _adapted(copy.deepcopy(base))
    install(lean)
    with lean.disable_adapter():
        found = lean(input_ids=torch.arange(3, 13)[None]).logits
    torch.testing.assert_close(found, base(input_ids=torch.arange(3, 13)[None]).logits)


def test_the_gradient_in_float64() -> None:
    torch.manual_seed(0)
    shapes = [(5, 6), (5, 4), (3, 4), (6, 3)]
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *x: _Added.apply(*x, 0.7), inputs)
