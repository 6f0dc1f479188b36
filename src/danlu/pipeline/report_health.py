"""The report's part on the health of PPO and GRPO: findings with advice, curves in groups, answers to one prompt over time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from danlu.pipeline.listing import StageView
from danlu.pipeline.report_charts import Chart, Plan, Series, draw
from danlu.pipeline.report_words import is_number, number, visible
from danlu.training.curves import Points, Rows, points
from danlu.training.rules import RULES
from danlu.training.tracking import read_metrics

KINDS: Final = ("ppo", "grpo")
COLUMNS: Final = 5  # answers side by side at most: the first, the last and some between
DIALOGUES: Final = 4
ACTIONS: Final = {"warn": "warned", "adapt": "corrected", "stop": "stopped"}


@dataclass(frozen=True)
class Told:
    """A finding as the page shows it."""

    code: str
    severe: bool
    step: str
    action: str
    seen: str
    cause: str
    change: str
    done: str


@dataclass(frozen=True)
class HealthView:
    """What the page says of a stage's health.

    Attributes:
        summary: what the rules came to, in a sentence.
        groups: title, what to look for, charts.
        dialogues: a prompt's turns and its answers, the oldest first.
    """

    summary: str
    findings: list[Told]
    groups: list[tuple[str, str, list[Chart]]]
    dialogues: list[dict[str, Any]]


def health_of(key: str, stage: StageView, rows: Rows) -> HealthView | None:
    """The health of a stage that rolls out; None of other kinds.

    Args:
        key: unique in the page, a prefix of the drawings' ids.
        rows: of its metrics.jsonl.
    """
    if stage.kind not in KINDS or stage.folder is None:
        return None
    start = stage.start
    steps = [step for name in ("score", "kl") for step, _ in points(rows, name)]
    span = (0.0 if start else min(steps), max(steps)) if steps else None
    groups = []
    for place, (title, plans) in enumerate(_groups(rows, start)):
        charts = draw(f"{key}-{place}", plans, "iteration", span)
        if charts:
            groups.append((title, LOOK_FOR[title], charts))
    findings = [_told(row) for row in read_metrics(stage.folder / "health.jsonl")]
    return HealthView(
        summary=_summary(stage, len(findings)),
        findings=findings,
        groups=groups,
        dialogues=_dialogues(read_metrics(stage.folder / "samples.jsonl")),
    )


def _summary(stage: StageView, count: int) -> str:
    if (stage.settings.get("health") or {}).get("on") is False:
        return "The rules were off."
    found = "nothing yet" if stage.status == "running" else "nothing"
    found = found if not count else "one thing" if count == 1 else f"{count} things"
    return f"{len(RULES)} rules watched this stage and found {found}."


def _told(row: Mapping[str, Any]) -> Told:
    texts = {k: visible(row.get(k) or "") for k in ("code", "seen", "cause", "change", "done")}
    step = number(row["step"]) if is_number(row.get("step")) else "?"
    action = ACTIONS.get(str(row.get("action")), "")
    return Told(severe=row.get("severity") == "error", step=step, action=action, **texts)


# -- curves -------------------------------------------------------------------------------------------------------------


LOOK_FOR: Final = {
    "Reward": "What the policy is rewarded with on its own answers, and what held-out prompts say of it. Where the first rises and "
    "the others do not, the policy has learnt what the reward gets wrong.",
    "KL": "How far the policy has gone from the model that it began as: two estimates of one number, of which k1 may be a little "
    "below 0. It should level out.",
    "Ratio and clip": "How much an iteration changes a token's probability, and how many tokens went so far that they were held "
    "back. Engine and trainer may differ by rounding alone.",
    "Entropy and repetition": "How much the policy still tries: near 0 it knows one answer only. Repetition should stay low, and "
    "a batch's answers should not become alike.",
    "Length and stops": "Answers that become ever longer, or no longer end by themselves, are what a reward that likes "
    "length leads to.",
    "Critic": "How well the critic foresees what answers will be worth: at 1 it knows all of it, at 0 and below "
    "advantages are noise.",
    "Learning": "Gradients should neither grow on and on nor be 0.",
}


def _groups(rows: Rows, start: Mapping[str, Any]) -> list[tuple[str, list[Plan]]]:
    """Plans of charts by group. `start`: held-out metrics of the model before training."""

    def of(label: str, name: str, ink: str = "first", noisy: bool = False) -> Series:
        begun = [(0.0, float(start[name]))] if is_number(start.get(name)) else []
        return Series(label, [*begun, *points(rows, name)], ink, noisy)

    share = {"percent": True}
    wins: tuple[Points, Points] = points(rows, "eval_win_rate_low"), points(rows, "eval_win_rate_high")
    return [
        (
            "Reward",
            [
                ("Score", [of("roll-outs", "score"), of("held-out", "eval_score", "second")], {}),
                (
                    "Score less the KL's price",
                    [of("less KL", "reward_total", "third"), of("as judged", "score_raw", "second")],
                    {},
                ),
                (
                    "Disagreement of the ensemble",
                    [of("roll-outs", "disagreement"), of("held-out", "eval_disagreement", "second")],
                    {},
                ),
                ("Gold: measured, not trained on", [of("held-out", "eval_gold", "second")], {}),
                (
                    "Wins against the start model",
                    [of("held-out", "eval_win_rate", "second")],
                    {**share, "band": wins, "level": 0.5},
                ),
            ],
        ),
        (
            "KL",
            [
                ("KL to the reference, nats an answer", [of("k1", "kl"), of("k3", "kl_k3", "third")], {}),
                ("Weight of the KL", [of("kl_coef", "kl_coef")], {}),
            ],
        ),
        (
            "Ratio and clip",
            [
                ("Largest ratio", [of("of an iteration", "ratio_max")], {}),
                ("Clipped tokens", [of("share", "clip_fraction", noisy=True)], share),
                ("KL of an update, nats a token", [of("approximate", "approx_kl", noisy=True)], {}),
                ("Engine against trainer, nats a token", [of("mean difference", "engine_gap")], {}),
            ],
        ),
        (
            "Entropy and repetition",
            [
                ("Entropy, nats per token", [of("roll-outs", "entropy")], {}),
                ("Repeated 3-grams of an answer", [of("roll-outs", "repetition")], share),
                (
                    "Different n-grams of a batch",
                    [of("tokens", "distinct_1"), of("2-grams", "distinct_2", "second")],
                    share,
                ),
            ],
        ),
        (
            "Length and stops",
            [
                ("Answer length, tokens", [of("roll-outs", "length"), of("held-out", "eval_length", "second")], {}),
                (
                    "Answers that end by themselves",
                    [of("roll-outs", "stop_rate"), of("held-out", "eval_stop_rate", "second")],
                    share,
                ),
            ],
        ),
        (
            "Critic",
            [
                ("Critic's loss", [of("value loss", "value_loss", noisy=True)], {}),
                ("Explained variance of the returns", [of("share", "explained_variance")], {"level": 0.0}),
            ],
        ),
        (
            "Learning",
            [
                (
                    "Gradient norm",
                    [of("policy", "grad_norm", noisy=True), of("critic", "critic_grad_norm", "second", True)],
                    {},
                ),
                ("Language-model loss in the gradient", [of("share", "ptx_share")], share),
                ("Groups of equal scores", [of("groups", "equal_groups", noisy=True)], share),
            ],
        ),
    ]


# -- answers over time --------------------------------------------------------------------------------------------------


def _dialogues(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same prompts at several steps: {"prompt": turns, "answers": [{"who", "score", "text"}]}."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if isinstance(row.get("prompt"), list) and is_number(row.get("step")):
            by_prompt.setdefault(json.dumps(row["prompt"], sort_keys=True), []).append(row)
    return [
        {
            "prompt": [
                {"role": visible(m.get("role", "")), "content": visible(m.get("content", ""))}
                for m in told[0]["prompt"]
                if isinstance(m, Mapping)
            ],
            "answers": [_answer(row) for row in _some(told)],
        }
        for told in list(by_prompt.values())[:DIALOGUES]
    ]


def _answer(row: Mapping[str, Any]) -> dict[str, str]:
    step = row["step"]
    scores = [f"{k} {number(row[k])}" for k in ("score", "gold") if is_number(row.get(k))]
    who = "before training" if step == 0 else f"iteration {number(step)}"
    return {"who": " · ".join([who, *scores]), "text": visible(row.get("answer") or "")}


def _some(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most COLUMNS rows at even distances, the first and the last among them."""
    if len(rows) <= COLUMNS:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
