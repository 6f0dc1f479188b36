"""Every hint on a synthetic curve that deserves it and on one that does not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from fake_run import curves

from danlu.pipeline.hints import hints

Row = dict[str, Any]
STEPS = range(10, 1010, 10)


def rows(**curve: Callable[[float], float]) -> list[Row]:
    """A row every 10 of 1000 steps; a curve is a function of the share of training done. `eval_...` come every 100."""
    found = []
    for step in STEPS:
        row: Row = {"step": step}
        row |= {k: f(step / 1000) for k, f in curve.items() if not k.startswith("eval_") or step % 100 == 0}
        found.append(row)
    return found


def codes(kind: str, logged: list[Row], **metrics: float) -> set[str]:
    return {h.code for h in hints(kind, logged, {"metrics": metrics})}


def fall(start: float, end: float, speed: float = 8.0) -> Callable[[float], float]:
    return lambda t: end + (start - end) * math.exp(-speed * t)


def line(start: float, end: float) -> Callable[[float], float]:
    return lambda t: start + (end - start) * t


def noisy(curve: Callable[[float], float], share: float, seed: int = 0) -> Callable[[float], float]:
    draw = random.Random(seed)
    return lambda t: curve(t) * (1 + draw.gauss(0, share))


def spiky(curve: Callable[[float], float], *at: float) -> Callable[[float], float]:
    return lambda t: curve(t) * (2.5 if any(abs(t - a) < 1e-9 for a in at) else 1)


FIRES: list[tuple[str, str, list[Row], dict[str, float]]] = [
    ("overfitting", "sft", rows(loss=line(2, 0.5), eval_loss=lambda t: 2 + (t - 0.4) ** 2), {}),
    ("undertrained", "pretrain", rows(loss=line(5, 3), eval_loss=line(5, 3)), {}),
    ("rate-too-high", "sft", rows(loss=lambda t: 2 - t if t < 0.5 else 1 + t), {}),
    ("rate-too-high", "sft", rows(loss=spiky(noisy(fall(4, 1), 0.03), 0.4, 0.7)), {}),
    ("rate-too-high", "sft", rows(loss=fall(4, 1), grad_norm=line(0.1, 6)), {}),
    ("flat", "sft", rows(loss=noisy(line(2, 2), 0.002), eval_loss=line(2.1, 2.1)), {"first_eval_loss": 2.1}),
    ("flat", "reward", rows(loss=lambda t: 0.693, accuracy=lambda t: 0.5), {}),
    ("sft-loss-high", "sft", rows(loss=fall(5, 2.8)), {}),
    ("near-chance", "reward", [], {"eval_accuracy": 0.53, "eval_accuracy_low": 0.51}),
    ("near-chance", "reward", [], {"eval_accuracy": 0.62, "eval_accuracy_low": 0.48}),
    ("length-bias", "reward", rows(eval_length_correlation=lambda t: -0.55), {}),
    ("chosen-falls", "dpo", rows(eval_chosen_reward=line(0, -3)), {}),
    ("overfitting", "dpo", rows(loss=line(0.69, 0.2), eval_loss=lambda t: 0.6 + (t - 0.4) ** 2), {}),
]

SILENT: list[tuple[str, str, list[Row], dict[str, float]]] = [
    # the training loss rises too: that is no overfitting
    ("overfitting", "sft", rows(loss=line(1, 2), eval_loss=line(1, 2)), {}),
    ("overfitting", "sft", rows(loss=fall(3, 1), eval_loss=noisy(fall(3, 1.1), 0.005)), {}),
    ("undertrained", "pretrain", rows(loss=fall(5, 3), eval_loss=fall(5, 3)), {}),
    # halving next to nothing is of no use
    ("undertrained", "sft", rows(eval_loss=line(0.012, 0.006)), {}),
    ("rate-too-high", "sft", rows(loss=noisy(fall(4, 1), 0.15), grad_norm=noisy(fall(2, 1), 0.3)), {}),
    # one bad record
    ("rate-too-high", "sft", rows(loss=spiky(fall(4, 1), 0.4)), {}),
    # a norm that grows below the clip
    ("rate-too-high", "sft", rows(loss=fall(4, 1), grad_norm=line(0.02, 0.6)), {}),
    ("flat", "sft", rows(loss=noisy(fall(4, 1), 0.05)), {}),
    # the training loss is noise but the held-out loss fell
    ("flat", "sft", rows(loss=lambda t: 2, eval_loss=line(2.0, 1.9)), {"first_eval_loss": 2.2}),
    ("sft-loss-high", "sft", rows(loss=fall(5, 1.9)), {}),
    ("sft-loss-high", "pretrain", rows(loss=fall(5, 2.9)), {}),
    ("near-chance", "reward", [], {"eval_accuracy": 0.62, "eval_accuracy_low": 0.58}),
    ("near-chance", "reward", [], {}),
    ("length-bias", "reward", rows(eval_length_correlation=lambda t: 0.2), {}),
    ("chosen-falls", "dpo", rows(eval_chosen_reward=line(0, -0.5)), {}),
]


@pytest.mark.parametrize(("code", "kind", "logged", "metrics"), FIRES)
def test_fires(code: str, kind: str, logged: list[Row], metrics: dict[str, float]) -> None:
    assert code in codes(kind, logged, **metrics)


@pytest.mark.parametrize(("code", "kind", "logged", "metrics"), SILENT)
def test_does_not_fire(code: str, kind: str, logged: list[Row], metrics: dict[str, float]) -> None:
    assert code not in codes(kind, logged, **metrics)


@pytest.mark.parametrize("kind", ["pretrain", "sft", "reward"])
@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_stage_gets_no_hint(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    logged = [
        {k: v if k == "step" or k.startswith("eval_") else v * (1 + draw.gauss(0, 0.03)) for k, v in row.items()}
        for row in curves(kind)
    ]
    assert codes(kind, logged) == set()


@pytest.mark.parametrize("kind", ["pretrain", "sft", "reward", "dpo", "ppo", "grpo", "eval", "tokenizer", "?"])
@pytest.mark.parametrize(
    "logged", [[], [{"step": 1, "loss": 3.0, "kl": 0.0}], [{"step": 1, "loss": math.nan, "score": math.inf}, {"x": 1}]]
)
def test_too_little_says_nothing(kind: str, logged: list[Row]) -> None:
    assert hints(kind, logged, {}) == []


def test_sentences_name_numbers_and_a_remedy() -> None:
    found = hints("sft", rows(loss=line(2, 0.5), eval_loss=lambda t: 2 + (t - 0.4) ** 2), {})
    assert "step 400 (2.000)" in found[0].sentence and "2.360" in found[0].sentence
    assert "early_stopping" in found[0].sentence
