"""Watches the curves of PPO and its relatives while they run, and acts on what the rules find: says it, corrects it, or stops.

Decisions are functions of numbers that are equal on every rank and of a state that is saved with every checkpoint. So all
processes decide the same, and a stage that is killed and goes on decides as it would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from danlu.health_config import HEALTH_ACTIONS, HealthSettings
from danlu.train_config import Best
from danlu.training import distributed
from danlu.training.rules import READ, Finding, examine
from danlu.training.session import Session

# code -> what is multiplied by how much at each correction, and the least or greatest share that this may come to
CORRECTIONS: Final[dict[str, tuple[str, float, float]]] = {
    "P-KL-HIGH": ("kl_coef", 1.5, 10.0),
    "P-ENTROPY-LOST": ("learning_rate", 0.5, 1 / 16),
    "P-RATIO": ("learning_rate", 0.5, 1 / 16),
    "P-CLIP-HIGH": ("learning_rate", 0.5, 1 / 16),
}
PAUSE: Final = 10  # iterations that a correction is given to show what it does
HEAD, TAIL, MOST = 20, 100, 240  # rows that are kept whole at both ends, and in all: of the rest every second one goes
HELD_OUT: Final = ("P-REWARD-HACK",)  # asked after evaluations, the others after iterations


class Health:
    """One for a stage, made inside its session and after the start model's evaluation. Its state is part of `Session.extra`.

    Where a finding may stop the stage, the session keeps the best weights: by held-out gold if there is any, else by the held-out
    score, unless `checkpoint_best` or `early_stopping` says otherwise.
    """

    def __init__(self, settings: HealthSettings, session: Session) -> None:
        self.settings, self.session = settings, session
        fresh = {"rows": [], "held": [], "last": {}, "findings": [], "stopped": ""}
        fresh["corrections"] = {"kl_coef": 1.0, "learning_rate": 1.0}
        session.extra.setdefault("health", fresh)
        start = (session.extra.get("start") or {}).get("metrics")
        if start and session.best is None and any(settings.action(code) == "stop" for code in HEALTH_ACTIONS):
            name = "eval_gold" if "eval_gold" in start else "eval_score"
            session.best = Best(monitor=name, mode="max", restore=False)
        if self.stopped:
            self._end()

    @property
    def state(self) -> dict[str, Any]:
        """Plain values: rows to judge by, findings, corrections."""
        found: dict[str, Any] = self.session.extra["health"]
        return found

    @property
    def corrections(self) -> dict[str, float]:
        """What the KL's weight (`kl_coef`) and all rates (`learning_rate`) are multiplied by in the next iteration."""
        return dict(self.state["corrections"])

    @property
    def stopped(self) -> str:
        """Code of the finding that ended the stage, or ""."""
        return str(self.state["stopped"])

    def watch(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Takes the metrics of a 0-based iteration and acts on them; returns `corrections`.

        An iteration whose updates were refused is left out: its numbers are those of the fault.
        """
        if self.settings.on and not self.session.monitor.bad:
            self._keep("rows", step + 1, metrics)
            self._act(step, [c for c in HEALTH_ACTIONS if c not in HELD_OUT])
        return self.corrections

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a held-out evaluation after a 0-based iteration and acts on them."""
        if not self.settings.on:
            return
        if not self.state["held"] and "start" in self.session.extra:
            self._keep("held", 0, self.session.extra["start"]["metrics"])
        self._keep("held", step + 1, metrics)
        self._act(step, list(HELD_OUT))

    def facts(self) -> dict[str, Any]:
        """For the manifest: the findings, what was corrected, and why the stage ended early if it did."""
        found: dict[str, Any] = {
            "findings": [f"{f['code']} at step {f['step']}: {f['seen']}" for f in self.state["findings"]]
        }
        changed = {k: v for k, v in self.state["corrections"].items() if v != 1.0}
        if changed:
            found["corrections"] = changed
        if self.stopped:
            last = self.state["findings"][-1]
            bests = self.session.extra.get("bests", [])
            found["stopped"] = f"{self.stopped} at step {last['step']}: {last['seen']}"
            found["kept"] = f"the weights after step {bests[0]['step']}" if bests else "the last weights"
        return found

    # -- what is done ---------------------------------------------------------------------------------------------------

    def _keep(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        rows = self.state[name]
        rows.append({"step": step, **distributed.same({k: metrics[k] for k in READ if k in metrics})})
        if len(rows) > MOST:
            del rows[HEAD:-TAIL:2]

    def _act(self, step: int, codes: list[str]) -> None:
        if self.stopped:
            return
        asked = [c for c in codes if self.settings.action(c) != "off" and not self._silent(c, step)]
        for finding in examine([*self.state["rows"], *self.state["held"]], asked):
            action = self.settings.action(finding.code)
            done = self._correct(finding.code) if action == "adapt" else ""
            if action == "stop":
                self.state["stopped"] = finding.code
                done = "the stage ends here, with the best weights so far"
            self._tell(step, finding, action, done)
            if action == "stop":
                self._end()
                return

    def _silent(self, code: str, step: int) -> bool:
        """Whether a finding was told before and there is nothing new to do about it."""
        last = self.state["last"].get(code)
        if last is None:
            return False
        if self.settings.action(code) != "adapt":
            return True
        name, _, bound = CORRECTIONS[code]
        return bool(step + 1 - last < PAUSE or self.state["corrections"][name] == bound)

    def _correct(self, code: str) -> str:
        name, factor, bound = CORRECTIONS[code]
        share = self.state["corrections"][name] * factor
        self.state["corrections"][name] = min(share, bound) if factor > 1 else max(share, bound)
        return f"{name} is multiplied by {self.state['corrections'][name]:.3g} from the next iteration on"

    def _tell(self, step: int, finding: Finding, action: str, done: str) -> None:
        self.state["last"][finding.code] = step + 1
        row = {**asdict(finding), "step": step + 1, "action": action, "done": done}
        self.state["findings"].append(row)
        self.session.note("health.jsonl", step, row)
        said = f"{finding.code} at step {step + 1}: {finding.seen}. Likely: {finding.cause}. Try: {finding.change}."
        self.session.say(f"{said} Done: {done}." if done else said)

    def _end(self) -> None:
        if self.session.best is not None:
            self.session.best = self.session.best.model_copy(update={"restore": True})
        self.session.end_early()
