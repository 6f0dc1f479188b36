"""OpenAI's messages in the older form, where one `function_call` stands for a list of tool calls."""

from __future__ import annotations

from typing import Any

from danlu.data.formats.base import Format, Row
from danlu.data.formats.danlu import MESSAGES
from danlu.data.formats.fields import wrong_type
from danlu.types import Origin, Record


def _is_old(item: Any) -> bool:
    return isinstance(item, dict) and (bool(item.get("function_call")) or item.get("role") == "function")


def _matches(row: Row) -> bool:
    messages = row.get("messages")
    if not isinstance(messages, list) or not {"label", "kto_tag", "chosen", "rejected"}.isdisjoint(row):
        return False
    return "functions" in row or any(map(_is_old, messages))


def _modern(item: Any, field: str, origin: Origin) -> Any:
    if not _is_old(item):
        return item
    if item.get("role") == "function":
        return {**item, "role": "tool"}
    call = item["function_call"]
    if not isinstance(call, dict):
        raise wrong_type(call, "an object with 'name' and 'arguments'", origin, f"{field}.function_call")
    rest = {key: value for key, value in item.items() if key != "function_call"}
    return {**rest, "tool_calls": [{"type": "function", "function": call}]}


def _parse(row: Row, origin: Origin) -> list[Record]:
    messages = row.get("messages")
    modern = dict(row)
    if isinstance(messages, list):
        modern["messages"] = [_modern(item, f"messages[{i}]", origin) for i, item in enumerate(messages)]
    functions = modern.pop("functions", None)
    if functions is not None and not row.get("tools"):
        if not isinstance(functions, list):
            raise wrong_type(functions, "a list of functions", origin, "functions")
        modern["tools"] = [{"type": "function", "function": function} for function in functions]
    return MESSAGES.parse(modern, origin)


FORMAT = Format(
    "messages-functions",
    '{"messages": [{"role": "assistant", "function_call": {...}}, {"role": "function", ...}], "functions": [...]}',
    "conversation",
    _matches,
    _parse,
    "OpenAI's messages with the older `function_call`, `function` turns and `functions`, which become tool calls, tool turns "
    "and tools.",
    {
        "messages": [
            {"role": "user", "content": "What is 6 times 7?"},
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "multiply", "arguments": '{"a": 6, "b": 7}'},
            },
            {"role": "function", "name": "multiply", "content": "42"},
            {"role": "assistant", "content": "It is 42."},
        ],
        "functions": [{"name": "multiply", "parameters": {}}],
    },
)
