"""Mixtures of experts in an engine: a token's bits do not depend on which experts other tokens are sent to.

An expert multiplies the rows that are sent to it, and a product of fewer than a few rows has other bits than a larger one. So
every expert that is used gets that many rows of zeros beside its own; they lie behind the others and are dropped.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn


def fill(model: nn.Module, rows: int) -> None:
    """Sees to at least `rows` rows in each product of the experts of a model in inference mode; a trainer that shares it, and
    whose readings are to have the bits of its updates, does without.
    """
    for module in model.modules():
        kind = type(module)
        if "top_k_index" in inspect.signature(kind.forward).parameters and not hasattr(kind, "danlu_rows"):
            module.__class__ = _filling(kind, rows)  # type: ignore[arg-type]


@functools.cache
def _filling(kind: type[nn.Module], rows: int) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not torch.is_inference_mode_enabled():
            out: Tensor = kind.forward(self, hidden_states, top_k_index, top_k_weights)
            return out
        tokens, choices = top_k_index.shape
        used = top_k_index.unique().repeat_interleave(-(-rows // choices))
        more = used[:, None].expand(-1, choices)
        filled: Tensor = kind.forward(
            self,
            torch.cat([hidden_states, hidden_states.new_zeros(len(used), hidden_states.shape[1])]),
            torch.cat([top_k_index, more]),
            torch.cat([top_k_weights, top_k_weights.new_zeros(more.shape)]),
        )
        return filled[:tokens]

    return type(kind.__name__, (kind,), {"forward": forward, "danlu_rows": rows, "__module__": kind.__module__})
