"""Numbers of PPO that follow the run: the weight of the KL, and mean and deviation of the scores so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any, Literal

from danlu.alignment_config import Ppo

LIMIT = 0.2  # of the proportional error (Ziegler et al. 2019, section 2.2)


class KlController:
    """The weight of the KL to the reference: fixed, or steered so that answers keep a KL of `kl_target`.

    `e = clip((KL - target) / target, -0.2, 0.2)`, `coef <- coef (1 + e n / horizon)` after an update on n episodes (Ziegler et
    al. 2019, section 2.2, with its gain written as n / horizon).

    Attributes:
        coef: >= 0.
    """

    def __init__(self, settings: Ppo) -> None:
        self.settings, self.coef = settings, settings.kl_coef

    def update(self, kl: float, episodes: int) -> None:
        """After an iteration.

        Args:
            kl: nats per answer, mean.
            episodes: of the update.
        """
        if self.settings.kl_controller == "adaptive" and math.isfinite(kl):
            target = self.settings.kl_target
            error = max(-LIMIT, min(LIMIT, (kl - target) / target))
            self.coef *= max(0.0, 1.0 + error * episodes / self.settings.kl_horizon)

    def state_dict(self) -> dict[str, Any]:
        """See `checkpoint.Stateful`."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `checkpoint.Stateful`."""
        self.coef = float(state["coef"])


class RunningMoments:
    """Mean and standard deviation of everything seen so far, batch by batch (Chan et al. 1983, eq. 2.1)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, values: Sequence[float]) -> None:
        """Takes a batch in."""
        if not values:
            return
        mean = fmean(values)
        total = self.count + len(values)
        apart = mean - self.mean
        self.squares += sum((v - mean) ** 2 for v in values) + apart**2 * self.count * len(values) / total
        self.mean += apart * len(values) / total
        self.count = total

    @property
    def std(self) -> float:
        """Of all values; 0 before there is one."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def state_dict(self) -> dict[str, Any]:
        """See `checkpoint.Stateful`."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `checkpoint.Stateful`."""
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


def shaped_scores(
    raw: Sequence[float],
    finished: Sequence[bool],
    settings: Ppo,
    norm: Literal["none", "running", "batch"],
    seen: RunningMoments,
) -> list[float]:
    """Scores as rewards: normalised (Zheng et al. 2023, Secrets of RLHF I, eq. 15), then clipped, less the penalty for a missing
    stop token. Where all scores are equal, normalising only takes their mean away.

    Args:
        raw: of the judge.
        finished: whether each answer ends with a stop token.
        norm: by the moments `seen` so far, by those of `raw` itself, or not at all.
    """
    mean, std = {"none": (0.0, 1.0), "running": (seen.mean, seen.std), "batch": (fmean(raw), pstdev(raw))}[norm]
    clip, penalty = settings.score_clip, settings.missing_stop_penalty
    scaled = [(v - mean) / (std or 1.0) for v in raw] if norm != "none" else list(raw)
    return [max(-clip, min(clip, v)) - (0.0 if done else penalty) for v, done in zip(scaled, finished, strict=True)]
