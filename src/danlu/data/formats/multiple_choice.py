"""Multiple choice: MMLU and CMMLU csv, C-Eval, ARC and the hub's lists of choices."""

from __future__ import annotations

import string
from typing import Any, Final

from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.fields import fault, filled_list, present, text, wrong_type
from danlu.data.formats.turns import user
from danlu.types import Origin, Prompt, Record

LETTERS: Final = string.ascii_uppercase
# A table without a header has its columns' numbers for keys: question, four options, answer.
_HEADERLESS: Final = ("0", "1", "2", "3", "4", "5")


def _is_headerless(row: Row) -> bool:
    return tuple(row) == _HEADERLESS and isinstance(row["5"], str) and row["5"].strip() in tuple(LETTERS[:4])


def _matches(row: Row) -> bool:
    if "question" in row or "Question" in row:
        return {"A", "B"} <= row.keys() or isinstance(row.get("choices"), (list, dict))
    return _is_headerless(row)


def _cell(value: Any, origin: Origin, field: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return text({field: value}, field, origin)


def _options(row: Row, origin: Origin) -> list[str]:
    choices = row.get("choices")
    if isinstance(choices, dict):
        choices = filled_list(choices, "text", origin)
    if choices is not None:
        if not isinstance(choices, list):
            raise wrong_type(choices, "a list", origin, "choices")
        return [_cell(choice, origin, f"choices[{i}]") for i, choice in enumerate(choices)]
    if _is_headerless(row):
        return [_cell(row[key], origin, key) for key in _HEADERLESS[1:5]]
    letters = [letter for letter in LETTERS if letter in row and row[letter] is not None]
    return [_cell(row[letter], origin, letter) for letter in letters]


def _letter(row: Row, count: int, origin: Origin) -> str:
    """The right answer's letter; rows give the letter, its index, or a label of their own (ARC)."""
    field = next((name for name in ("answer", "Answer", "answerKey", "5") if name in row), "answer")
    value = present(row, field, origin)
    if value is None or value == "":
        raise RowDropped("no answer")
    labels = row["choices"].get("label") if isinstance(row.get("choices"), dict) else None
    if isinstance(labels, list) and value in labels:
        value = labels.index(value)
    if isinstance(value, str):
        found = value.strip().upper()
        value = LETTERS.find(found) if len(found) == 1 else -1
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        shown = repr(row[field])
        raise fault(f"found {shown[:40]}, expected one of {', '.join(LETTERS[:count])}", origin, field)
    return LETTERS[value]


def _parse(row: Row, origin: Origin) -> list[Record]:
    question = text(row, next((name for name in ("question", "Question", "0") if name in row), "question"), origin)
    options = _options(row, origin)
    if not 2 <= len(options) <= len(LETTERS):
        raise fault(f"found {len(options)} options, expected 2 to {len(LETTERS)}", origin, "choices")
    answer = _letter(row, len(options), origin)
    if not question.strip():
        raise RowDropped("empty question")
    lines = [question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))]
    reference = {"verifier": "choice", "answer": answer, "choices": options}
    return [Prompt([user("\n".join(lines))], reference, origin)]


FORMAT = Format(
    "multiple-choice",
    '{"question", "A", "B", "C", "D", "answer"}',
    "prompt",
    _matches,
    _parse,
    "MMLU (csv without a header), CMMLU and C-Eval (csv with one), and rows with a list of `choices` (the hub's MMLU, ARC). "
    "The options stand below the question, each with its letter; the reference is "
    '`{"verifier": "choice", "answer": "B", "choices": [...]}`.',
    {"question": "Which is prime?", "A": "4", "B": "7", "C": "8", "D": "9", "answer": "B"},
)
