"""Watches the numbers of every update and decides what to do about bad ones: skip, lower the rate, go back, give up.

Decisions are functions of numbers that are equal on every rank and of a state that is saved with every checkpoint. So all
processes decide the same, and a stage that is killed and goes on decides as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from danlu.train_config import Defence

# Scale of a spike: standard deviation of a normal distribution from its median absolute deviation, and the least deviation that
# counts, as a share of a loss and in units of a log gradient norm. Else a loss that is flat would make every wiggle a spike.
MAD_TO_STD = 1.4826
LEAST_LOSS, LEAST_LOG_NORM = 0.01, 0.2


def robust_z(value: float, window: Sequence[float], least: float) -> float:
    """How many robust standard deviations `value` lies above the median of `window`, of which none is below `least` (> 0)."""
    middle = median(window)
    spread = MAD_TO_STD * median(abs(v - middle) for v in window)
    return (value - middle) / max(spread, least)


def _log(value: float) -> float:
    return math.log(max(value, 1e-12)) if math.isfinite(value) else value


class Monitor:
    """One for a stage. `check` is asked before each update, `end_step` after each step.

    Args:
        state: that of a checkpoint (`Monitor.state`), or empty.

    Attributes:
        state: plain values: windows, skipped steps, returns to a checkpoint, the lowered rate.
        bad: why an update of the current step was refused, or "".
        damaged: whether that is because the weights are no numbers any more.
        updates: made in the current step.
    """

    def __init__(self, settings: Defence, state: dict[str, Any] | None = None) -> None:
        self.settings = settings
        fresh = {
            "windows": {},
            "skipped": [],
            "rollbacks": [],
            "in_a_row": 0,
            "good": 0,
            "cooldown_until": 0,
            "cooldowns": 0,
        }
        self.state: dict[str, Any] = fresh | (state or {})
        self.bad = ""
        self.damaged = False
        self.updates = 0
        self.step = 0

    def begin_step(self, step: int) -> None:
        """A 0-based step begins (again)."""
        self.step, self.bad, self.damaged, self.updates = step, "", False, 0
        if step >= self.state["cooldown_until"]:
            self.state["cooldowns"] = 0

    @property
    def rate_share(self) -> float:
        """What the learning rate is multiplied by in the current step."""
        cooldowns: int = self.state["cooldowns"]
        return self.settings.cooldown_rate**cooldowns

    def check(self, name: str, loss: float, norm: float) -> bool:
        """Whether an update is made.

        Args:
            name: of the trained role, if several learn.
            loss, norm: of the whole step, equal on every rank.
        """
        if not self.settings.on:
            self.updates += 1
            return True
        # A critic's squared error falls to nearly nothing and rises again with every turn of the policy: its size is judged.
        of_loss = _log(loss) if name == "critic" else loss
        judged = [(f"{name} loss".strip(), loss, of_loss), (f"{name} gradient norm".strip(), norm, _log(norm))]
        reasons = [self._reason(label, shown, value) for label, shown, value in judged]
        found = [r for r in reasons if r]
        if found:
            self.bad = self.bad or found[0]
            return False
        for label, _, value in judged:
            window = self.state["windows"].setdefault(label, [])
            window.append(value)
            del window[: -self.settings.window]
        self.updates += 1
        return True

    def give_up_weights(self) -> None:
        """What was learnt is no numbers any more: no step more is made with it."""
        self.bad, self.damaged = self.bad or "weights are not numbers", True

    def _reason(self, label: str, shown: float, value: float) -> str:
        if not math.isfinite(value):
            return f"{label} is {shown}"
        window = self.state["windows"].get(label, [])
        if len(window) < max(4, self.settings.window // 4):
            return ""
        by_size = label.endswith("norm") or label == "critic loss"
        least = LEAST_LOG_NORM if by_size else max(LEAST_LOSS * abs(median(window)), 1e-6)
        z = robust_z(value, window, least)
        return f"{label} is {shown:.4g}, {z:.0f} deviations above its median" if z > self.settings.spike_z else ""

    def end_step(self) -> bool:
        """Counts a step that went bad; whether the state itself is suspect, so that the last checkpoint is wanted."""
        if not self.bad:
            self.state["in_a_row"] = 0
            self.state["good"] += 1
            return False
        self.state["skipped"].append({"step": self.step + 1, "reason": self.bad})
        self.state["in_a_row"] += 1
        self.state["cooldowns"] = max(1, self.state["cooldowns"])
        self.state["cooldown_until"] = self.step + 1 + self.settings.cooldown_steps
        wanted: bool = self.damaged or self.state["in_a_row"] >= self.settings.patience
        return wanted

    @property
    def exhausted(self) -> bool:
        """Whether more was skipped, or gone back over, than the settings allow."""
        settings = self.settings
        return (
            len(self.state["skipped"]) > settings.max_skipped or len(self.state["rollbacks"]) > settings.max_rollbacks
        )

    def goes_back_to(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps was gone back to already and no step was good since."""
        rollbacks = self.state["rollbacks"]
        return bool(rollbacks) and rollbacks[-1]["to"] == step and self.state["good"] == 0

    def rolled_back(self, to: int, saved: dict[str, Any]) -> None:
        """Takes the windows of the checkpoint after `to` steps, and keeps what was learnt since: bad steps and the low rate."""
        self.state["rollbacks"].append({"from": self.step + 1, "to": to})
        self.state |= {"windows": saved.get("windows", {}), "in_a_row": 0, "good": 0}
        self.state["cooldowns"] += 1

    @property
    def skipped(self) -> set[int]:
        """0-based steps whose batch must not be trained on again."""
        return {s["step"] - 1 for s in self.state["skipped"]}

    def facts(self) -> dict[str, Any]:
        """For the manifest; empty if nothing happened."""
        return {k: self.state[k] for k in ("skipped", "rollbacks") if self.state[k]}

    def report(self) -> str:
        """One line for each thing that happened."""
        lines = [f"step {s['step']}: {s['reason']}" for s in self.state["skipped"]]
        lines += [f"step {r['from']}: back to step {r['to']}" for r in self.state["rollbacks"]]
        return "\n".join(f"  {line}" for line in lines)
