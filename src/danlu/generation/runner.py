"""Runs a model for an engine: what lanes read goes through in one forward, with the engine's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from danlu.exceptions import EngineError
from danlu.generation.graphs import DecodeGraphs
from danlu.generation.kv_cache import CacheShape, KeyValueCache, Lane, arena_length
from danlu.generation.prefixes import SHARE, PrefixStore
from danlu.generation.step_plan import Read, StepPlan
from danlu.models import experts, lean, prepacked
from danlu.models.attention import planned_call
from danlu.models.heads import logits_of
from danlu.models.prefix import attached

# A linear layer gives a row the same bits in every batch of at least so many rows, and an elementwise function where the numbers
# fill whole vector registers, which a multiple of it sees to (measured in fp32 on CPUs; for layers wider than 64 with MKL's strict
# mode, which `danlu/__init__.py` asks for).
ROWS = 4


class CachedRunner:
    """For models whose attention takes a plan.

    Args:
        model: prepared (`models.root.prepare`), on the fast path.
        memory: bytes for keys and values: a quarter for read prompts, the rest for running lanes and what the model carries before
            every text.
    """

    whole_prompts = False  # they may be read in pieces

    def __init__(self, model: Any, memory: int) -> None:
        self.model = model
        self.shape = _shape(model)
        # Bits are promised in float32; in other dtypes a single row is worth a single row's time.
        self.rows = ROWS if self.shape.dtype == torch.float32 else 1
        if self.rows > 1 and self.shape.device.type == "cpu":
            experts.fill(model, self.rows)
        self.cache = KeyValueCache(self.shape, int(memory * (1 - SHARE)))
        self.prefixes = PrefixStore(int(memory * SHARE))
        self._prepack()
        self.graphs = DecodeGraphs(model, self.cache) if self.shape.device.type == "cuda" else None
        self._begin()

    def _prepack(self) -> None:
        products, head = lean.products(self.model.base_model), self.model.get_output_embeddings()
        if products is not None and type(head) is torch.nn.Linear:
            prepacked.enable([*products, (head, [head])])

    def _begin(self) -> None:
        """Reads what the model carries before every text, now that no lane is open."""
        prefix, trunk = attached(self.model), self.model.base_model
        with torch.no_grad():
            self.cache.begin_with(prefix.root(trunk) if prefix is not None else None)

    def require(self, positions: int, lanes: int) -> None:
        """Refuses what could never run.

        Raises:
            EngineError: so many lanes of so many positions do not fit into the empty cache.
        """
        needed = lanes * arena_length(positions)
        if needed > self.cache.limit:
            unit = self.shape.bytes_per_position / 2**20
            raise EngineError(
                f"the request needs {needed * unit:,.1f} MiB of key/value cache, and {self.cache.limit * unit:,.1f} MiB are there",
                hint="lower max_new_tokens or shorten the prompt, or give the engine more memory",
            )

    def fits(self, positions: int, lanes: int) -> bool:
        """Whether so many lanes of so many positions can be opened now."""
        return self.cache.fits(positions, lanes)

    def open(self, reserved: int, start: int, lanes: int = 1) -> Lane:
        """A lane that may need `reserved` positions, and soon `start`; that will be forked into so many."""
        return self.cache.open(reserved, start, lanes)

    def fork(self, lane: Lane) -> Lane:
        """A lane with the same tokens."""
        return self.cache.fork(lane)

    def reorder(self, lanes: Sequence[Lane], parents: Sequence[int], start: int) -> None:
        """Lane i takes over what lane parents[i] holds from position `start` on."""
        self.cache.reorder(lanes, parents, start)

    def close(self, lane: Lane) -> None:
        """Frees a lane at once."""
        self.cache.close(lane)

    def reset(self) -> None:
        """Forgets every lane and every prompt."""
        self.cache.clear()
        self.prefixes.clear()

    @property
    def recalls(self) -> bool:
        """Whether prompts are kept at all."""
        return self.prefixes.memory > 0

    def recall(self, lane: Lane, ids: Sequence[int]) -> None:
        """Lets a lane that has read less hold as much of the beginning of `ids` as an earlier prompt shares with it."""
        lane.length = self.prefixes.load(ids, lane)

    def remember(self, lane: Lane, ids: Sequence[int]) -> None:
        """Keeps a prompt's first ids, all of which the lane has read."""
        self.prefixes.save(ids, lane)

    def forget_prompts(self, *, in_place: bool = False) -> None:
        """To be called when the weights have changed, and no lane is open.

        Args:
            in_place: they lie where they lay.
        """
        self.prefixes.clear()
        prepacked.forget(self.model)
        if self.graphs is not None and (self.cache.root is not None or not in_place):
            self.graphs.clear()
        self._begin()

    def room(self, lane: Lane) -> int:
        """How many tokens the lane may read at once with the bits of reading them one by one."""
        return arena_length(lane.length + 1) - lane.length

    def read(self, reads: Sequence[Read]) -> Tensor:
        """One forward over what lanes read; hidden states `[M, D]` of the last `wanted` tokens of each read, in order."""
        for read in reads:
            self.cache.extend(read.lane, read.lane.length + len(read.ids))
        plan = StepPlan.of(self.cache, reads)
        wanted = [p for r, places in zip(reads, plan.places, strict=True) for p in places[len(places) - r.wanted :]]
        replayed = self.graphs.read(plan, wanted) if self.graphs is not None else None
        if replayed is not None:
            return replayed
        device = self.shape.device
        padding = [0] * (-len(plan.ids) % self.rows)
        offset = self.cache.root.offset if self.cache.root is not None else 0
        positions = [p + offset for p in plan.positions]
        ids_2T = torch.tensor([[*plan.ids, *padding], [*positions, *padding]], device=device)
        output = planned_call(self.model.base_model, plan, input_ids=ids_2T[:1], position_ids=ids_2T[1:])
        hidden: Tensor = output.last_hidden_state[0]
        return hidden.index_select(0, torch.tensor(wanted, dtype=torch.int64, device=device))

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """`[M, V]`."""
        rows = len(hidden_MD)
        if 0 < rows < self.rows:
            hidden_MD = torch.cat([hidden_MD, hidden_MD[:1].expand(self.rows - rows, -1)])
        return logits_of(self.model, hidden_MD)[:rows]


class _Probe:
    """A plan that attends to nothing and notes what each layer would keep."""

    longest = 1

    def __init__(self) -> None:
        self.found: list[tuple[int, int, int, torch.dtype]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **_: Any) -> Tensor:
        self.found.append((key.shape[0], key.shape[2], value.shape[2], value.dtype))
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[2])


def _shape(model: Any) -> CacheShape:
    device = next(model.base_model.parameters()).device
    probe, tokens = _Probe(), torch.zeros(1, 1, dtype=torch.int64, device=device)
    planned_call(model.base_model, probe, input_ids=tokens, position_ids=tokens)
    if len(set(probe.found)) > 1:
        raise EngineError(f"the layers of {type(model).__name__} keep keys and values of different shapes")
    heads, key_width, value_width, dtype = probe.found[0]
    return CacheShape(len(probe.found), heads, key_width, value_width, dtype, device)
