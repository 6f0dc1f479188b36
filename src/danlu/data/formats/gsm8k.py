"""GSM8K: word problems whose solutions end with `#### number`.

The same rows serve two ends: a stage that asks for prompts gets the question with the number as reference, a stage that
asks for conversations gets the question with the whole solution.
"""

from __future__ import annotations

import re
from typing import Final

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import fault, text
from danlu.data.formats.turns import assistant, published_conversation, published_question, user
from danlu.types import Origin, Prompt, Record

_NUMBER: Final = re.compile(r"[-+]?\$?(?:\d[\d,]*)?\.?\d+%?\.?")
_EXAMPLE: Final[Row] = {
    "question": "A cup holds 3 dl. How much do 4 cups hold?",
    "answer": "4*3 = <<4*3=12>>12 dl.\n#### 12",
}


def _matches(row: Row) -> bool:
    return "question" in row and isinstance(row.get("answer"), str) and "####" in row["answer"]


def number_of(solution: str, origin: Origin) -> str:
    """The number after the last `####`, without thousands separators, currency and percent signs."""
    written = solution.rpartition("####")[2].strip()
    if not _NUMBER.fullmatch(written):
        raise fault(f"found {written[:40]!r} after '####', expected a number", origin, "answer")
    return written.replace(",", "").replace("$", "").rstrip("%.").removeprefix("+")


def _parse(row: Row, origin: Origin) -> list[Record]:
    question = published_question([user(text(row, "question", origin))])
    number = number_of(text(row, "answer", origin), origin)
    return [Prompt(question, {"verifier": "number", "answer": number}, origin)]


def _parse_solution(row: Row, origin: Origin) -> list[Record]:
    solution = text(row, "answer", origin)
    number_of(solution, origin)
    return [published_conversation([user(text(row, "question", origin)), assistant(solution)], origin)]


PROMPT = Format(
    "gsm8k",
    '{"question": "...", "answer": "... #### 72"}',
    "prompt",
    _matches,
    _parse,
    "Grade-school word problems. The number after `####` is the reference: "
    '`{"verifier": "number", "answer": "72"}`. A stage that needs conversations reads the same rows as `gsm8k-solution`.',
    _EXAMPLE,
)
SOLUTION = Format(
    "gsm8k-solution",
    '{"question": "...", "answer": "... #### 72"}',
    "conversation",
    _matches,
    _parse_solution,
    "GSM8K for stages that need conversations: the question and the whole solution, with its calculator annotations "
    "(`<<48/2=24>>`) and the `#### number` at its end.",
    _EXAMPLE,
)
