"""Question and answer as text: `{"prompt", "response"}`, with earlier rounds in `history` as ChatGLM has them.

Rows without `response` are prompts.
"""

from __future__ import annotations

from typing import Final

from danlu.data.formats.base import ANSWER_KEYS, Format, Row
from danlu.data.formats.fields import optional_text, text
from danlu.data.formats.turns import assistant, history_turns, published_conversation, published_question, user
from danlu.types import Message, Origin, Prompt, Record

_OTHERS: Final = frozenset({"chosen", "rejected", "completion", "label", "kto_tag", "responses", "reward_model"})


def _matches(row: Row) -> bool:
    return isinstance(row.get("prompt"), str) and _OTHERS.isdisjoint(row)


def _question(row: Row, origin: Origin) -> list[Message]:
    system = optional_text(row, "system", origin)
    head: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    return [*head, *history_turns(row, origin), user(text(row, "prompt", origin))]


def _parse(row: Row, origin: Origin) -> list[Record]:
    question = _question(row, origin)
    return [published_conversation([*question, assistant(text(row, "response", origin))], origin)]


def _has_no_answer(row: Row) -> bool:
    return _matches(row) and ANSWER_KEYS.isdisjoint(row)


def _parse_prompt(row: Row, origin: Origin) -> list[Record]:
    return [Prompt(published_question(_question(row, origin)), origin=origin)]


FORMAT = Format(
    "question-answer",
    '{"prompt": "...", "response": "..."}',
    "conversation",
    _matches,
    _parse,
    "A question and its answer as text. ChatGLM's dialogue files add earlier rounds as `history: [[question, answer], ...]`.",
    {"prompt": "And the capital of Norway?", "response": "Oslo.", "history": [["The capital of Peru?", "Lima."]]},
)
PROMPT = Format(
    "prompt-text",
    '{"prompt": "..."}',
    "prompt",
    _has_no_answer,
    _parse_prompt,
    "A question as text without an answer, for stages that write their own.",
    {"prompt": "Why is the sky blue?"},
)
