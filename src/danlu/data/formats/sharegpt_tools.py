"""ShareGPT's shape with tools, as LLaMA-Factory has it: calls are turns of their own, tools a JSON text."""

from __future__ import annotations

import json
from typing import Any, Final

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import fault, filled_list, optional_text, wrong_type
from danlu.data.formats.sharegpt import turn_of as sharegpt_turn
from danlu.data.formats.turns import published_conversation, tool_call, tools_of
from danlu.types import Message, Origin, Record, ToolCall

_SPEAKS_TO_TOOLS: Final = ("function_call", "observation", "tool")
_OTHERS: Final = frozenset({"chosen", "rejected", "kto_tag", "label"})


def _speaker(item: object) -> Any:
    return item.get("from") if isinstance(item, dict) else None


def _matches(row: Row) -> bool:
    items = row.get("conversations")
    if not isinstance(items, list) or not _OTHERS.isdisjoint(row):
        return False
    return "tools" in row or any(_speaker(item) in _SPEAKS_TO_TOOLS for item in items)


def calls_in(content: str, field: str, origin: Origin) -> list[ToolCall]:
    """The calls that a `function_call` turn writes as JSON: one object with name and arguments, or a list of these."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise fault("found text that is no JSON, expected a call", origin, field, code="bad-tool-call") from error
    calls: list[ToolCall] = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise wrong_type(item, "an object with 'name' and 'arguments'", origin, field)
        arguments = item.get("arguments", {})
        if not isinstance(arguments, (dict, str)):
            raise wrong_type(arguments, "an object, or its JSON as text", origin, field)
        calls.append(tool_call(item["name"], arguments))
    return calls


def tool_turns(row: Row, field: str, origin: Origin) -> list[Message]:
    """The turns in a field, with structured calls; a result gets the name of the one call before it."""
    turns: list[Message] = []
    calls: list[ToolCall] = []
    for i, item in enumerate(filled_list(row, field, origin)):
        message = sharegpt_turn(item, f"{field}[{i}]", origin)
        if _speaker(item) == "function_call":
            calls = calls_in(message["content"], f"{field}[{i}].value", origin)
            message = {"role": "assistant", "content": "", "tool_calls": calls}
        elif message["role"] == "tool" and len(calls) == 1:
            message["name"] = calls[0]["function"]["name"]
        turns.append(message)
    system = optional_text(row, "system", origin)
    if system.strip():
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _parse(row: Row, origin: Origin) -> list[Record]:
    return [published_conversation(tool_turns(row, "conversations", origin), origin, tools_of(row, origin))]


FORMAT = Format(
    "sharegpt-tools",
    '{"conversations": [{"from": "function_call", "value": "{...}"}, ...], "tools": "[...]"}',
    "conversation",
    _matches,
    _parse,
    "ShareGPT's shape with tools, as in LLaMA-Factory's Glaive demos: `function_call` turns hold the call as JSON, "
    "`observation` turns its result, `tools` the JSON of the tools' schemas.",
    {
        "conversations": [
            {"from": "human", "value": "What is 6 times 7?"},
            {"from": "function_call", "value": '{"name": "multiply", "arguments": {"a": 6, "b": 7}}'},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "It is 42."},
        ],
        "tools": '[{"name": "multiply", "description": "Multiplies two numbers.", "parameters": {}}]',
    },
)
