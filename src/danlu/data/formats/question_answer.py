"""Question and answer as text: `{"prompt", "response"}`, with earlier rounds in `history` as ChatGLM has them.

Rows without `response` are prompts.
"""

from __future__ import annotations

from typing import Final

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import optional_text, text
from danlu.data.formats.turns import assistant, history_turns, published_question, published_records, user
from danlu.types import Message, Origin, Prompt, Record, RecordKind

_OTHERS: Final = frozenset({"chosen", "rejected", "completion", "label", "kto_tag", "responses", "reward_model"})


def _matches(row: Row) -> bool:
    return isinstance(row.get("prompt"), str) and _OTHERS.isdisjoint(row)


def _parse(row: Row, kind: RecordKind, origin: Origin) -> list[Record]:
    system = optional_text(row, "system", origin)
    head: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    question = [*head, *history_turns(row, origin), user(text(row, "prompt", origin))]
    if kind == "prompt":
        return [Prompt(published_question(question), origin=origin)]
    return published_records([*question, assistant(text(row, "response", origin))], kind, origin)


FORMAT = Format("question-answer", '{"prompt": "...", "response": "..."}', "conversation", _matches, _parse)
