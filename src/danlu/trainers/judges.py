"""What G-RM said of the reward models that a stage is about to follow: it travels in their config.json.

Here alone it is decided whether they are followed. A stage asks before it writes anything, and so does every trainer, since it
may be called without a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.alignment_config import RolloutSettings
from danlu.exceptions import GateError
from danlu.rewards.model import stored_verdict
from danlu.train_config import StageSettings, as_models
from danlu.training.runs import resolve_model


@dataclass(frozen=True)
class Opinion:
    """A reward model and what G-RM said of it; `gate` is None where it was never asked."""

    model: str
    gate: dict[str, Any] | None

    @property
    def note(self) -> str:
        """What people should know before the stage follows it; "" where all is well."""
        if self.gate is None:
            return f"the reward model {self.model} brings no verdict of G-RM: how good it is, is not known here"
        return (
            "" if self.gate["passed"] else f"the reward model {self.model} did not pass G-RM: {self.gate['sentence']}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"model": self.model, "gate": self.gate}


def opinions(settings: StageSettings) -> list[Opinion]:
    """What is known of the reward models that the settings name; none where a stage follows none.

    Raises:
        GateError: one did not pass, with the sentence of the gate, and the settings do not say `follow_failed`.
    """
    if not isinstance(settings, RolloutSettings):
        return []
    found = [Opinion(name, stored_verdict(Path(resolve_model(name)))) for name in as_models(settings.reward_model)]
    failed = [opinion for opinion in found if opinion.gate is not None and not opinion.gate["passed"]]
    if failed and not settings.follow_failed:
        raise GateError(
            failed[0].note,
            field="reward_model",
            hint="train a better one, or follow it all the same with --force (in a recipe or in Python: follow_failed)",
        )
    return found


def following(settings: StageSettings) -> StageSettings:
    """The settings of a stage that was told to go on whatever a gate said."""
    return settings.model_copy(update={"follow_failed": True}) if isinstance(settings, RolloutSettings) else settings
