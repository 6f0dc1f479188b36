"""Records -> token trees, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from danlu.exceptions import DataError
from danlu.text.chat_template import ChatTemplate, Encoded
from danlu.text.tokenizer import encode_document
from danlu.tree import Node, TreeBatch, branches, conversation, forest
from danlu.types import Comparison, Conversation, Document, Message, Prompt


@dataclass
class Trees:
    """Encoded records: one list of nodes each, and what G-STOP and G-TRUNC need to know about them."""

    items: list[list[Node]] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    answers: int = 0
    answers_with_stop: int = 0
    answers_cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each item."""
        return [sum(len(n.ids) for n in item) for item in self.items]

    def batch(self, indices: Sequence[int]) -> TreeBatch:
        """Some items as one batch."""
        return TreeBatch.of(forest(self.items[i] for i in indices))

    def _drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


def _shorter(messages: list[Message]) -> list[Message] | None:
    """Without the oldest exchange; the system text stays. None when only one exchange is left."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    starts = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]
    return [*messages[:first], *messages[starts[0] :]] if starts else None


def _fit(messages: list[Message], size: Callable[[list[Message]], int], limit: int) -> list[Message] | None:
    """Messages with the oldest exchanges dropped until they fit, never half an answer; None if even the last does not."""
    current: list[Message] | None = messages
    while current is not None and size(current) > limit:
        current = _shorter(current)
    return current


def encode_conversations(records: Iterable[Conversation], template: ChatTemplate, max_length: int) -> Trees:
    """Conversations as single nodes with loss on every assistant turn and its stop token.

    Raises:
        TemplateError: the template cannot be used for training.
    """
    trees = Trees()
    for record in records:
        before = _trained(record.messages)
        kept = _fit(record.messages, lambda m: len(template.encode(m).ids), max_length)
        trees.answers += before
        if kept is None:
            trees.answers_cut += before
            trees._drop("longer than max_length")
            continue
        trees.answers_cut += before - _trained(kept)
        encoded = template.encode(kept)
        trees.answers_with_stop += sum(_learns_stop(encoded, a.start, a.end, a.stops) for a in encoded.answers)
        trees.items.append(conversation(encoded.ids, encoded.loss_weights))
    return trees


def _trained(messages: Sequence[Message]) -> int:
    return sum(m["role"] == "assistant" and m.get("train", True) for m in messages)


def _learns_stop(encoded: Encoded, start: int, end: int, stops: bool) -> bool:
    return stops and end > start and encoded.loss_weights[end - 1] > 0


def encode_documents(records: Iterable[Document], tokenizer: Any, max_length: int) -> Trees:
    """Documents cut into windows, loss on every token but a window's first."""
    trees = Trees()
    for record in records:
        for ids in encode_document(tokenizer, record.text, max_length):
            if len(ids) > 1:
                trees.items.append(conversation(ids, [1.0] * len(ids)))
    return trees


def encode_comparisons(records: Iterable[Comparison], template: ChatTemplate, max_length: int) -> Trees:
    """Pairs as prompt -> {chosen, rejected}, each answer with its stop token."""
    trees = Trees()
    for record in records:

        def size(prompt: list[Message], pair: Comparison = record) -> int:
            longest = max(len(template.encode([*prompt, *a]).ids) for a in (pair.chosen, pair.rejected))
            return longest

        prompt = _fit(record.prompt, size, max_length)
        trees.answers += 2
        if prompt is None:
            trees.answers_cut += 2
            trees._drop("longer than max_length")
            continue
        ids, chosen = template.encode_answer(prompt, record.chosen)
        _, rejected = template.encode_answer(prompt, record.rejected)
        if chosen == rejected or not chosen or not rejected:
            trees._drop("equal or empty answers")
            continue
        trees.answers_with_stop += sum(a[-1] in template.stop_ids for a in (chosen, rejected))
        trees.items.append(branches(ids, [chosen, rejected]))
        trees.margins.append(record.margin)
    return trees


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt up to where the assistant begins to speak: its ids, and the messages that they render."""

    ids: list[int]
    messages: list[Message]


def encode_prompts(
    records: Iterable[Prompt], template: ChatTemplate, max_length: int
) -> tuple[list[EncodedPrompt], int]:
    """Prompts of at most `max_length` tokens (oldest turns go first), and how many were dropped as too long."""
    found: list[EncodedPrompt] = []
    dropped = 0
    for record in records:
        kept = _fit(list(record.prompt), lambda m: len(template.encode_prompt(m)), max_length)
        if kept is None:
            dropped += 1
        else:
            found.append(EncodedPrompt(template.encode_prompt(kept), kept))
    return found, dropped


def require_items(trees: Trees, what: str, max_length: int) -> None:
    """Raises DataError when nothing is left to train on."""
    if not trees.items:
        raise DataError(
            f"no {what} is left to train on (dropped: {trees.dropped or 'none'})",
            hint=f"raise max_length (now {max_length})",
        )


Plan = list[list[list[int]]]


def plan_steps(
    lengths: Sequence[int],
    *,
    tokens_per_step: int,
    micro_tokens: int,
    epochs: float,
    max_steps: int | None,
    seed: int,
) -> Plan:
    """Which items each optimizer step sees, cut into micro-batches: a function of the arguments alone.

    Each epoch is a fresh permutation. A step takes items until it holds `tokens_per_step` tokens; a micro-batch holds at most
    `micro_tokens` (a longer item stands alone).

    Returns:
        steps -> micro-batches -> item indices.
    """
    steps: Plan = []
    wanted = max_steps if max_steps is not None else float("inf")
    passes = float("inf") if max_steps is not None else epochs
    epoch = 0
    while len(steps) < wanted and epoch < passes:
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
        share = min(1.0, passes - epoch)
        order = order[: max(1, round(len(order) * share))]
        current: list[int] = []
        tokens = 0
        for index in order.tolist():
            current.append(index)
            tokens += lengths[index]
            if tokens >= tokens_per_step:
                steps.append(_micro(current, lengths, micro_tokens))
                current, tokens = [], 0
        if current:
            steps.append(_micro(current, lengths, micro_tokens))
        epoch += 1
    return steps[: max_steps if max_steps is not None else len(steps)]


def _micro(items: Sequence[int], lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    tokens = 0
    for index in items:
        if batches[-1] and tokens + lengths[index] > micro_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches
