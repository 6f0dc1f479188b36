"""What a chat template has no place for is told as text, so that nothing of a conversation is lost silently.

| in the message | as text |
|---|---|
| tools on offer | at the end of the system text, a JSON schema a line between `<tools>` and `</tools>` |
| a call | after the assistant's text, as JSON between `<tool_call>` and `</tool_call>` |
| a result | a user turn, between `<tool_response>` and `</tool_response>` |
| thoughts | before the assistant's text, between `<think>` and `</think>` |
| a system text | in front of the next user turn |

These are the marks of Hermes and Qwen, so other tools can read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from danlu.types import Message

Tools = Sequence[Mapping[str, Any]]
_TAGGED = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a template renders by itself.

    Attributes:
        system, late_system: a system text at the beginning, and one further on.
        tools, calls, results, thoughts: tools on offer, `tool_calls`, tool turns, `reasoning_content`.
        kept_thoughts, kept_tags: thoughts of earlier turns, too; thoughts that stand in `<think>` tags in their texts.
        text_beside_calls: the text of a turn that also calls tools.
        several_calls: more than one call in a turn.
        text_arguments: a call's arguments must be JSON text, not an object.
        call_ids: calls and results must have ids.
    """

    system: bool = True
    late_system: bool = True
    tools: bool = False
    calls: bool = False
    results: bool = False
    thoughts: bool = False
    kept_thoughts: bool = False
    kept_tags: bool = True
    text_beside_calls: bool = False
    several_calls: bool = False
    text_arguments: bool = False
    call_ids: bool = False


@dataclass(slots=True)
class Shown:
    """A message as a template gets it.

    Attributes:
        fields: what Jinja sees.
        index: the message that it began as.
        train: whether it carries loss.
        made: a user turn that was made of something else.
    """

    fields: dict[str, Any]
    index: int
    train: bool = True
    made: bool = False

    @property
    def role(self) -> str:
        """Who speaks, as the template sees it."""
        return str(self.fields["role"])


def shown_messages(messages: Sequence[Message], tools: Tools, can: Abilities) -> tuple[list[Shown], Tools]:
    """The messages as a template with these abilities gets them, and the tools that are left to be rendered by it."""
    shown: list[Shown] = []
    calls = 0
    offered = bool(tools) and not can.tools
    if offered and (not messages or messages[0]["role"] != "system"):
        shown += _system(tools_text(tools), 0, can.system)
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system":
            text = message["content"]
            if offered and index == 0:
                text = "\n\n".join(part for part in (text, tools_text(tools)) if part)
            shown += _system(text, index, can.system if not shown else can.late_system)
        elif role == "tool" and not can.results:
            shown.append(Shown({"role": "user", "content": _result_text(message)}, index, made=True))
        else:
            fields: dict[str, Any] = {"role": role, "content": message["content"]}
            if role == "assistant":
                _add_thoughts_and_calls(fields, message, can, calls)
            elif role == "tool":
                _add_result_fields(fields, message, can, messages, index)
            shown.append(Shown(fields, index, message.get("train", True)))
        calls += len(message.get("tool_calls", ()))
    return _joined(shown), () if offered else tools


def tools_text(tools: Tools) -> str:
    """Tools on offer, as text for the system turn."""
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You may use these tools. Each line describes one.\n<tools>\n{schemas}\n</tools>\n\n"
        'To use a tool, write\n<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>\n'
        "and wait: its result follows between <tool_response> and </tool_response>."
    )


def parsed_arguments(arguments: Mapping[str, Any] | str) -> Mapping[str, Any] | str:
    """A call's arguments as an object where they are one, else the text that they are."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def untagged(message: Message) -> tuple[str, str]:
    """An assistant's thoughts as the message has them, and its text as it is."""
    return message.get("reasoning_content", ""), message["content"]


def thoughts_of(message: Message) -> tuple[str, str]:
    """An assistant's thoughts and text; thoughts may stand in front of the text between `<think>` and `</think>`."""
    tagged = _TAGGED.match(message["content"])
    if tagged is None or message.get("reasoning_content"):
        return untagged(message)
    return tagged.group(1).strip("\n"), message["content"][tagged.end() :]


def _system(text: str, index: int, native: bool) -> list[Shown]:
    """A system turn; where there is none, a user turn that `_joined` puts in front of the next one."""
    return [Shown({"role": "system" if native else "user", "content": text}, index, made=not native)]


def _call_text(call: Mapping[str, Any]) -> str:
    function = call["function"]
    body = {"name": function["name"], "arguments": parsed_arguments(function["arguments"])}
    return f"<tool_call>\n{json.dumps(body, ensure_ascii=False)}\n</tool_call>"


def _result_text(message: Message) -> str:
    return f"<tool_response>\n{message['content']}\n</tool_response>"


def _add_thoughts_and_calls(fields: dict[str, Any], message: Message, can: Abilities, calls: int) -> None:
    thoughts, fields["content"] = thoughts_of(message) if can.thoughts else untagged(message)
    made = message.get("tool_calls", [])
    if thoughts and can.thoughts:
        fields["reasoning_content"] = thoughts
    elif thoughts:
        fields["content"] = f"<think>\n{thoughts}\n</think>\n\n{fields['content']}"
    native = can.calls and (can.text_beside_calls or not fields["content"]) and (can.several_calls or len(made) < 2)
    if made and native:
        fields["tool_calls"] = [_call_fields(call, can, calls + n) for n, call in enumerate(made)]
    elif made:
        parts = [fields["content"], *(_call_text(call) for call in made)]
        fields["content"] = "\n".join(part for part in parts if part)


def _call_fields(call: Mapping[str, Any], can: Abilities, number: int) -> dict[str, Any]:
    arguments = parsed_arguments(call["function"]["arguments"])
    if can.text_arguments and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    fields = {**call, "type": "function", "function": {**call["function"], "arguments": arguments}}
    if can.call_ids:
        fields["id"] = _call_id(number)
    return fields


def _add_result_fields(
    fields: dict[str, Any], message: Message, can: Abilities, messages: Sequence[Message], index: int
) -> None:
    if "name" in message:
        fields["name"] = message["name"]
    if can.call_ids:
        fields["tool_call_id"] = _call_id(_answered_call(messages, index))
    elif "tool_call_id" in message:
        fields["tool_call_id"] = message["tool_call_id"]


def _call_id(number: int) -> str:
    return f"call{number:05d}"  # nine letters and digits: the strictest templates ask for exactly that


def _answered_call(messages: Sequence[Message], index: int) -> int:
    """Which call of the conversation a result answers: by its id, else the calls of a turn in their order."""
    wanted = messages[index].get("tool_call_id")
    ids = [call.get("id") for m in messages[:index] for call in m.get("tool_calls", ())]
    if wanted is not None and wanted in ids:
        return len(ids) - 1 - ids[::-1].index(wanted)
    caller = max((i for i in range(index) if messages[i].get("tool_calls")), default=-1)
    before = sum(len(m.get("tool_calls", ())) for m in messages[: max(caller, 0)])
    return before + sum(m["role"] == "tool" for m in messages[caller + 1 : index])


def _joined(shown: Sequence[Shown]) -> list[Shown]:
    """User turns made of something else join the user turns beside them: many templates want the roles to alternate."""
    kept: list[Shown] = []
    for turn in shown:
        last = kept[-1] if kept else None
        if last is not None and last.role == turn.role == "user" and (last.made or turn.made):
            text = "\n\n".join(part for part in (last.fields["content"], turn.fields["content"]) if part)
            kept[-1] = Shown({"role": "user", "content": text}, last.index, made=True)
        else:
            kept.append(turn)
    return kept
