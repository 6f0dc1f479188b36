"""What every generation engine can do. Chat, serving, evaluation and roll-outs speak only this."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled.

    Args:
        max_new_tokens: >= 1; cut to what the model's context leaves.
        temperature: >= 0; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: in (0, 1]: keep the smallest set of tokens with at least this probability.
        repetition_penalty: > 0: divides positive and multiplies negative logits of tokens already present (Keskar et al. 2019).
        seed: draws are a function of (seed, token index) alone.
        stop_ids: token ids that end the answer; the last one is part of it.
        stop: texts that end the answer.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges = (
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1"),
            (self.temperature >= 0, "temperature must not be negative"),
            (self.top_k >= 0, "top_k must not be negative"),
            (0 < self.top_p <= 1, "top_p must be in (0, 1]"),
            (self.repetition_penalty > 0, "repetition_penalty must be positive"),
        )
        for holds, sentence in ranges:
            if not holds:
                raise ValueError(sentence)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue."""

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token. `logprob` is that of the distribution it was drawn from (of the plain softmax when greedy)."""

    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. `ids` includes the stop token if there was one; one log-probability per id."""

    request_id: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int


class Engine(Protocol):
    """A generation backend. All methods may be called from several threads."""

    version: int

    def submit(self, request: Request) -> str:
        """Queues a request and returns its id.

        Raises:
            EngineError: the prompt is empty or leaves no room in the model's context.
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


def generate(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Completions of many requests, in their order."""
    ids = [engine.submit(r) for r in requests]
    return [engine.result(i) for i in ids]
