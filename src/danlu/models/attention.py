"""The one attention function: token trees for training and prefill, a cache for decoding.

It is registered with transformers' `AttentionInterface`, so that Hugging Face layers call it. What to attend to (a "plan")
travels as the call argument `danlu_plan`, never in a global: activation checkpointing recomputes later. Families whose layers
drop call arguments are made to keep this one (`carry`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from danlu.exceptions import ModelError
from danlu.models import blocks, varlen
from danlu.tree import TreeBatch

NAME = "danlu"
PLAN_ARGUMENT = "danlu_plan"


class AttentionPlan(Protocol):
    """What a plan must do: attend, for one layer."""

    longest: int

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        bias: KeyBias | None = None,
    ) -> Tensor:
        """query [H, T, K], key and value [G, T, K] -> [T, H, K].

        Args:
            layer: its index.
            scale: of the products of queries and keys.
            window: a token sees itself and the `window - 1` positions before it; None: everything before it.
            softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2); None: as they are.
            bias: is added to the scores by the position of the key (ALiBi); keys before every text have the first positions.
        """
        ...


@dataclass(frozen=True, eq=False)
class KeyBias:
    """What is added to the scores of a key, by its position: `factor * slope * position` for each head (Press et al. 2022).

    Attributes:
        slopes_H1: one for each query head, fp32.
        factor: of all of them.
        rounded: the dtype in which the family computes `slope * position`.
    """

    slopes_H1: Tensor
    factor: float = 1.0
    rounded: torch.dtype = torch.float32

    def of(self, positions_S: Tensor) -> Tensor:
        """`[H, S]`, fp32."""
        product = self.slopes_H1.to(positions_S.device, self.rounded) * positions_S
        return product.to(self.rounded).float() * self.factor


@dataclass(frozen=True)
class VirtualRoot:
    """Keys and values that stand before the first token of every tree (P-Tuning v2), as many in every layer.

    Attributes:
        keys, values: of each layer, `[G, P, K]`; keys as the attention reads them: rotary positions are not applied to them.
        offset: by how many positions the tokens of the trees move.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    offset: int

    @property
    def tokens(self) -> int:
        """P."""
        return self.keys[0].shape[1]

    def in_front(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value `[G, T, K]` of a layer with the root's before them: `[G, P + T, K]`, in their dtypes."""
        pairs = ((self.keys[layer], key), (self.values[layer], value))
        first, second = (torch.cat([own.to(x.dtype), x], dim=1) for own, x in pairs)
        return first, second


class TreePlan:
    """What every token of a batch attends to: its node's ancestors fully, its node causally. Made once per batch.

    Args:
        tree: the batch.
        role: whose adapter is selected again when activation checkpointing recomputes a layer.
        root: what every token sees beside, from everywhere: a sliding window does not move past it.
        reads: indices of the tokens `[M]`, each once, whose hidden states are asked for in the end; None: of all. The last layer
            may leave out what only the others need (`models/lean.py`), and then returns `[M, D]`.
    """

    def __init__(
        self,
        tree: TreeBatch,
        role: str | None = None,
        root: VirtualRoot | None = None,
        reads: Tensor | None = None,
    ) -> None:
        self.role = role
        self.tree = tree
        self.root = root
        self.reads = reads
        self.longest = int(tree.position_ids_T.max()) + 1
        self._blocks: dict[tuple[int | None, bool], blocks.Blocks] = {}
        self._sequences: varlen.Sequences | None = None
        self._tables: dict[KeyBias, Tensor] = {}
        # Called with (layer, key [G, T, K], value) by prefill, which keeps them; training leaves it empty.
        self.on_key_value: Callable[[int, Tensor, Tensor], None] | None = None

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        bias: KeyBias | None = None,
        *,
        last: bool = False,
    ) -> Tensor:
        """See `AttentionPlan`; `last`: rows that nobody reads may be zero."""
        if self.on_key_value is not None:
            self.on_key_value(layer, key, value)
        if window is not None and window >= self.longest:
            window = None
        if bias is not None and window is not None:
            raise ModelError("a sliding window with a bias by position is not supported on token trees")
        before = 0
        if self.root is not None:
            before = self.root.tokens
            key, value = self.root.in_front(layer, key, value)
        # The kernel's window would hide the root.
        if bias is None and varlen.fits(value, softcap) and not (before and window is not None):
            if self._sequences is None:
                self._sequences = varlen.Sequences.of(self.tree, before)
            return varlen.attend(query, key, value, self._sequences, scale, window)
        reads = self.reads if last else None
        kind = (window, reads is not None)
        if kind not in self._blocks:
            self._blocks[kind] = blocks.Blocks(self.tree, window, before=before, reads=reads)
        return blocks.attend(query, key, value, self._blocks[kind], scale, softcap, self._table(bias))

    def _table(self, bias: KeyBias | None) -> Tensor | None:
        """`[H, S]` for all places on a path of the batch and those before it."""
        if bias is None:
            return None
        if bias not in self._tables:
            node = int((self.tree.node_end_N - self.tree.node_start_N).max())  # what fills a batch has no positions
            end = max(self.longest, node) + (self.root.tokens if self.root is not None else 0)
            self._tables[bias] = bias.of(torch.arange(end, device=self.tree.input_ids_T.device))
        return self._tables[bias]


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' layers call. query [1, H, T, K], key and value [1, G, T, K] -> [1, T, H, K].

    Raises:
        ModelError: called without a plan, with attention dropout, or with a variant that would be silently wrong here.
    """
    plan: AttentionPlan | None = kwargs.get(PLAN_ARGUMENT) or getattr(module, PLAN_ARGUMENT, None)
    if plan is None:
        raise ModelError(
            f"{type(module).__name__} was called without '{PLAN_ARGUMENT}'", hint="use RootModel or Engine"
        )
    if dropout:
        raise ModelError(
            "attention dropout is not supported on token trees", hint="set attention_dropout to 0 in config.json"
        )
    for name in ("s_aux", "sinks", "position_bias"):
        if kwargs.get(name) is not None:
            raise ModelError(f"attention option '{name}' of {type(module).__name__} is not supported on token trees")
    options = {"window": kwargs.get("sliding_window"), "softcap": kwargs.get("softcap"), "bias": kwargs.get("key_bias")}
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = getattr(module, "layer_idx", 0)
    given = {name: value for name, value in options.items() if value is not None}
    return plan.attend(layer, query[0], key[0], value[0], scale, **given).unsqueeze(0), None


class Carrier:
    """Holds what the layers of a trunk are called with, for as long as a forward pass takes."""

    plan: Any = None


def planned_call(trunk: Any, plan: Any, **inputs: Any) -> Any:
    """What a trunk on the fast path returns for its inputs, every layer of which attends by the plan."""
    with carrying(trunk, plan):
        return trunk(use_cache=False, **inputs, **{PLAN_ARGUMENT: plan})


@contextmanager
def carrying(trunk: Any, plan: Any) -> Iterator[None]:
    """The trunk's `Carrier`, where it has one, holds a plan meanwhile."""
    carrier: Carrier | None = getattr(trunk, "danlu_carrier", None)
    if carrier is not None:
        carrier.plan = plan
    try:
        yield
    finally:
        if carrier is not None:
            carrier.plan = None


def carry(trunk: nn.Module) -> None:
    """Makes the layers of a trunk take `danlu_plan` from its `Carrier` and keep it for their parts.

    For families whose model does not hand it to the layers, or whose layers do not hand it on. A call takes it before
    activation checkpointing begins, so that recomputing a layer later finds what the layer was called with.
    """
    if isinstance(getattr(trunk, "danlu_carrier", None), Carrier):
        return
    trunk.danlu_carrier = Carrier()  # type: ignore[assignment]
    for layer in [m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer)]:
        layer.danlu_carrier = trunk.danlu_carrier
        layer.__class__ = _carrying(type(layer))  # type: ignore[arg-type]


@functools.cache
def _carrying(kind: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault(PLAN_ARGUMENT, self.danlu_carrier.plan)
        return kind.__call__(self, *args, **kwargs)

    def forward(self: Any, *args: Any, danlu_plan: Any = None, **kwargs: Any) -> Any:
        parts = list(self.children())
        for part in parts:
            part.danlu_plan = danlu_plan
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            for part in parts:
                part.danlu_plan = None

    return type(kind.__name__, (kind,), {"__call__": call, "forward": forward, "__module__": kind.__module__})


def _no_mask(*_: Any, **__: Any) -> None:
    """The plan carries all there is to know, so transformers builds no mask."""


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, _no_mask)
