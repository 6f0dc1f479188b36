"""Messages: checking danlu's own strictly, cleaning published ones by counted rules, making records of both.

danlu's own files are written by tools and people who can fix them, so every fault is an error. Published files are used
unchanged and have known noise: such rows are dropped and the reason is counted; their missing fields are still errors.
"""

from __future__ import annotations

from typing import Any, Final, cast, get_args

from danlu.data.formats.base import Row, RowDropped
from danlu.data.formats.fields import fault, filled_list, present, type_name, wrong_type
from danlu.types import Comparison, Conversation, Message, Origin, Prompt, Record, RecordKind, Role

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
    """A list of danlu's own messages, each checked; keys other than role, content and train are left out."""
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
    role, content = (present(item, key, origin, f"{field}.") for key in ("role", "content"))
    if role not in _ROLES:
        found = f"'{role[:40]}'" if isinstance(role, str) else type_name(role)
        raise fault(f"found {found}, expected one of {', '.join(_ROLES)}", origin, f"{field}.role")
    if not isinstance(content, str):
        raise wrong_type(content, "text", origin, f"{field}.content")
    # A tool may well return nothing; nobody else says nothing.
    if not content.strip() and role != "tool":
        raise fault("the message is empty", origin, f"{field}.content", "Fill it in, or remove it.")
    for key in ("tool_calls", "function_call"):
        if item.get(key):
            raise fault("structured tool calls are not part of this format", origin, f"{field}.{key}")
    message: Message = {"role": cast(Role, role), "content": content}
    if "train" in item:
        if not isinstance(item["train"], bool):
            raise wrong_type(item["train"], "true or false", origin, f"{field}.train")
        if role != "assistant":
            raise fault("only assistant turns can be trained on", origin, f"{field}.train", "Remove the key.")
        message["train"] = item["train"]
    return message


def published_turns(turns: list[Message]) -> list[Message]:
    """Turns of a published data set with doubled user or assistant turns merged (joined by a blank line).

    Raises `RowDropped` if they start with the assistant: what it answered is lost.
    """
    merged: list[Message] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if last is not None and last["role"] == turn["role"] and turn["role"] in ("user", "assistant"):
            joined = "\n\n".join(part for part in (last["content"], turn["content"]) if part.strip())
            merged[-1] = {"role": turn["role"], "content": joined}
        else:
            merged.append(turn)
    spoken = [turn["role"] for turn in merged if turn["role"] != "system"]
    if spoken and spoken[0] == "assistant":
        raise RowDropped("starts with an assistant turn")
    return merged


def _is_blank(message: Message) -> bool:
    return message["role"] != "tool" and not message["content"].strip()


def published_question(messages: list[Message]) -> list[Message]:
    """Check the turns before an answer; `RowDropped` if there is no question or a turn is empty."""
    if all(message["role"] == "system" for message in messages):
        raise RowDropped("no question before the answer")
    if any(map(_is_blank, messages)):
        raise RowDropped("empty question" if len(messages) == 1 else "empty turn")
    return messages


def published_records(turns: list[Message], kind: RecordKind, origin: Origin) -> list[Record]:
    """A published conversation as a `Conversation` or a `Prompt`."""
    messages = published_turns(turns)
    if not messages or messages[-1]["role"] != "assistant":
        raise RowDropped("does not end with an assistant turn")
    published_question(messages[:-1])
    if kind == "conversation" and _is_blank(messages[-1]):
        raise RowDropped("empty answer")
    return conversation_records(messages, kind, origin)


def conversation_records(messages: list[Message], kind: RecordKind, origin: Origin) -> list[Record]:
    """A checked conversation as a `Conversation` or, without its last answer, as a `Prompt`."""
    if kind == "conversation":
        return [Conversation(messages, origin)]
    question = before_answer(messages)
    if all(message["role"] == "system" for message in question):
        raise RowDropped("no question before the answer")
    return [Prompt(question, origin=origin)]


def comparison_records(
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    kind: RecordKind,
    origin: Origin,
    margin: float = 0.0,
) -> list[Record]:
    """A pair as a `Comparison`, as a `Conversation` (prompt and chosen) or as a `Prompt`.

    Only what the kind uses is judged: a pair with equal answers still has a good prompt.
    """
    if kind == "prompt":
        return [Prompt(prompt, origin=origin)]
    if any(map(_is_blank, chosen)):
        raise RowDropped("empty answer")
    if kind == "conversation":
        return [Conversation([*prompt, *chosen], origin)]
    if any(map(_is_blank, rejected)):
        raise RowDropped("empty answer")
    if chosen == rejected:
        raise RowDropped("chosen equals rejected")
    return [Comparison(prompt, chosen, rejected, margin, origin)]


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
