"""One forward pass of the engine: what each of its tokens writes into the cache and attends to.

Whatever else is in the batch must not change a lane's bits (fp32 on a CPU): every matrix product has a shape that is a function
of the lane alone. A decoded token attends to its arena's positions by a product of its own; a prompt is read in blocks on a
fixed grid of positions, and a block that is partly known or ends early is padded to the whole.

What a model carries before every text (P-Tuning v2) is held once: each product with a lane's positions has one with the root's
beside it, and their scores share a softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from danlu.generation.kv_cache import Arena, CacheShape, KeyValueCache, Lane, Root
from danlu.models.attention import KeyBias


@dataclass
class _Decode:
    """One token each of some lanes of an arena: tokens `start:end` of the step; its first `slots` slots take part."""

    arena: Arena
    start: int
    end: int
    slots: int
    slots_S: Tensor | None  # None: all of these, in order
    seen_S: Tensor  # [slots * G]: the last position that each slot sees
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    biases: dict[KeyBias, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def bias(self, bias: KeyBias, before: int) -> tuple[Tensor, Tensor]:
        """Of each key for the heads that read it, less that of the last position seen: of the root's `[slots * G, R, before]`, and
        of the lanes' with the mask `[slots * G, R, positions]`.
        """
        if bias not in self.biases:
            groups = self.arena.keys.shape[2]
            own = bias.of(torch.arange(before + self.arena.positions, device=self.seen_S.device))
            last = own[:, before + self.seen_S[::groups]].T[:, :, None]
            shifted = (own[None] - last).reshape(self.slots * groups, -1, own.shape[1]).to(self.arena.keys.dtype)
            self.biases[bias] = shifted[..., :before], shifted[..., before:] + self.mask(None)
        return self.biases[bias]

    def mask(self, window: int | None) -> Tensor:
        """[slots * G, 1, positions]: 0 where a slot sees a position, -inf elsewhere; `window` positions at most."""
        if window not in self.masks:
            positions = torch.arange(self.arena.positions, device=self.seen_S.device)
            hidden_SP = positions > self.seen_S[:, None]
            if window is not None:
                hidden_SP |= positions <= self.seen_S[:, None] - window
            mask = torch.zeros(hidden_SP.shape, dtype=self.arena.keys.dtype, device=hidden_SP.device)
            self.masks[window] = mask.masked_fill_(hidden_SP, float("-inf"))[:, None]
        return self.masks[window]


@dataclass
class _Block:
    """A run of a prompt that lies in one block: tokens `start:end` of the step, from `position` on."""

    arena: Arena
    slot: int
    start: int
    end: int
    position: int


@dataclass
class _Write:
    """Where the keys and values of tokens `start:end` go: rows of the arena's `[slots * G * positions, K]`."""

    arena: Arena
    start: int
    end: int
    cells_M: Tensor


@dataclass(frozen=True)
class Read:
    """Tokens that a lane reads next.

    Attributes:
        prompt: read on the grid; else each as a decoded token, with the bits of decoding them one by one.
        wanted: of how many of the last tokens the hidden states are asked for.
    """

    lane: Lane
    ids: Sequence[int]
    prompt: bool
    wanted: int


@dataclass
class StepPlan:
    """One forward of an engine: what each of its tokens writes and attends to. Make one with `StepPlan.of`.

    Attributes:
        causal_QS: the mask of a block of the grid on itself.
        root: what every token sees beside its lane.
        ids, positions: of the T tokens.
        longest: positions that are attended to, at most.
        places: for each read, the step's token index of each of its tokens.
    """

    causal_QS: Tensor
    root: Root | None = None
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    longest: int = 1
    places: list[list[int]] = field(default_factory=list)
    _decodes: list[_Decode] = field(default_factory=list)
    _blocks: list[_Block] = field(default_factory=list)
    _writes: list[_Write] = field(default_factory=list)

    @classmethod
    def of(cls, cache: KeyValueCache, reads: Sequence[Read]) -> StepPlan:
        """Lanes need room for what they read; their `length` moves on here."""
        plan = cls(cache.causal_QS, cache.root, places=[[] for _ in reads])
        by_arena: dict[int, list[int]] = {}
        for index, read in enumerate(reads):
            if not read.prompt:
                assert read.lane.arena is not None
                by_arena.setdefault(read.lane.arena.positions, []).append(index)
        for _, members in sorted(by_arena.items()):
            plan._add_decodes(cache.shape, reads, sorted(members, key=lambda i: reads[i].lane.slot))
        for index, read in enumerate(reads):
            if read.prompt:
                plan._add_prompt(read, index)
        for read in reads:
            read.lane.length += len(read.ids)
        plan.longest = max(plan.positions) + 1
        return plan

    @classmethod
    def fixed(
        cls, cache: KeyValueCache, arenas: Sequence[Arena], slots: Sequence[int], positions_T: Tensor
    ) -> StepPlan:
        """A step in which the first slots of some arenas decode one token each, whose numbers are all on the device.

        Args:
            slots: how many of each arena.
            positions_T: of the tokens, arena by arena.
        """
        plan = cls(cache.causal_QS, cache.root, longest=max(a.positions for a in arenas))
        heads = torch.arange(cache.shape.heads, device=positions_T.device)
        start = 0
        for arena, count in zip(arenas, slots, strict=True):
            own = positions_T[start : start + count]
            rows = torch.arange(count, device=own.device)[:, None] * cache.shape.heads + heads
            cells = (rows * arena.positions + own[:, None]).flatten()
            seen = own[:, None].expand(count, cache.shape.heads).flatten()
            plan._decodes.append(_Decode(arena, start, start + count, count, None, seen))
            plan._writes.append(_Write(arena, start, start + count, cells))
            start += count
        return plan

    def decoding(self) -> list[Arena]:
        """The arenas, all lanes of which decode one token each in this step; none if it does anything else."""
        arenas = [d.arena for d in self._decodes]
        once = len(arenas) == len({id(a) for a in arenas})
        plain = once and not self._blocks and all(d.slots_S is None for d in self._decodes)
        return arenas if plain else []

    def _add_decodes(self, shape: CacheShape, reads: Sequence[Read], members: Sequence[int]) -> None:
        """The first tokens of all lanes, then the second ones, and so on: each round is one product per slot."""
        arena = reads[members[0]].lane.arena
        assert arena is not None
        begin = len(self.ids)
        slots: list[int] = []
        for depth in range(max(len(reads[i].ids) for i in members)):
            active = [i for i in members if depth < len(reads[i].ids)]
            start = len(self.ids)
            for i in active:
                self.places[i].append(len(self.ids))
                self.ids.append(reads[i].ids[depth])
                self.positions.append(reads[i].lane.length + depth)
                slots.append(reads[i].lane.slot)
            seen = torch.zeros(len(arena.lanes), dtype=torch.int64)  # slots that do not decode now see position 0 only
            used = torch.tensor([reads[i].lane.slot for i in active])
            seen[used] = torch.tensor(self.positions[start:])
            seen = seen.repeat_interleave(shape.heads).to(shape.device)
            every = len(active) == len(arena.lanes)
            own = None if every else used.to(shape.device)
            self._decodes.append(_Decode(arena, start, len(self.ids), len(arena.lanes), own, seen))
        heads = torch.arange(shape.heads)
        rows = torch.tensor(slots)[:, None] * shape.heads + heads
        cells = rows * arena.positions + torch.tensor(self.positions[begin:])[:, None]
        self._writes.append(_Write(arena, begin, len(self.ids), cells.flatten().to(shape.device)))

    def _add_prompt(self, read: Read, index: int) -> None:
        lane = read.lane
        assert lane.arena is not None
        grid = len(self.causal_QS)
        at, end = lane.length, lane.length + len(read.ids)
        self.places[index] = list(range(len(self.ids), len(self.ids) + len(read.ids)))
        while at < end:
            stop = min(end, (at // grid + 1) * grid)
            first = len(self.ids)
            self.ids += read.ids[at - lane.length : stop - lane.length]
            self.positions += range(at, stop)
            self._blocks.append(_Block(lane.arena, lane.slot, first, len(self.ids), at))
            at = stop

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
        """query [H, T, K], key and value [G, T, K] -> [T, H, K]; see `models.attention.AttentionPlan`."""
        rule = _Rule(scale, None if window is None or window >= self.longest else window, softcap, self.root, bias)
        for write in self._writes:
            for kept, new in ((write.arena.keys, key), (write.arena.values, value)):
                rows = new[:, write.start : write.end].transpose(0, 1).reshape(-1, new.shape[2]).to(kept.dtype)
                kept[layer].view(-1, new.shape[2]).index_copy_(0, write.cells_M, rows)
        if len(self._decodes) == 1 and self._decodes[0].end == query.shape[1]:
            return _attend_one(self._decodes[0], layer, query, rule)
        out = query.new_zeros(query.shape[1], query.shape[0], value.shape[2])
        for decode in self._decodes:
            out[decode.start : decode.end] = _attend_one(decode, layer, query[:, decode.start : decode.end], rule)
        for block in self._blocks:
            part = slice(block.start, block.end)
            end = block.position + block.end - block.start
            block.arena.keys[layer, block.slot, :, block.position : end] = key[:, part]
            block.arena.values[layer, block.slot, :, block.position : end] = value[:, part]
            out[part] = _attend_block(block, layer, query[:, part], rule, self.causal_QS)
        return out


@dataclass(frozen=True)
class _Rule:
    """How scores are made from products; `window` is set only where it hides a position, and hides nothing of the root."""

    scale: float
    window: int | None
    softcap: float | None
    root: Root | None = None
    bias: KeyBias | None = None

    @property
    def before(self) -> int:
        """Positions of the root."""
        return self.root.tokens if self.root is not None else 0

    def mix(
        self, layer: int, slots: int, q: Tensor, scores: Tensor, values: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """q [slots * G, n, K], scores [.., n, P], values [.., P, K] -> [.., n, K]: the softmax is over root and positions.

        Args:
            bias: of the root's scores, `[.., n, before]`; the given ones have theirs already.
        """
        if self.root is None:
            return torch.bmm(torch.softmax(scores, dim=-1), values)
        first_keys, first_values = self.root.of(layer, slots)
        first = self.scores(q, first_keys, self.root.mask_11P)
        if bias is not None:
            first[..., : self.before] += bias
        probs = torch.softmax(torch.cat([first, scores], dim=-1), dim=-1)
        end = first.shape[-1]
        return torch.bmm(probs[..., :end], first_values).add_(torch.bmm(probs[..., end:], values))

    def scores(self, q: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """q [B, n, K], keys [B, P, K], mask [B or 1, n or 1, P] -> [B, n, P]."""
        if self.softcap is None:
            if mask is not None:
                return torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=self.scale)
            return torch.bmm(q, keys.transpose(1, 2)).mul_(self.scale)
        capped = torch.bmm(q, keys.transpose(1, 2)).mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return capped if mask is None else capped.add_(mask)


def _attend_one(decode: _Decode, layer: int, query: Tensor, rule: _Rule) -> Tensor:
    """query [H, S, K] -> [S, H, K], one product for each slot and key head."""
    arena = decode.arena
    slots = decode.slots
    keys = arena.keys[layer, :slots].flatten(0, 1)
    values = arena.values[layer, :slots].flatten(0, 1)
    q = query.transpose(0, 1).to(keys.dtype)
    if decode.slots_S is not None:
        q = q.new_zeros(slots, *q.shape[1:]).index_copy_(0, decode.slots_S, q)
    q = q.reshape(keys.shape[0], -1, keys.shape[2])
    bias, mask = (None, decode.mask(rule.window)) if rule.bias is None else decode.bias(rule.bias, rule.before)
    scores = rule.scores(q, keys, mask)
    mixed = rule.mix(layer, slots, q, scores, values, bias).view(slots, query.shape[0], -1)
    if decode.slots_S is not None:
        mixed = mixed.index_select(0, decode.slots_S)
    return mixed.to(query.dtype)


def _attend_block(block: _Block, layer: int, query: Tensor, rule: _Rule, causal_QS: Tensor) -> Tensor:
    """query [H, n, K] -> [n, H, K], as rows of a product of the whole block with all positions up to its end."""
    heads, count, width = query.shape
    grid = len(causal_QS)
    first = block.position % grid
    begin = block.position - first
    end = min(begin + grid, block.arena.positions)
    keys = block.arena.keys[layer, block.slot, :, :end]
    values = block.arena.values[layer, block.slot, :, :end]
    q = keys.new_zeros(heads, grid, width)
    q[:, first : first + count] = query
    q = q.view(keys.shape[0], -1, width)
    scores = rule.scores(q, keys)
    by_head = scores.view(heads, grid, end)
    by_head[:, :, begin:] += causal_QS[:, : end - begin]
    if rule.window is not None:
        place = torch.arange(begin + grid, device=keys.device)
        by_head.masked_fill_(place[:end] <= place[begin:, None] - rule.window, float("-inf"))
    bias = None
    if rule.bias is not None:
        own = rule.bias.of(torch.arange(rule.before + end, device=keys.device))
        own = (own - own[:, -1:]).to(scores.dtype)[:, None].expand(-1, grid, -1)
        by_head += own[:, :, rule.before :]
        bias = own[:, :, : rule.before].reshape(keys.shape[0], scores.shape[1], rule.before)
    mixed = rule.mix(layer, 1, q, scores, values, bias)
    return mixed.view(heads, grid, -1)[:, first : first + count].transpose(0, 1).to(query.dtype)
