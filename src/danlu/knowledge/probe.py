"""What a model knows of a fact, and whether it still answers everything else as before."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from danlu.knowledge.phrasings import Asked, Questions, user
from danlu.types import Message

Answerer = Callable[[Sequence[Sequence[Message]]], list[str]]
"""Answers to conversations that end with a user's turn, the likeliest ones (temperature 0)."""


@dataclass(frozen=True, slots=True)
class Recall:
    """Shares in [0, 1] of the questions whose answer has the fact; None where there was nothing to ask."""

    trained: float | None
    unseen: float | None
    other_language: float | None
    multi_turn: float | None
    alias: float | None
    task: float | None

    def as_dict(self) -> dict[str, Any]:
        """`recall` and `portability` as `--json` shows them."""
        plain = asdict(self)
        portability = {k: plain.pop(k) for k in ("alias", "task")}
        return {"recall": plain, "portability": portability}


@dataclass(frozen=True, slots=True)
class Locality:
    """How far other answers moved.

    agreement: share of greedy answers that are the same text; neighbours, general: of these alone (None: none were asked).
    kl: nats per token of the answers before, from the model before to the model after.
    perplexity_ratio: of these answers (or of the data's own, where it has some), after by before.
    """

    agreement: float
    kl: float
    perplexity_ratio: float
    neighbours: float | None = None
    general: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plain(text: str) -> str:
    """Text as answers are compared by: NFKC, case folded, letters and digits only."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if c.isalnum())


def has(answer: str, expected: Sequence[str]) -> bool:
    """Whether an answer has one of the expected texts in it, whatever its case, spaces and punctuation."""
    found = plain(answer)
    return any(plain(text) in found for text in expected if plain(text))


def conversations(asked: Sequence[Asked], answer: Answerer) -> list[list[Message]]:
    """Messages of each question; what the user says first is answered by the model itself."""
    first = sorted({a.before for a in asked if a.before})
    said = dict(zip(first, answer([[user(b)] for b in first]), strict=True)) if first else {}

    def opening(before: str) -> list[Message]:
        reply: Message = {"role": "assistant", "content": said[before] or "..."}
        return [user(before), reply]

    return [[*(opening(a.before) if a.before else []), user(a.question)] for a in asked]


def recall(questions: Questions, answer: Answerer) -> Recall:
    """Asks every set of questions at once and counts the answers that have the fact."""
    sets = {name: getattr(questions, name) for name in Recall.__dataclass_fields__}
    asked = [a for group in sets.values() for a in group]
    answers = iter(answer(conversations(asked, answer)))
    shares: dict[str, float | None] = {}
    for name, group in sets.items():
        right = [has(next(answers), a.expected) for a in group]
        shares[name] = sum(right) / len(right) if right else None
    return Recall(**shares)


def agreement(before: Sequence[str], after: Sequence[str]) -> float:
    """Share of answers that are the same text but for case, spaces and punctuation; 1 for none."""
    same = [plain(a) == plain(b) and bool(plain(a)) == bool(plain(b)) for a, b in zip(before, after, strict=True)]
    return sum(same) / len(same) if same else 1.0


def locality(
    before: Sequence[str],
    after: Sequence[str],
    near: Sequence[bool],
    *,
    kl: float,
    nll_before: float,
    nll_after: float,
) -> Locality:
    """Locality from answers and means.

    Args:
        near: for each answer whether its question was about a neighbour of the fact.
        kl, nll_before, nll_after: means per token, in nats.
    """

    def of(wanted: bool) -> float | None:
        chosen = [i for i, n in enumerate(near) if n is wanted]
        return agreement([before[i] for i in chosen], [after[i] for i in chosen]) if chosen else None

    ratio = math.exp(min(nll_after - nll_before, 50.0))
    return Locality(agreement(before, after), kl, ratio, of(True), of(False))
