"""Embeddings and heads in 8 bits, for models of packed weights that answer and do not learn; they are not written to files.

At half a billion parameters a vocabulary of 150,000 is a quarter of all numbers, and its head is the largest product of a token.
Rows are rounded as `Int8Linear` has them; a head that is the embedding shares its codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danlu.models.packed import Int8Linear, pack_rows

Rows = Callable[[slice], Tensor]


class PackedEmbedding(nn.Module):
    """An embedding `[V, D]` of int8 rows.

    Args:
        table: its rows; may be the head, too.
        dtype: of the rows that are looked up; it follows `.to(dtype)`.
    """

    def __init__(self, table: Int8Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = table
        self._like: Tensor
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=table.scale.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The codes `[V, D]`: they say how many rows there are, how wide, and on which device."""
        return self.table.weight_int8

    @property
    def dtype(self) -> torch.dtype:
        """Of what is looked up."""
        return self._like.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `[..., D]` of ids `[...]`."""
        return (self.weight[ids].float() * self.table.scale[ids].unsqueeze(-1)).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, bits=8"


class Tables:
    """A model's embedding and head by name, to be packed in place, one after the other, as their weights come.

    There are none where the embedding is of a class of its own (Gemma's scales what it looks up) or the head no linear layer.

    Attributes:
        embedding, head: names of modules, or "".
        tied: they are the same numbers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        known = type(embedding) is nn.Embedding and embedding.max_norm is None and type(head) is nn.Linear
        named = {id(m): n for n, m in model.named_modules()} if known else {}
        self.embedding, self.head = named.get(id(embedding), ""), named.get(id(head), "")
        self.tied = known and head.weight is embedding.weight

    def take(self, parameter: str) -> bool:
        """Whether a parameter is the weight of one of them, so that `put` is to have it."""
        owner, _, leaf = parameter.rpartition(".")
        return bool(owner) and leaf == "weight" and owner in (self.embedding, self.head)

    def put(self, parameter: str, shape: Sequence[int], rows: Rows, dtype: torch.dtype) -> None:
        """Packs the embedding or the head by its weight; a tied head comes with the embedding.

        Args:
            shape: `[V, D]`.
            rows: reads some of its rows.
            dtype: of the computation.
        """
        owner = parameter.rpartition(".")[0]
        if owner == self.embedding:
            table = pack_rows(shape, rows, None)
            _replace(self.model, owner, PackedEmbedding(table, dtype))
            if self.tied:
                table.bias = self._bias()
                _replace(self.model, self.head, table)
        elif not self.tied:
            _replace(self.model, owner, pack_rows(shape, rows, self._bias()))

    def missing(self) -> list[str]:
        """The bias of a packed head that has not come."""
        head = self.model.get_submodule(self.head) if self.head else None
        unread = isinstance(head, Int8Linear) and head.bias is not None and head.bias.is_meta
        return [f"{self.head}.bias"] if unread else []

    def _bias(self) -> Tensor | None:
        """Of the head as it is, on the meta device where it is not read yet."""
        bias: Tensor | None = self.model.get_submodule(self.head).bias
        return None if bias is None else bias.detach()


def pack_tables(model: Any) -> None:
    """Packs the embedding and the head of a model that will only answer, in place, where that can be."""
    tables = Tables(model)
    for owner in filter(None, (tables.embedding, "" if tables.tied else tables.head)):
        weight = model.get_submodule(owner).weight.detach()
        tables.put(f"{owner}.weight", weight.shape, weight.__getitem__, weight.dtype)


def unpack_tables(model: Any, parameters: Iterable[str]) -> None:
    """Makes a packed embedding or head an ordinary layer of the same values, where an adapter is about to change it.

    Where they are the same numbers, both become ordinary and share them.

    Args:
        parameters: names of the adapter's, in which those of modules occur.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, PackedEmbedding):
        return
    names = {m: n for n, m in model.named_modules(remove_duplicate=False) if not n.endswith(".table")}
    changed = [m for m in (embedding, head) if any(f".{names[m]}." in parameter for parameter in parameters)]
    if changed and embedding.table is head:
        changed = [embedding, head]
    whole: dict[nn.Module, nn.Parameter] = {}
    for layer in changed:
        table = embedding.table if layer is embedding else head
        if table not in whole:
            whole[table] = nn.Parameter(table.dequantized(embedding.dtype), requires_grad=False)
        _replace(model, names[layer], _ordinary(layer, whole[table]))


def _ordinary(layer: Any, weight: nn.Parameter) -> nn.Module:
    """An embedding or a linear layer with this weight."""
    made: Any
    if isinstance(layer, PackedEmbedding):
        made = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    else:
        made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        made.bias = None if layer.bias is None else nn.Parameter(layer.bias, requires_grad=False)
    made.weight = weight
    ordinary: nn.Module = made
    return ordinary


def _replace(model: Any, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
