"""Virtual tokens before every tree, as a model reads them: P-Tuning v2 (Liu et al. 2021) and prompt tuning (Lester et al. 2021).

A prefix is what was learned: keys and values of every layer, or input embeddings that are read through the layers first. Either
becomes one `VirtualRoot`, whose keys and values every token of a batch attends to. So a batch holds a prefix once, however many
trees it has, and training, generation and both paths of attention treat the two kinds alike.

Axes: P virtual tokens, L layers, G key/value heads, K head width, D width of the input embeddings.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from danlu.exceptions import ModelError
from danlu.models.attention import TreePlan, VirtualRoot, planned_call
from danlu.models.resting import embedded_dtype
from danlu.tree import Node, TreeBatch

PrefixKind = Literal["ptuning", "prompt"]
NAME = (
    "danlu_prefix"  # the attribute of a trunk that holds its prefix, and the first part of the name in weight updates
)


@dataclass(frozen=True)
class PrefixShape:
    """What one position holds: in each of L layers G keys and G values of K numbers."""

    layers: int
    heads: int
    width: int

    @property
    def numbers(self) -> int:
        """2 * L * G * K."""
        return 2 * self.layers * self.heads * self.width


@dataclass(frozen=True)
class Prefix:
    """What was learned for the virtual tokens.

    Attributes:
        kind: "ptuning" or "prompt".
        states: "ptuning": `[P, 2 * L * G * K]`, keys of layer i in slot 2i and values in slot 2i + 1 of `[P, 2 * L, G, K]`, as PEFT
            and ChatGLM lay them out; "prompt": `[P, D]`.
        shape: of the model's keys and values.
        shift: whether the tokens' positions begin at P (PEFT) or at 0 (ChatGLM). A prompt's tokens have the positions before
            those of the text, so that there they always begin at P.
    """

    kind: PrefixKind
    states: Tensor
    shape: PrefixShape
    shift: bool = True

    @property
    def tokens(self) -> int:
        """P."""
        return len(self.states)

    @property
    def offset(self) -> int:
        """By how many positions tokens move."""
        return self.tokens if self.shift or self.kind == "prompt" else 0

    def detach(self) -> Prefix:
        """The same numbers without a history, in memory of their own."""
        return replace(self, states=self.states.detach().clone())

    def root(self, trunk: Any, role: str | None = None) -> VirtualRoot:
        """Keys and values, on the trunk's device; gradients flow back to `states`.

        Args:
            trunk: the transformer without head that will read them.
            role: whose adapter reads a prompt's embeddings.
        """
        embedding = trunk.get_input_embeddings().weight
        if self.kind == "prompt":
            return _read(trunk, self.states.to(embedding.device, embedded_dtype(trunk)), role)
        shape = self.shape
        each = self.states.to(embedding.device).view(self.tokens, 2 * shape.layers, shape.heads, shape.width)
        every = each.permute(1, 2, 0, 3).unbind(0)
        return VirtualRoot(every[0::2], every[1::2], self.offset)


def shape_of(trunk: Any) -> PrefixShape:
    """Found out by reading one token: configurations name these numbers in too many ways.

    Raises:
        ModelError: the layers differ, or keys and values do.
    """
    embedding = trunk.get_input_embeddings().weight
    with torch.no_grad():
        root = _read(
            trunk, torch.zeros(1, embedding.shape[1], dtype=embedded_dtype(trunk), device=embedding.device), None
        )
    found = {(x.shape[0], x.shape[2]) for x in (*root.keys, *root.values)}
    if len(found) != 1:
        raise ModelError(
            f"the layers of {type(trunk).__name__} keep keys and values of different shapes ({sorted(found)})",
            hint="a prefix needs one shape for all; take adapter: lora",
        )
    [(heads, width)] = found
    return PrefixShape(len(root.keys), heads, width)


class RootCache(DynamicCache):  # type: ignore[misc]
    """A virtual root as transformers' cache, for families whose attention takes no plan.

    It is read and never written, so that a layer that is recomputed finds what it found before.
    """

    def __init__(self, root: VirtualRoot, rows: int) -> None:
        every = zip(root.keys, root.values, strict=True)
        super().__init__([(k[None].expand(rows, -1, -1, -1), v[None].expand(rows, -1, -1, -1)) for k, v in every])
        self.read: set[int] = set()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, P + S, K]` of a layer: the root's and the given ones."""
        self.read.add(layer_idx)
        own: Any = self.layers[layer_idx]
        pairs = ((own.keys, key_states), (own.values, value_states))
        first, second = (torch.cat([before.to(x.dtype), x], dim=2) for before, x in pairs)
        return first, second

    def require_read(self, trunk: nn.Module) -> None:
        """Raises ModelError if a layer did not look: a prefix without effect would be trained and served in silence."""
        if len(self.read) != len(self.layers):
            raise ModelError(
                f"{len(self.layers) - len(self.read)} layers of {type(trunk).__name__} do not read keys and values that are "
                "given before the text",
                hint="take adapter: lora for this family",
            )


def _read(trunk: Any, states_PD: Tensor, role: str | None) -> VirtualRoot:
    """Keys and values that the layers make of input embeddings at positions 0 .. P - 1."""
    tokens = len(states_PD)
    places = torch.arange(tokens, device=states_PD.device)[None]
    with _kept_whole(trunk):
        if getattr(trunk, "danlu_fast_path", False):
            return _read_planned(trunk, states_PD, places, role)
        cache = DynamicCache()
        given = takes_positions(trunk) and not derives_positions(trunk)
        arguments = {"position_ids": places} if given else {}
        trunk(
            inputs_embeds=states_PD[None],
            attention_mask=torch.ones_like(places),
            past_key_values=cache,
            use_cache=True,
            **arguments,
        )
    layers: list[Any] = cache.layers
    return VirtualRoot([x.keys[0] for x in layers], [x.values[0] for x in layers], tokens)


def _read_planned(trunk: Any, states_PD: Tensor, places: Tensor, role: str | None) -> VirtualRoot:
    tokens = len(states_PD)
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, key: Tensor, value: Tensor) -> None:
        found[layer] = (key, value)

    plan = TreePlan(TreeBatch.of([Node([0] * tokens, [0.0] * tokens)]).to(places.device), role)
    plan.on_key_value = keep
    planned_call(trunk, plan, inputs_embeds=states_PD[None], position_ids=places)
    layers = [found[n] for n in range(len(found))]
    return VirtualRoot([k for k, _ in layers], [v for _, v in layers], tokens)


def takes_positions(trunk: nn.Module) -> bool:
    """Whether a transformer is told the positions of tokens."""
    return "position_ids" in inspect.signature(trunk.forward).parameters


def derives_positions(trunk: nn.Module) -> bool:
    """Whether a transformer makes masks and positions of the ids themselves (ChatGLM-6B, whose contexts see what follows)."""
    return bool(getattr(trunk, "derives_positions", False))


@contextmanager
def left_out(trunk: Any, tokens: int) -> Iterator[None]:
    """Masks and positions that a family makes of the ids leave so many virtual tokens out meanwhile; 0: as the trunk has it.

    Raises:
        ModelError: the trunk has a prefix of its own.
    """
    before = getattr(trunk, "prefix_length", 0)
    if tokens and before:
        raise ModelError(
            f"{type(trunk).__name__} has a prefix of {before} tokens of its own, and another one before it",
            hint="take the model without its prefix encoder",
        )
    if tokens:
        trunk.prefix_length = tokens
    try:
        yield
    finally:
        if tokens:
            trunk.prefix_length = before


@contextmanager
def _kept_whole(trunk: nn.Module) -> Iterator[None]:
    """No layer is recomputed meanwhile: a few virtual tokens take no memory, and a recomputed layer would write its cache twice."""
    layers = [m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
