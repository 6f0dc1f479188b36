"""A server of the user's own as a reward: it gets answers in batches and gives one number for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from danlu.reward_config import HttpTerm
from danlu.rewards.endpoint import Cache, Client
from danlu.rewards.function import scores_of
from danlu.rewards.protocol import Episode, Score, Unscored, never


class HttpReward:
    """POSTs `{"prompts", "responses", "references"}`, and reads `{"scores": [...]}`.

    Args:
        field: of the term in the settings, for errors.
        cache: folder for what was answered, or None.

    Raises:
        SettingsError: the variable with the key is not set.
    """

    def __init__(self, name: str, term: HttpTerm, field: str, cache: Path | None) -> None:
        self.name, self.term, self.cache = name, term, Cache(cache)
        self.client = Client(term.url, term, field)

    def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
        """See `Reward.score`. A request that fails is an error of its batch alone."""
        asked = [_asked(e) for e in episodes]
        known = [self.cache.get([self.term.url, a]) for a in asked]
        scores: list[Score] = [Score(k) for k in known]
        left = [i for i, value in enumerate(known) if value is None]
        size = self.term.batch
        parts = [left[start : start + size] for start in range(0, len(left), size)]

        def work(part: list[int]) -> list[Score]:
            return [Score(None, "cancelled")] * len(part) if cancelled() else self._batch([asked[i] for i in part])

        for part, found in zip(parts, self.client.together(parts, work), strict=True):
            for place, index in enumerate(part):
                scores[index] = found.score if isinstance(found, Unscored) else found[place]
        return scores

    def _batch(self, asked: list[dict[str, Any]]) -> list[Score]:
        body = {f"{key}s": [a[key] for a in asked] for key in ("prompt", "response", "reference")}
        found = self.client.post(body)
        scores = found.get("scores") if isinstance(found, dict) else None
        if not isinstance(scores, list):
            raise Unscored("R-TYPE", f"{self.term.url} answered without a list of scores")
        checked = scores_of(scores, len(asked), self.term.url)
        for one, score in zip(asked, checked, strict=True):
            if score.value is not None:
                self.cache.put([self.term.url, one], score.value)
        return checked


def _asked(episode: Episode) -> dict[str, Any]:
    """What the server is told of an answer; what in a reference is not JSON goes as text."""
    reference = json.loads(json.dumps(dict(episode.reference), default=str))
    return {"prompt": list(episode.prompt), "response": episode.response, "reference": reference}
