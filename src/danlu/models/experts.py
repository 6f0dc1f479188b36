"""Mixtures of experts in an engine: a token's bits do not depend on which experts other tokens are sent to.

An expert multiplies the rows that are sent to it, and a product of fewer than a few rows has other bits than a larger one. So
every expert that is used gets what it lacks as rows of zeros; they lie behind the others and are dropped.

Elementwise functions take other code for what does not fill vector registers, at the end of a contiguous tensor. In a gate with
one column (the shared expert's of Qwen2-MoE) that depends on the number of rows; its column is handed on as one of two, which
has one code for all.
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
        elif kind is nn.Linear and module.out_features == 1:
            module.__class__ = _Gate


class _Gate(nn.Linear):
    """One column, of which every element is computed alike."""

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        return out.repeat_interleave(2, dim=-1)[..., :1] if torch.is_inference_mode_enabled() else out


@functools.cache
def _filling(kind: type[nn.Module], rows: int) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not torch.is_inference_mode_enabled():
            out: Tensor = kind.forward(self, hidden_states, top_k_index, top_k_weights)
            return out
        tokens, choices = top_k_index.shape
        sent = torch.bincount(top_k_index.flatten())
        missing = (rows - sent).clamp(min=0) * (sent > 0)
        beside = torch.arange(len(sent), device=sent.device).repeat_interleave(missing)
        # As many rows in all as fill whole vector registers, as the engine's own do.
        beside = torch.cat([beside, beside[-1:].expand(-len(beside) % (rows * choices))]).view(-1, choices)
        filled: Tensor = kind.forward(
            self,
            torch.cat([hidden_states, hidden_states.new_zeros(len(beside), hidden_states.shape[1])]),
            torch.cat([top_k_index, beside]),
            torch.cat([top_k_weights, top_k_weights.new_zeros(beside.shape)]),
        )
        return filled[:tokens]

    return type(kind.__name__, (kind,), {"forward": forward, "danlu_rows": rows, "__module__": kind.__module__})
