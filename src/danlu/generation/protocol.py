"""What every generation engine can do. Chat, serving, evaluation and roll-outs speak only this."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import Tensor

from danlu.exceptions import EngineError
from danlu.generation.seeds import mix_seed

FinishReason = Literal["stop", "length", "cancelled"]
TopLogprobs = tuple[tuple[int, float], ...]  # token id and log-probability, the likeliest first

COLDEST = 1e-3  # a temperature below is greedy in all but name, and dividing by it overflows


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is answered.

    A step goes through these in order, which is transformers': logit_bias, repetition_penalty, presence and frequency penalty,
    no_repeat_ngram_size, bad_words, min_new_tokens; then, unless the most likely token is taken, temperature, top_k, top_p, min_p,
    typical_p. Should that ban every token, the smallest stop id is taken; without stop ids the bans are void for this step.

    Args:
        max_new_tokens: >= 1; cut to what the model's context leaves.
        temperature: >= 0; 0 takes the most likely token.
        top_k: keep the k most likely tokens, and those that equal the last of them; 0 keeps all.
        top_p: in (0, 1]: keep the smallest set of tokens with at least this probability (Holtzman et al. 2020); 1 keeps all.
        min_p: in [0, 1]: keep tokens at least this times as likely as the likeliest (Nguyen et al. 2024).
        typical_p: in (0, 1]: keep the tokens whose surprise is nearest to the entropy, up to this mass; 1 keeps all
            (Meister et al. 2023, eq. 6).
        repetition_penalty: > 0: divides positive and multiplies negative logits of tokens already present, in the prompt too
            (Keskar et al. 2019).
        presence_penalty: in [-2, 2]: subtracted from the logits of tokens already answered (OpenAI's API).
        frequency_penalty: in [-2, 2]: the same, times how often.
        no_repeat_ngram_size: no n-gram of this size, the prompt's too, occurs again (Paulus et al. 2018); 0 allows all.
        logit_bias: added to the logits of these token ids; -inf bans one.
        bad_words: sequences of token ids that never occur.
        stop_ids: token ids that end the answer; the last one is part of it.
        stop: texts that end the answer.
        min_new_tokens: neither stop ids nor stop texts count before so many tokens.
        seed: draws are a function of (seed, token index) alone.
        n: answers to return, >= 1; see `generate`.
        best_of: answers to sample, of which the n with the highest mean log-probability are returned; 0 samples n.
        num_beams: > 1: beam search with so many beams, which returns its best one.
        length_penalty: a finished beam's log-probability is divided by its length to this power.
        penalty_alpha: in (0, 1]: contrastive search among the top_k candidates (Su et al. 2022, eq. 5); 0 samples.
        logprobs: how many of the likeliest tokens to tell at each step, with their log-probabilities.

    Lists will do for sequences and sets, and one text for `stop`.

    Raises:
        ValueError: a value of another type or out of range, or a combination without a meaning.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    n: int = 1
    best_of: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    penalty_alpha: float = 0.0
    logprobs: int = 0

    def __post_init__(self) -> None:
        for name, convert, expected in _CONVERSIONS:
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, convert(given))
            except (TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{name} must be {expected} (found: {given!r})") from error
        ranges = (
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1"),
            (0 <= self.temperature < math.inf, "temperature must be a number and not negative"),
            (self.top_k >= 0, "top_k must not be negative"),
            (0 < self.top_p <= 1, "top_p must be in (0, 1]"),
            (0 <= self.min_p <= 1, "min_p must be in [0, 1]"),
            (0 < self.typical_p <= 1, "typical_p must be in (0, 1]"),
            (0 < self.repetition_penalty < math.inf, "repetition_penalty must be positive"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty must be in [-2, 2]"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty must be in [-2, 2]"),
            (self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size must not be negative"),
            (all(b < math.inf for b in self.logit_bias.values()), "logit_bias must be numbers, or -inf to ban a token"),
            (all(i >= 0 for i in self.logit_bias), "logit_bias has a negative token id"),
            (all(self.bad_words), "bad_words has an empty sequence"),
            (all(self.stop), "stop has an empty text"),
            (0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens must be in [0, max_new_tokens]"),
            (self.n >= 1, "n must be at least 1"),
            (self.best_of == 0 or self.best_of >= self.n, "best_of must be 0 or at least n"),
            (self.num_beams >= 1, "num_beams must be at least 1"),
            (0 <= self.penalty_alpha <= 1, "penalty_alpha must be in [0, 1]"),
            (math.isfinite(self.length_penalty), "length_penalty must be a number"),
            (self.logprobs >= 0, "logprobs must not be negative"),
        )
        for holds, sentence in (*ranges, *self._combinations()):
            if not holds:
                raise ValueError(sentence)

    def _combinations(self) -> Iterator[tuple[bool, str]]:
        deterministic = "num_beams" if self.num_beams > 1 else "penalty_alpha" if self.penalty_alpha else ""
        if deterministic:
            yield self.temperature in (0.0, 1.0), f"{deterministic} draws nothing: leave temperature at 0 or 1"
            for name, off in (("top_p", 1.0), ("min_p", 0.0), ("typical_p", 1.0), ("n", 1)):
                yield getattr(self, name) == off, f"{deterministic} draws nothing: {name} has no meaning with it"
            yield self.best_of <= 1, f"{deterministic} gives one answer: best_of has no meaning with it"
        if self.num_beams > 1:
            yield self.top_k == 0, "num_beams draws nothing: top_k has no meaning with it"
            yield self.penalty_alpha == 0, "num_beams and penalty_alpha are two kinds of search: give one"
        else:
            yield self.length_penalty == 1.0, "length_penalty has a meaning with num_beams > 1 only"
        if self.penalty_alpha:
            yield self.top_k >= 2, "penalty_alpha chooses among top_k candidates: give top_k of at least 2"
        if self.greedy and not deterministic:
            yield self.best_of <= self.n, "best_of samples several answers, and temperature 0 always gives the same one"

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < COLDEST

    @property
    def reads_history(self) -> bool:
        """Whether a step depends on the ids before it."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.no_repeat_ngram_size
            or any(len(word) > 1 for word in self.bad_words)
        )


def _texts(given: Any) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("not all are texts")
    return texts


def _number(given: Any) -> float:
    if isinstance(given, str):
        raise TypeError("a text")
    return float(given)


# What each field takes: wrong kinds would fail, or be misread, in a step that many requests share.
_CONVERSIONS: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    *(
        (name, operator.index, "a whole number")
        for name in (
            *("max_new_tokens", "top_k", "seed", "no_repeat_ngram_size", "min_new_tokens", "n", "best_of"),
            *("num_beams", "logprobs"),
        )
    ),
    *(
        (name, _number, "a number")
        for name in (
            *("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty"),
            *("frequency_penalty", "length_penalty", "penalty_alpha"),
        )
    ),
    ("stop", _texts, "texts"),
    ("stop_ids", lambda ids: frozenset(operator.index(i) for i in ids), "token ids"),
    ("bad_words", lambda words: tuple(tuple(operator.index(i) for i in w) for w in words), "sequences of token ids"),
    ("logit_bias", lambda b: {operator.index(i): _number(v) for i, v in b.items()}, "numbers by token id"),
)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue."""

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    Attributes:
        logprob: of the distribution it was drawn from; when greedy, of the softmax of the logits after penalties and bans.
        top_logprobs: the likeliest tokens of the same distribution, as many as `SamplingParams.logprobs` asks for and it has.
    """

    id: int
    logprob: float
    top_logprobs: TopLogprobs = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer. `ids` includes the stop token if there was one; one log-probability per id.

    `top_logprobs` has an entry per id where the request asks for them, else it is empty.
    """

    request_id: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    top_logprobs: tuple[TopLogprobs, ...] = ()

    @property
    def mean_logprob(self) -> float:
        """What `best_of` ranks by; an answer without a token is the worst."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else -math.inf


class Engine(Protocol):
    """A generation backend. All methods may be called from several threads."""

    version: int

    def submit(self, request: Request) -> str:
        """Queues a request for one answer and returns its id.

        Raises:
            EngineError: the prompt is empty, has ids that the model does not know, or leaves no room in its context; or the
                request asks for several answers (`generate` expands those).
        """
        ...

    def stream(self, request_id: str) -> Iterator[Token]:
        """Tokens of a request as they are sampled. Leaving the iterator early cancels the request."""
        ...

    def result(self, request_id: str) -> Completion:
        """Waits for a request, and forgets it."""
        ...

    def cancel(self, request_id: str) -> None:
        """Stops a request; its slot is free at once. Unknown and finished ids are ignored."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copies weights in by parameter name and sets `version`; running requests are refused."""
        ...


def require_single(params: SamplingParams) -> None:
    """Refuses parameters that ask for several answers: an engine's request has one.

    Raises:
        EngineError: n or best_of is above 1.
    """
    if params.n > 1 or params.best_of > 1:
        raise EngineError(
            f"a request has one answer, and n={params.n}, best_of={params.best_of} ask for more",
            hint="generation.protocol.generate expands such a request",
        )


def expand(request: Request) -> list[Request]:
    """One request for each answer to sample: the first has the request's seed, the others seeds derived from it."""
    params = request.params
    count = max(params.n, params.best_of)
    return [
        replace(request, params=replace(params, n=1, best_of=0, seed=mix_seed(params.seed, i) if i else params.seed))
        for i in range(count)
    ]


def generate(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Completions of many requests, in their order; n in a row for a request that asks for n.

    With `best_of`, a request's answers come with the highest mean log-probability first.
    """
    groups = [expand(r) for r in requests]
    ids: list[str] = []
    try:
        for request in (single for group in groups for single in group):
            ids.append(engine.submit(request))  # noqa: PERF401 (known one by one, should a later one be refused)
        done = iter([engine.result(i) for i in ids])
    except BaseException:
        for request_id in ids:
            engine.cancel(request_id)
        raise
    return [
        c for r, group in zip(requests, groups, strict=True) for c in _chosen([next(done) for _ in group], r.params)
    ]


def _chosen(group: list[Completion], params: SamplingParams) -> list[Completion]:
    if params.best_of <= params.n:
        return group
    return sorted(group, key=lambda c: c.mean_logprob, reverse=True)[: params.n]
