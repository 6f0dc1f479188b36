"""Speculative decoding: several tokens are guessed and then read at once (Leviathan et al. 2023).

The engine samples at every guessed position with the draw that belongs to that token, and keeps guesses as long as they equal what
was sampled. A guess is one fixed token, so this accepts it with its probability under the model, as rejection sampling would; and
the answer is the one without speculation, greedy or sampled, token for token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from danlu.exceptions import EngineError
from danlu.generation.kv_cache import Lane
from danlu.generation.runner import CachedRunner
from danlu.generation.step_plan import Read
from danlu.models.load import load_model
from danlu.models.prefix import room_of
from danlu.models.root import prepare


@dataclass(frozen=True)
class Guessing:
    """What a drafter is asked for one request: to go on with `ids` (prompt and answer) by at most `count` tokens."""

    request_id: str
    ids: Sequence[int]
    count: int


class Drafter(Protocol):
    """Guesses tokens. `tokens`: how many it is asked for at most."""

    tokens: int

    def guess(self, asked: Sequence[Guessing]) -> list[list[int]]:
        """For each request up to `count` ids; fewer, or none, where it has no idea."""
        ...

    def forget(self, request_id: str) -> None:
        """The request is over."""
        ...


@dataclass
class _Index:
    """Where each run of ids was last followed by something."""

    indexed: int = 0
    after: dict[tuple[int, ...], int] = field(default_factory=dict)


class NgramDrafter:
    """Repeats what followed the last occurrence of the text's last ids: for answers that quote their prompt.

    Args:
        tokens: to guess at once.
        longest, shortest: how many ids must agree; longer runs are tried first.
    """

    def __init__(self, tokens: int = 5, *, longest: int = 3, shortest: int = 2) -> None:
        self.tokens = tokens
        self.sizes = range(longest, shortest - 1, -1)
        self._indices: dict[str, _Index] = {}

    def guess(self, asked: Sequence[Guessing]) -> list[list[int]]:
        """See `Drafter.guess`."""
        return [self._continue(g) for g in asked]

    def forget(self, request_id: str) -> None:
        """See `Drafter.forget`."""
        self._indices.pop(request_id, None)

    def _continue(self, asked: Guessing) -> list[int]:
        index, ids = self._indices.setdefault(asked.request_id, _Index()), asked.ids
        for end in range(index.indexed, len(ids)):
            for size in self.sizes:
                if end >= size:
                    index.after[tuple(ids[end - size : end])] = end
        index.indexed = len(ids)
        for size in self.sizes:
            place = index.after.get(tuple(ids[-size:]))
            if place is not None:
                return list(ids[place : place + asked.count])
        return []


@dataclass
class _Draft:
    lane: Lane
    ids: list[int] = field(default_factory=list)  # that the lane has read
    sure: int = 0  # of them, those that are no guesses


class ModelDrafter:
    """Guesses with a smaller model's most likely tokens.

    Args:
        model: a causal language model with the same tokenizer, and attention that takes a plan.
        vocab_size: of the model that it guesses for.
        tokens: to guess at once.
        memory: bytes for its keys and values; requests that find no room are not guessed for.

    Raises:
        EngineError: another vocabulary, or a family without pluggable attention.
    """

    def __init__(self, model: Any, *, vocab_size: int, tokens: int = 4, memory: int = 1 << 30) -> None:
        self.tokens = tokens
        model = prepare(model).eval()
        if model.config.vocab_size != vocab_size:
            raise EngineError(
                f"the draft model has {model.config.vocab_size} tokens, the model {vocab_size}",
                hint="take a draft model with the same tokenizer",
            )
        if not model.base_model.danlu_fast_path:
            raise EngineError(f"{type(model).__name__} cannot be a draft model: its attention is not pluggable")
        self.context = room_of(model)
        self._runner = CachedRunner(model, memory)
        self._drafts: dict[str, _Draft] = {}

    def guess(self, asked: Sequence[Guessing]) -> list[list[int]]:
        """See `Drafter.guess`."""
        guesses: list[list[int]] = [[] for _ in asked]
        active = [i for i, g in enumerate(asked) if g.count > 0 and self._open(g)]
        reads = []
        for i in active:
            draft = self._drafts[asked[i].request_id]
            self._rewind(draft, asked[i].ids)
            new = list(asked[i].ids[len(draft.ids) :])
            draft.ids += new
            draft.sure = len(draft.ids)
            reads.append(Read(draft.lane, new, prompt=True, wanted=1))
        while active:
            tokens = self._runner.logits(self._runner.read(reads)).argmax(-1).tolist()
            for i, token in zip(active, tokens, strict=True):
                guesses[i].append(token)
            active = [i for i in active if len(guesses[i]) < asked[i].count]
            reads = []
            for i in active:
                draft = self._drafts[asked[i].request_id]
                draft.ids.append(guesses[i][-1])
                reads.append(Read(draft.lane, guesses[i][-1:], prompt=False, wanted=1))
        return guesses

    def forget(self, request_id: str) -> None:
        """See `Drafter.forget`."""
        draft = self._drafts.pop(request_id, None)
        if draft is not None:
            self._runner.close(draft.lane)

    def _open(self, asked: Guessing) -> bool:
        needed = len(asked.ids) + asked.count
        if needed > self.context:
            return False
        draft = self._drafts.get(asked.request_id)
        if draft is not None and needed <= draft.lane.reserved:
            return True
        self.forget(asked.request_id)
        reserved = min(2 * needed, self.context)
        if not self._runner.fits(reserved, 1):
            return False
        self._drafts[asked.request_id] = _Draft(self._runner.open(reserved, needed))
        return True

    @staticmethod
    def _rewind(draft: _Draft, ids: Sequence[int]) -> None:
        """Forgets guesses that were not taken; the last id is read again if need be, for its prediction."""
        same = min(draft.sure, len(ids) - 1)
        while same < min(len(draft.ids), len(ids) - 1) and draft.ids[same] == ids[same]:
            same += 1
        del draft.ids[same:]
        draft.lane.length = same


def drafter_of(speculate: str, guesses: int, model: Any) -> Drafter | None:
    """The drafter that settings ask for.

    Args:
        speculate: "off", "ngram", or a draft model for `models.load.load_model`.
        guesses: tokens to guess at once.
        model: for which it guesses.
    """
    if speculate == "off":
        return None
    if speculate == "ngram":
        return NgramDrafter(guesses)
    draft = load_model(speculate, dtype=model.dtype).to(model.device)
    return ModelDrafter(draft, vocab_size=model.config.vocab_size, tokens=guesses)
