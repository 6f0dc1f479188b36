"""MOSS: rounds of a question, inner thoughts, commands to tools, their results, and the answer.

A round becomes a user turn, then (if tools ran) an assistant turn that calls and a tool turn for each result, then the
answer. The marks around the parts (`<|Human|>: ... <eoh>`) come off; the marks inside answers (`<sup><|1|></sup>`, which
cite results) stay. What the tools returned decides: a command without results did not run and is left out.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.fields import optional_text, text, wrong_type
from danlu.data.formats.turns import assistant, published_conversation, published_question, tool_call, user
from danlu.types import Message, Origin, Prompt, Record, ToolCall

PARTS: Final = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")

_TURN: Final = re.compile(r"turn_(\d+)")
_START: Final = re.compile(r"\s*<\|(?:Human|Inner Thoughts|Commands|Results|MOSS)\|>:?")
_ENDS: Final = re.compile(r"(?:\s*<eo[a-z]>)+\s*\Z")
_SPEAKER: Final = re.compile(r"\[(Human|MOSS)\]:|<\|(Human|Inner Thoughts|Commands|Results|MOSS)\|>:")
_NONE: Final = re.compile(r"None\b\.?")
_NAME: Final = re.compile(r"([A-Za-z_]\w*)\(")
_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_API: Final = re.compile(r"\bAPI:\s*([A-Za-z_]\w*)\((\w+)\)")
# The names of MOSS's own tools, for rows whose meta instruction does not say them.
_PARAMETERS: Final = {"Search": "query", "Calculate": "expression", "Solve": "equation", "Text2Image": "description"}


class Call(NamedTuple):
    """A command: its name, and its arguments as they stand between the brackets."""

    name: str
    arguments: str


def _bare(value: str) -> str:
    """A part without its marks; "" for None."""
    inner = _ENDS.sub("", _START.sub("", value, count=1)).strip()
    return "" if _NONE.fullmatch(inner) else inner


def split_commands(commands: str) -> list[Call] | None:
    """The calls in a line of commands such as `Search("a"), Calculate("1+1")`; None if something else stands there."""
    calls: list[Call] = []
    at = 0
    while at < len(commands):
        if commands[at] in ", \t\n":
            at += 1
        elif none := _NONE.match(commands, at):
            at = none.end()
        elif (name := _NAME.match(commands, at)) and (end := _closing(commands, name.end())) is not None:
            calls.append(Call(name.group(1), commands[name.end() : end]))
            at = end + 1
        else:
            return None
    return calls


def _closing(commands: str, at: int) -> int | None:
    """Where the bracket that opened before `at` closes; brackets inside double quotes do not count."""
    depth = 1
    while at < len(commands):
        if quoted := _QUOTED.match(commands, at):
            at = quoted.end()
            continue
        depth += (commands[at] == "(") - (commands[at] == ")")
        if depth == 0:
            return at
        at += 1
    return None


def split_results(results: str, calls: list[Call]) -> list[str] | None:
    """The results of each call, with their heads (`Search("a") =>`); None if the heads are not those of the calls."""
    starts: list[int] = []
    at = 0
    for call in calls:
        head = f"{call.name}({call.arguments}) =>"
        found = results.find(head, at)
        if found < 0 or (found > 0 and results[found - 1] != "\n"):
            return None
        starts.append(found)
        at = found + len(head)
    if not starts or starts[0] != 0:
        return None
    return [results[start:end].strip() for start, end in zip(starts, [*starts[1:], len(results)], strict=True)]


def _tool_call(call: Call, parameters: dict[str, str]) -> ToolCall:
    quoted = _QUOTED.fullmatch(call.arguments.strip())
    # Anything but one quoted text has no parameter that it could be the value of.
    return tool_call(call.name, {parameters.get(call.name, "input"): quoted.group(1)} if quoted else call.arguments)


def round_messages(parts: dict[str, str], parameters: dict[str, str]) -> list[Message]:
    """The messages of one round; `RowDropped` if its tools returned something that no readable command asked for."""
    said = {name: _bare(parts.get(name, "")) for name in PARTS}
    thoughts, results = said["Inner Thoughts"], said["Tool Responses"]
    messages = [user(said["Human"])]
    if results:
        calls = split_commands(said["Commands"])
        if not calls:
            raise RowDropped("results of a command that is no call")
        asking: Message = {"role": "assistant", "content": "", "tool_calls": [_tool_call(c, parameters) for c in calls]}
        messages.append(asking)
        pieces = split_results(results, calls)
        if pieces is None:
            messages.append(_result(results, calls[0].name if len(calls) == 1 else ""))
        else:
            messages += [_result(piece, call.name) for piece, call in zip(pieces, calls, strict=True)]
    if "MOSS" in parts:
        messages.append(assistant(said["MOSS"]))
    if thoughts and len(messages) > 1:
        messages[1]["reasoning_content"] = thoughts
    return messages


def _result(content: str, name: str) -> Message:
    message: Message = {"role": "tool", "content": content}
    if name:
        message["name"] = name
    return message


def _conversation(rounds: list[dict[str, str]], meta: str, origin: Origin) -> list[Record]:
    parameters = {**_PARAMETERS, **dict(_API.findall(meta))}
    turns: list[Message] = [{"role": "system", "content": meta.strip()}] if meta.strip() else []
    for parts in rounds:
        turns += round_messages(parts, parameters)
    return [published_conversation(turns, origin)]


def _parse(row: Row, origin: Origin) -> list[Record]:
    chat = row.get("chat")
    if not isinstance(chat, dict):
        raise wrong_type(chat, "an object with 'turn_1', 'turn_2', ...", origin, "chat")
    # turn_10 comes after turn_9, and the keys need not be in order.
    numbered = sorted((int(found.group(1)), key) for key in chat if (found := _TURN.fullmatch(key)))
    rounds: list[dict[str, str]] = []
    for _, key in numbered:
        field = f"chat.{key}"
        if not isinstance(chat[key], dict):
            raise wrong_type(chat[key], "an object with 'Human' and 'MOSS'", origin, field)
        for name in ("Human", "MOSS"):
            text(chat[key], name, origin, f"{field}.")
        for name in PARTS:
            if not isinstance(chat[key].get(name, ""), str):
                raise wrong_type(chat[key][name], "text", origin, f"{field}.{name}")
        rounds.append(chat[key])
    if not rounds:
        raise RowDropped("no turns")
    return _conversation(rounds, optional_text(row, "meta_instruction", origin), origin)


def _parse_plain(row: Row, origin: Origin) -> list[Record]:
    pieces = _SPEAKER.split(text(row, "plain_text", origin))
    rounds: list[dict[str, str]] = []
    for old, new, content in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        name = {"Results": "Tool Responses"}.get(old or new, old or new)
        if name == "Human" or not rounds:
            rounds.append({})
        if name in rounds[-1]:
            raise RowDropped(f"two parts named {name} in one turn")
        rounds[-1][name] = content
    if not rounds or "Human" not in rounds[0]:
        raise RowDropped("starts with an assistant turn" if rounds else "no turns")
    return _conversation(rounds, optional_text(row, "meta_instruction", origin) or pieces[0], origin)


def _parse_prompt(row: Row, origin: Origin) -> list[Record]:
    return [Prompt(published_question([user(text(row, "user_prompt", origin))]), origin=origin)]


def _has_turns(row: Row) -> bool:
    return "chat" in row and ("meta_instruction" in row or "num_turns" in row)


FORMAT = Format(
    "moss",
    '{"meta_instruction", "chat": {"turn_1": {"Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS"}, ...}}',
    "conversation",
    _has_turns,
    _parse,
    "MOSS's conversations with and without plugins. The meta instruction is the system text; inner thoughts, commands and "
    "results become `reasoning_content`, `tool_calls` and tool turns. A command without results is left out.",
    {
        "conversation_id": 1,
        "meta_instruction": "You are MOSS.\n- Calculator: enabled. API: Calculate(expression)\n",
        "num_turns": 1,
        "chat": {
            "turn_1": {
                "Human": "<|Human|>: What is 6 times 7?<eoh>\n",
                "Inner Thoughts": "<|Inner Thoughts|>: I had better calculate it.<eot>\n",
                "Commands": '<|Commands|>: Calculate("6*7")<eoc>\n',
                "Tool Responses": '<|Results|>:\nCalculate("6*7") => 42\n<eor>\n',
                "MOSS": "<|MOSS|>: It is 42.<eom>\n",
            }
        },
    },
)
PLAIN = Format(
    "moss-plain",
    '{"plain_text": "[Human]: ...<eoh> [MOSS]: ...<eoa>"}',
    "conversation",
    lambda row: "plain_text" in row,
    _parse_plain,
    "MOSS's older form, a whole conversation as one text, with the speakers in square brackets or in the newer marks.",
    {"conversation_id": "1", "num_turns": 1, "plain_text": "[Human]: Hello!<eoh> [MOSS]: Hello.<eoa>"},
)
PROMPT = Format(
    "moss-prompt",
    '{"user_prompt"}',
    "prompt",
    lambda row: "user_prompt" in row,
    _parse_prompt,
    "The questions that users asked MOSS, without answers.",
    {"user_prompt": "How do I learn to swim?"},
)
