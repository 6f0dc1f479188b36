"""danlu's own engine: continuous batching on any model that transformers can run.

Requests start in their order as soon as a slot and memory are free. Every step is one forward: each running request gets one
token (or several that were guessed), and what is left of the step goes to prompts, so that long ones are read in pieces and keep
nobody waiting. What another prompt has read before is not read again. There is no background thread: whoever waits for a token
takes the lock and moves every running request one step on.

A request's tokens do not depend on what else runs (bit for bit in fp32 on a CPU; see `step_plan.py` for how).
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from danlu.exceptions import EngineError
from danlu.generation.kv_cache import Lane
from danlu.generation.memory import default_memory
from danlu.generation.past import PastRunner
from danlu.generation.protocol import Request
from danlu.generation.runner import CachedRunner
from danlu.generation.sampling import sample
from danlu.generation.search import Search, search_of
from danlu.generation.speculative import Drafter, Guessing
from danlu.generation.step_plan import Read
from danlu.generation.stepwise import Row, StepwiseEngine
from danlu.models import prepacked
from danlu.models.prefix import receive, room_of
from danlu.models.root import prepare

PREFILL_TOKENS = 4096  # of prompts in one step
PREFILL_BESIDE_DECODING = 512  # the same while others wait for their next token
LIKELY_SHARED = 16  # ids after what two prompts have read that make them worth reading once


@dataclass(eq=False)
class _Row(Row):
    request: Request
    limit: int
    text: array[int]  # prompt and answer
    search: Search | None = None
    lanes: list[Lane] = field(default_factory=list)
    next_tokens: list[int] = field(default_factory=list)  # of a search: what its lanes read next
    hidden: list[Tensor] = field(default_factory=list)  # of a search that wants it: the prompt's, as far as it is read

    @property
    def prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def width(self) -> int:
        return self.search.width if self.search is not None else 1


class _Part(NamedTuple):
    """The reads `start:end` of a step, and their first hidden state, belong to a row; `guesses` were read after its last token."""

    row: _Row
    start: int
    end: int
    first: int
    guesses: Sequence[int] = ()


class LocalEngine(StepwiseEngine[_Row]):
    """Generates with a transformers model in this process.

    Args:
        model: a causal language model; the engine owns it from now on (evaluation mode, no gradients). Who changes its weights
            otherwise than by `update_weights` must call `forget_prompts`.
        tokenizer: needed for stop texts only.
        max_slots: how many sequences run at once (a beam search takes one for each beam).
        memory: bytes for keys and values of running and remembered prompts; fewer requests run at once where it is short.
            Default: a quarter of what is free, at most 4 GiB on a CPU and 32 GiB on a GPU.
        drafter: guesses tokens ahead (`speculative.py`); results are the same with and without. For models on the fast path.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None = None,
        *,
        max_slots: int = 64,
        memory: int | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        super().__init__()
        self.model = prepare(model).eval()
        self.tokenizer = tokenizer
        self.max_slots = max_slots
        self.context = room_of(model)
        self.vocabulary = len(model.get_input_embeddings().weight)
        self.drafter = drafter if model.base_model.danlu_fast_path else None
        self._memory = memory
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._made: CachedRunner | PastRunner | None = None

    # -- protocol -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def submit(self, request: Request) -> str:
        """See `Engine.submit`."""
        self._check(request)
        prompt, params = len(request.prompt_ids), request.params
        if params.stop and self.tokenizer is None:
            raise EngineError("stop texts need a tokenizer")
        limit = min(params.max_new_tokens, self.context - prompt)
        row = _Row(request, limit, array("q", request.prompt_ids))
        row.search = search_of(request.prompt_ids, params, limit, lambda ids: self._ends(row, ids))
        if row.width > self.max_slots:
            raise EngineError(
                f"the search needs {row.width} slots and the engine has {self.max_slots}",
                hint="fewer beams or candidates (num_beams, top_k)",
            )
        with self._lock:
            self._runner().require(prompt + limit, row.width)
            self._rows[row.id] = row
            self._waiting.append(row)
        return row.id

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
                self._leave(row)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Engine.update_weights`."""
        with self._lock, torch.no_grad():
            if self._running or self._waiting:
                raise EngineError("weights cannot change while requests are running")
            own = dict(self.model.named_parameters())
            try:
                for name, tensor in named_tensors:
                    if name in own:
                        own[name].copy_(tensor)
                    elif not receive(self.model, name, tensor) and name not in self.model.state_dict():
                        raise EngineError(f"the engine's model has no parameter named '{name}'")
            finally:
                self._forget(in_place=True)
            self.version = version

    def close(self) -> None:
        """Lets go of the model and its cache; the engine answers nothing after that."""
        with self._lock:
            if self._running or self._waiting:
                raise EngineError("the engine cannot close while requests are running")
            if self.model is not None:  # else it is closed already
                prepacked.disable(self.model)
            self.model = self._made = self.drafter = None

    def forget_prompts(self) -> None:
        """Drops what was kept of earlier prompts; needed after the model's weights or its prefix were changed in place.

        Raises:
            EngineError: requests are running.
        """
        self._forget(in_place=False)

    def _forget(self, *, in_place: bool) -> None:
        with self._lock:
            if self._running:
                raise EngineError("weights cannot change while requests are running")
            self.context = room_of(self.model)
            if self._made is not None:
                self._made.forget_prompts(in_place=in_place)

    # -- scheduling -----------------------------------------------------------------------------------------------------

    def _runner(self) -> CachedRunner | PastRunner:
        if self._made is None:
            memory = self._memory
            if memory is None:
                memory = default_memory(next(self.model.parameters()).device)
            kind = CachedRunner if self.model.base_model.danlu_fast_path else PastRunner
            self._made = kind(self.model, memory)
        return self._made

    @torch.inference_mode()
    def step(self) -> None:
        """One forward: a token for every running request, and a piece of the prompts that are still to be read."""
        with self._lock:
            if not self._running and not self._waiting:
                return
            try:
                self._admit()
                reads, parts = self._next_reads()
                hidden = self._runner().read(reads)
                self._remember(parts)
                self._take(hidden, parts)
            except BaseException as error:  # Ctrl-C too
                # Whoever waits for one of these rows must hear of it: their place in the cache is not to be trusted.
                for row in self._running:
                    row.lanes.clear()
                    row.error, row.finished = error, row.finished or "cancelled"
                    if self.drafter is not None:
                        self.drafter.forget(row.id)
                self._running.clear()
                self._runner().reset()
                raise

    def _admit(self) -> None:
        """Requests start in the order of their arrival; nobody overtakes the first one that does not fit yet."""
        runner = self._runner()
        taken = sum(r.width for r in self._running)
        while self._waiting:
            row = self._waiting[0]
            if taken + row.width > self.max_slots or not runner.fits(row.prompt + row.limit, row.width):
                return
            self._waiting.popleft()
            self._running.append(row)  # before its lane: should that fail, whoever waits for the row hears of it
            # The other lanes of a search are opened when its prompt has been read; their room is kept for them.
            row.lanes.append(runner.open(row.prompt + row.limit, row.prompt, lanes=row.width))
            row.version = self.version
            taken += row.width

    def _next_reads(self) -> tuple[list[Read], list[_Part]]:
        reads: list[Read] = []
        parts: list[_Part] = []
        decoding = [r for r in self._running if r.lanes[0].length >= r.prompt]
        first = 0
        for row, guesses in zip(decoding, self._guesses(decoding), strict=True):
            start = len(reads)
            if row.search is not None:
                reads += [Read(x, [t], False, 1) for x, t in zip(row.lanes, row.next_tokens, strict=True)]
            else:
                reads.append(Read(row.lanes[0], [row.ids[-1], *guesses], False, 1 + len(guesses)))
            parts.append(_Part(row, start, len(reads), first, guesses))
            first += sum(r.wanted for r in reads[start:])
        room = PREFILL_BESIDE_DECODING if decoding else PREFILL_TOKENS
        begun: set[bytes] = set()
        for row in self._running:
            lane = row.lanes[0]
            if lane.length >= row.prompt or room <= 0:
                continue
            if row.search is None or not row.search.all_hidden:
                self._runner().recall(lane, row.request.prompt_ids[:-1])
                # What another row begins to read in this step is there to copy in the next one.
                next_ids = row.text[: lane.length + LIKELY_SHARED].tobytes()
                if self._runner().recalls and row.prompt - lane.length > LIKELY_SHARED:
                    if next_ids in begun:
                        continue
                    begun.add(next_ids)
            end = row.prompt if self._runner().whole_prompts else min(row.prompt, lane.length + room)
            ids = list(row.request.prompt_ids[lane.length : end])
            whole = row.search is not None and row.search.all_hidden
            reads.append(Read(lane, ids, True, len(ids) if whole else int(end == row.prompt)))
            parts.append(_Part(row, len(reads) - 1, len(reads), first))
            first += reads[-1].wanted
            room -= len(ids)
        return reads, parts

    def _guesses(self, rows: Sequence[_Row]) -> list[list[int]]:
        """What to read after each row's last token in the hope that it will be sampled."""
        drafter = self.drafter
        if drafter is None:
            return [[] for _ in rows]
        asked = []
        for row in rows:
            room = min(drafter.tokens, row.limit - len(row.ids) - 1, self._runner().room(row.lanes[0]) - 1)
            asked.append(Guessing(row.id, row.text, room if row.search is None else 0))
        wanted = [i for i, g in enumerate(asked) if g.count > 0]
        guessed = dict(zip(wanted, drafter.guess([asked[i] for i in wanted]), strict=True))
        return [guessed.get(i, []) for i in range(len(rows))]

    def _remember(self, parts: Sequence[_Part]) -> None:
        for part in parts:
            row = part.row
            if not row.ids and not row.next_tokens:
                lane = row.lanes[0]
                self._runner().remember(lane, row.request.prompt_ids[: lane.length])

    # -- sampling -------------------------------------------------------------------------------------------------------

    def _take(self, hidden_MD: Tensor, parts: Sequence[_Part]) -> None:
        """Samples a token for each row, or several where guesses were right, and lets finished rows go."""
        for row, _, _, first, _ in parts:
            if row.search is not None and row.search.all_hidden and not row.next_tokens:
                new = row.lanes[0].length - sum(len(h) for h in row.hidden)
                row.hidden.append(hidden_MD[first : first + new])
        ready = [p for p in parts if p.row.lanes[0].length >= p.row.prompt]
        if not ready:
            return
        places: list[int] = []  # of the hidden states that predict something
        own: list[range] = []
        for part in ready:
            first, count = part.first, 1 + len(part.guesses)
            if part.row.search is not None:
                count = part.end - part.start
            if part.row.hidden:
                first += len(part.row.hidden[-1]) - 1
            own.append(range(len(places), len(places) + count))
            places += range(first, first + count)
        whole = len(places) == len(hidden_MD)
        logits = self._runner().logits(hidden_MD if whole else hidden_MD[torch.tensor(places, device=hidden_MD.device)])
        self._sample([(p, r) for p, r in zip(ready, own, strict=True) if p.row.search is None], logits)
        for part, rows in zip(ready, own, strict=True):
            if part.row.search is not None:
                self._search(part, logits[rows.start : rows.stop], hidden_MD)
        for part in ready:
            if part.row.finished is not None:
                self._leave(part.row)

    def _sample(self, parts: Sequence[tuple[_Part, range]], logits_MV: Tensor) -> None:
        if not parts:
            return
        params = [p.row.request.params for p, own in parts for _ in own]
        steps = [len(p.row.ids) + n for p, own in parts for n in range(len(own))]
        history = [h for p, own in parts for h in _histories(p.row, p.guesses)]
        index = [i for _, own in parts for i in own]
        whole = len(index) == len(logits_MV)
        drawn = sample(logits_MV if whole else logits_MV[torch.tensor(index)], params, steps, history)
        at = 0
        for part, own in parts:
            row, lane = part.row, part.row.lanes[0]
            for n in range(len(own)):
                token = drawn.tokens[at + n]
                row.logprobs.append(drawn.logprobs[at + n])
                if row.request.params.logprobs:
                    row.tops.append(drawn.top_logprobs[at + n])
                row.text.append(token)
                row.ids.append(token)  # last: readers without the lock go by its length
                if self._ends(row, row.ids):
                    row.finished = "stop"
                elif len(row.ids) >= row.limit:
                    row.finished = "length"
                if row.finished is not None or n == len(part.guesses) or token != part.guesses[n]:
                    break
            lane.length = len(row.text) - 1  # guesses that were wrong are overwritten
            at += len(own)

    def _search(self, part: _Part, logits_KV: Tensor, hidden_MD: Tensor) -> None:
        row, search = part.row, part.row.search
        assert search is not None
        begun = bool(row.next_tokens)
        hidden = torch.cat(row.hidden) if row.hidden else hidden_MD[part.first : part.first + part.end - part.start]
        row.hidden.clear()
        move = search.advance(logits_KV, hidden)
        new = len(row.ids)
        row.logprobs += search.logprobs[new:]
        row.tops += search.top_logprobs[new:]
        row.ids += search.ids[new:]
        row.finished = search.finished
        if row.finished is not None:
            return
        while len(row.lanes) < len(move.tokens):
            row.lanes.append(self._runner().fork(row.lanes[0]))
        if begun:
            self._runner().reorder(row.lanes, move.parents, row.lanes[0].length - search.undone)
        row.next_tokens = move.tokens

    def _ends(self, row: _Row, ids: Sequence[int]) -> bool:
        """Whether an answer ends with its last token: a stop id, or a stop text in what it says so far."""
        params = row.request.params
        if ids[-1] in params.stop_ids:
            return True
        if not params.stop or self.tokenizer is None or len(ids) < params.min_new_tokens:
            return False
        # A stop text of n characters spans at most n bytes-worth of tokens times four (UTF-8).
        tail = self.tokenizer.decode(list(ids[-4 * max(len(s) for s in params.stop) :]))
        return any(s in tail for s in params.stop)

    def _leave(self, row: _Row) -> None:
        for lane in row.lanes:
            self._runner().close(lane)
        row.lanes.clear()
        if self.drafter is not None:
            self.drafter.forget(row.id)
        self._running.remove(row)


def _histories(row: _Row, guesses: Sequence[int]) -> list[Sequence[int]]:
    """Prompt and answer before each of the tokens to sample."""
    if not guesses or not row.request.params.reads_history:
        return [row.text] * (1 + len(guesses))
    return [row.text[:] + array("q", guesses[:n]) for n in range(1 + len(guesses))]
