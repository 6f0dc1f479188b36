"""Conversations as message lists under other names than `messages`, and turns of published sets in either naming."""

from __future__ import annotations

from typing import Final

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import fault, filled_list, optional_text, text, wrong_type
from danlu.data.formats.sharegpt import SPEAKERS
from danlu.data.formats.sharegpt import turn_of as sharegpt_turn
from danlu.data.formats.turns import assistant, own_tool_calls, published_conversation, tools_of, user
from danlu.types import Message, Origin, Record, Role

ROLES: Final[dict[str, Role]] = {**SPEAKERS, "developer": "system", "function": "tool", "ipython": "tool"}


def published_turn(item: object, field: str, origin: Origin) -> Message:
    """A turn of a published set: `{"from", "value"}` or `{"role", "content"}`; an empty one is left to the caller."""
    if not isinstance(item, dict) or "from" in item or "role" not in item:
        return sharegpt_turn(item, field, origin)
    role = text(item, "role", origin, f"{field}.")
    if role not in ROLES:
        raise fault(f"found '{role[:40]}', expected one of {', '.join(ROLES)}", origin, f"{field}.role")
    calls = own_tool_calls(item, field, origin)
    content = optional_text(item, "content", origin) if calls else text(item, "content", origin, f"{field}.")
    message: Message = {"role": ROLES[role], "content": content}
    if calls:
        message["tool_calls"] = calls
    return message


def turns_of(row: Row, field: str, origin: Origin) -> list[Message]:
    """The turns in a field, after the row's `system` text if it has one."""
    items = filled_list(row, field, origin)
    turns = [published_turn(item, f"{field}[{i}]", origin) for i, item in enumerate(items)]
    system = optional_text(row, "system", origin)
    if system.strip():
        turns.insert(0, {"role": "system", "content": system})
    return turns


def field_of(row: Row) -> str:
    """The field that holds the turns."""
    return next((name for name in ("messages", "conversations") if name in row), "conversation")


def _first(row: Row, field: str) -> Row:
    items = row.get(field)
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


def _has_roles(row: Row) -> bool:
    if not {"chosen", "rejected", "kto_tag", "label"}.isdisjoint(row):
        return False
    return any("role" in _first(row, field) for field in ("conversations", "conversation"))


def _parse_roles(row: Row, origin: Origin) -> list[Record]:
    return [published_conversation(turns_of(row, field_of(row), origin), origin, tools_of(row, origin))]


def _parse_rounds(row: Row, origin: Origin) -> list[Record]:
    turns: list[Message] = []
    for i, item in enumerate(filled_list(row, "conversation", origin)):
        field = f"conversation[{i}]"
        if not isinstance(item, dict):
            raise wrong_type(item, "an object with 'human' and 'assistant'", origin, field)
        turns += [
            user(text(item, "human", origin, f"{field}.")),
            assistant(text(item, "assistant", origin, f"{field}.")),
        ]
    return [published_conversation(turns, origin)]


FORMAT = Format(
    "conversation-roles",
    '{"conversation(s)": [{"role": "user", "content": "..."}, ...]}',
    "conversation",
    _has_roles,
    _parse_roles,
    "Messages with roles under ShareGPT's key `conversations`, or under `conversation` as in LMSYS-Chat.",
    {"conversation": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello."}]},
)
ROUNDS = Format(
    "conversation-rounds",
    '{"conversation": [{"human": "...", "assistant": "..."}, ...]}',
    "conversation",
    lambda row: "human" in _first(row, "conversation"),
    _parse_rounds,
    "One object for each question and its answer, as Firefly publishes MOSS's conversations.",
    {"conversation_id": 1, "conversation": [{"human": "Hello!", "assistant": "Hello."}]},
)
