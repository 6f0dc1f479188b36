"""What a reward is: a batched, cancellable judge of answers, with an error per item instead of a crash for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from danlu.data.collate import EncodedPrompt
from danlu.exceptions import RewardError
from danlu.tree import Trajectory
from danlu.types import Message


@dataclass(frozen=True, slots=True)
class Episode:
    """One answer to be judged, as ids of the policy's tokenizer and, where known, as text.

    Args:
        prompt_ids, response_ids: the response includes its stop token if it has one.
        finished: the response ends with a stop token.
        prompt, response: for rewards that read text.
        reference: what the prompt says of a right answer, for verifiers; empty if nothing.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finished: bool
    prompt: tuple[Message, ...] = ()
    response: str = ""
    reference: Mapping[str, Any] = field(default_factory=dict)


def episodes_of(
    prompts: Sequence[EncodedPrompt], trajectories: Sequence[Trajectory], decode: Callable[[Sequence[int]], str]
) -> list[Episode]:
    """Roll-outs as episodes, one prompt to each.

    Args:
        decode: ids of an answer to its text.
    """
    return [
        Episode(t.prompt, t.actions, t.finished, tuple(p.messages), decode(t.actions), p.reference)
        for p, t in zip(prompts, trajectories, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Score:
    """A number, or the reason why there is none, with its code (docs/rewards.md lists them).

    `spread`: of an ensemble, the standard deviation among its members' numbers.
    """

    value: float | None
    error: str | None = None
    code: str = ""
    spread: float | None = None


class Unscored(RewardError):
    """Why an answer, or a whole batch of them, has no score.

    Args:
        code: R-COUNT, R-NAN, R-ENDPOINT, ...
        reason: one sentence that names what failed.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason

    @property
    def score(self) -> Score:
        """As the score of an answer."""
        return Score(None, self.reason, self.code)


def never() -> bool:
    """The default of `cancelled`."""
    return False


class Reward(Protocol):
    """A judge. One score per episode, in order."""

    name: str

    def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
        """Scores; once `cancelled()` is true the rest come back with the error "cancelled"."""
        ...
