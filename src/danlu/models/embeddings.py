"""Rows of the embedding and of the output head for tokens that a tokenizer was extended by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danlu.exceptions import ModelError
from danlu.models.quantize import KEY


def grow_embeddings(model: Any, pieces: Mapping[int, Sequence[int]]) -> None:
    """Gives new tokens the mean of the rows of their old pieces, in place; `config.vocab_size` follows.

    So the model reads a new word as the average of what it read before. The output head gets the same means (and its
    bias), whether it is tied to the embedding or not. Rows that the model has to spare beyond its tokenizer are used first.

    Args:
        model: a transformers model.
        pieces: new id to old ids.

    Raises:
        ModelError: the model has no rows for the old ids, or they are quantised.
    """
    if not pieces:
        return
    embedding = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    oldest = min(pieces)
    used = max(i for ids in pieces.values() for i in ids)
    if used >= min(rows, oldest):
        raise ModelError(
            f"token {used} has no row in the embedding, which has {rows}", hint="the tokenizer belongs to another model"
        )
    if not embedding.weight.is_floating_point():
        raise ModelError("the embedding is quantised", hint="extend the model that it was made from")
    if max(pieces) >= rows:
        model.resize_token_embeddings(max(pieces) + 1, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        _fill(embedding.weight, pieces)
        if head is not None:
            if head.weight is not embedding.weight:
                _fill(head.weight, pieces)
            if getattr(head, "bias", None) is not None:
                _fill(head.bias, pieces)


def _fill(weight: Tensor | nn.Parameter, pieces: Mapping[int, Sequence[int]]) -> None:
    means = [weight[list(ids)].float().mean(dim=0) for ids in pieces.values()]
    weight[list(pieces)] = torch.stack(means).to(weight.dtype)


def holds_bfloat16(model: str | Path) -> bool:
    """Whether a folder's weights are bfloat16 ones; not of an adapter, a quantised model or a hub id."""
    file = Path(model) / "config.json"
    if not file.is_file():
        return False
    config = json.loads(file.read_text("utf-8"))
    if KEY in config or config.get("quantization_config") or config.get("quantization_bit"):
        return False
    return stored_dtype(model) == torch.bfloat16


def stored_dtype(model: str | Path) -> torch.dtype:
    """The dtype of a model's weights as its configuration says; float32 if it does not.

    Args:
        model: a folder, or a hub id.

    Raises:
        ModelError: the weights are quantised.
    """
    file = Path(model) / "config.json"
    if file.is_file():
        config = json.loads(file.read_text("utf-8"))
    else:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(model), trust_remote_code=False).to_dict()
    if KEY in config or config.get("quantization_config"):
        raise ModelError("the model is quantised", file=model, hint="extend the model that it was made from")
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32
