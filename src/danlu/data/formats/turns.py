"""Messages: checking danlu's own strictly, cleaning published ones by counted rules, making records of both.

danlu's own files are written by tools and people who can fix them, so every fault is an error. Published files are used
unchanged and have known noise: such rows are dropped and the reason is counted; their missing fields are still errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, cast, get_args

from danlu.data.formats.base import Row, RowDropped
from danlu.data.formats.fields import fault, filled_list, present, text, type_name, wrong_type
from danlu.types import Conversation, Message, Origin, Role, ToolCall

_ROLES: Final[tuple[str, ...]] = get_args(Role)


def user(content: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant turn."""
    return {"role": "assistant", "content": content}


def before_answer(messages: list[Message]) -> list[Message]:
    """The messages before the last assistant turn; answers that follow each other without a question count as one."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def own_messages(row: Row, field: str, origin: Origin) -> list[Message]:
    """A list of danlu's own messages, each checked; keys that `Message` does not have are left out."""
    return [_own_message(item, f"{field}[{i}]", origin) for i, item in enumerate(filled_list(row, field, origin))]


def own_answer(row: Row, field: str, origin: Origin) -> list[Message]:
    """Own messages that end with an assistant turn."""
    messages = own_messages(row, field, origin)
    if messages[-1]["role"] != "assistant":
        raise fault(
            f"the last message is from '{messages[-1]['role']}', expected 'assistant'",
            origin,
            field,
            "Add the answer, or remove the messages after the last answer.",
        )
    return messages


def own_prompt(row: Row, field: str, origin: Origin) -> list[Message]:
    """Own messages that wait for an answer: at least one user or tool turn, and the last is not the assistant's."""
    messages = own_messages(row, field, origin)
    if messages[-1]["role"] == "assistant":
        raise fault("the prompt ends with an assistant turn", origin, field, "Move that turn into the answer.")
    if all(message["role"] == "system" for message in messages):
        raise fault("the prompt holds system messages only", origin, field, "Add the user's question.")
    return messages


def _own_message(item: Any, field: str, origin: Origin) -> Message:
    if not isinstance(item, dict):
        raise wrong_type(item, "an object with 'role' and 'content'", origin, field)
    role = present(item, "role", origin, f"{field}.")
    role = "system" if role == "developer" else role
    if role not in _ROLES:
        found = f"'{role[:40]}'" if isinstance(role, str) else type_name(role)
        raise fault(f"found {found}, expected one of {', '.join(_ROLES)}", origin, f"{field}.role")
    if item.get("function_call"):
        hint = 'Write it as "tool_calls": [{"type": "function", "function": {"name", "arguments"}}].'
        raise fault("found OpenAI's old form of a tool call", origin, f"{field}.function_call", hint)
    calls = own_tool_calls(item, field, origin)
    # OpenAI writes null, or nothing, where there are only calls.
    content = item.get("content") or "" if calls else present(item, "content", origin, f"{field}.")
    if not isinstance(content, str):
        raise wrong_type(content, "text", origin, f"{field}.content")
    message: Message = {"role": cast(Role, role), "content": content}
    if calls:
        message["tool_calls"] = calls
    if is_blank(message):
        raise fault("the message is empty", origin, f"{field}.content", "Fill it in, or remove it.", code="empty-turn")
    _add_extras(message, item, field, origin)
    return message


def _add_extras(message: Message, item: Row, field: str, origin: Origin) -> None:
    """`train`, the thoughts, and what a tool's turn says about its call, each checked."""
    role = message["role"]
    if "train" in item:
        if not isinstance(item["train"], bool):
            raise wrong_type(item["train"], "true or false", origin, f"{field}.train")
        if role != "assistant":
            raise fault("only assistant turns can be trained on", origin, f"{field}.train", "Remove the key.")
        message["train"] = item["train"]
    elif role == "assistant" and item.get("weight") is not None:
        # OpenAI's fine-tuning files: weight 0 masks a turn.
        if item["weight"] not in (0, 1):
            raise fault("found another weight than 0 and 1", origin, f"{field}.weight", "Use 0, 1 or no weight.")
        if not item["weight"]:
            message["train"] = False
    if item.get("reasoning_content") is not None:
        thoughts = text(item, "reasoning_content", origin, f"{field}.")
        if role != "assistant":
            raise fault("only assistant turns have thoughts", origin, f"{field}.reasoning_content", "Remove the key.")
        if thoughts.strip():
            message["reasoning_content"] = thoughts
    if role == "tool":
        if item.get("tool_call_id") is not None:
            message["tool_call_id"] = text(item, "tool_call_id", origin, f"{field}.")
        if item.get("name") is not None:
            message["name"] = text(item, "name", origin, f"{field}.")


def own_tool_calls(item: Row, field: str, origin: Origin) -> list[ToolCall]:
    """The checked `tool_calls` of a message; none if absent or null."""
    calls = item.get("tool_calls")
    if calls is None or calls == []:
        return []
    if not isinstance(calls, list):
        raise wrong_type(calls, "a list of calls", origin, f"{field}.tool_calls")
    if item.get("role") != "assistant":
        raise fault("only assistant turns call tools", origin, f"{field}.tool_calls", "Remove the key.")
    found: list[ToolCall] = []
    for i, call in enumerate(calls):
        inside = f"{field}.tool_calls[{i}]"
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            raise wrong_type(call, 'an object like {"type": "function", "function": {...}}', origin, inside)
        if call.get("type", "function") != "function":
            raise fault("only calls of functions are known", origin, f"{inside}.type")
        name = text(call["function"], "name", origin, f"{inside}.function.")
        arguments = call["function"].get("arguments")
        if arguments is not None and not isinstance(arguments, (str, dict)):
            raise wrong_type(arguments, "an object, or its JSON as text", origin, f"{inside}.function.arguments")
        known = None if call.get("id") is None else text(call, "id", origin, f"{inside}.")
        found.append(tool_call(name, {} if arguments is None else arguments, known))
    return found


def tool_call(name: str, arguments: str | dict[str, Any], id: str | None = None) -> ToolCall:
    """A call of a tool; arguments given as JSON text become the object, other text stays text."""
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(arguments) if arguments.strip() else {}
            arguments = value if isinstance(value, dict) else arguments
    call: ToolCall = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if id is not None:
        call["id"] = id
    return call


def tools_of(row: Row, origin: Origin, field: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """The tools a conversation may call: a list of objects with a name, or its JSON as text; none if absent or null."""
    tools = row.get(field)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise fault("found text that is no JSON, expected a list of tools", origin, field) from error
    if tools is None or tools in ("", []):
        return ()
    if not isinstance(tools, list):
        raise wrong_type(tools, "a list of tools", origin, field)
    for i, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise wrong_type(tool, "an object with the name of a function", origin, f"{field}[{i}]")
    return tuple(tools)


def published_turns(turns: list[Message]) -> list[Message]:
    """Turns of a published data set with doubled user or assistant turns merged (joined by a blank line).

    Raises `RowDropped` if they start with the assistant: what it answered is lost.
    """
    merged: list[Message] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if last is not None and last["role"] == turn["role"] and turn["role"] in ("user", "assistant"):
            merged[-1] = _joined(last, turn)
        else:
            merged.append(turn)
    spoken = [turn["role"] for turn in merged if turn["role"] != "system"]
    if spoken and spoken[0] == "assistant":
        raise RowDropped("starts with an assistant turn")
    return merged


def _joined(first: Message, second: Message) -> Message:
    joined: Message = {**first, **second}
    for key in ("content", "reasoning_content"):
        if key in first or key in second:
            parts = (first.get(key, ""), second.get(key, ""))
            joined[key] = "\n\n".join(part for part in parts if part.strip())
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    if calls:
        joined["tool_calls"] = calls
    return joined


def is_blank(message: Message) -> bool:
    """Whether a turn says and calls nothing; a tool may well return nothing."""
    return message["role"] != "tool" and not message["content"].strip() and not message.get("tool_calls")


def published_question(messages: list[Message]) -> list[Message]:
    """Check the turns before an answer; `RowDropped` if there is no question or a turn is empty."""
    if all(message["role"] == "system" for message in messages):
        raise RowDropped("no question before the answer")
    if any(map(is_blank, messages)):
        raise RowDropped("empty question" if len(messages) == 1 else "empty turn")
    return messages


def published_conversation(
    turns: list[Message], origin: Origin, tools: Sequence[Mapping[str, Any]] = ()
) -> Conversation:
    """Turns of a published data set as a conversation; an empty last answer is left to `kinds.as_kind`."""
    messages = published_turns(turns)
    if not messages or messages[-1]["role"] != "assistant":
        raise RowDropped("does not end with an assistant turn")
    published_question(messages[:-1])
    return Conversation(messages, origin, tuple(tools))


def history_turns(row: Row, origin: Origin) -> list[Message]:
    """Earlier rounds from `history: [[question, answer], ...]`; absent or null is none."""
    history = row.get("history")
    if history is None:
        return []
    if not isinstance(history, list):
        raise wrong_type(history, "a list of [question, answer] pairs", origin, "history")
    turns: list[Message] = []
    for i, pair in enumerate(history):
        field = f"history[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise wrong_type(pair, "a pair [question, answer]", origin, field)
        for part in pair:
            if not isinstance(part, str):
                raise wrong_type(part, "text", origin, field)
        turns += [user(pair[0]), assistant(pair[1])]
    return turns
