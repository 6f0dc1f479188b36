"""Records -> token trees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from danlu.data.token_store import StoredItems
from danlu.data.truncate import FittedAnswers, Limits, fit_answers, fit_prompt, split_conversation, trained_answers
from danlu.exceptions import DataError
from danlu.text.chat_template import ChatTemplate, Encoded
from danlu.text.tokenizer import document_windows
from danlu.tree import Node, TreeBatch, branches, conversation, forest
from danlu.types import Comparison, Conversation, Document, Message, Prompt, Ranking, Unpaired

# Records that go through the tokenizer in one call.
TOGETHER = 256
Item = TypeVar("Item")


def batched(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """The items in lists of at most `count`."""
    source = iter(items)
    while part := list(islice(source, count)):
        yield part


@dataclass
class Trees:
    """Encoded records: one list of nodes each, and what G-STOP and G-TRUNC need to know about them.

    `items` and `margins` hold one entry per item; all other fields are counts, as numbers or by reason.
    """

    items: Sequence[list[Node]] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    answers: int = 0
    answers_with_stop: int = 0
    answers_cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each item."""
        if isinstance(self.items, StoredItems):
            return self.items.tokens
        return np.array([sum(len(n.ids) for n in item) for item in self.items], dtype=np.int64)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Sum of loss weights of each item."""
        if isinstance(self.items, StoredItems):
            return self.items.weights
        return np.array([sum(sum(n.loss_weights) for n in item) for item in self.items], dtype=np.float64)

    def batch(self, indices: Sequence[int]) -> TreeBatch:
        """Some items as one batch."""
        return TreeBatch.of(forest(self.items[i] for i in indices))

    def counts(self) -> dict[str, Any]:
        """All fields but those that hold one entry per item."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("items", "margins")}

    def count(self, other: Trees) -> None:
        """Adds the counts of another."""
        for name, value in other.counts().items():
            if isinstance(value, dict):
                own: dict[str, int] = getattr(self, name)
                own.update({reason: own.get(reason, 0) + number for reason, number in value.items()})
            else:
                setattr(self, name, getattr(self, name) + value)

    def _add(self, item: list[Node]) -> None:
        assert isinstance(self.items, list), "these trees were stored; they hold what they hold"
        self.items.append(item)

    def _drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


def encode_conversations(records: Iterable[Conversation], template: ChatTemplate, max_length: int | Limits) -> Trees:
    """Conversations as single nodes with loss on every assistant turn and its stop token.

    A conversation may become several where the template (`ChatTemplate.samples`) or `overlength: split` asks for it.

    Raises:
        TemplateError: the template cannot be used for training.
        DataError: something is longer than its limit and `overlength` is "error".
    """
    trees, limits = Trees(), Limits.of(max_length)
    samples = ((record, messages) for record in records for messages in template.samples(record.messages))
    for part in batched(samples, TOGETHER):
        encoded_part = template.encode_many([messages for _, messages in part], [record.tools for record, _ in part])
        for (record, messages), whole in zip(part, encoded_part, strict=True):
            trees.answers += trained_answers(messages)
            more: dict[str, Any] = {"tools": record.tools, "origin": record.origin, "whole": whole}
            for fitted in split_conversation(messages, template, limits, **more):
                trees.answers_cut += fitted.lost
                encoded = fitted.encoded
                if encoded is None:
                    trees._drop(fitted.reason)
                    continue
                trees.answers_with_stop += sum(_learns_stop(encoded, a.start, a.end, a.stops) for a in encoded.answers)
                trees._add(conversation(encoded.ids, encoded.loss_weights))
    return trees


def _learns_stop(encoded: Encoded, start: int, end: int, stops: bool) -> bool:
    return stops and end > start and encoded.loss_weights[end - 1] > 0


def encode_documents(records: Iterable[Document], tokenizer: Any, max_length: int) -> Trees:
    """Documents cut into windows, loss on every token but a window's first."""
    trees = Trees()
    for part in batched(records, TOGETHER):
        for ids in document_windows(tokenizer, [record.text for record in part], max_length):
            if len(ids) > 1:
                trees._add(conversation(ids, [1.0] * len(ids)))
    return trees


def encode_comparisons(records: Iterable[Comparison], template: ChatTemplate, max_length: int | Limits) -> Trees:
    """Pairs as prompt -> {chosen, rejected}, each answer with its stop token.

    The loss weight of an answer's tokens is its rank: 2 for the chosen one, 1 for the rejected one.

    Raises:
        DataError: something is longer than its limit and `overlength` is "error".
    """
    trees, limits = Trees(), Limits.of(max_length)
    for part in batched(records, TOGETHER):
        whole = template.encode_branches([(record.prompt, [record.chosen, record.rejected]) for record in part])
        for record, pair in zip(part, whole, strict=True):
            answers = [record.chosen, record.rejected]
            fitted = fit_answers(record.prompt, answers, template, limits, origin=record.origin, whole=pair)
            _add_pair(trees, record, fitted, template)
    return trees


def _add_pair(trees: Trees, record: Comparison, fitted: FittedAnswers | str, template: ChatTemplate) -> None:
    trees.answers += 2
    if isinstance(fitted, str):
        trees.answers_cut += 2
        trees._drop(fitted)
        return
    ids, answers, cut = fitted
    trees.answers_cut += cut
    if answers[0] == answers[1] or not all(answers):
        trees._drop("equal or empty answers")
        return
    trees.answers_with_stop += sum(a[-1] in template.stop_ids for a in answers)
    trees._add(branches(ids, answers, [2.0, 1.0]))
    trees.margins.append(record.margin)


def encode_rankings(records: Iterable[Ranking], template: ChatTemplate, max_length: int | Limits) -> Trees:
    """Rankings as prompt -> {answer} * K, each answer with its stop token; of equal answers the best stays.

    The loss weight of an answer's tokens is its rank among the scores of its prompt: 1 for the worst, equal scores share one.

    Raises:
        DataError: something is longer than its limit and `overlength` is "error".
    """
    trees, limits = Trees(), Limits.of(max_length)
    for part in batched(records, TOGETHER):
        whole = template.encode_branches([(record.prompt, record.responses) for record in part])
        for record, ranking in zip(part, whole, strict=True):
            fitted = fit_answers(record.prompt, record.responses, template, limits, origin=record.origin, whole=ranking)
            _add_ranking(trees, record, fitted, template)
    return trees


def _add_ranking(trees: Trees, record: Ranking, fitted: FittedAnswers | str, template: ChatTemplate) -> None:
    trees.answers += len(record.responses)
    if isinstance(fitted, str):
        trees.answers_cut += len(record.responses)
        trees._drop(fitted)
        return
    ids, answers, cut = fitted
    trees.answers_cut += cut
    best: dict[tuple[int, ...], float] = {}
    for answer, score in zip(answers, record.scores, strict=True):
        if answer:
            best[tuple(answer)] = max(score, best.get(tuple(answer), score))
    ranks = {score: float(rank) for rank, score in enumerate(sorted(set(best.values())), start=1)}
    if len(ranks) < 2:
        trees._drop("all scores equal" if len(best) > 1 else "only one answer to this prompt")
        return
    trees.answers_with_stop += sum(a[-1] in template.stop_ids for a in best)
    trees._add(branches(ids, [list(a) for a in best], [ranks[score] for score in best.values()]))


def encode_scored(records: Iterable[Ranking], template: ChatTemplate, max_length: int | Limits) -> Trees:
    """Scored answers as prompt -> {answer} * K, K >= 1, each answer with its stop token.

    The loss weight of an answer's tokens is its score as it was given (in fp32 once it is in a batch), 0 and below included.

    Raises:
        DataError: something is longer than its limit and `overlength` is "error".
    """
    return _encode_targets(((r, r.responses, r.scores) for r in records), template, max_length)


def encode_unpaired(records: Iterable[Unpaired], template: ChatTemplate, max_length: int | Limits) -> Trees:
    """Labelled answers as prompt -> {answer}, each answer with its stop token.

    The loss weight of an answer's tokens is its label: 1 for a liked answer, 0 for one that was not.

    Raises:
        DataError: something is longer than its limit and `overlength` is "error".
    """
    return _encode_targets(((r, [r.completion], [float(r.label)]) for r in records), template, max_length)


def _encode_targets(
    records: Iterable[tuple[Ranking | Unpaired, list[list[Message]], list[float]]],
    template: ChatTemplate,
    max_length: int | Limits,
) -> Trees:
    trees, limits = Trees(), Limits.of(max_length)
    for part in batched(records, TOGETHER):
        whole = template.encode_branches([(record.prompt, answers) for record, answers, _ in part])
        for (record, given, targets), encoded in zip(part, whole, strict=True):
            fitted = fit_answers(record.prompt, given, template, limits, origin=record.origin, whole=encoded)
            trees.answers += len(given)
            if isinstance(fitted, str):
                trees.answers_cut += len(given)
                trees._drop(fitted)
                continue
            ids, answers, cut = fitted
            trees.answers_cut += cut
            kept = [(a, t) for a, t in zip(answers, targets, strict=True) if a]
            if not kept:
                trees._drop("empty answer")
                continue
            trees.answers_with_stop += sum(a[-1] in template.stop_ids for a, _ in kept)
            trees._add(branches(ids, [a for a, _ in kept], [t for _, t in kept]))
    return trees


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt up to where the assistant begins to speak: its ids, the messages that they render, and the prompt's reference."""

    ids: list[int]
    messages: list[Message]
    reference: Mapping[str, Any] = field(default_factory=dict)


def encode_prompts(
    records: Iterable[Prompt], template: ChatTemplate, max_length: int | Limits
) -> tuple[list[EncodedPrompt], int]:
    """Prompts within their limit (oldest turns go first, then by `overlength`), and how many were dropped as too long.

    Raises:
        DataError: a prompt is longer than its limit and `overlength` is "error".
    """
    found: list[EncodedPrompt] = []
    dropped = 0
    limits = Limits.of(max_length)
    for part in batched(records, TOGETHER):
        whole = template.encode_branches([(record.prompt, []) for record in part])
        for record, (ids, _) in zip(part, whole, strict=True):
            messages = list(record.prompt)
            kept = fit_prompt(messages, template, limits, origin=record.origin, length=len(ids))
            if kept is None:
                dropped += 1
                continue
            kept_ids = ids if kept == messages else template.encode_prompt(kept)
            found.append(EncodedPrompt(kept_ids, kept, record.reference))
    return found, dropped


def require_items(trees: Trees, what: str, max_length: int) -> None:
    """Raises DataError when nothing is left to train on."""
    if not trees.items:
        raise DataError(
            f"no {what} is left to train on (dropped: {trees.dropped or 'none'})",
            hint=f"raise max_length (now {max_length})",
        )
