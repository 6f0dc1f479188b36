"""AlpacaEval's annotations: two models' outputs for one instruction and which of them a judge prefers."""

from __future__ import annotations

from danlu.data.formats.alpaca import question_of as alpaca_question
from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.cells import optional_number
from danlu.data.formats.fields import fault, present, text
from danlu.data.formats.turns import assistant, published_question
from danlu.types import Comparison, Origin, Record


def _parse(row: Row, origin: Origin) -> list[Record]:
    prompt = published_question(alpaca_question(row, origin))
    first, second = assistant(text(row, "output_1", origin)), assistant(text(row, "output_2", origin))
    present(row, "preference", origin)
    preference = optional_number(row, "preference", origin)
    if preference is None:
        raise RowDropped("the annotator failed")
    # Newer judges give a number between 1 and 2, how sure they are that the second is better.
    if preference in (0, 1.5):
        raise RowDropped("tie")
    if not 1 <= preference <= 2:
        raise fault(f"found {preference:g}, expected 0 to 2", origin, "preference")
    better, worse = (first, second) if preference < 1.5 else (second, first)
    return [Comparison(prompt, [better], [worse], origin=origin)]


FORMAT = Format(
    "alpaca-eval",
    '{"instruction", "output_1", "output_2", "preference"}',
    "comparison",
    lambda row: "output_1" in row and "output_2" in row,
    _parse,
    "AlpacaEval's annotations. A preference of 1 (or below 1.5) means the first output; ties (0, 1.5) and rows where the "
    "annotator failed (null) are left out and counted.",
    {"instruction": "Is 7 prime?", "output_1": "Yes.", "output_2": "No.", "preference": 1},
)
