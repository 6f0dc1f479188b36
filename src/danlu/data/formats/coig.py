"""COIG's own shapes: exams and human values, translated instructions, and counter-factual dialogues.

Its human-value (part 1) and LeetCode rows have Alpaca's keys.
"""

from __future__ import annotations

import json
import re
from typing import Final

from danlu.data.formats import alpaca
from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.fields import optional_text, text, wrong_type
from danlu.data.formats.renamed import parse_renamed
from danlu.data.formats.turns import assistant, published_conversation, user
from danlu.types import Message, Origin, Record

_ROUND: Final = re.compile(r"round_(\d+)")
_FENCE: Final = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL | re.IGNORECASE)


def _joined(parts: list[str]) -> str:
    return "\n".join(part.strip() for part in parts if part.strip())


def _parse_exam(row: Row, origin: Origin) -> list[Record]:
    about = [optional_text(row, f"textbox_q_{part}", origin) for part in ("instruction", "context")]
    question = _joined([*about, text(row, "textbox_question", origin)])
    answer = _joined([text(row, "textbox_answer", origin), optional_text(row, "textbox_answer_analysis", origin)])
    return [published_conversation([user(question), assistant(answer)], origin)]


def _round(value: object, field: str, origin: Origin) -> tuple[str, str]:
    """Question and answer of a round, which a model wrote as JSON."""
    if not isinstance(value, dict):
        raise wrong_type(value, "an object with 'response'", origin, field)
    response = value.get("response")
    if isinstance(response, str):
        try:
            response = json.loads(fenced.group(1) if (fenced := _FENCE.fullmatch(response)) else response)
        except (ValueError, RecursionError) as error:
            raise RowDropped("a round that is no JSON") from error
    if not isinstance(response, dict):
        raise RowDropped("a round that is no JSON")
    question, answer = response.get("Q"), response.get("A")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise RowDropped("a round without question or answer")
    return question, answer


def _parse_rounds(row: Row, origin: Origin) -> list[Record]:
    turns: list[Message] = []
    for _, key in sorted((int(found.group(1)), key) for key in row if (found := _ROUND.fullmatch(key))):
        question, answer = _round(row[key], key, origin)
        turns += [user(question), assistant(answer)]
    return [published_conversation(turns, origin)]


EXAM = Format(
    "coig-exam",
    '{"textbox_q_instruction", "textbox_q_context", "textbox_question", "textbox_answer", "textbox_answer_analysis"}',
    "conversation",
    lambda row: "textbox_question" in row,
    _parse_exam,
    "COIG's exam questions and human-value rows (part 2). The user's turn is instruction, context and question, the "
    "assistant's the answer and its analysis, a line each.",
    {
        "textbox_q_instruction": "选择正确的一项。",
        "textbox_q_context": "",
        "textbox_question": "哪个是质数？A. 4 B. 7",
        "textbox_answer": "B",
        "textbox_answer_analysis": "7只能被1和7整除。",
    },
)
TRANSLATED = Format(
    "coig-translated",
    '{"trans_instruction", "trans_input", "trans_output"}',
    "conversation",
    lambda row: "trans_instruction" in row,
    parse_renamed(
        alpaca.FORMAT, {"instruction": "trans_instruction", "input": "trans_input", "output": "trans_output"}
    ),
    "COIG's translated instructions; the translation is read, the original beside it is left out.",
    {"instruction": "Add.", "trans_instruction": "求和。", "trans_input": "2和3", "trans_output": "5"},
)
ROUNDS = Format(
    "coig-rounds",
    '{"round_0": {"response": "{\\"Q\\": ..., \\"A\\": ...}"}, "round_1": ...}',
    "conversation",
    lambda row: "round_0" in row,
    _parse_rounds,
    "COIG's counter-factual corrections: dialogues whose rounds a model wrote as JSON. A dialogue with a round that is no "
    "JSON is left out and counted.",
    {"round_0": {"response": '{"Q": "太阳从西边升起吗？", "A": "不，太阳从东边升起。"}'}},
)
