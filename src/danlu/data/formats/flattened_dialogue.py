"""Alpaca's keys with a whole dialogue in the instruction: HuaTuo's literature rows and BELLE's multi-turn chats."""

from __future__ import annotations

import re
from typing import Final

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import fault, text
from danlu.data.formats.turns import assistant, published_conversation, user
from danlu.types import Message, Origin, Record

_TAGGED: Final = re.compile(r"(?:\A\s*|\s+)<(user|bot)>:")
_NAMED: Final = re.compile(r"(?:\A\s*|\s*\n\s*)(Human|Assistant)[:：]")


def _marks(instruction: str) -> re.Pattern[str] | None:
    """How the dialogue's turns are marked; None if the instruction is no dialogue."""
    if re.match(r"\s*<user>:", instruction):
        return _TAGGED
    # An instruction may well begin with a name; a dialogue also leaves the place of the answer open.
    if re.match(r"\s*Human[:：]", instruction) and re.search(r"\n\s*Assistant[:：]\s*\Z", instruction):
        return _NAMED
    return None


def _matches(row: Row) -> bool:
    instruction = row.get("instruction")
    return isinstance(instruction, str) and isinstance(row.get("output"), str) and _marks(instruction) is not None


def _parse(row: Row, origin: Origin) -> list[Record]:
    instruction, answer = text(row, "instruction", origin), text(row, "output", origin)
    marks = _marks(instruction)
    if marks is None:
        raise fault("found no dialogue that starts with '<user>:' or 'Human:'", origin, "instruction")
    pieces = marks.split(instruction)
    turns: list[Message] = [
        user(content.strip()) if who in ("user", "Human") else assistant(content.strip())
        for who, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    # The place of the answer may stand open at the end; the two become one turn.
    return [published_conversation([*turns, assistant(answer)], origin)]


FORMAT = Format(
    "flattened-dialogue",
    '{"instruction": " <user>: ... <bot>: ... <user>: ...", "output"}',
    "conversation",
    _matches,
    _parse,
    "A dialogue written into Alpaca's instruction, as in HuaTuo's literature rows (`<user>:`, `<bot>:`) and BELLE's "
    "multi-turn chats (`Human:`, `Assistant:`). It is split into its turns.",
    {
        "instruction": " <user>: Is aspirin a drug? <bot>: Yes. <user>: What is it for?",
        "input": "",
        "output": "For pain.",
    },
)
