"""Databricks Dolly: an instruction, perhaps a passage that it is about, and an answer."""

from __future__ import annotations

from danlu.data.formats import alpaca
from danlu.data.formats.base import Format
from danlu.data.formats.renamed import parse_renamed

FORMAT = Format(
    "dolly",
    '{"instruction", "context", "response", "category"}',
    "conversation",
    lambda row: "instruction" in row and "context" in row and "response" in row,
    parse_renamed(alpaca.FORMAT, {"instruction": "instruction", "input": "context", "output": "response"}),
    "Databricks' instructions written by its staff, which may be used commercially. The user's turn is the instruction, a "
    "line break and the passage.",
    {
        "instruction": "Who planted the tree?",
        "context": "The oak was planted by Ada in 1901.",
        "response": "Ada.",
        "category": "closed_qa",
    },
)
