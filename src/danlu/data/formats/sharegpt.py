"""ShareGPT and Vicuna: `{"conversations": [{"from", "value"}, ...]}`, with LLaMA-Factory's tool turns."""

from __future__ import annotations

from typing import Final

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import fault, filled_list, optional_text, text, wrong_type
from danlu.data.formats.turns import published_conversation
from danlu.types import Message, Origin, Record, Role

SPEAKERS: Final[dict[str, Role]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}
# Preference, KTO and tool rows use the same key for another purpose; to read them here would lose that silently.
_OTHERS: Final = frozenset({"chosen", "rejected", "kto_tag", "label"})


def _matches(row: Row) -> bool:
    return "conversations" in row and not row.get("tools") and _OTHERS.isdisjoint(row)


def turn_of(item: object, field: str, origin: Origin) -> Message:
    if not isinstance(item, dict):
        raise wrong_type(item, "an object with 'from' and 'value'", origin, field)
    speaker = text(item, "from", origin, f"{field}.")
    if speaker not in SPEAKERS:
        raise fault(f"found '{speaker[:40]}', expected one of {', '.join(SPEAKERS)}", origin, f"{field}.from")
    return {"role": SPEAKERS[speaker], "content": text(item, "value", origin, f"{field}.")}


def _parse(row: Row, origin: Origin) -> list[Record]:
    items = filled_list(row, "conversations", origin)
    turns = [turn_of(item, f"conversations[{i}]", origin) for i, item in enumerate(items)]
    system = optional_text(row, "system", origin)
    if system.strip():
        turns.insert(0, {"role": "system", "content": system})
    return [published_conversation(turns, origin)]


FORMAT = Format(
    "sharegpt",
    '{"conversations": [{"from": "human", "value": "..."}, ...]}',
    "conversation",
    _matches,
    _parse,
    "Conversations with ChatGPT that users shared, and the many sets in the same shape (Vicuna, LLaMA-Factory). "
    "Doubled turns are merged; a conversation that starts with the assistant or ends with the user is dropped and counted.",
    {"conversations": [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hello, how can I help?"}]},
)
