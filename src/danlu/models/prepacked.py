"""bf16 weights of small models in oneDNN's own layout, beside the plain ones, for generation on a CPU.

A product of few rows with plain weights spends more time laying them out than multiplying: in this layout it takes 0.5 to 0.7 of
the time (docs/log.md). The second copy is what that costs, so only models that fit `MOST_BYTES` get it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

MOST_BYTES = 256 << 20
TYPICAL_ROWS = 16
_NAME = "danlu_prepacked"


@dataclass
class _Packed:
    """The layout of one product's weights; made when it is first asked for, and again when a weight has changed."""

    key: tuple[tuple[int, int], ...] = ()
    weight: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def enable(products: Iterable[tuple[nn.Module, Sequence[nn.Linear]]]) -> bool:
    """Lets `linear` pack from now on, if it can and all weights are small enough together.

    Args:
        products: who owns a product, and the layers whose weights lie side by side in it.
    """
    found = list(products)
    weights = [layer.weight for _, layers in found for layer in layers]
    fits = sum(w.nbytes for w in weights) <= MOST_BYTES
    if not (fits and torch.backends.mkldnn.is_available()) or any(not _can_be_packed(w) for w in weights):
        return False
    for owner, _ in found:
        owner.__dict__[_NAME] = _Packed()
    return True


def forget(model: nn.Module) -> None:
    """Drops every packed weight; they are made again when they are needed."""
    for module in model.modules():
        packed = module.__dict__.get(_NAME)
        if packed is not None:
            packed.key, packed.weight = (), None


def disable(model: nn.Module) -> None:
    """As before `enable`."""
    for module in model.modules():
        module.__dict__.pop(_NAME, None)


def linear(owner: nn.Module, rows: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[nn.Linear]) -> Tensor:
    """`torch.nn.functional.linear(rows, weight, bias)`, with packed weights where `owner` may have them.

    Args:
        rows: `[T, K]`.
        weight: `[N, K]`, those of `parts` one below the other.
    """
    packed: _Packed | None = owner.__dict__.get(_NAME)
    if packed is None or rows.dtype != torch.bfloat16 or torch.is_grad_enabled():
        return nn.functional.linear(rows, weight, bias)
    key = tuple((p.weight.data_ptr(), p.weight._version) for p in parts)
    if packed.key != key:
        packed.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_ROWS)
        packed.key = key
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), packed.weight, bias, "none", [], "")
    return out


def _can_be_packed(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not weight.is_inference()
