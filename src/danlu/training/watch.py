"""What a loop that learns from its own answers calls at each step besides its maths: held-out answers, health, and the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from danlu import atomic
from danlu.text.chat_template import ChatTemplate
from danlu.training import distributed
from danlu.training.health import Health
from danlu.training.heldout import Heldout
from danlu.training.session import Session
from danlu.training.text_signs import text_signs
from danlu.tree import Trajectory

FINDINGS = "findings"


class Watch:
    """Made inside the session, before its first step: the start model answers the held-out prompts here.

    Attributes:
        health: the rules and what they corrected.
    """

    def __init__(self, session: Session, heldout: Heldout, template: ChatTemplate) -> None:
        self.session, self.heldout, self.template = session, heldout, template
        heldout.begin(session)
        self.health = Health(heldout.settings.health, session)

    @property
    def corrections(self) -> dict[str, float]:
        """What health multiplies the KL's weight (`kl_coef`) and all rates (`learning_rate`) by in the next iteration."""
        return self.health.corrections

    def step(
        self, step: int, metrics: dict[str, float], answers: Sequence[Trajectory], scores: Sequence[float]
    ) -> dict[str, float]:
        """The metrics of a 0-based iteration with those of its answers' text, once health has seen them; before they are logged.

        Where a rule found something, the answers and their scores are kept for people to look at: in
        `out/findings/CODE-step-N.jsonl`.
        """
        found = metrics | text_signs([t.actions for t in answers], self.template.stop_ids)
        told = self.health.state["findings"]
        known = len(told)
        self.health.watch(step, found)
        for finding in told[known:]:
            path = Path(self.session.settings.out) / FINDINGS / f"{finding['code']}-step-{step + 1}.jsonl"
            if distributed.is_main():
                atomic.write_jsonl(path, map(self._row, answers, scores))
            self.session.say(f"The answers of this iteration are in {path}.")
        return found

    def _row(self, answer: Trajectory, score: float) -> dict[str, Any]:
        prompt = self.template.tokenizer.decode(list(answer.prompt))  # as it was rendered: marks and all
        texts = {"prompt": prompt, "response": self.template.decode(answer.actions)}
        return {**texts, "tokens": len(answer.actions), "finished": answer.finished, "score": score}

    def evaluate(self, step: int) -> None:
        """The held-out evaluation, if there is something held out and one is due after this 0-based iteration."""
        if not self.heldout.prompts or not self.session.eval_due(step) or self.session.damaged():
            return
        held = self.heldout.evaluate(self.session, step)
        self.session.extra["held"] = held
        self.session.evaluated(step, held)
        self.health.evaluated(step, held)

    def outcome(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Final metrics and facts; the best weights are put back where they are wanted."""
        extra = self.session.extra
        best = self.session.restore_best()
        metrics = {**extra.get("last", {}), **extra.get("held", {}), **best}
        start = extra.get("start", {}).get("metrics", {})
        if start:
            metrics["first_eval_score"] = start["eval_score"]
        facts = {"start": start, "health": self.health.facts(), "first": extra.get("first", {})}
        return metrics, {**facts, **self.session.facts}
