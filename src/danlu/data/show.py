"""Rows as a model will see them: which text is trained, which is masked, and where the stop token is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from danlu.text.chat_template import ChatTemplate
from danlu.text.template_registry import named_template
from danlu.text.tokenizer import train_tokenizer
from danlu.types import Comparison, Conversation, Document, Message, Prompt, Ranking, Record, Unpaired

Kind = Literal["masked", "trained", "stop"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of tokens that follow each other and are treated alike."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class View:
    """One sequence that training or generation sees."""

    title: str
    pieces: list[Piece]


def stand_in_tokenizer(template: str) -> Any:
    """A byte-level tokenizer that knows a shipped template's control tokens, for looking at rows without a model."""
    named = named_template(template)
    tokenizer = train_tokenizer([], 260)
    known = tokenizer.get_vocab()
    tokenizer.chat_template = None
    end = named.stop or "</s>"
    tokenizer.add_special_tokens({"eos_token": end})
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [t for t in named.control_tokens if t not in known and t != end]}
    )
    return tokenizer


def views(record: Record, template: ChatTemplate) -> list[View]:
    """The sequences of a record.

    Raises:
        TemplateError: the template refuses the record.
    """
    match record:
        case Document():
            return [View("document", [Piece("trained", record.text)])]
        case Prompt():
            return [View("prompt", _pieces(template, template.encode_prompt(record.prompt), None))]
        case Conversation():
            encoded = [template.encode(turns, tools=record.tools) for turns in template.samples(record.messages)]
            titles = ["conversation"] if len(encoded) == 1 else [f"answer {i}" for i in range(1, len(encoded) + 1)]
            return [View(t, _pieces(template, e.ids, e.loss_weights)) for t, e in zip(titles, encoded, strict=True)]
        case Comparison():
            answers = [("chosen", record.chosen), ("rejected", record.rejected)]
        case Ranking():
            answers = [(f"score {s:g}", r) for s, r in zip(record.scores, record.responses, strict=True)]
        case Unpaired():
            answers = [("liked" if record.label else "not liked", record.completion)]
    return [View(title, _answer(template, record.prompt, answer)) for title, answer in answers]


def _answer(template: ChatTemplate, prompt: Sequence[Message], answer: Sequence[Message]) -> list[Piece]:
    before, ids = template.encode_answer(prompt, answer)
    return _pieces(template, [*before, *ids], [0.0] * len(before) + [1.0] * len(ids))


def _pieces(template: ChatTemplate, ids: Sequence[int], weights: Sequence[float] | None) -> list[Piece]:
    kinds: list[Kind] = []
    for place, token in enumerate(ids):
        trained = weights is not None and weights[place] > 0
        kinds.append("stop" if trained and token in template.stop_ids else "trained" if trained else "masked")
    found: list[Piece] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[start]:
            # Tokens are decoded together: a character may lie in several of them.
            text = template.tokenizer.decode(list(ids[start:end]), skip_special_tokens=False)
            found.append(Piece(kinds[start], text))
            start = end
    return found
