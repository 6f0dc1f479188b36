"""Deterministic searches that decode several lanes for one request: beam search and contrastive search."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from danlu.generation.penalties import adjust
from danlu.generation.protocol import FinishReason, SamplingParams, TopLogprobs

Ends = Callable[[Sequence[int]], bool]  # whether an answer ends with its last token


@dataclass(frozen=True)
class Move:
    """What the lanes do next: lane i continues lane parents[i] and reads tokens[i]."""

    parents: list[int]
    tokens: list[int]


class Search(Protocol):
    """One request's search.

    Attributes:
        width: lanes it needs.
        all_hidden: whether it wants the hidden states of the whole prompt.
        ids, logprobs, top_logprobs: the answer so far (beam search: empty until it is found).
        finished: how it ended, None before that.
    """

    width: int
    all_hidden: bool
    ids: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    finished: FinishReason | None

    @property
    def undone(self) -> int:
        """Positions at the end of the lanes that the last move exchanges; all before are common."""
        ...

    def advance(self, logits: Tensor, hidden: Tensor) -> Move:
        """The next move, after the prompt was read (logits `[1, V]`, hidden `[n, D]`) or a move (`[width, V]`, `[width, D]`)."""
        ...


@dataclass
class _Beam:
    ids: list[int]
    logprobs: list[float]
    tops: list[TopLogprobs]
    score: float


class BeamSearch:
    """Keeps the `num_beams` most likely beginnings; the same answers as transformers' `generate` with its defaults.

    A beam that ends is scored by its summed log-probability over its length to the power of `length_penalty`. The search ends
    when no running beam can still beat the worst of `num_beams` finished ones at the present length (Wu et al. 2016, section 7).
    Log-probabilities are after penalties and bans, which act on them as transformers' processors do.
    """

    all_hidden = False

    def __init__(self, prompt: Sequence[int], params: SamplingParams, limit: int, ends: Ends) -> None:
        self.width = params.num_beams
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[TopLogprobs] = []
        self.finished: FinishReason | None = None
        self._prompt, self._params, self._limit, self._ends = list(prompt), params, limit, ends
        self._running = [_Beam([], [], [], 0.0)]
        self._done: list[tuple[float, _Beam]] = []

    @property
    def undone(self) -> int:
        return max(0, len(self._running[0].ids) - 1)

    def advance(self, logits: Tensor, hidden: Tensor) -> Move:
        """See `Search.advance`."""
        beams, step = self._running, len(self._running[0].ids)
        params = self._params
        histories = [array("q", [*self._prompt, *b.ids]) for b in beams]
        logprobs = adjust(
            torch.log_softmax(logits.float(), dim=-1), [params] * len(beams), [step] * len(beams), histories
        )
        scores = logprobs + torch.tensor([b.score for b in beams], device=logits.device)[:, None]
        # Enough for `width` beams to go on, should every stop token be among the best.
        count = min(max(2, 1 + len(params.stop_ids)) * self.width, scores.numel())
        best, index = scores.flatten().topk(count)
        chosen, vocab = index.tolist(), scores.shape[1]
        picked = logprobs.flatten()[index].tolist()
        tops = _likeliest(logprobs, params.logprobs)
        going: list[tuple[int, _Beam]] = []
        for rank, (score, place, logprob) in enumerate(zip(best.tolist(), chosen, picked, strict=True)):
            parent, token = divmod(place, vocab)
            old = beams[parent]
            beam = _Beam([*old.ids, token], [*old.logprobs, logprob], [*old.tops, *tops[parent : parent + 1]], score)
            if len(beam.ids) < self._limit and not self._ends(beam.ids):
                going.append((parent, beam))
            elif rank < self.width:
                self._done.append((score / len(beam.ids) ** params.length_penalty, beam))
        self._done = sorted(self._done, key=lambda d: d[0], reverse=True)[: self.width]
        going = going[: self.width]
        if not going or not self._can_improve(going[0][1]):
            self._finish()
            return Move([], [])
        while len(going) < self.width:  # stop texts may leave fewer: a copy that can never win
            parent, beam = going[0]
            going.append((parent, _Beam(beam.ids, beam.logprobs, beam.tops, -1e9)))
        self._running = [b for _, b in going]
        return Move([p for p, _ in going], [b.ids[-1] for b in self._running])

    def _can_improve(self, best: _Beam) -> bool:
        if len(self._done) < self.width:
            return True
        return bool(best.score / len(best.ids) ** self._params.length_penalty > self._done[-1][0])

    def _finish(self) -> None:
        found = self._done[0][1]
        self.ids, self.logprobs, self.top_logprobs = found.ids, found.logprobs, found.tops
        self.finished = "stop" if self._ends(found.ids) else "length"


class ContrastiveSearch:
    """Among the `top_k` likeliest tokens takes the one that repeats the text least (Su et al. 2022, eq. 5).

    A candidate v after x scores `(1 - alpha) p(v | x) - alpha max_j cos(h_v, h_j)` over the hidden states of all tokens before it,
    so every candidate is read before one is taken. The log-probability is that of the softmax after penalties and bans.
    """

    all_hidden = True

    def __init__(self, prompt: Sequence[int], params: SamplingParams, limit: int, ends: Ends) -> None:
        self.width = params.top_k
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[TopLogprobs] = []
        self.finished: FinishReason | None = None
        self._history, self._params, self._limit, self._ends = array("q", prompt), params, limit, ends
        self._seen: list[Tensor] = []  # hidden states of length 1 of all tokens so far
        self._candidates: list[int] = []
        self._logprobs: list[float] = []
        self._tops: list[TopLogprobs] = []

    @property
    def undone(self) -> int:
        return 1

    def advance(self, logits: Tensor, hidden: Tensor) -> Move:
        """See `Search.advance`."""
        directions = torch.nn.functional.normalize(hidden.float(), dim=-1)
        taken = self._take(directions) if self._candidates else 0
        self._seen.append(directions if not self._candidates else directions[taken : taken + 1])
        if self.finished is not None:
            return Move([], [])
        row = logits[taken : taken + 1]
        adjusted = adjust(row, [self._params], [len(self.ids)], [self._history])
        logprobs = torch.log_softmax(adjusted, dim=-1)
        self._tops = _likeliest(logprobs, self._params.logprobs)
        best, index = logprobs[0].topk(min(self.width, row.shape[1]))
        self._logprobs, self._candidates = best.tolist(), index.tolist()
        return Move([taken] * len(self._candidates), list(self._candidates))

    def _take(self, directions_CD: Tensor) -> int:
        alpha = self._params.penalty_alpha
        likeness = (directions_CD @ torch.cat(self._seen).T).amax(dim=1)
        probs = torch.tensor(self._logprobs, device=likeness.device).exp()
        taken = int(((1 - alpha) * probs - alpha * likeness).argmax())
        token = self._candidates[taken]
        self.ids.append(token)
        self.logprobs.append(self._logprobs[taken])
        self.top_logprobs += self._tops
        self._history.append(token)
        if self._ends(self.ids):
            self.finished = "stop"
        elif len(self.ids) >= self._limit:
            self.finished = "length"
        return taken


def _likeliest(logprobs_RV: Tensor, count: int) -> list[TopLogprobs]:
    """The most likely tokens of each row that are not banned; no rows where none are asked for."""
    if not count:
        return []
    values, ids = logprobs_RV.topk(min(count, logprobs_RV.shape[1]))
    rows = zip(ids.tolist(), values.tolist(), strict=True)
    return [tuple((i, v) for i, v in zip(*row, strict=True) if v > float("-inf")) for row in rows]


def search_of(prompt: Sequence[int], params: SamplingParams, limit: int, ends: Ends) -> Search | None:
    """The search that a request asks for; None where it samples."""
    if params.num_beams > 1:
        return BeamSearch(prompt, params, limit, ends)
    if params.penalty_alpha > 0:
        return ContrastiveSearch(prompt, params, limit, ends)
    return None
