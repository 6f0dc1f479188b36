"""What a record says, whatever its kind: its messages with their place, its texts, its question, its answers, its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from danlu.data.kinds import kind_of
from danlu.types import Comparison, Conversation, Document, Message, Prompt, Ranking, Record, Unpaired

_EXTRAS = ("train", "reasoning_content", "tool_calls", "tool_call_id", "name")


def parts(record: Record) -> list[tuple[str, list[Message]]]:
    """The record's lists of messages, each with its field in danlu's own rows; none for a document."""
    match record:
        case Conversation():
            return [("messages", record.messages)]
        case Comparison():
            return [("prompt", record.prompt), ("chosen", record.chosen), ("rejected", record.rejected)]
        case Ranking():
            answers = [(f"responses[{i}]", response) for i, response in enumerate(record.responses)]
            return [("prompt", record.prompt), *answers]
        case Unpaired():
            return [("prompt", record.prompt), ("completion", record.completion)]
        case Prompt():
            return [("prompt", record.prompt)]
        case Document():
            return []


def messages(record: Record) -> Iterator[tuple[str, Message]]:
    """Every message with its field."""
    for name, turns in parts(record):
        for index, message in enumerate(turns):
            yield f"{name}[{index}]", message


def dialogues(record: Record) -> list[list[Message]]:
    """The record as whole conversations, one for each of its answers (or the prompt alone); none for a document."""
    match record:
        case Conversation():
            return [record.messages]
        case Document():
            return []
        case _:
            found = [[*record.prompt, *turns] for name, turns in parts(record) if name != "prompt"]
            return found or [record.prompt]


def texts(record: Record) -> Iterator[tuple[str, str]]:
    """Every text with its field: contents and thoughts of messages, or a document's text."""
    if isinstance(record, Document):
        yield "text", record.text
        return
    for name, turns in parts(record):
        for index, message in enumerate(turns):
            yield f"{name}[{index}].content", message["content"]
            if "reasoning_content" in message:
                yield f"{name}[{index}].reasoning_content", message["reasoning_content"]


def questions(record: Record) -> list[str]:
    """What users say in it."""
    turns = (
        record.messages if isinstance(record, Conversation) else [] if isinstance(record, Document) else record.prompt
    )
    return [message["content"] for message in turns if message["role"] == "user"]


def answers(record: Record) -> Iterator[tuple[str, Message]]:
    """The answers to learn from or to compare, with their fields: the last assistant turn of every list that has one."""
    for name, turns in parts(record):
        if turns and turns[-1]["role"] == "assistant" and name != "prompt":
            yield f"{name}[{len(turns) - 1}]", turns[-1]


def turn_count(record: Record) -> int:
    """How many messages a conversation has, or a prompt with its first answer."""
    if isinstance(record, Document):
        return 0
    if isinstance(record, Conversation):
        return len(record.messages)
    return len(record.prompt) + sum(len(turns) for _, turns in parts(record)[1:2])


def fingerprint(record: Record) -> int:
    """Eight bytes of a hash of all that the record says (not of where it came from): equal records, equal numbers."""
    pieces: list[str] = [kind_of(record)]
    for name, turns in parts(record):
        pieces.append(name)
        for message in turns:
            pieces += (message["role"], message["content"])
            pieces += (f"{key}={json.dumps(message[key])}" for key in _EXTRAS if key in message)  # type: ignore[literal-required]
    match record:
        case Document():
            pieces.append(record.text)
        case Conversation(tools=tools) if tools:
            pieces.append(json.dumps(tools, sort_keys=True, default=dict))
        case Comparison(margin=margin):
            pieces.append(repr(margin))
        case Ranking(scores=scores):
            pieces.append(repr(scores))
        case Unpaired(label=label):
            pieces.append(repr(label))
        case Prompt(reference=reference) if reference:
            pieces.append(json.dumps(reference, sort_keys=True, default=str))
        case _:
            pass
    return hash_of(pieces)


def hash_of(pieces: Sequence[str]) -> int:
    """Eight bytes of BLAKE2b over texts; where one ends and the next begins counts."""
    # A length before each text is as good as escaping a separator, and texts may hold any character.
    joined = "".join(f"{len(piece)}:{piece}" for piece in pieces)
    return int.from_bytes(hashlib.blake2b(joined.encode(errors="surrogatepass"), digest_size=8).digest())
