"""Linear layers that quantising replaces, and those of packed numbers as others see them, such as adapters. Needs no PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from danlu.exceptions import ModelError
from danlu.models.packed import PackedLinear


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """The layers that quantising replaces, by name: linear ones (GPT-2's, too), but not the output head.

    Raises:
        ModelError: there are none, or the model is quantised already.
    """
    if any(isinstance(m, PackedLinear) for m in model.modules()):
        raise ModelError("the model is quantised already", hint="quantise the model it was made from")
    heads = [model.get_output_embeddings(), getattr(model, "score", None), getattr(model, "classifier", None)]
    found = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and not any(m is head for head in heads)
    }
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear layers that quantising knows how to replace")
    return found


def weight_of(linear: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight `[out, in]` of a linear layer; GPT-2's lie the other way."""
    given: Tensor = linear.weight.detach() if weight is None else weight  # type: ignore[operator]
    return given.T.contiguous() if isinstance(linear, Conv1D) else given


def replace(model: Any, name: str, layer: Any) -> None:
    """Puts a packed layer where another one was; one of GPT-2's becomes what it was when it is made dense again."""
    layer.danlu_transposed = isinstance(model.get_submodule(name), Conv1D)
    setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer of packed numbers: it has features, buffers and no weight that could learn."""
    features = hasattr(module, "in_features") and hasattr(module, "out_features")
    return (
        features
        and not isinstance(module, nn.Linear)
        and not any(True for _ in module.children())
        and not any(True for _ in module.parameters(recurse=False))
        and any(True for _ in module.buffers(recurse=False))
    )


def quantized_kinds(model: nn.Module) -> list[type[nn.Module]]:
    """The classes of a model's quantised layers."""
    return sorted({type(m) for m in model.modules() if is_quantized_layer(m)}, key=lambda kind: kind.__name__)


@contextmanager
def shown_to_peft(model: nn.Module) -> Iterator[None]:
    """Inside the block PEFT can put adapters on quantised layers: it looks for a tensor of theirs by the name `qweight`."""
    layers = [m for m in model.modules() if is_quantized_layer(m) and not hasattr(m, "qweight")]
    for layer in layers:
        # Past nn.Module, so that no state dict has it.
        object.__setattr__(layer, "qweight", next(layer.buffers()))
    try:
        yield
    finally:
        for layer in layers:
            object.__delattr__(layer, "qweight")


@torch.no_grad()
def dense_weight(layer: nn.Module) -> Tensor:
    """fp32 weight `[out, in]` that a quantised layer stands for: what it makes of the unit vectors."""
    if hasattr(layer, "dequantized"):
        known: Tensor = layer.dequantized(torch.float32)  # type: ignore[operator]
        return known
    like = next(b for b in layer.buffers())
    width: int = layer.in_features  # type: ignore[assignment]
    bias: Tensor | None = getattr(layer, "bias", None)
    rows = [layer(part) for part in torch.eye(width, device=like.device).split(1024)]
    found: Tensor = torch.cat(rows).float()
    return (found if bias is None else found - bias.float()).t().contiguous()


@torch.no_grad()
def dense_layer(layer: nn.Module, weight: Tensor) -> nn.Module:
    """An ordinary fp32 layer with this weight `[out, in]` and a quantised layer's bias; of GPT-2's kind where it was one."""
    wide: int = layer.in_features  # type: ignore[assignment]
    out: int = layer.out_features  # type: ignore[assignment]
    bias: Tensor | None = getattr(layer, "bias", None)
    made: Any
    if getattr(layer, "danlu_transposed", False):
        made = Conv1D(out, wide)
        made.weight.copy_(weight.t())
        made.bias.zero_()
    else:
        made = nn.Linear(wide, out, bias=bias is not None)
        made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    dense: nn.Module = made
    return dense


def forget_packing(config: Any) -> None:
    """Takes from a model's configuration what says that its weights are packed, in place."""
    if hasattr(config, "danlu_quantization"):
        del config.danlu_quantization
    if getattr(config, "quantization_bit", None):  # ChatGLM's
        config.quantization_bit = 0
