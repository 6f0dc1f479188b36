"""Rows: the batch of objectives that token trees cannot express, and the root module that runs them.

A context that is read both ways, positions in two rows, an encoder beside a decoder: such inputs are whatever the family's
`forward` takes, one row a text, padded. Targets are aligned with the hidden states that predict them. Everything after the hidden
states, and the one normaliser, is as with trees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from danlu.models.heads import LogitRule, head_of, head_weights
from danlu.models.root import RoleName, Trunks
from danlu.tree import TreeBatch

Result = TypeVar("Result")


@dataclass(frozen=True)
class RowBatch:
    """inputs: arguments of the trunk; targets_R: int64, what is predicted at each of the R = B * T places of its hidden states,
    row by row; loss_weight_R: float32, 0 where nothing is learnt.
    """

    inputs: dict[str, Tensor]
    targets_R: Tensor
    loss_weight_R: Tensor

    @classmethod
    def empty(cls, tree: TreeBatch, encoder_decoder: bool) -> Self:
        """A row without loss, of a tree's tokens: for ranks that have nothing to do."""
        ids = tree.input_ids_T[None]
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if encoder_decoder else {})
        return cls(inputs, tree.input_ids_T, torch.zeros_like(tree.loss_weight_T))

    def loss_index(self) -> Tensor:
        """Places that carry loss."""
        return self.loss_weight_R.nonzero().squeeze(1)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return type(self)(inputs, self.targets_R.to(device), self.loss_weight_R.to(device))


@dataclass(frozen=True)
class RowsOutput:
    """What a `head_fn` gets.

    hidden_TD: hidden states `[R, D]` before the head; rows: the batch; linear: the head; rule: from its product to logits.
    """

    hidden_TD: Tensor
    rows: RowBatch
    linear: nn.Module
    rule: LogitRule

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, D]` and bias of the head, with its adapter."""
        return head_weights(self.linear, self.hidden_TD.dtype)


class OneModel(nn.Module):
    """The only role, "policy", as one model that trains all its weights; any family with a linear head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.requires_grad_(True)

    def trunk(self, role: RoleName) -> nn.Module:
        trunk: nn.Module = self.model.base_model
        return trunk

    def head(self, role: RoleName) -> Any:
        return head_of(self.model)


class RowsRoot(nn.Module):
    """The root for rows, as `RootModel` is for trees. `trunks` must be an `nn.Module` that also is a `Trunks`."""

    def __init__(self, trunks: nn.Module) -> None:
        super().__init__()
        self.trunks = trunks

    def forward(self, batch: RowBatch | TreeBatch, role: RoleName, head_fn: Callable[[RowsOutput], Result]) -> Result:
        """Runs the trunk on the rows and then `head_fn` on its output."""
        trunks: Trunks = self.trunks  # type: ignore[assignment]
        trunk: Any = trunks.trunk(role)
        encoder_decoder = bool(getattr(trunk.config, "is_encoder_decoder", False))
        if isinstance(batch, TreeBatch):
            batch = RowBatch.empty(batch, encoder_decoder)
        hidden = _encode_decode(trunk, batch.inputs) if encoder_decoder else _states(trunk, batch.inputs)
        return head_fn(RowsOutput(hidden.flatten(0, 1), batch, trunks.head(role), LogitRule.of(trunk.config)))


def _states(trunk: Any, inputs: dict[str, Tensor]) -> Tensor:
    hidden: Tensor = trunk(**inputs, use_cache=False).last_hidden_state
    return hidden


def _encode_decode(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What an encoder-decoder's head gets: T5 has no trunk beside its parts."""
    mask = inputs.get("attention_mask")
    source = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
    decoder = model.get_decoder()
    hidden: Tensor = decoder(
        input_ids=inputs["decoder_input_ids"],
        encoder_hidden_states=source,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    return hidden


@dataclass(frozen=True)
class ClassOutput:
    """hidden_TD: logits `[R, classes]` of a model with a classification head; rows: the batch; linear: that head."""

    hidden_TD: Tensor
    rows: RowBatch
    linear: nn.Module


class ClassRoot(nn.Module):
    """The root of models with a classification head: targets are classes of rows, or of tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: RowBatch | TreeBatch, role: RoleName, head_fn: Callable[[ClassOutput], Result]) -> Result:
        """Runs the model on the rows and then `head_fn` on its logits."""
        if isinstance(batch, TreeBatch):
            batch = RowBatch.empty(batch, False)
        logits: Tensor = self.model(**batch.inputs).logits
        return head_fn(ClassOutput(logits.flatten(0, -2), batch, next(reversed(list(self.model.children())))))
