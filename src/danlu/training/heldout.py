"""Held-out prompts during PPO and its relatives: scores, a win rate against the model before training, and samples over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev

import numpy as np

from danlu.alignment_config import RolloutSettings
from danlu.data.collate import EncodedPrompt
from danlu.generation.protocol import Engine
from danlu.generation.seeds import mix_seed
from danlu.models.root import RootModel
from danlu.text.chat_template import ChatTemplate
from danlu.training.interval import wilson
from danlu.training.rollouts import push_weights, sampling_of, share_rollout
from danlu.training.session import Session
from danlu.tree import Trajectory

SAMPLES = 4  # prompts whose answers are kept at every evaluation
TOLD = ("disagreement",)  # of what the reward says of a batch besides its scores, this is told of held-out answers, too
Scorer = Callable[[Sequence[EncodedPrompt], Sequence[Trajectory]], list[float | None]]


class Heldout:
    """The held-out prompts of a stage, one answer to each at every evaluation, with draws that are always the same.

    Answers that could not be scored count in no mean and in no pair.

    Args:
        prompts: may be none; then there is nothing to evaluate.
        scorer: the reward that is trained on.
        gold: a reward that is only measured, or none. Where there is one, it is the judge of wins.
        said: what the reward says of the batch that `scorer` scored last, by metric (`Combined.metrics`).
    """

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        engine: Engine,
        root: RootModel,
        settings: RolloutSettings,
        template: ChatTemplate,
        scorer: Scorer,
        gold: Scorer | None = None,
        said: Mapping[str, float] | None = None,
    ) -> None:
        self.prompts, self.engine, self.root = prompts, engine, root
        self.said = said if said is not None else {}
        self.settings, self.template, self.scorer, self.gold = settings, template, scorer, gold
        chosen = np.random.default_rng([settings.seed, 0x5A]).permutation(len(prompts))[:SAMPLES]
        self.shown = sorted(int(i) for i in chosen)

    def begin(self, session: Session) -> None:
        """Before the first step: the start model's metrics and judged scores go into `session.extra["start"]`.

        They are kept in the checkpoints, so a resumed stage does not answer again with other weights.
        """
        if self.prompts and "start" not in session.extra and not session.start:
            metrics, judged = self._answer(session, -1)
            spread = pstdev([v for v in judged if v is not None])
            session.extra["start"] = {"metrics": {**metrics, "spread": spread}, "judged": judged}

    def evaluate(self, session: Session, step: int) -> dict[str, float]:
        """After a 0-based step: `eval_score`, `eval_length`, `eval_stop_rate`, `eval_gold` if there is gold, `eval_disagreement`
        of an ensemble, and `eval_win_rate`.

        A pair of the new and the start model's answer to one prompt is won when the judge scores the new one higher; ties count
        half. `eval_win_rate_low` and `_high` are the ends of the 95% interval (Wilson 1927).
        """
        metrics, judged = self._answer(session, step)
        if "start" in session.extra:
            before = session.extra["start"]["judged"]
            pairs = [(n, o) for n, o in zip(judged, before, strict=True) if n is not None and o is not None]
            if pairs:
                share = fmean((new > old) + 0.5 * (new == old) for new, old in pairs)
                low, high = wilson(share, len(pairs))
                metrics |= {"eval_win_rate": share, "eval_win_rate_low": low, "eval_win_rate_high": high}
        return metrics

    def _answer(self, session: Session, step: int) -> tuple[dict[str, float], list[float | None]]:
        """Metrics of the policy as it is now, and its answers' scores by the judge."""
        push_weights(self.engine, self.root, step + 1)  # the updates made so far: so are roll-outs counted
        found = share_rollout(
            self.engine,
            [p.ids for p in self.prompts],
            sampling_of(self.settings, self.template),
            seed=mix_seed(self.settings.seed, 0xE7),
            step=0,
        )
        scores = self.scorer(self.prompts, found)
        told = {f"eval_{name}": self.said[name] for name in TOLD if name in self.said}
        judged = scores if self.gold is None else self.gold(self.prompts, found)
        for i in self.shown:
            row = {
                "prompt": self.prompts[i].messages,
                "answer": self.template.decode(found[i].actions),
                "score": scores[i],
            }
            session.note("samples.jsonl", step, row if self.gold is None else {**row, "gold": judged[i]})
        metrics = {
            "eval_score": _mean(scores),
            "eval_length": fmean(len(t.actions) for t in found),
            "eval_stop_rate": fmean(t.finished for t in found),
            **told,
        }
        return metrics if self.gold is None else metrics | {"eval_gold": _mean(judged)}, judged


def _mean(scores: Sequence[float | None]) -> float:
    return fmean(v for v in scores if v is not None)
