"""Conversations that were already put into a template: one `text` with "### Instruction:" or "### Human:" marks.

The marks come off: the model's own chat template puts its own around the turns.
"""

from __future__ import annotations

import re
from typing import Final

from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.fields import text
from danlu.data.formats.turns import assistant, published_conversation, user
from danlu.types import Message, Origin, Record

_PART: Final = re.compile(r"^### (Instruction|Input|Response):[ \t]*\n?", re.MULTILINE)
_PREAMBLE: Final = re.compile(r"\s*(?:Below is an instruction that describes a task\b[^\n]*\s+)?### Instruction:")
_END: Final = re.compile(r"\s*(?:^END|</s>|<\|endoftext\|>)?\s*\Z", re.MULTILINE)
# Guanaco's turns stand on one line, often without even a space between them.
_SPEAKER: Final = re.compile(r"### ?(Human|Assistant):")
_DIALOGUE: Final = re.compile(r"\s*### ?Human:")


def _starts_with(row: Row, start: re.Pattern[str]) -> bool:
    return isinstance(row.get("text"), str) and start.match(row["text"]) is not None


def _parse_instruction(row: Row, origin: Origin) -> list[Record]:
    pieces = _PART.split(text(row, "text", origin))
    said: dict[str, str] = {}
    for name, content in zip(pieces[1::2], pieces[2::2], strict=True):
        if name in said:
            raise RowDropped(f"two parts named {name}")
        said[name] = content.strip()
    if "Response" not in said:
        raise RowDropped("no response after the instruction")
    question = "\n".join(part for part in (said.get("Instruction", ""), said.get("Input", "")) if part)
    return [published_conversation([user(question), assistant(_END.sub("", said["Response"]))], origin)]


def _parse_guanaco(row: Row, origin: Origin) -> list[Record]:
    pieces = _SPEAKER.split(text(row, "text", origin))
    turns: list[Message] = [
        user(content.strip()) if who == "Human" else assistant(content.strip())
        for who, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return [published_conversation(turns, origin)]


INSTRUCTION = Format(
    "instruction-text",
    '{"text": "### Instruction:\\n...\\n\\n### Response:\\n...\\nEND\\n"}',
    "conversation",
    lambda row: _starts_with(row, _PREAMBLE),
    _parse_instruction,
    "Alpaca rows that alpaca-lora and ChatGLM-Tuning already put into Alpaca's template. The marks, the preamble and the "
    "closing `END` come off.",
    {"text": "### Instruction:\nSay it in French.\n\n### Input:\ngood night\n\n### Response:\nbonne nuit\nEND\n"},
)
GUANACO = Format(
    "guanaco",
    '{"text": "### Human: ...### Assistant: ..."}',
    "conversation",
    lambda row: _starts_with(row, _DIALOGUE),
    _parse_guanaco,
    "OpenAssistant's best dialogues as Guanaco was trained on them: turns marked `### Human:` and `### Assistant:`.",
    {"text": "### Human: Is a whale a fish?### Assistant: No, it is a mammal."},
)
