"""What the curves of a stage say, in plain words: pure functions of logged rows, every threshold with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, pstdev
from typing import Any, Final

from danlu.training.curves import Points, Rows, points, values

MIN_POINTS: Final = 5  # fewer logged rows than this are no curve
EDGE: Final = 0.2  # "first" and "last" are means over this share of a curve: one batch says little

OVERFIT_RISE: Final = 0.02  # held-out sets of a few hundred records move by about 1% between evaluations by chance
UNDERTRAINED_FALL: Final = 0.03  # a last quarter that still buys 3% of loss promises more than 1% for the next one
UNDERTRAINED_NATS: Final = 0.01  # below this a fall is of no use, whatever its share
SPIKE_RATIO: Final = 1.5  # a batch's loss this far above its neighbours ...
SPIKE_DEVIATIONS: Final = 6.0  # ... and so many robust deviations: batches differ, but not like that
SPIKE_WINDOW: Final = 4  # neighbours on each side
SPIKES: Final = 2  # one spike can be one bad record
RISE: Final = 0.10  # the end this far above the best stretch ...
RISE_ERRORS: Final = 4.0  # ... and so many standard errors: the lowest of several means is low by chance already
GRAD_GROWTH: Final = 4.0  # a norm drifts by a factor of two in healthy training
GRAD_CLIP: Final = 1.0  # below the usual clip a growing norm harms nothing
FLAT: Final = 0.01  # learning anything moves the loss by more than 1%
SFT_LOSS: Final = 2.5  # ColossalAI's Coati warns from here: such a model answers with little sense
CHANCE: Final = 0.55  # a reward model right in under 55% of pairs hardly moves PPO in any direction
LENGTH_CORRELATION: Final = 0.4  # G-RM fails at 0.5; 0.4 is where length already explains a sixth of the score
CHOSEN_REWARD: Final = (
    -1.0
)  # at the usual beta of 0.1: e^10 times less likely than before, which no wish for brevity explains


@dataclass(frozen=True)
class Hint:
    """`code` is short and stable; `sentence` says what was seen and what to try."""

    code: str
    sentence: str


def hints(kind: str, rows: Rows, manifest: Mapping[str, Any]) -> list[Hint]:
    """What the curves of a stage say. Those of roll-outs are read while they are drawn, by `training/rules.py`.

    Args:
        kind: of the stage.
        rows: of its metrics.jsonl.
        manifest: of the stage; its final metrics stand in where no curve was logged.
    """
    checks: dict[str, tuple[Callable[[Rows, Mapping[str, Any]], Hint | None], ...]] = {
        "pretrain": (overfitting, undertrained, rate_too_high, flat),
        "sft": (overfitting, undertrained, rate_too_high, flat, sft_loss_high),
        "reward": (overfitting, undertrained, rate_too_high, flat, near_chance, length_bias),
        "dpo": (overfitting, undertrained, rate_too_high, flat, chosen_falls),
    }
    found = (check(rows, manifest) for check in checks.get(kind, ()))
    return [hint for hint in found if hint is not None]


# -- language-model and reward-model curves --------------------------------------------------------------------------


def overfitting(rows: Rows, manifest: Mapping[str, Any]) -> Hint | None:
    """The held-out loss rises while the training loss goes on falling."""
    train, held = points(rows, "loss"), points(rows, "eval_loss")
    if len(held) < 3 or len(train) < MIN_POINTS:
        return None
    best_step, best = min(held, key=lambda p: p[1])
    last = held[-1][1]
    before = [v for s, v in train if s <= best_step] or [train[0][1]]
    after = [v for s, v in train if s > best_step]
    if last <= best * (1 + OVERFIT_RISE) or not after or _end(after) >= _end(before):
        return None
    return Hint(
        "overfitting",
        f"The held-out loss was best at step {best_step:g} ({best:.3f}) and rose to {last:.3f}, while the "
        "training loss went on falling: the model learns its examples by heart. Use fewer epochs, more data, or "
        "early_stopping.",
    )


def undertrained(rows: Rows, manifest: Mapping[str, Any]) -> Hint | None:
    """The held-out loss still falls steeply at the end."""
    held = points(rows, "eval_loss")
    if len(held) < 3:
        return None
    last_step, last = held[-1]
    then = _at(held, held[0][0] + 0.75 * (last_step - held[0][0]))
    fall = then - last
    if fall < UNDERTRAINED_NATS or fall < UNDERTRAINED_FALL * abs(then):
        return None
    return Hint(
        "undertrained",
        f"The held-out loss was still falling at the end ({fall / abs(then):.0%} in the last quarter). Train "
        "longer: more epochs or steps would help.",
    )


def rate_too_high(rows: Rows, manifest: Mapping[str, Any]) -> Hint | None:
    """The training loss jumps or rises, or gradients grow."""
    losses, norms = values(rows, "loss"), values(rows, "grad_norm")
    advice = "Try half the learning_rate, or a longer warmup."
    if len(losses) >= MIN_POINTS:
        size = max(2, round(EDGE * len(losses)))
        lowest = min(fmean(losses[i : i + size]) for i in range(len(losses) - size + 1))
        end = fmean(losses[-size:])
        noise = pstdev([b - a for a, b in pairwise(losses)]) / 2**0.5
        error = noise * (2 / size) ** 0.5
        if end > lowest + max(RISE * abs(lowest), RISE_ERRORS * error):
            return Hint("rate-too-high", f"The training loss rose from {lowest:.3f} to {end:.3f}. {advice}")
        # Pairwise losses of single batches have long tails by nature; `accuracy` is absent elsewhere.
        spikes = [] if values(rows, "accuracy") else _spikes(losses)
        if len(spikes) >= SPIKES:
            return Hint(
                "rate-too-high", f"The training loss jumped {len(spikes)} times, up to {max(spikes):.2f}. {advice}"
            )
    if len(norms) >= 3 * MIN_POINTS:
        third = len(norms) // 3
        first, last = median(norms[:third]), median(norms[-third:])
        if last > GRAD_CLIP and last > GRAD_GROWTH * first:
            return Hint("rate-too-high", f"Gradient norms grew from {first:.2f} to {last:.2f}. {advice}")
    return None


def flat(rows: Rows, manifest: Mapping[str, Any]) -> Hint | None:
    """The loss is at the end where it was at the start."""
    losses, norms = values(rows, "loss"), values(rows, "grad_norm")
    if len(losses) < MIN_POINTS or abs(_end(losses) - _begin(losses)) > FLAT * abs(_begin(losses)):
        return None
    held = values(rows, "eval_loss")
    first = (manifest.get("metrics") or {}).get("first_eval_loss", held[0] if held else 0.0)
    if held and abs(held[-1] - first) > FLAT * abs(first):
        return None
    if norms and max(norms) == 0:
        return Hint(
            "flat", "The loss did not move and every gradient is zero: nothing is being trained. Check the adapter."
        )
    return Hint(
        "flat",
        f"The loss did not move ({_begin(losses):.3f} at the start, {_end(losses):.3f} at the end). Try a "
        "learning_rate three to ten times as high, and more steps.",
    )


def sft_loss_high(rows: Rows, manifest: Mapping[str, Any]) -> Hint | None:
    """Coati's warning: the loss of the last batches is too high for sensible answers."""
    losses = values(rows, "loss")
    if len(losses) < MIN_POINTS or _end(losses) < SFT_LOSS:
        return None
    return Hint(
        "sft-loss-high",
        f"The last batches still had a loss of {_end(losses):.2f} (from {SFT_LOSS} on, answers make little "
        "sense). Train longer, or start from a model that knows the language of the data.",
    )


def near_chance(rows: Rows, manifest: Mapping[str, Any]) -> Hint | None:
    """The reward model tells good from bad hardly better than a coin."""
    accuracy, low = _final(rows, manifest, "eval_accuracy"), _final(rows, manifest, "eval_accuracy_low")
    if accuracy is None or (accuracy >= CHANCE and (low is None or low > 0.5)):
        return None
    return Hint(
        "near-chance",
        f"The reward model ranks {accuracy:.0%} of held-out pairs rightly; guessing gives 50%. PPO would follow noise: "
        "give it more pairs or clearer ones, and train it longer.",
    )


def length_bias(rows: Rows, manifest: Mapping[str, Any]) -> Hint | None:
    """The score follows the answer's length."""
    correlation = _final(rows, manifest, "eval_length_correlation")
    if correlation is None or abs(correlation) < LENGTH_CORRELATION:
        return None
    wanted, other = ("long", "short") if correlation > 0 else ("short", "long")
    return Hint(
        "length-bias",
        f"The score follows the length of the answer (correlation {correlation:.2f}): PPO would learn to be "
        f"{wanted}. Add pairs in which the {other} answer is the better one.",
    )


def chosen_falls(rows: Rows, manifest: Mapping[str, Any]) -> Hint | None:
    """DPO makes the preferred answers much less likely, if only less so than the others."""
    reward = _final(rows, manifest, "eval_chosen_reward")
    if reward is None or reward > CHOSEN_REWARD:
        return None
    return Hint(
        "chosen-falls",
        f"The answers that people preferred became less likely too (held-out reward {reward:.2f}): the policy flees from "
        "both. Lower learning_rate, raise beta, use fewer epochs, or train SFT on the preferred answers first.",
    )


# -- reading curves --------------------------------------------------------------------------------------------------


def _begin(curve: Sequence[float]) -> float:
    return fmean(curve[: max(1, round(EDGE * len(curve)))])


def _end(curve: Sequence[float]) -> float:
    return fmean(curve[-max(1, round(EDGE * len(curve))) :])


def _at(curve: Points, step: float) -> float:
    """Linear interpolation."""
    for (a, x), (b, y) in pairwise(curve):
        if step <= b:
            return x + (y - x) * (step - a) / (b - a) if b > a else y
    return curve[-1][1]


def _spikes(losses: Sequence[float]) -> list[float]:
    found = []
    for i in range(SPIKE_WINDOW, len(losses)):
        around = [*losses[i - SPIKE_WINDOW : i], *losses[i + 1 : i + 1 + SPIKE_WINDOW]]
        centre = median(around)
        deviation = 1.4826 * median(abs(v - centre) for v in around)
        if losses[i] > SPIKE_RATIO * centre and losses[i] > centre + SPIKE_DEVIATIONS * deviation:
            found.append(losses[i])
    return found


def _final(rows: Rows, manifest: Mapping[str, Any], key: str) -> float | None:
    logged = values(rows, key)
    value = logged[-1] if logged else (manifest.get("metrics") or {}).get(key)
    return float(value) if isinstance(value, int | float) else None
