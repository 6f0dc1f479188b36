"""An engine for encoder-decoders, with transformers' own cache.

Requests that come together are one cohort: their sources go through the encoder as one padded batch, and their answers grow in
step, so that no answer needs padding. Rows leave a cohort when they end. Later requests make a cohort of their own as soon as
there are slots. A request's tokens do not depend on what else runs up to rounding.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from danlu.exceptions import EngineError
from danlu.generation.protocol import Request
from danlu.generation.sampling import sample
from danlu.generation.search import Search, search_of
from danlu.generation.stepwise import Row, StepwiseEngine
from danlu.models.families import context_of
from danlu.models.seq2seq import start_id


@dataclass(eq=False)
class _Row(Row):
    request: Request
    limit: int
    text: array[int]  # what the decoder has read and is about to read
    search: Search | None = None

    @property
    def width(self) -> int:
        return self.search.width if self.search is not None else 1


@dataclass(eq=False)
class _Cohort:
    """Rows whose answers are equally long. Lanes are the batch of the decoder; a beam search has several, one after another."""

    rows: list[_Row]
    states_LSD: Tensor
    mask_LS: Tensor
    past: EncoderDecoderCache
    tokens: list[list[int]]  # what each lane reads next
    lanes: list[int] = field(default_factory=list)  # of each row


class EncoderDecoderEngine(StepwiseEngine[_Row]):
    """Generates with an encoder-decoder of transformers in this process.

    Args:
        model: the engine owns it from now on (evaluation mode, no gradients).
        tokenizer: needed for stop texts only.
        max_slots: how many sequences run at once (a beam search takes one for each beam).
    """

    def __init__(self, model: Any, tokenizer: Any | None = None, *, max_slots: int = 64) -> None:
        super().__init__()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_slots = max_slots
        self.context = context_of(model.config)
        self.vocabulary = len(model.get_input_embeddings().weight)
        forced = getattr(model.generation_config, "forced_bos_token_id", None)
        self._prefix = [start_id(model), *([forced] if isinstance(forced, int) else [])]
        self._waiting: deque[_Row] = deque()
        self._cohorts: list[_Cohort] = []

    # -- protocol -------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> str:
        """See `Engine.submit`; the prompt is the source."""
        self._check(request)
        params = request.params
        if params.stop and self.tokenizer is None:
            raise EngineError("stop texts need a tokenizer")
        limit = min(params.max_new_tokens, self.context - len(self._prefix))
        row = _Row(request, limit, array("q", self._prefix))
        row.search = search_of(self._prefix, params, limit, lambda ids: self._ends(row, ids))
        if row.width > self.max_slots:
            raise EngineError(
                f"the search needs {row.width} slots and the engine has {self.max_slots}",
                hint="fewer beams or candidates (num_beams, top_k)",
            )
        with self._lock:
            self._rows[row.id] = row
            self._waiting.append(row)
        return row.id

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        with self._lock:
            row = self._rows.get(request_id)
            if row is None or row.finished is not None:
                return
            row.finished = "cancelled"  # its cohort lets it go in the next step
            if row in self._waiting:
                self._waiting.remove(row)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Engine.update_weights`."""
        with self._lock, torch.no_grad():
            if self._waiting or any(r.finished is None for c in self._cohorts for r in c.rows):
                raise EngineError("weights cannot change while requests are running")
            own = dict(self.model.named_parameters())
            for name, tensor in named_tensors:
                if name in own:
                    own[name].copy_(tensor)
                elif name not in self.model.state_dict():
                    raise EngineError(f"the engine's model has no parameter named '{name}'")
            self.version = version

    def forget_prompts(self) -> None:
        """Nothing is kept of earlier prompts."""

    # -- steps ----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every running request; waiting ones are read first where there are slots."""
        with self._lock:
            try:
                self._admit()
                for cohort in self._cohorts:
                    self._advance_cohort(cohort)
                self._cohorts = [c for c in self._cohorts if c.rows]
            except BaseException as error:  # Ctrl-C too: whoever waits for one of these rows must hear of it
                for row in (r for c in self._cohorts for r in c.rows):
                    row.error, row.finished = error, row.finished or "cancelled"
                self._cohorts.clear()
                raise

    def _admit(self) -> None:
        taken = sum(r.width for c in self._cohorts for r in c.rows if r.finished is None)
        rows: list[_Row] = []
        while self._waiting and taken + self._waiting[0].width <= self.max_slots:
            rows.append(self._waiting.popleft())
            rows[-1].version = self.version
            taken += rows[-1].width
        if not rows:
            return
        device = next(self.model.parameters()).device
        sources = [list(r.request.prompt_ids) for r in rows]
        longest = max(map(len, sources))
        ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sources], device=device)
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sources], device=device)
        cohort = _Cohort(
            rows, ids, mask, _fresh(self.model.config), [list(self._prefix) for _ in rows], [1] * len(rows)
        )
        self._cohorts.append(cohort)  # before the encoder runs: should that fail, whoever waits hears of it
        cohort.states_LSD = self._encode(ids, mask)

    def _encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        embedded = getattr(self.model, "embedded", None)  # CPM-2 reads prompts for negative ids
        given = {"inputs_embeds": embedded(ids)} if embedded is not None else {"input_ids": ids}
        states: Tensor = self.model.get_encoder()(**given, attention_mask=mask).last_hidden_state
        return states

    def _advance_cohort(self, cohort: _Cohort) -> None:
        if all(r.finished is not None for r in cohort.rows):
            cohort.rows.clear()
            return
        wanted = any(r.search is not None and r.search.all_hidden for r in cohort.rows)
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=cohort.states_LSD),
            attention_mask=cohort.mask_LS,
            decoder_input_ids=torch.tensor(cohort.tokens, device=cohort.mask_LS.device),
            past_key_values=cohort.past,
            use_cache=True,
            output_hidden_states=wanted,
        )
        cohort.past = output.past_key_values
        hidden_LTD = output.decoder_hidden_states[-1] if wanted else output.logits[:, :, :0]
        self._take(cohort, output.logits[:, -1], hidden_LTD)

    def _take(self, cohort: _Cohort, logits_LV: Tensor, hidden_LTD: Tensor) -> None:
        """Samples or searches for each row, and gives the cohort the lanes that go on."""
        first = [sum(cohort.lanes[:n]) for n in range(len(cohort.rows))]
        drawing = [n for n, r in enumerate(cohort.rows) if r.search is None and r.finished is None]
        if drawing:
            rows = [cohort.rows[n] for n in drawing]
            drawn = sample(
                logits_LV[torch.tensor([first[n] for n in drawing], device=logits_LV.device)],
                [r.request.params for r in rows],
                [len(r.ids) for r in rows],
                [r.text for r in rows],
            )
            for at, row in enumerate(rows):
                row.logprobs.append(drawn.logprobs[at])
                if row.request.params.logprobs:
                    row.tops.append(drawn.top_logprobs[at])
                row.text.append(drawn.tokens[at])
                row.ids.append(drawn.tokens[at])  # last: readers without the lock go by its length
                if self._ends(row, row.ids):
                    row.finished = "stop"
                elif len(row.ids) >= row.limit:
                    row.finished = "length"
        stay: list[int] = []
        tokens: list[list[int]] = []
        left: list[_Row] = []
        lanes: list[int] = []
        for row, start, count in zip(cohort.rows, first, cohort.lanes, strict=True):
            parents, new = [0], list(row.ids[-1:])
            if row.search is not None and row.finished is None:
                parents, new = self._search(row, logits_LV[start : start + count], hidden_LTD[start : start + count])
            if row.finished is not None:
                continue
            stay += [start + p for p in parents]
            tokens += [[t] for t in new]
            left.append(row)
            lanes.append(len(new))
        cohort.rows, cohort.lanes, cohort.tokens = left, lanes, tokens
        if left and stay != list(range(len(logits_LV))):
            index = torch.tensor(stay, device=logits_LV.device)
            cohort.past.reorder_cache(index)
            cohort.states_LSD, cohort.mask_LS = cohort.states_LSD[index], cohort.mask_LS[index]

    def _search(self, row: _Row, logits_KV: Tensor, hidden_KTD: Tensor) -> tuple[list[int], list[int]]:
        search = row.search
        assert search is not None, "asked by the caller"
        begun = len(logits_KV) > 1  # before that there is one lane, which has read what the decoder begins with
        move = search.advance(logits_KV, hidden_KTD[:, -1] if begun else hidden_KTD[0])
        new = len(row.ids)
        row.logprobs += search.logprobs[new:]
        row.tops += search.top_logprobs[new:]
        row.ids += search.ids[new:]
        row.finished = search.finished
        return move.parents, move.tokens

    def _ends(self, row: _Row, ids: Sequence[int]) -> bool:
        params = row.request.params
        if ids[-1] in params.stop_ids:
            return True
        if not params.stop or self.tokenizer is None or len(ids) < params.min_new_tokens:
            return False
        tail = self.tokenizer.decode(list(ids[-4 * max(len(s) for s in params.stop) :]))
        return any(s in tail for s in params.stop)


def _fresh(config: Any) -> EncoderDecoderCache:
    decoder = config.get_text_config(decoder=True)
    return EncoderDecoderCache(DynamicCache(config=decoder), DynamicCache(config=decoder))
