"""Runs a model whose attention takes no plan, with transformers' own cache.

Lanes that decode together are one batch padded on the left, kept from step to step and made anew when lanes join or leave.
Prompts of one length are read together. Results equal those of one lane at a time up to rounding, and so do those of a prompt whose
beginning was read before.

A trunk may say more of itself (ChatGLM's do):
    prefix_length       virtual tokens that it puts in front of the cache, and that masks and positions leave out
    derives_positions   masks and positions are a function of the whole text: `inputs_of(rows, new)` makes them, and a prompt is
                        read in one piece, since its tokens may see what follows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from danlu.exceptions import EngineError
from danlu.generation.kv_cache import Lane, arena_length
from danlu.generation.prefixes import SHARE, PrefixStore
from danlu.generation.step_plan import Read
from danlu.models.attention import VirtualRoot
from danlu.models.heads import logits_of
from danlu.models.prefix import attached
from danlu.models.resting import embedded_dtype
from danlu.models.virtual_root import derives_positions, left_out, takes_positions

States = list[tuple[Tensor, Tensor]]  # keys and values `[1, heads, length, K]` of each layer


class PastRunner:
    """See `CachedRunner`.

    Args:
        model: any causal language model.
        memory: bytes for keys and values: a quarter for read prompts where they can be kept, the rest for running lanes.
    """

    def __init__(self, model: Any, memory: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._takes_positions = takes_positions(model.base_model)
        self.whole_prompts = derives_positions(model.base_model)
        self._batch: tuple[list[Lane], Any] = ([], None)
        self._reserved = 0
        self._root: VirtualRoot | None = None
        self._begin()
        bytes_each, alike = self._per_position()
        # Not where a token's keys depend on what follows it, layers keep unlike states, or the model puts keys in front itself.
        share = SHARE if alike and not self.whole_prompts and not self._front else 0.0
        self._limit = int(memory * (1 - share)) // bytes_each
        self.prefixes = PrefixStore(int(memory * share))

    def _begin(self) -> None:
        """Reads what the model carries before every text; each lane begins with it in its own cache."""
        prefix, trunk = attached(self.model), self.model.base_model
        dtype = embedded_dtype(trunk)
        self._root = None
        self._front = int(getattr(trunk, "prefix_length", 0))
        if prefix is not None:
            with torch.no_grad():
                root = prefix.root(trunk)
            keys, values = ([x.to(dtype) for x in side] for side in (root.keys, root.values))
            self._root = VirtualRoot(keys, values, root.offset)
            if self.whole_prompts:  # its masks and positions leave out what stands in front, see `_forward`
                self._front = root.tokens

    @property
    def _before(self) -> int:
        """Positions of a lane's cache that stand before its text."""
        return self._root.tokens if self._root is not None else 0

    def _room_of(self, positions: int) -> int:
        return arena_length(self._before + positions)

    def require(self, positions: int, lanes: int) -> None:
        """See `CachedRunner.require`."""
        if lanes * self._room_of(positions) > self._limit:
            raise EngineError(
                f"the request needs {lanes * self._room_of(positions)} positions of cache, and {self._limit} are there",
                hint="lower max_new_tokens or shorten the prompt, or give the engine more memory",
            )

    def fits(self, positions: int, lanes: int) -> bool:
        """See `CachedRunner.fits`."""
        return self._reserved + lanes * self._room_of(positions) <= self._limit

    def open(self, reserved: int, start: int, lanes: int = 1) -> Lane:
        """See `CachedRunner.open`."""
        lane = Lane(reserved, claim=lanes * self._room_of(reserved))
        self._reserved += lane.claim
        if self._root is not None:
            every = zip(self._root.keys, self._root.values, strict=True)
            lane.past = _cache([(keys[None], values[None]) for keys, values in every])
        return lane

    def fork(self, lane: Lane) -> Lane:
        """See `CachedRunner.fork`."""
        self._spread()
        share = self._room_of(lane.reserved)
        lane.claim -= share
        return Lane(lane.reserved, lane.length, share, past=_copy(lane.past), ids=list(lane.ids))

    def reorder(self, lanes: Sequence[Lane], parents: Sequence[int], start: int) -> None:
        """See `CachedRunner.reorder`."""
        self._spread()
        taken = [(lanes[p].past, lanes[p].ids) for p in parents]
        for lane, (past, ids), parent in zip(lanes, taken, parents, strict=True):
            if lanes[parent] is not lane:
                lane.past, lane.ids = _copy(past), list(ids)

    def close(self, lane: Lane) -> None:
        """See `CachedRunner.close`."""
        self._reserved -= lane.claim
        lane.claim = 0
        if lane in self._batch[0]:
            self._spread()
        lane.past = None

    def reset(self) -> None:
        """See `CachedRunner.reset`."""
        self._batch, self._reserved = ([], None), 0
        self.prefixes.clear()

    @property
    def recalls(self) -> bool:
        """Whether prompts are kept at all."""
        return self.prefixes.memory > 0

    def recall(self, lane: Lane, ids: Sequence[int]) -> None:
        """See `CachedRunner.recall`."""
        if self.recalls:
            self._spread()
            lane.length = self.prefixes.load(ids, _Held(lane))

    def remember(self, lane: Lane, ids: Sequence[int]) -> None:
        """See `CachedRunner.remember`."""
        if self.recalls:
            self._spread()
            self.prefixes.save(ids, _Held(lane))

    def forget_prompts(self, *, in_place: bool = False) -> None:
        """See `CachedRunner.forget_prompts`."""
        self.prefixes.clear()
        self._begin()

    def room(self, lane: Lane) -> int:
        """One token at a time."""
        return 1

    def read(self, reads: Sequence[Read]) -> Tensor:
        """See `CachedRunner.read`; one forward for all single tokens, and one for each length of prompts."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, read in enumerate(reads):
            key = (read.lane.length, len(read.ids)) if read.prompt else (-1, 1)
            groups.setdefault(key, []).append(index)
        found: dict[int, Tensor] = {}
        for members in groups.values():
            batches = [members] if all(self._is_plain(reads[i].lane) for i in members) else [[i] for i in members]
            for batch in batches:
                hidden = self._forward([reads[i].lane for i in batch], [list(reads[i].ids) for i in batch])
                found |= {i: h[h.shape[0] - reads[i].wanted :] for i, h in zip(batch, hidden, strict=True)}
        return torch.cat([found[i] for i in range(len(reads))])

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """`[M, V]`."""
        return logits_of(self.model, hidden_MD)

    def _forward(self, lanes: list[Lane], ids: list[list[int]]) -> Tensor:
        """Hidden states `[B, n, D]` of n new tokens of each lane."""
        if self._batch[0] != lanes:
            self._spread()
            self._batch = (lanes, _merge([x.past for x in lanes], self._front))
        longest, new = max(x.length for x in lanes), len(ids[0])
        arguments: dict[str, Tensor] = {}
        if self.whole_prompts:
            for lane, read in zip(lanes, ids, strict=True):
                lane.ids += read
            arguments = self.model.base_model.inputs_of([x.ids for x in lanes], new)
        else:
            starts = torch.tensor([longest - x.length for x in lanes], device=self.device)
            place = torch.arange(self._before + longest + new, device=self.device)
            arguments["attention_mask"] = (place[None] >= starts[:, None]).long()
            if self._takes_positions:
                offset = self._root.offset if self._root is not None else 0
                positions = [[offset + x.length + n for n in range(new)] for x in lanes]
                arguments["position_ids"] = torch.tensor(positions, device=self.device)
        with left_out(self.model.base_model, self._before if self.whole_prompts else 0):
            output = self.model.base_model(
                input_ids=torch.tensor(ids, device=self.device),
                past_key_values=self._batch[1],
                use_cache=True,
                **arguments,
            )
        self._batch = (lanes, output.past_key_values)
        for lane in lanes:
            lane.length += new
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _spread(self) -> None:
        """Gives every lane of the batch its own cache back."""
        lanes, past = self._batch
        self._batch = ([], None)
        for row, lane in enumerate(lanes):
            lane.past = (
                past
                if len(lanes) == 1
                else _cache(
                    [
                        (self._of(layer.keys[row : row + 1], lane), self._of(layer.values[row : row + 1], lane))
                        for layer in past.layers
                    ]
                )
            )

    def _of(self, states: Tensor, lane: Lane) -> Tensor:
        """A lane's part of a row, which is padded on the left, or between what stays in front and the lane's own positions."""
        if not self._front:
            return states[:, :, states.shape[2] - self._before - lane.length :]
        own = states[:, :, states.shape[2] - lane.length :]
        return torch.cat([states[:, :, : self._front], own], dim=2)

    def _is_plain(self, lane: Lane) -> bool:
        """Whether the lane's cache is keys and values of all positions, which can be padded and put together."""
        past = self._batch[1] if lane in self._batch[0] else lane.past
        return past is None or all(type(layer) is DynamicLayer for layer in past.layers)

    def _per_position(self) -> tuple[int, bool]:
        """Bytes, and whether all layers keep all positions, and alike."""
        tokens = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        layers = self.model.base_model(input_ids=tokens, use_cache=True).past_key_values.layers
        states = [x for layer in layers for x in (layer.keys, layer.values) if isinstance(x, Tensor)]
        plain = all(type(layer) is DynamicLayer for layer in layers)
        alike = plain and len({(x.keys.shape, x.values.shape) for x in layers}) == 1
        return max(1, sum(x.nbytes // x.shape[2] for x in states)), alike


@dataclass(frozen=True)
class _Held:
    """What a lane that is in no batch holds; see `prefixes.Holder`."""

    lane: Lane

    @property
    def length(self) -> int:
        return self.lane.length

    def states(self, at: int, count: int) -> tuple[Tensor, Tensor]:
        layers = self.lane.past.layers
        begin = layers[0].keys.shape[2] - self.length + at  # what stands in front is no part of the text
        part = (0, slice(None), slice(begin, begin + count))
        return torch.stack([x.keys[part] for x in layers]), torch.stack([x.values[part] for x in layers])

    def put(self, at: int, keys: Tensor, values: Tensor) -> None:
        self.lane.past = self.lane.past if self.lane.past is not None else DynamicCache()
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.lane.past.update(key[None], value[None], layer)


def _cache(states: States) -> DynamicCache:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(states):
        cache.update(keys, values, layer)
    return cache


def _copy(past: Any) -> DynamicCache:
    return _cache([(layer.keys.clone(), layer.values.clone()) for layer in past.layers])


def _merge(pasts: Sequence[Any], prefix: int) -> Any:
    """One cache of several, padded on the left, behind the prefix that all have."""
    if len(pasts) == 1 or pasts[0] is None:
        return pasts[0]
    longest = max(p.layers[0].keys.shape[2] for p in pasts)
    states: States = []
    for layer in range(len(pasts[0].layers)):
        pairs = [(p.layers[layer].keys, p.layers[layer].values) for p in pasts]
        keys, values = (torch.cat([_padded(x, longest, prefix) for x in side]) for side in zip(*pairs, strict=True))
        states.append((keys, values))
    return _cache(states)


def _padded(states: Tensor, length: int, prefix: int) -> Tensor:
    missing = length - states.shape[2]
    if not prefix:
        return torch.nn.functional.pad(states, (0, 0, missing, 0))
    own = torch.nn.functional.pad(states[:, :, prefix:], (0, 0, missing, 0))
    return torch.cat([states[:, :, :prefix], own], dim=2)
