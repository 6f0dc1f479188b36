"""Formats that are another one under other column names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from danlu.data.formats.base import Format, Row
from danlu.exceptions import DataError
from danlu.types import Origin, Record


def parse_renamed(entry: Format, columns: Mapping[str, str]) -> Callable[[Row, Origin], list[Record]]:
    """How to parse rows of `entry` whose fields have other names.

    Args:
        entry: the format that knows what the fields mean.
        columns: its field to the column that holds it; a column may be absent if `entry` can do without the field.
            Errors name the column.
    """

    def parse(row: Row, origin: Origin) -> list[Record]:
        renamed = {field: row[column] for field, column in columns.items() if column in row}
        try:
            return entry.parse(renamed, origin)
        except DataError as error:
            head, bracket, rest = (error.field or "").partition("[")
            if head in columns:
                error.field = columns[head] + bracket + rest
            raise

    return parse
