"""danlu's own engine: continuous batching over a slotted cache, on any model that transformers can run.

Rows join as soon as a slot is free and leave at their stop token; equal prompts of one admission are read once. There is no
background thread: whoever waits for a token takes the lock and moves every running request one step on.
"""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from danlu.exceptions import EngineError, GenerationFailed
from danlu.generation.kv_cache import DecodePlan, SlotCache
from danlu.generation.protocol import Completion, FinishReason, Request, Token
from danlu.generation.sampling import sample
from danlu.models.attention import PLAN_ARGUMENT, TreePlan
from danlu.models.root import prepare
from danlu.tree import Node, TreeBatch

PREFILL_TOKENS = 4096


@dataclass
class _Row:
    """The state of one request."""

    request: Request
    id: str
    limit: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: FinishReason | None = None
    read: int = 0
    version: int = 0
    error: BaseException | None = None
    past: Any = None  # transformers' cache, for families without pluggable attention

    @property
    def length(self) -> int:
        return len(self.request.prompt_ids) + len(self.ids)

    def history(self) -> list[int]:
        return [*self.request.prompt_ids, *self.ids]


class LocalEngine:
    """Generates with a transformers model in this process.

    Args:
        model: a causal language model; the engine owns it from now on (evaluation mode, no gradients).
        tokenizer: needed for stop texts only.
        max_slots: how many requests run at once.
    """

    def __init__(self, model: Any, tokenizer: Any | None = None, *, max_slots: int = 64) -> None:
        self.model = prepare(model).eval()
        self.tokenizer = tokenizer
        self.max_slots = max_slots
        self.version = 0
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20)
        self._lock = threading.RLock()
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._rows: dict[str, _Row] = {}
        self._cache: SlotCache | None = None

    # -- protocol -------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> str:
        """See `Engine.submit`."""
        prompt = len(request.prompt_ids)
        if prompt == 0:
            raise EngineError("the prompt is empty")
        if prompt >= self.context:
            raise EngineError(
                f"the prompt has {prompt} tokens and the model's context holds {self.context}",
                hint="shorten the conversation",
            )
        if request.params.stop and self.tokenizer is None:
            raise EngineError("stop texts need a tokenizer")
        row = _Row(request, uuid.uuid4().hex, min(request.params.max_new_tokens, self.context - prompt))
        with self._lock:
            self._rows[row.id] = row
            self._waiting.append(row)
        return row.id

    def stream(self, request_id: str) -> Iterator[Token]:
        """See `Engine.stream`."""
        row = self._row(request_id)
        try:
            while True:
                # Looked at before the tokens: another thread may append the last one and finish the row in between.
                error, finished = row.error, row.finished
                while row.read < len(row.ids):
                    row.read += 1
                    yield Token(row.ids[row.read - 1], row.logprobs[row.read - 1])
                if error is not None:
                    raise GenerationFailed(f"generation failed: {error}") from error
                if finished is not None:
                    return
                self._advance(row, row.read)
        finally:
            if row.finished is None:
                self.cancel(request_id)

    def result(self, request_id: str) -> Completion:
        """See `Engine.result`."""
        row = self._row(request_id)
        try:
            while row.finished is None:
                self._advance(row, len(row.ids))
        finally:
            self.cancel(request_id)
            with self._lock:
                self._rows.pop(request_id, None)
        if row.error is not None:
            raise GenerationFailed(f"generation failed: {row.error}") from row.error
        return Completion(row.id, tuple(row.ids), tuple(row.logprobs), row.finished, row.version)

    @torch.inference_mode()
    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        with self._lock:
            row = self._rows.get(request_id)
            if row is None or row.finished is not None:
                return
            row.finished = "cancelled"
            if row in self._waiting:
                self._waiting.remove(row)
            else:
                self._leave(self._running.index(row))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Engine.update_weights`."""
        with self._lock, torch.no_grad():
            if self._running or self._waiting:
                raise EngineError("weights cannot change while requests are running")
            own = dict(self.model.named_parameters())
            for name, tensor in named_tensors:
                if name in own:
                    own[name].copy_(tensor)
                elif name not in self.model.state_dict():
                    raise EngineError(f"the engine's model has no parameter named '{name}'")
            self.version = version

    # -- scheduling -----------------------------------------------------------------------------------------------------

    def _row(self, request_id: str) -> _Row:
        row = self._rows.get(request_id)
        if row is None:
            raise EngineError(f"no request has the id {request_id}")
        return row

    def _advance(self, row: _Row, known: int) -> None:
        """One step, unless another thread already took this row past the `known` tokens."""
        with self._lock:
            if row.finished is None and len(row.ids) <= known:
                self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """Admits waiting requests and samples one token for every running one."""
        with self._lock:
            new = self._next_rows()
            try:
                if new:
                    self._admit(new)
                elif self._running:
                    self._decode()
            except BaseException as error:  # Ctrl-C too
                # Whoever waits for one of these rows must hear of it: their place in the cache is not to be trusted.
                for row in {id(r): r for r in [*new, *self._running]}.values():
                    row.error, row.finished = error, row.finished or "cancelled"
                self._running.clear()
                raise

    def _next_rows(self) -> list[_Row]:
        """As many waiting requests as fit into the slots and one reading."""
        new: list[_Row] = []
        tokens = 0
        while self._waiting and len(self._running) + len(new) < self.max_slots:
            tokens += len(self._waiting[0].request.prompt_ids)
            if new and tokens > PREFILL_TOKENS:
                break
            new.append(self._waiting.popleft())
        return new

    def _admit(self, new: list[_Row]) -> None:
        """Reads the prompts of new rows and samples their first tokens."""
        fast = self.model.base_model.danlu_fast_path
        logits = self._prefill(new) if fast else self._prefill_with_past(new)
        self._running += new
        for row in new:
            row.version = self.version
        self._take(logits, new)

    def _prefill(self, new: list[_Row]) -> Tensor:
        """All distinct prompts as one batch of trees; their keys and values are copied into every slot that needs them."""
        prompts: dict[tuple[int, ...], int] = {}
        owner = [prompts.setdefault(tuple(r.request.prompt_ids), len(prompts)) for r in new]
        tree = TreeBatch.of([Node(p, [0.0] * len(p)) for p in prompts]).to(self.model.device)
        plan = TreePlan(tree)
        starts, ends = tree.node_start_N.tolist(), tree.node_end_N.tolist()
        base = len(self._running)

        def keep(layer: int, key: Tensor, value: Tensor) -> None:
            if self._cache is None:
                groups, _, width = key.shape
                count = self.model.config.num_hidden_layers
                self._cache = SlotCache(count, groups, width, dtype=value.dtype, device=value.device)
            longest = max(r.length + min(r.limit, 64) for r in [*self._running, *new])
            self._cache.reserve(base + len(new), longest)
            for offset, node in enumerate(owner):
                part = slice(starts[node], ends[node])
                length = ends[node] - starts[node]
                self._cache.keys[layer, base + offset, :, :length] = key[:, part]
                self._cache.values[layer, base + offset, :, :length] = value[:, part]

        plan.on_key_value = keep
        hidden = self._trunk(tree.input_ids_T, tree.position_ids_T, plan)
        last = hidden.index_select(0, tree.node_end_N - 1)
        logits: Tensor = self.model.get_output_embeddings()(last)
        return logits[torch.tensor(owner, device=logits.device)]

    def _decode(self) -> None:
        rows = list(self._running)
        if self.model.base_model.danlu_fast_path:
            cache = self._cache
            assert cache is not None, "running rows were prefilled"
            cache.reserve(len(rows), max(r.length for r in rows))
            # The last sampled token has not been read yet: it stands at position length - 1.
            positions = [r.length - 1 for r in rows]
            plan = DecodePlan(cache, positions)
            ids = torch.tensor([r.ids[-1] for r in rows], device=self.model.device)
            logits = self.model.get_output_embeddings()(self._trunk(ids, plan.positions_S, plan))
        else:
            logits = torch.cat([self._read_with_past(r, [r.ids[-1]]) for r in rows])
        self._take(logits, rows)

    def _trunk(self, ids_T: Tensor, positions_T: Tensor, plan: Any) -> Tensor:
        output = self.model.base_model(
            input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False, **{PLAN_ARGUMENT: plan}
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _prefill_with_past(self, new: list[_Row]) -> Tensor:
        return torch.cat([self._read_with_past(r, list(r.request.prompt_ids)) for r in new])

    def _read_with_past(self, row: _Row, ids: list[int]) -> Tensor:
        """One row at a time with transformers' own cache: right for every family, slow."""
        output = self.model(
            input_ids=torch.tensor([ids], device=self.model.device), past_key_values=row.past, use_cache=True
        )
        row.past = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits

    def _take(self, logits: Tensor, rows: list[_Row]) -> None:
        """Samples a token for each row, and lets finished rows go."""
        params = [r.request.params for r in rows]
        penalised = any(p.repetition_penalty != 1.0 for p in params)
        history = [r.history() if penalised else [] for r in rows]
        tokens, logprobs = sample(logits.cpu(), params, [len(r.ids) for r in rows], history)
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.logprobs.append(logprob)
            row.ids.append(token)  # last: readers without the lock go by its length
            if token in row.request.params.stop_ids or self._hits_stop_text(row):
                row.finished = "stop"
            elif len(row.ids) >= row.limit:
                row.finished = "length"
        for index in reversed(range(len(self._running))):
            if self._running[index].finished is not None:
                self._leave(index)

    def _hits_stop_text(self, row: _Row) -> bool:
        stops = row.request.params.stop
        if not stops or self.tokenizer is None:
            return False
        # A stop text of n characters spans at most n bytes-worth of tokens times four (UTF-8).
        tail = self.tokenizer.decode(row.ids[-4 * max(len(s) for s in stops) :])
        return any(s in tail for s in stops)

    def _leave(self, index: int) -> None:
        last = len(self._running) - 1
        moved = self._running[last]
        if index != last and self._cache is not None:
            self._cache.move(last, index, moved.length)
        self._running[index].past = None
        self._running[index] = moved
        self._running.pop()
