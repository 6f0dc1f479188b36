"""ChatGLM's published int8 and int4 weights: one scale per output row, `w ~ scale * q`, q in [-127, 127] or [-7, 7].

`X.weight` is int8 `[out, in]`, or `[out, in / 2]` where a byte holds two columns: the high nibble the even one, the low
nibble the odd one, each in two's complement. `X.weight_scale` is fp16 `[out]`. The four linear layers of each block are
quantised; embeddings, norms and the output layer are not. Weights stay packed in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from danlu.exceptions import ModelError

LARGEST = {8: 127, 4: 7}
LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def pack_nibbles(values: Tensor) -> Tensor:
    """int8 values in [-8, 7] `[out, in]` -> int8 `[out, in / 2]`; `in` is even."""
    low = values[:, 1::2] & 15
    return (values[:, ::2] << 4) | low


def unpack_nibbles(packed: Tensor) -> Tensor:
    """int8 `[out, n]` -> int8 values in [-8, 7] `[out, 2 n]`."""
    even = packed >> 4  # arithmetic: the sign comes along
    odd = (packed << 4) >> 4
    return torch.stack([even, odd], dim=2).flatten(1)


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(weight as the layer holds it, fp16 scale `[out]`) of a float weight `[out, in]`.

    `scale = max|row| / (2^(bits-1) - 1)`, rounded to fp16 before it divides; a row of zeros has scale 0.

    Raises:
        ModelError: int4 and an odd number of columns.
    """
    exact = weight.detach().float()
    scale = (exact.abs().amax(dim=1) / LARGEST[bits]).half()
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    # fp16 may round the scale down so far that the largest entry would not fit.
    values = torch.round(exact / divisor[:, None]).clamp_(-LARGEST[bits] - 1, LARGEST[bits]).to(torch.int8)
    if bits == 8:
        return values, scale
    if values.shape[1] % 2:
        raise ModelError(f"int4 packs two columns in a byte, and this weight has {values.shape[1]}")
    return pack_nibbles(values), scale


class _Product(torch.autograd.Function):
    """`x W^T` whose backward pass makes the weight again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: ChatGlmQuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return nn.functional.linear(x, layer.dequantized().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dequantized().to(grads[0].dtype), None


class ChatGlmQuantizedLinear(nn.Module):
    """A linear layer over packed weights; the product runs in the dtype of its input.

    Args:
        in_features, out_features: as of `nn.Linear`.
        bits: 8 or 4.
        bias: whether there is one. All are buffers: nothing of the layer learns, and adapters know it by that.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool) -> None:
        super().__init__()
        if bits not in LARGEST:
            raise ModelError(f"quantization_bit is {bits}; ChatGLM has 8 and 4", field="quantization_bit")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        columns = in_features * bits // 8
        self.register_buffer("weight", torch.zeros(out_features, columns, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def of(cls, linear: nn.Linear, bits: int) -> Self:
        """The quantised form of a linear layer, on its device."""
        made = cls(linear.in_features, linear.out_features, bits, linear.bias is not None)
        made.weight, made.weight_scale = quantize_rows(linear.weight, bits)
        made.bias = linear.bias.detach() if linear.bias is not None else None
        return made

    def dequantized(self) -> Tensor:
        """The weight `[out, in]` in fp16, rounded as the original kernels round it."""
        values = self.weight if self.bits == 8 else unpack_nibbles(self.weight)
        return values.half() * self.weight_scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with the model, but a change of its dtype does not reach the scale: bf16 would lose three of its bits."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float16:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def linear_layers(blocks: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of a model's blocks that ChatGLM quantises: (parent, its name there, layer)."""
    found = []
    for parent in blocks.modules():
        for name, child in parent.named_children():
            if name in LAYERS and isinstance(child, nn.Linear):
                found.append((parent, name, child))
    return found


def put_empty(blocks: nn.Module, bits: int) -> None:
    """Puts quantised layers without values in place of the linear ones: what a quantised checkpoint is loaded into."""
    for parent, name, linear in linear_layers(blocks):
        bias = linear.bias is not None
        setattr(parent, name, ChatGlmQuantizedLinear(linear.in_features, linear.out_features, bits, bias))


def quantize_blocks(blocks: nn.Module, bits: int) -> None:
    """Quantises the linear layers of a model's blocks one after the other, so that at most one is held twice.

    Raises:
        ModelError: there are none; an adapter holds them, perhaps.
    """
    if bits not in LARGEST:
        raise ModelError(f"bits={bits}: ChatGLM's layout has 8 and 4")
    layers = linear_layers(blocks)
    if not layers:
        raise ModelError("there are no linear layers to quantise", hint="merge adapters first")
    for parent, name, linear in layers:
        setattr(parent, name, ChatGlmQuantizedLinear.of(linear, bits))
