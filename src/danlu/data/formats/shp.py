"""Stanford Human Preferences: a post, two comments, and which of them more readers liked."""

from __future__ import annotations

from danlu.data.formats.base import Format, Row
from danlu.data.formats.cells import truth
from danlu.data.formats.fields import text
from danlu.data.formats.turns import assistant, published_question, user
from danlu.types import Comparison, Origin, Record


def _parse(row: Row, origin: Origin) -> list[Record]:
    prompt = published_question([user(text(row, "history", origin))])
    first, second = assistant(text(row, "human_ref_A", origin)), assistant(text(row, "human_ref_B", origin))
    better, worse = (first, second) if truth(row, "labels", origin) else (second, first)
    return [Comparison(prompt, [better], [worse], origin=origin)]


FORMAT = Format(
    "shp",
    '{"history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"}',
    "comparison",
    lambda row: "human_ref_A" in row and "human_ref_B" in row,
    _parse,
    "Stanford Human Preferences: a Reddit post and two comments; `labels` is 1 if the first was liked more. The scores are "
    "counts of votes and make no margin.",
    {
        "history": "How do I get wax off a table?",
        "human_ref_A": "Warm it, then wipe it off.",
        "human_ref_B": "Buy a new table.",
        "labels": 1,
        "score_A": 41,
        "score_B": 2,
    },
)
