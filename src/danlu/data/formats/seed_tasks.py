"""Seed tasks of Self-Instruct, which BELLE took over: one instruction with instances of input and output."""

from __future__ import annotations

from danlu.data.formats import alpaca
from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import filled_list, wrong_type
from danlu.exceptions import DataError
from danlu.types import Origin, Record


def _parse(row: Row, origin: Origin) -> list[Record]:
    records: list[Record] = []
    for i, instance in enumerate(filled_list(row, "instances", origin)):
        if not isinstance(instance, dict):
            raise wrong_type(instance, "an object with 'input' and 'output'", origin, f"instances[{i}]")
        merged = {**instance, **({"instruction": row["instruction"]} if "instruction" in row else {})}
        try:
            records += alpaca.FORMAT.parse(merged, origin)
        except DataError as error:
            if error.field in ("input", "output"):
                error.field = f"instances[{i}].{error.field}"
            raise
    return records


FORMAT = Format(
    "seed-tasks",
    '{"instruction", "instances": [{"input", "output"}, ...]}',
    "conversation",
    lambda row: "instruction" in row and "instances" in row,
    _parse,
    "The seed tasks of Self-Instruct and BELLE. Every instance is a conversation of its own.",
    {"id": "seed_1", "instruction": "Add the numbers.", "instances": [{"input": "2, 3", "output": "5"}]},
)
