"""Answers to held-out questions, scored: rubric, exact match; every mean with its 95% bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from danlu.assistant import Assistant, Reply
from danlu.evals.rubric import is_correct, score
from danlu.exceptions import DataError
from danlu.generation.protocol import SamplingParams
from danlu.generation.seeds import mix_seed
from danlu.rewards.verifiers import exact
from danlu.types import Prompt

BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True)
class Evaluation:
    """Summary and rows of one model on one set of questions.

    `summary`: `correct` and (task rubric) `rubric`, each {"mean", "low", "high"}; `stop_rate`; `length` in tokens.
    `rows`: prompt, label, prediction and scores of each question.
    """

    summary: dict[str, Any]
    rows: list[dict[str, Any]]


def answer(
    assistant: Assistant,
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    numbers: Sequence[int] | None = None,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[Reply]:
    """One answer per prompt; the draws are a function of (seed, number), so that models are compared on equal luck.

    Args:
        numbers: of the prompts; default 0, 1, 2, ...
    """
    params = [
        SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=mix_seed(seed, number))
        for number in (range(len(prompts)) if numbers is None else numbers)
    ]
    replies: list[Reply] = []
    chunk = 256
    for start in range(0, len(prompts), chunk):
        part = prompts[start : start + chunk]
        replies += assistant.generate([p.prompt for p in part], params[start : start + chunk])
        on_done(len(replies))
    return replies


def evaluate(
    assistant: Assistant,
    prompts: Sequence[Prompt],
    *,
    task: str,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    on_done: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Answers the questions and scores them.

    Args:
        task: "rubric" (see `evals/rubric.py`) or "exact": the answer equals one variant of the reference's first item after
            Unicode normalisation and trimming.

    Raises:
        DataError: a question has no reference.
    """
    for prompt in prompts:
        if not prompt.reference:
            place = prompt.origin
            raise DataError(
                "this question has no reference to judge an answer by",
                file=place.file if place else None,
                line=place.line if place else None,
                field="reference",
                hint='rows look like {"prompt": [...], "reference": {"answers": [["7:30"]]}}',
            )
    replies = answer(
        assistant, prompts, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, on_done=on_done
    )
    rows: list[dict[str, Any]] = []
    for prompt, reply in zip(prompts, replies, strict=True):
        finished = reply.finish_reason == "stop"
        row: dict[str, Any] = {
            "prompt": prompt.prompt,
            "label": prompt.reference.get("answers", []),
            "prediction": reply.text,
            "finished": finished,
            "tokens": len(reply.ids),
        }
        if task == "rubric":
            row["rubric"] = score(reply.text, prompt.reference, finished).total
            row["correct"] = float(is_correct(reply.text, prompt.reference))
        else:
            row["correct"] = float(exact(reply.text, prompt.reference))
        rows.append(row)
    summary: dict[str, Any] = {
        "correct": interval([r["correct"] for r in rows], seed),
        "stop_rate": float(np.mean([r["finished"] for r in rows])),
        "length": float(np.mean([r["tokens"] for r in rows])),
        "questions": len(rows),
    }
    if task == "rubric":
        summary["rubric"] = interval([r["rubric"] for r in rows], seed)
    return Evaluation(summary, rows)


def interval(values: Sequence[float], seed: int) -> dict[str, float]:
    """Mean with the 95% percentile interval of a seeded bootstrap over the questions (Efron 1979)."""
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng([seed, 0xB0])
    means = np.array([data[rng.integers(0, len(data), len(data))].mean() for _ in range(BOOTSTRAP_SAMPLES)])
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(data.mean()), "low": float(low), "high": float(high)}
