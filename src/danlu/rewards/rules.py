"""Rewards that are plain arithmetic on an answer: its length, what repeats in it, its form."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from danlu.exceptions import SettingsError
from danlu.reward_config import FormatTerm, LengthTerm, RepetitionTerm
from danlu.rewards.json_schema import fits, parsed, schema_fault
from danlu.rewards.protocol import Episode, Score, never


class RuleReward:
    """Scores each answer by a function of it alone.

    Args:
        rule: an episode to a finite number.
    """

    def __init__(self, name: str, rule: Callable[[Episode], float]) -> None:
        self.name, self.rule = name, rule

    def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
        """See `Reward.score`."""
        return [Score(None, "cancelled") if cancelled() else Score(self.rule(e)) for e in episodes]


def length_of(term: LengthTerm) -> Callable[[Episode], float]:
    """`limit`: -max(0, n - limit) / limit; `target`: -|n - target| / target; n: tokens without the stop token. At most 0."""

    def rule(episode: Episode) -> float:
        tokens = len(episode.response_ids) - episode.finished
        if term.limit is not None:
            return -max(0, tokens - term.limit) / term.limit
        assert term.target is not None, "the settings have one of the two"
        return -abs(tokens - term.target) / term.target

    return rule


def repetition_of(term: RepetitionTerm) -> Callable[[Episode], float]:
    """See `repetition`, of an answer's tokens without the stop token."""
    return lambda e: repetition(e.response_ids[: len(e.response_ids) - e.finished], term.n)


def repetition(ids: Sequence[int], n: int) -> float:
    """Share of n-grams that stood in a sequence before: 1 - distinct / all; 0 for less than n tokens. From 0 to below 1."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def format_of(term: FormatTerm, field: str) -> Callable[[Episode], float]:
    """1 if an answer matches the pattern and is JSON that fits the schema, as far as they are given, else 0.

    Args:
        field: of the term in the settings.

    Raises:
        SettingsError: the schema has something that is not supported.
    """
    schema: Any = term.json_schema
    fault = schema_fault(schema) if schema is not None else None
    if fault:
        raise SettingsError(fault, field=f"{field}.json_schema")
    pattern = re.compile(term.pattern) if term.pattern is not None else None

    def rule(episode: Episode) -> float:
        answer = episode.response
        if pattern is not None:
            matches = pattern.fullmatch(answer) if term.match == "fullmatch" else pattern.search(answer)
            if matches is None:
                return 0.0
        if schema is None:
            return 1.0
        try:
            return float(fits(parsed(answer), schema))
        except ValueError:
            return 0.0

    return rule
