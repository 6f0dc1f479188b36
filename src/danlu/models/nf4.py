"""Weights in NF4 (Dettmers et al. 2023, section 3): 16 values that are quantiles of a normal distribution, by bitsandbytes.

For bases that adapters are trained on, where bitsandbytes is installed; it computes on CUDA and on CPUs. Stored of a weight are its
codes, two in a byte, and the largest value of each 64 numbers: 4.5 bits a number in all.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from danlu.exceptions import ModelError
from danlu.models.packed import PackedLinear
from danlu.models.quantized_layers import linear_layers, replace, weight_of

BLOCK: Final = 64  # numbers that share a scale, along the rows one after the other; the paper's


def library() -> Any:
    """bitsandbytes' functions.

    Raises:
        ModelError: it is not installed, or does not work on this machine.
    """
    try:
        from bitsandbytes import functional
    except (ImportError, OSError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"a base in NF4 needs bitsandbytes, which cannot be used here ({first})",
            hint="pip install bitsandbytes, or base_format: rounded, danlu's own 4 bits, which need nothing",
        ) from error
    return functional


class Nf4Linear(PackedLinear):
    """A linear layer whose weight is kept in NF4 and made whole for each product, also in the backward pass.

    Args:
        weight_nf4: bitsandbytes' codes, uint8 `[B * 32, 1]`.
        scale: fp32 `[B]`, the largest absolute value of each block.
        code: fp32 `[16]`, the values that codes stand for.
        bias: `[N]` or None.
    """

    bits = 4

    def __init__(
        self, weight_nf4: Tensor, scale: Tensor, code: Tensor, shape: tuple[int, int], bias: Tensor | None
    ) -> None:
        super().__init__(shape[0], shape[1], scale, None, bias, None)
        self.weight_nf4: Tensor
        self.code: Tensor
        self.register_buffer("weight_nf4", weight_nf4)
        self.register_buffer("code", code)

    def codes_as_stored(self) -> Tensor:
        return self.weight_nf4

    def stored(self, dtype: torch.dtype) -> Tensor:
        functional = library()
        state = functional.QuantState(
            absmax=self.scale,
            shape=torch.Size((len(self.scale), BLOCK)),
            code=self.code.float(),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
        found: Tensor = functional.dequantize_4bit(self.weight_nf4, state)
        return found.flatten()[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def product(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.stored(rows.dtype))


@torch.no_grad()
def pack_nf4(weight: Tensor, bias: Tensor | None) -> Nf4Linear:
    """A layer of a weight `[N, K]`.

    Raises:
        ModelError: bitsandbytes cannot be used.
    """
    flat = weight.float().flatten()
    # As rows of one block each: with rows of other lengths bitsandbytes 0.50 gives blocks the scales of others on a CPU.
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    codes, state = library().quantize_4bit(blocks, blocksize=BLOCK, quant_type="nf4")
    return Nf4Linear(codes, state.absmax, state.code, (weight.shape[0], weight.shape[1]), bias)


def quantize_nf4(model: Any) -> Any:
    """Replaces the linear layers of the trunk by ones in NF4, in place.

    Raises:
        ModelError: bitsandbytes cannot be used, or there is nothing to quantise.
    """
    for name, linear in linear_layers(model).items():
        bias: Any = linear.bias
        replace(model, name, pack_nf4(weight_of(linear), None if bias is None else bias.detach()))
    return model
