"""LoRA on quantised layers (QLoRA, Dettmers et al. 2023): `y = Wq x + s B A x`, gradients flow through `Wq` to its input.

PEFT knows linear layers with weights. Layers of `quantize.py` have none: they hold packed numbers and say how many features go
in and out. bitsandbytes' layers are PEFT's own business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


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


class QuantizedLora(Linear):  # type: ignore[misc,unused-ignore]
    """A quantised layer with LoRA beside it, unmerged."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **options)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **options: Any) -> None:
        """PEFT's, which looks for a weight to find the device by."""
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)
        device = next(b for b in self.get_base_layer().buffers()).device
        self.lora_A[adapter_name].to(device)
        self.lora_B[adapter_name].to(device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Packed numbers cannot take an update; `dense_weight` can."""
        raise NotImplementedError("a quantised layer cannot be merged in place")


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
