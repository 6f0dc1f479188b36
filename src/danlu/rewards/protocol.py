"""What a reward is: a batched, cancellable judge of answers, with an error per item instead of a crash for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from danlu.types import Message


@dataclass(frozen=True, slots=True)
class Episode:
    """One answer to be judged, as ids of the policy's tokenizer and, where known, as text.

    Args:
        prompt_ids, response_ids: the response includes its stop token if it has one.
        finished: the response ends with a stop token.
        prompt, response: for rewards that read text.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finished: bool
    prompt: tuple[Message, ...] = ()
    response: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """A number, or the reason why there is none."""

    value: float | None
    error: str | None = None


def never() -> bool:
    """The default of `cancelled`."""
    return False


class Reward(Protocol):
    """A judge. One score per episode, in order."""

    name: str

    def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
        """Scores; once `cancelled()` is true the rest come back with the error "cancelled"."""
        ...
