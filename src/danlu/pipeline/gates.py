"""Gates between stages: a code, a sentence, a threshold and a verdict. A failed gate stops the run unless `--force`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from danlu.alignment_config import RewardSettings
from danlu.config import QuantizeSettings
from danlu.text.chat_template import ChatTemplate
from danlu.types import Conversation

STOP_SHARE = 0.99
TRUNCATED_SHARE = 0.05
RATIO_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Gate:
    """A verdict. `value` is compared with `threshold` as the sentence says."""

    code: str
    passed: bool
    value: float
    threshold: float
    sentence: str

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


def ratio(facts: Mapping[str, Any]) -> Gate:
    """G-RATIO: on the first PPO pass the ratio is 1 and the KL to the reference is 0."""
    first = facts.get("first") or {}
    found = (first.get("ratio_error", float("inf")), first.get("kl", float("inf")))
    error = float("nan") if any(v != v for v in found) else max(found)  # max() may lose a NaN, and NaN <= x is false
    sentence = (
        f"on the first pass the ratio is off by {first.get('ratio_error', float('nan')):.1e}, KL to the reference is "
    )
    sentence += f"{first.get('kl', float('nan')):.1e}"
    return Gate("G-RATIO", error <= RATIO_TOLERANCE, error, RATIO_TOLERANCE, sentence)


def quantized(before: float, after: float, settings: QuantizeSettings) -> Gate:
    """G-QUANT: perplexity of the quantised model against the model it was made from."""
    increase = after / before - 1
    limit = settings.max_perplexity_increase
    sentence = f"perplexity {before:.4f} before and {after:.4f} after quantising ({increase:+.2%})"
    return Gate("G-QUANT", increase <= limit, increase, limit, sentence)
