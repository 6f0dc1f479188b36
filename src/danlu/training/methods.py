"""The methods of the stage `grpo` that are one algorithm: each is a preset of a few switches, which may be set alone, too."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Literal

from danlu.alignment_config import Advantage, GrpoSettings, LossAverage


@dataclass(frozen=True)
class Method:
    """The switches. Defaults are GRPO's (Shao et al. 2024); the names are those of the settings under `grpo:`.

    Attributes:
        clip_range_high: None: as clip_range.
        overlong: share of max_new_tokens, see `overlong_penalty`.
    """

    advantage: Advantage = "group"
    loss_average: LossAverage = "sequence"
    ratio: Literal["token", "sequence"] = "token"
    clip_range: float = 0.2
    clip_range_high: float | None = None
    kl_coef: float = 0.04
    kl_in: Literal["loss", "reward"] = "loss"
    kl_estimator: Literal["k2", "k3"] = "k3"
    max_resample: int = 0
    overlong: float = 0.0
    missing_stop_penalty: float = 1.0

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        """As a line for people."""
        return ", ".join(f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in self.facts().items())


METHODS: Final[dict[str, Method]] = {
    "grpo": Method(),
    # Liu et al. 2025: no deviation, a constant in place of the answer's length, no KL.
    "dr_grpo": Method(advantage="group-mean", loss_average="constant", kl_coef=0.0),
    # Yu et al. 2025. The penalty for what is too long takes the place of the one for a missing stop token.
    "dapo": Method(
        loss_average="token",
        clip_range_high=0.28,
        kl_coef=0.0,
        max_resample=3,
        overlong=0.2,
        missing_stop_penalty=0.0,
    ),
    # Zheng et al. 2025, section 5.1.
    "gspo": Method(ratio="sequence", clip_range=3e-4, clip_range_high=4e-4, kl_coef=0.0),
    # Ahmadian et al. 2024: on the first pass REINFORCE on whole answers; later passes clip each token's ratio.
    "rloo": Method(advantage="leave-one-out", loss_average="sum", kl_coef=0.05, kl_in="reward"),
    # Hu 2025, without and with the group's mean.
    "reinforce++": Method(advantage="batch", loss_average="token", kl_coef=0.01, kl_in="reward"),
    "reinforce++-baseline": Method(advantage="group-batch", loss_average="token", kl_coef=0.01, kl_estimator="k2"),
    # Of these only the penalty counts.
    "online-dpo": Method(),
    "raft": Method(),
}


def method_of(settings: GrpoSettings) -> Method:
    """The switches as they are: what the settings say, else what the method has."""
    preset = METHODS[settings.method]
    given: dict[str, Any] = {f.name: getattr(settings.grpo, f.name) for f in fields(preset)}
    return replace(preset, **{name: value for name, value in given.items() if value is not None})
