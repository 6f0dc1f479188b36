"""Stanford Alpaca and what follows its keys (BELLE, InstructionWild, HuaTuo, ChatDoctor, GPTeacher, LLaMA-Factory).

The user's turn is the instruction, a line break and the input. GPTeacher calls the answer `response`. Prompt-only rows
(InstructionWild's seeds) have no answer at all. A noise rule of the set itself: an input that only says "no input", in
any of its spellings (`<noinput>`, `No input.`, ...), is no input.
"""

from __future__ import annotations

import re
from typing import Final

from danlu.data.formats.base import ANSWER_KEYS, Format, Row
from danlu.data.formats.fields import optional_text, text
from danlu.data.formats.turns import assistant, history_turns, published_conversation, published_question, user
from danlu.types import Message, Origin, Prompt, Record

_NO_INPUT: Final = re.compile(r"\W{0,8}no ?input\W{0,8}", re.IGNORECASE)
# Other formats build on "instruction"; to read them here would lose these fields silently.
_OTHERS: Final = frozenset({"context", "instances", "chosen", "rejected", "output_1", "output_2", "kto_tag", "label"})


def _matches(row: Row) -> bool:
    return "instruction" in row and _OTHERS.isdisjoint(row) and not isinstance(row.get("output"), list)


def question_of(row: Row, origin: Origin) -> list[Message]:
    instruction, extra = text(row, "instruction", origin), optional_text(row, "input", origin)
    if not extra.strip() or _NO_INPUT.fullmatch(extra):
        extra = ""
    content = "\n".join(part for part in (instruction, extra) if part.strip())
    system = optional_text(row, "system", origin)
    head: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    return [*head, *history_turns(row, origin), user(content)]


def _parse(row: Row, origin: Origin) -> list[Record]:
    question = question_of(row, origin)
    answer = text(row, "response" if "response" in row and "output" not in row else "output", origin)
    return [published_conversation([*question, assistant(answer)], origin)]


def _has_no_answer(row: Row) -> bool:
    return _matches(row) and ANSWER_KEYS.isdisjoint(row)


def _parse_prompt(row: Row, origin: Origin) -> list[Record]:
    return [Prompt(published_question(question_of(row, origin)), origin=origin)]


FORMAT = Format(
    "alpaca",
    '{"instruction", "input", "output"}',
    "conversation",
    _matches,
    _parse,
    "Stanford Alpaca and the sets that took over its keys (BELLE, InstructionWild, HuaTuo, ChatDoctor, GPTeacher, "
    "LLaMA-Factory with `system` and `history`). The user's turn is the instruction, a line break and the input.",
    {"instruction": "Name the larger number.", "input": "3, 8", "output": "8 is larger."},
)
PROMPT = Format(
    "alpaca-prompt",
    '{"instruction", "input"}',
    "prompt",
    _has_no_answer,
    _parse_prompt,
    "Alpaca's keys without an answer, as InstructionWild's seeds have them.",
    {"instruction": "Name the larger number.", "input": "3, 8"},
)
