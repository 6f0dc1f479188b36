"""Several rewards as one: each scores the whole batch once, and their numbers are weighted and added up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from danlu import atomic
from danlu.exceptions import RewardError, TemplateError
from danlu.rewards.protocol import Episode, Reward, Score, Unscored, never

FAILED = "failed"


@dataclass(frozen=True)
class Term:
    """A reward with its weight.

    Args:
        name: in metrics and errors; unique.
        weight: of any sign.
        waits: for a network or for other processes, so that the rest can compute meanwhile.
    """

    name: str
    weight: float
    reward: Reward
    waits: bool = False


@dataclass(frozen=True, slots=True)
class CombinedScore(Score):
    """A sum, with what each term said, in the order of the terms."""

    parts: tuple[Score, ...] = ()


class Combined:
    """The sum of weight * value over the terms. An answer that any term could not score has an error that names the term.

    Attributes:
        metrics: of the last batch that was settled: `reward_NAME`, the mean of each term over the answers it scored, before its
            weight; `reward_failed`, the share of answers without a score; with an ensemble `disagreement`, the mean standard
            deviation among its members.
        facts: for the manifest: `judges`, by name, and what else is known of them.
    """

    name = "rewards"

    def __init__(
        self, terms: Sequence[Term], *, max_failed: float = 0.0, facts: Mapping[str, Any] | None = None
    ) -> None:
        names = [t.name for t in terms]
        assert terms and len(set(names)) == len(names), "terms have names of their own"
        self.terms, self.max_failed = list(terms), max_failed
        self.metrics: dict[str, float] = {}
        self.facts: dict[str, Any] = {"judges": [t.reward.name for t in self.terms], **(facts or {})}

    def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
        """See `Reward.score`. Terms that wait do so in threads, while the others compute here."""
        if not episodes:
            return []
        waiting = [t for t in self.terms if t.waits]
        with ThreadPoolExecutor(len(waiting) or 1) as pool:
            begun = {t.name: pool.submit(_asked, t, episodes, cancelled) for t in waiting}
            found = {t.name: _asked(t, episodes, cancelled) for t in self.terms if not t.waits}
            found |= {name: future.result() for name, future in begun.items()}
        return [self._sum(tuple(found[t.name][i] for t in self.terms)) for i in range(len(episodes))]

    def _sum(self, parts: tuple[Score, ...]) -> Score:
        total = 0.0
        for term, part in zip(self.terms, parts, strict=True):
            if part.value is None:
                return CombinedScore(None, f"{term.name}: {part.error}", part.code, parts=parts)
            total += term.weight * part.value
        return CombinedScore(total, parts=parts)

    def settle(
        self, episodes: Sequence[Episode], scores: Sequence[Score], *, step: int, keep: Path | None
    ) -> list[float | None]:
        """What training goes on with, once all scores of a batch are there; sets `metrics`.

        Args:
            episodes, scores: of the whole batch, whoever scored them.
            step: of the batch, for the file's name.
            keep: the stage's folder; a batch that stops the run is written to `failed/rewards-step-N.jsonl` in it. None: not here.

        Returns:
            A number for each answer, None for those without one.

        Raises:
            RewardError: more than `max_failed` of the answers have no score, or none has.
        """
        bad = [i for i, s in enumerate(scores) if s.value is None]
        for place, term in enumerate(self.terms):
            said = [p.value for s in scores if (p := _parts(s)[place]).value is not None]
            if said:
                self.metrics[f"reward_{term.name}"] = fmean(said)
            spreads = [p.spread for s in scores if (p := _parts(s)[place]).spread is not None]
            if spreads:
                self.metrics["disagreement"] = fmean(spreads)
        self.metrics["reward_failed"] = len(bad) / len(scores)
        if bad and (len(bad) > self.max_failed * len(scores) or len(bad) == len(scores)):
            path = keep / FAILED / f"rewards-step-{step}.jsonl" if keep is not None else None
            if path is not None:
                atomic.write_jsonl(path, map(self._row, episodes, scores))
            first = scores[bad[0]]
            code = f"{first.code}: " if first.code else ""
            kept = f"the whole batch is in {path}; " if path is not None else ""
            raise RewardError(
                f"{code}{len(bad)} of {len(scores)} answers of iteration {step + 1} have no score (max_failed "
                f"{self.max_failed:g}); the first (answer {bad[0]}): {first.error}",
                hint=f"{kept}the same command goes on from the last checkpoint, and asks no server twice",
            )
        return [s.value for s in scores]

    def _row(self, episode: Episode, score: Score) -> dict[str, Any]:
        terms = {
            term.name: part.value if part.value is not None else {"code": part.code, "error": part.error}
            for term, part in zip(self.terms, _parts(score), strict=True)
        }
        said = {"prompt": list(episode.prompt), "response": episode.response, "finished": episode.finished}
        return {**said, "score": score.value, "terms": terms}


def _parts(score: Score) -> tuple[Score, ...]:
    assert isinstance(score, CombinedScore), "made by `Combined.score`"
    return score.parts


def _asked(term: Term, episodes: Sequence[Episode], cancelled: Callable[[], bool]) -> list[Score]:
    """A term's scores, with the same error for all answers where it failed as a whole."""
    try:
        found = term.reward.score(episodes, cancelled=cancelled)
    except Unscored as error:
        return [error.score] * len(episodes)
    except TemplateError as error:
        return [Score(None, error.message, "R-TEMPLATE")] * len(episodes)
    if len(found) != len(episodes):
        wrong = f"gave {len(found)} scores for {len(episodes)} answers"
        return [Score(None, wrong, "R-COUNT")] * len(episodes)
    return [
        s if s.value is None or math.isfinite(s.value) else Score(None, f"score is {s.value}", "R-NAN") for s in found
    ]
