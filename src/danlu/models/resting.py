"""Frozen weights, kept in the dtype of the products they take part in.

Under autocast a product rounds its weights to 16 bits, whatever they are kept in, and does so again in every step. Weights that do
not learn can as well be kept rounded: the results are the same numbers, in half the memory. What stands outside of products
(norms, scalar heads, whatever learns) stays fp32, and so does the stream between the layers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from danlu.models.heads import SCALAR_HEADS
from danlu.models.packed_tables import PackedEmbedding


def rest(model: Any, dtype: torch.dtype) -> bool:
    """Keeps the frozen weights of linear layers and embeddings in `dtype`, in place; all other numbers become fp32.

    An embedding rests only where its numbers are such in `dtype` already: it is looked up, and no product would round it.

    Args:
        model: frozen, or with adapters (which keep learning in fp32).
        dtype: of products; float32 makes everything fp32.

    Returns:
        Whether a weight was rounded, so that the model is no longer what its folder holds.
    """
    resting = _resting(model, dtype) if dtype != torch.float32 else set()
    rounded = False
    for parameter in model.parameters():
        if id(parameter) in resting:
            rounded = rounded or not _holds(parameter, dtype)
            parameter.data = parameter.data.to(dtype)
        elif parameter.is_floating_point():
            # A copy: a tensor that still lay in a mapped file would keep all of that in memory.
            parameter.data = parameter.data.to(torch.float32, copy=True)
    model.base_model.danlu_rests = dtype if resting else None
    return rounded


def _resting(model: Any, dtype: torch.dtype) -> set[int]:
    """The weights that can rest, by `id`; embeddings among them give fp32 from now on."""
    found: set[int] = set()
    for name, module in model.named_modules():
        frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
        scalar = any(part in (*SCALAR_HEADS, "scalar_heads") for part in name.split("."))
        if isinstance(module, nn.Linear | Conv1D) and frozen and not scalar:
            found.add(id(module.weight))
    for table in (m for m in model.modules() if isinstance(m, nn.Embedding)):
        # One of a class of its own may scale what it looks up, in the dtype of its weight.
        if type(table) is nn.Embedding and not table.weight.requires_grad and _holds(table.weight, dtype):
            table.register_forward_hook(_as_float)
            found.add(id(table.weight))
        else:
            found.discard(id(table.weight))  # a head that is the embedding, too
    return found


def rests(trunk: Any) -> bool:
    """Whether a trunk has weights that rest."""
    return getattr(trunk, "danlu_rests", None) is not None


def products(trunk: Any) -> AbstractContextManager[object]:
    """The context that a trunk whose weights rest can be run in."""
    if not rests(trunk):
        return nullcontext()
    return torch.autocast(next(trunk.parameters()).device.type, dtype=trunk.danlu_rests)


def embedded_dtype(trunk: Any) -> torch.dtype:
    """Of what a trunk's embedding gives to its layers."""
    embedding = trunk.get_input_embeddings()
    if isinstance(embedding, PackedEmbedding):
        return embedding.dtype
    found: torch.dtype = torch.float32 if _as_float in embedding._forward_hooks.values() else embedding.weight.dtype
    return found


def _holds(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.dtype == dtype or torch.equal(weight, weight.to(dtype).to(weight.dtype))


def _as_float(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.float()
