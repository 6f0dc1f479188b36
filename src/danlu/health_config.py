"""Settings of health: what is done about findings of the rules that watch a policy (`training/rules.py`)."""

from __future__ import annotations

import difflib
from types import MappingProxyType
from typing import Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from danlu.train_config import Settings

HealthAction = Literal["off", "warn", "adapt", "stop"]
HEALTH_ACTIONS: Final = MappingProxyType[str, HealthAction](
    {
        "P-KL-HIGH": "adapt",
        "P-KL-NEGATIVE": "warn",
        "P-TIMID": "warn",
        "P-LEN-GROWTH": "warn",
        "P-LEN-COLLAPSE": "warn",
        "P-STOP-LOST": "warn",
        "P-ENTROPY-LOST": "warn",
        "P-REPEATS": "warn",
        "P-EMPTY": "warn",
        "P-REWARD-HACK": "stop",
        "P-CRITIC-BLIND": "warn",
        "P-RATIO": "warn",
        "P-ENGINE-GAP": "warn",
        "P-CLIP-HIGH": "warn",
        "P-SCORE-FALLS": "warn",
        "P-EQUAL-GROUPS": "warn",
        "P-GRAD": "warn",
        "P-PTX-SHARE": "warn",
    }
)
"""What is done about each finding unless the settings say otherwise: what would end at max_kl, or in a worse model, is acted on."""
HEALTH_ADAPTS: Final = ("P-KL-HIGH", "P-ENTROPY-LOST", "P-RATIO", "P-CLIP-HIGH")
"""Findings that there is a correction for."""


class HealthSettings(Settings):
    """What is done about findings of the health rules."""

    on: bool = Field(True, description="false: no rule is asked")
    actions: dict[str, HealthAction] = Field(
        default_factory=dict,
        description="by a rule's code, where not [its default](health.md): off, warn (say it once), adapt (its correction) or stop "
        "(end with the best weights so far)",
    )

    @field_validator("actions", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML reads a bare `off` as false."""
        return {k: "off" if v is False else v for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _known(self) -> HealthSettings:
        for code, action in self.actions.items():
            if code not in HEALTH_ACTIONS:
                near = difflib.get_close_matches(code, HEALTH_ACTIONS, n=1)
                known = f"did you mean {near[0]}?" if near else f"known: {', '.join(HEALTH_ACTIONS)}"
                raise ValueError(f"there is no health rule {code}; {known}")
            if action == "adapt" and code not in HEALTH_ADAPTS:
                raise ValueError(f"there is no correction for {code}; adapt is for {', '.join(HEALTH_ADAPTS)}")
        return self

    def action(self, code: str) -> HealthAction:
        """What is done about a finding."""
        return self.actions.get(code, HEALTH_ACTIONS[code]) if self.on else "off"
