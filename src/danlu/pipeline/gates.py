"""Gates between stages: a code, a sentence, a threshold and a verdict. A failed gate stops the run unless `--force`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from danlu.alignment_config import GrpoSettings, PpoSettings, RewardSettings
from danlu.config import QuantizeSettings
from danlu.knowledge_config import TeachSettings
from danlu.text.chat_template import ChatTemplate
from danlu.types import Conversation

STOP_SHARE = 0.99
TRUNCATED_SHARE = 0.05
RATIO_TOLERANCE = 1e-4
ROUNDED_KL = 0.01  # nats a token by which a reference of 8 bits may be off: what G-QUANT lets int8 cost
# G-PPO asks whether a policy is fit for use, not whether it is the best one: each limit lies well beyond what chance does.
WIN_SHARE = 0.5
KL_LOWEST = -1.0  # nats per answer: k1 of one iteration may be a little below 0
STOP_LOSS = 0.2  # share of held-out answers that end by themselves; the start model's less that of the policy
LENGTH_FACTOR = 3.0  # held-out answers as many times as long, or as short, as the start model's
FACTS_RECALLED = 0.9
SCORE_LOSS = 1.0  # in standard deviations of the start model's held-out scores


@dataclass(frozen=True)
class Gate:
    """A verdict. `value` is compared with `threshold` as the sentence says; a mere `warning` that does not hold stops nothing."""

    code: str
    passed: bool
    value: float
    threshold: float
    sentence: str
    warning: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def stop(facts: Mapping[str, Any]) -> Gate:
    """G-STOP: the stop token is inside the loss mask of >= 99% of answers, and its embedding row can learn."""
    kept = max(facts["answers_kept"], 1)
    share = facts["answers_with_stop"] / kept
    learns = bool(facts["stop_row_learns"])
    sentence = f"{share:.1%} of {facts['answers_kept']:,} answers end with a trained stop token"
    if not learns:
        sentence += (
            f", but its row is frozen and the model gives it a probability of {facts['stop_probability']:.2f} only"
        )
    return Gate("G-STOP", share >= STOP_SHARE and learns, share, STOP_SHARE, sentence)


def truncated(facts: Mapping[str, Any]) -> Gate:
    """G-TRUNC: fewer than 5% of answers are lost to the length limit."""
    share = facts["answers_cut"] / max(facts["answers"], 1)
    sentence = f"{share:.1%} of {facts['answers']:,} answers are lost to max_length"
    return Gate("G-TRUNC", share < TRUNCATED_SHARE, share, TRUNCATED_SHARE, sentence)


def render(training: ChatTemplate, serving: ChatTemplate, records: Sequence[Conversation]) -> Gate:
    """G-RENDER: the prompt that training saw is, text and ids, the prompt that serving renders from the saved folder."""
    same = asked = 0
    for record in records:
        last = max(i for i, m in enumerate(record.messages) if m["role"] == "assistant")
        if not last:
            continue  # an answer to nothing has no prompt that could differ
        asked += 1
        encoded = training.encode(record.messages[: last + 1], tools=record.tools)
        prompt = record.messages[:last]
        text = serving.render(prompt, add_generation_prompt=True, tools=record.tools)
        seen = encoded.ids[: encoded.answers[-1].start]
        same_ids = seen == serving.encode_prompt(prompt, tools=record.tools)
        same += same_ids and training.render(prompt, add_generation_prompt=True, tools=record.tools) == text
    share = same / max(asked, 1)
    sentence = f"{same} of {asked} sampled prompts are the same in training and in serving"
    return Gate("G-RENDER", same == asked, share, 1.0, sentence)


def reward_model(metrics: Mapping[str, float], settings: RewardSettings) -> list[Gate]:
    """G-RM: held-out pair accuracy, and correlation of the score with answer length.

    Without pairs (`loss: unpaired`) the accuracy is that of every liked against every other held-out answer: the AUC.
    """
    key = "eval_auc" if settings.loss == "unpaired" else "eval_accuracy"
    if key not in metrics:
        what, more = ("answers of both labels", "answers") if settings.loss == "unpaired" else ("pairs", "comparisons")
        sentence = (
            f"there are no held-out {what} to judge the reward model by: give --eval-data, or {more} of more prompts"
        )
        return [Gate("G-RM", False, 0.0, settings.min_accuracy, sentence)]
    accuracy = metrics[key]
    low, high = metrics.get(f"{key}_low", 0.0), metrics.get(f"{key}_high", 0.0)
    correlation = abs(metrics.get("eval_length_correlation", 0.0))
    right = accuracy >= settings.min_accuracy
    fair = correlation < settings.max_length_correlation
    what = "held-out pairs of a liked and another answer (AUC)" if settings.loss == "unpaired" else "held-out pairs"
    sentence = (
        f"the reward model is right on {accuracy:.1%} of {what} (95% interval {low:.1%} to {high:.1%}); its score "
        f"correlates {correlation:.2f} with answer length (limit {settings.max_length_correlation})"
    )
    return [Gate("G-RM", right and fair, accuracy, settings.min_accuracy, sentence)]


def ratio(facts: Mapping[str, Any], settings: PpoSettings | GrpoSettings) -> Gate:
    """G-RATIO: on the first PPO pass the ratio is 1 and the KL to the reference is 0, but for what rounding costs a reference."""
    first = facts.get("first") or {}
    rounded = settings.ref_bits == 8 and not settings.adapted
    allowed = ROUNDED_KL * first.get("length", 0.0) if rounded else 0.0
    found = (first.get("ratio_error", float("inf")), first.get("kl", float("inf")) - allowed)
    error = float("nan") if any(v != v for v in found) else max(found)  # max() may lose a NaN, and NaN <= x is false
    sentence = (
        f"on the first pass the ratio is off by {first.get('ratio_error', float('nan')):.1e}, KL to the reference is "
    )
    sentence += f"{first.get('kl', float('nan')):.1e}"
    if rounded:
        sentence += f", of which 8 bits may cost {allowed:.1e}"
    return Gate("G-RATIO", error <= RATIO_TOLERANCE, error, RATIO_TOLERANCE, sentence)


def policy(metrics: Mapping[str, float], facts: Mapping[str, Any], settings: PpoSettings | GrpoSettings) -> Gate:
    """G-PPO: the policy has not left its bounds, and does not lose against the model it started from.

    Without held-out prompts it is not decided: a warning that says so.
    """
    start = facts.get("start") or {}
    if "eval_win_rate" not in metrics or not start:
        sentence = (
            "not decided: there are no held-out prompts to compare the policy with the start model on; give --eval-data"
        )
        return Gate("G-PPO", False, 0.0, WIN_SHARE, sentence, warning=True)
    wins, low, high = (metrics[f"eval_win_rate{end}"] for end in ("", "_low", "_high"))
    sentence = (
        f"the policy wins {wins:.1%} of held-out prompts against the start model (95% interval {low:.1%} to {high:.1%})"
    )
    faults = _faults(metrics, start, settings)
    if not high >= WIN_SHARE:
        faults.insert(0, "it loses beyond chance")
    if faults:
        sentence += "; " + "; ".join(faults)
    return Gate("G-PPO", not faults, wins, WIN_SHARE, sentence)


def _faults(
    metrics: Mapping[str, float], start: Mapping[str, float], settings: PpoSettings | GrpoSettings
) -> list[str]:
    """What has collapsed, in words. A number that is none counts as collapsed."""
    max_kl = settings.ppo.max_kl if isinstance(settings, PpoSettings) else settings.grpo.max_kl
    judge = "eval_gold" if "eval_gold" in start else "eval_score"
    kl = metrics.get("kl", 0.0)  # not all methods have one
    length, stops, score = (metrics[k] for k in ("eval_length", "eval_stop_rate", judge))
    least_stops, least_score = start["eval_stop_rate"] - STOP_LOSS, start[judge] - SCORE_LOSS * start["spread"]
    shortest, longest = start["eval_length"] / LENGTH_FACTOR, start["eval_length"] * LENGTH_FACTOR
    checks = [
        (KL_LOWEST <= kl <= max_kl, f"its KL is {kl:.1f} nats per answer (bounds {KL_LOWEST:g} and {max_kl:g})"),
        (
            stops >= least_stops,
            f"{stops:.0%} of its answers end by themselves, {start['eval_stop_rate']:.0%} did before",
        ),
        (shortest <= length <= longest, f"its answers have {length:.0f} tokens, {start['eval_length']:.0f} before"),
        (score >= least_score, f"its held-out score is {score:.2f}, {start[judge]:.2f} before"),
    ]
    return [said for holds, said in checks if not holds]


def quantized(before: float, after: float, settings: QuantizeSettings) -> Gate:
    """G-QUANT: perplexity of the quantised model against the model it was made from."""
    increase = after / before - 1
    limit = settings.perplexity_limit
    sentence = f"perplexity {before:.4f} before and {after:.4f} after quantising ({increase:+.2%})"
    return Gate("G-QUANT", increase <= limit, increase, limit, sentence)


def facts_recalled(recall: Mapping[str, float | None], count: int) -> Gate:
    """G-FACT: after the last fact at least nine of ten trained phrasings recall theirs."""
    share = recall["trained"] or 0.0
    unseen = recall["unseen"] or 0.0
    sentence = f"{share:.1%} of the trained phrasings of {count} facts recall theirs, {unseen:.1%} of unseen ones"
    return Gate("G-FACT", share >= FACTS_RECALLED, share, FACTS_RECALLED, sentence)


def facts_local(locality: Mapping[str, float], settings: TeachSettings) -> Gate:
    """G-LOCAL: answers to other questions stayed the same, on average over the facts."""
    share = locality["agreement"]
    sentence = (
        f"{share:.1%} of other answers stayed the same, KL {locality['kl']:.4f}, perplexity x"
        f"{locality['perplexity_ratio']:.3f}"
    )
    return Gate("G-LOCAL", share >= settings.min_agreement, share, settings.min_agreement, sentence)
