"""LoRA's product in few operations: `x W^T + s (x A^T) B^T` with the input rounded once.

PEFT's own forward pass keeps the adapter's input in fp32, so that under autocast it is copied and rounded again for every layer,
and adds the two products in two further passes. Here both products read one rounded input, and the second is added where it is
made.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


def install(model: nn.Module) -> int:
    """Gives PEFT's LoRA layers the lean forward pass; returns how many. Parameters stay what they are."""
    from peft.tuners.lora.layer import Linear

    layers: list[Any] = [m for m in model.modules() if isinstance(m, Linear)]
    for layer in layers:
        if not getattr(type(layer), "danlu_lean", False):
            layer.__class__ = _lean(type(layer))  # type: ignore[arg-type]
    return len(layers)


@functools.cache
def _lean(kind: Any) -> type[nn.Module]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = _only_adapter(self) if not args and not kwargs else None
        device = x.device.type
        rounded = torch.is_autocast_enabled(device)
        if name is None or not (rounded or x.dtype == self.lora_A[name].weight.dtype):
            out: Tensor = kind.forward(self, x, *args, **kwargs)
            return out
        low = x.to(torch.get_autocast_dtype(device)) if rounded else x
        plain: Tensor = self.base_layer(low)
        first, second = self.lora_A[name].weight, self.lora_B[name].weight
        with torch.autocast(device, enabled=False):
            rows = plain.reshape(-1, plain.shape[-1])
            found: Tensor = _Added.apply(rows, low.reshape(-1, low.shape[-1]), first, second, self.scaling[name])
        return found.view(plain.shape)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "danlu_lean": True})


def _only_adapter(layer: Any) -> str | None:
    """The adapter that takes part, if it is one, plain (no DoRA, no dropout now) and not merged."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [n for n in layer.active_adapters if n in layer.lora_A]
    if len(names) != 1:
        return None
    name: str = names[0]
    dropout = layer.lora_dropout[name]
    drops = layer.training and not isinstance(dropout, nn.Identity)
    plain = name not in layer.lora_variant and layer.lora_B[name].bias is None and layer.lora_A[name].bias is None
    return name if plain and not drops else None


class _Added(torch.autograd.Function):
    """`plain + s (rows A^T) B^T`: plain [T, N], rows [T, K] in one dtype; A [r, K] and B [N, r] in any, and so their gradients."""

    @staticmethod
    def forward(ctx: Any, plain: Tensor, rows: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
        dtype = rows.dtype
        a, b = first.to(dtype), second.to(dtype).mul(scale)
        inner = rows @ a.T
        ctx.save_for_backward(rows, inner, a, b)
        ctx.scale, ctx.dtypes = scale, (first.dtype, second.dtype)
        return torch.addmm(plain, inner, b.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, a, b = ctx.saved_tensors
        grad, needs = grads[0], ctx.needs_input_grad
        low = grad.to(rows.dtype)
        grad_inner = low @ b
        grad_a = (grad_inner.T @ rows).to(ctx.dtypes[0]) if needs[2] else None
        grad_b = (low.T @ inner).to(ctx.dtypes[1]).mul_(ctx.scale) if needs[3] else None
        return grad if needs[0] else None, grad_inner @ a if needs[1] else None, grad_a, grad_b, None
