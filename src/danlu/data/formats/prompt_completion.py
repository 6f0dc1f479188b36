"""TRL's prompt-completion rows, as text or as message lists: only the completion is trained."""

from __future__ import annotations

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import filled_list, present, text
from danlu.data.formats.role_lists import published_turn
from danlu.data.formats.turns import assistant, published_conversation, tools_of, user
from danlu.types import Message, Origin, Record


def _matches(row: Row) -> bool:
    return "prompt" in row and "completion" in row and {"label", "kto_tag", "score"}.isdisjoint(row)


def _turns(row: Row, field: str, origin: Origin) -> list[Message]:
    if not isinstance(present(row, field, origin), list):
        return [user(text(row, field, origin)) if field == "prompt" else assistant(text(row, field, origin))]
    return [published_turn(item, f"{field}[{i}]", origin) for i, item in enumerate(filled_list(row, field, origin))]


def _parse(row: Row, origin: Origin) -> list[Record]:
    prompt = _turns(row, "prompt", origin)
    for message in prompt:
        if message["role"] == "assistant":
            message["train"] = False
    return [published_conversation([*prompt, *_turns(row, "completion", origin)], origin, tools_of(row, origin))]


FORMAT = Format(
    "prompt-completion",
    '{"prompt", "completion"}',
    "conversation",
    _matches,
    _parse,
    "TRL's (and OpenAI's first) rows for fine-tuning, as text or as message lists. Answers inside the prompt are shown to "
    "the model and not trained.",
    {"prompt": "The sky is", "completion": " blue."},
)
