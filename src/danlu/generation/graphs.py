"""Decoding steps as CUDA graphs: on a card, starting the hundreds of small kernels of a step takes longer than running them.

A step that only decodes is the same work each time: the same arenas, as many slots, other ids at other positions. So it is captured
once as a graph that reads ids and positions from one tensor, and replayed with a single call. The number of slots is rounded up
to one of a few, so that few graphs are enough; what the added slots compute nobody reads, and what they write goes to the first
position of places that no lane has.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from danlu.generation.kv_cache import Arena, KeyValueCache
from danlu.generation.step_plan import StepPlan
from danlu.models.attention import planned_call

SLOTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MOST = 64  # graphs that are kept; the least recently used one goes first
Key = tuple[tuple[int, int, int, int], ...]


class _Step(NamedTuple):
    """A step of fixed shape.

    Attributes:
        inputs_2T: ids and positions.
        starts: the first row of each arena.
        run: computes the hidden states `[T, D]` of the inputs as they are; the next run may write over them.
    """

    inputs_2T: Tensor
    starts: list[int]
    run: Callable[[], Tensor]


class DecodeGraphs:
    """Captured steps of a model over a cache.

    Args:
        model: prepared, on the fast path.
        cache: whose arenas it decodes in.
        capture: False runs the same fixed steps without capturing them, on any device (for tests).
    """

    def __init__(self, model: Any, cache: KeyValueCache, *, capture: bool = True) -> None:
        self.model, self.cache, self.capture = model, cache, capture
        self.steps: OrderedDict[Key, _Step] = OrderedDict()
        self.refused = ""  # why this model's steps cannot be captured
        self._seen: set[Key] = set()
        self._pool: Any = None

    def clear(self) -> None:
        """Forgets all steps: weights or a prefix lie elsewhere now."""
        self.steps.clear()
        self._seen.clear()

    def read(self, plan: StepPlan, wanted: Sequence[int]) -> Tensor | None:
        """Hidden states `[M, D]` of the plan's tokens `wanted`; None for a step that is no plain decoding, or seen for the first
        time (what comes once is not worth capturing).
        """
        arenas = plan.decoding()
        if not arenas or self.refused:
            return None
        key: Key = tuple((a.keys.data_ptr(), a.positions, a.capacity, _rounded(len(a.lanes), a)) for a in arenas)
        step = self.steps.get(key)
        if step is None:
            if key not in self._seen and self.capture:
                self._seen.add(key)
                return None
            step = self._made(arenas, key)
            if step is None:
                return None
        self.steps.move_to_end(key)
        # The plan's tokens, in order, are the first rows of each arena's share.
        rows = [s + i for s, arena in zip(step.starts, arenas, strict=True) for i in range(len(arena.lanes))]
        filled = torch.zeros(step.inputs_2T.shape, dtype=torch.int64)
        filled[:, rows] = torch.tensor([plan.ids, plan.positions])
        step.inputs_2T.copy_(filled)
        hidden = step.run()
        return hidden.index_select(0, torch.tensor([rows[w] for w in wanted], device=hidden.device))

    def _made(self, arenas: Sequence[Arena], key: Key) -> _Step | None:
        slots = [part[-1] for part in key]
        inputs = torch.zeros(2, sum(slots), dtype=torch.int64, device=self.cache.shape.device)
        before = self.cache.root.offset if self.cache.root is not None else 0

        def work() -> Tensor:
            plan = StepPlan.fixed(self.cache, arenas, slots, inputs[1])
            ids, positions = inputs[:1], inputs[1:] + before
            output = planned_call(self.model.base_model, plan, input_ids=ids, position_ids=positions)
            hidden: Tensor = output.last_hidden_state[0]
            return hidden

        run = self._captured(work) if self.capture else work
        if run is None:
            return None
        self.steps[key] = _Step(inputs, [sum(slots[:i]) for i in range(len(slots))], run)
        if len(self.steps) > MOST:
            self.steps.popitem(last=False)
        return self.steps[key]

    def _captured(self, work: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
        """Replays what `work` does; None, with a sentence and for good, where it cannot be captured."""
        alive = {a.keys.data_ptr() for a in self.cache.arenas}
        for old in [k for k in self.steps if not all(part[0] in alive for part in k)]:
            del self.steps[old]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                hidden = work()
        except RuntimeError as error:
            self.refused = str(error).splitlines()[0]
            self.clear()
            print(f"danlu: decoding without CUDA graphs, for {self.refused}", file=sys.stderr)
            return None

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay


def _rounded(lanes: int, arena: Arena) -> int:
    """Slots of a captured step: of the few numbers the next one, as far as the arena has so many."""
    return min(arena.capacity, next((s for s in SLOTS if s >= lanes), arena.capacity))
