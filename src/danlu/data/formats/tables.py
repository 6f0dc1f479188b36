"""Tables to rows: comma, tab or semicolon separated text, with or without a header, and parquet."""

from __future__ import annotations

import csv
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, Final

from danlu.data.formats.streams import Member
from danlu.data.problems import RowError

Cells = dict[str, str]

_DELIMITERS: Final = (",", "\t", ";")
_SAMPLE_LINES: Final = 50
_LONGEST_CELL: Final = 2**31 - 1  # csv's limit is a C long
_NUMBER: Final = re.compile(r"[-+]?\d+([.,]\d+)?%?")
# A name of a column: a few words without a sentence's marks.
_NAME: Final = re.compile(r"[^\W\d][\w\-/.()#]*( [\w\-/()#]+){0,3}")
_CHOICE: Final = re.compile(r"[A-H]")
_NOT_JSON: Final = ("struct<", "timestamp", "date", "time", "duration", "decimal", "binary", "map<")


def csv_rows(stream: IO[str], head: str, name: str) -> Iterator[tuple[int, Cells] | RowError]:
    """The rows with the line where each starts; without a header the keys are "0", "1", ...

    Args:
        stream: the text.
        head: its beginning, by which delimiter and header are told.
        name: of the file, for errors.
    """
    csv.field_size_limit(_LONGEST_CELL)
    sample = head.split("\n")[:_SAMPLE_LINES]
    delimiter = find_delimiter(sample)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    keys: list[str] | None = None
    line = 1
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RowError(f"broken table: {error}", code="bad-table", hint=_QUOTES, file=name, line=line)
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if keys is None:
            first = list(_parsed(sample, delimiter))
            if has_header(first):
                keys = _distinct(cells)
                continue
            keys = [str(i) for i in range(len(cells))]
        if len(cells) != len(keys):
            message = f"found {len(cells)} cells, expected {len(keys)} as in the first row"
            yield RowError(message, code="wrong-columns", hint=_QUOTES, file=name, line=line)
            continue
        yield line, dict(zip(keys, cells, strict=True))


_QUOTES: Final = (
    "A cell with a delimiter, a quote or a line break in it stands in quotes, and a quote in it is doubled."
)


def find_delimiter(sample: list[str]) -> str:
    """The delimiter by which the sample's rows have the same number of cells, above one; of several the one with most."""
    best, best_score = ",", (0.0, 0)
    for delimiter in _DELIMITERS:
        widths = Counter(len(cells) for cells in _parsed(sample, delimiter))
        if not widths:
            continue
        width, count = widths.most_common(1)[0]
        score = (count / widths.total(), width) if width > 1 else (0.0, 0)
        if score > best_score:
            best, best_score = delimiter, score
    return best


def has_header(rows: list[list[str]]) -> bool:
    """Whether the first row names the columns: short names, no two alike, none that is a value of its column below.

    A table of questions with choices and no header (MMLU) ends in the letter of the right choice; a header does not.
    """
    if not rows:
        return False
    names = [cell.strip().removeprefix("\ufeff") for cell in rows[0]]
    # An unnamed first column is an index that pandas wrote.
    rest = names[1:] if names and not names[0] else names
    if not rest or len(set(names)) < len(names) or not all(_NAME.fullmatch(n) and len(n) <= 60 for n in rest):
        return False
    if _CHOICE.fullmatch(names[-1]) and len(names) > 2:
        return False
    below = [row for row in rows[1:] if len(row) == len(names)]
    return not any(name == row[i].strip() for i, name in enumerate(names) if name for row in below)


def _parsed(sample: list[str], delimiter: str) -> Iterator[list[str]]:
    try:
        for cells in csv.reader((line + "\n" for line in sample), delimiter=delimiter):
            if any(cell.strip() for cell in cells):
                yield cells
    except csv.Error:
        return


def _distinct(names: list[str]) -> list[str]:
    return [name.strip().removeprefix("\ufeff") or str(i) for i, name in enumerate(names)]


def parquet_rows(member: Member) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a parquet file with their numbers."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RowError(
            "a parquet file needs pyarrow, which is not installed",
            code="missing-library",
            hint="pip install 'danlu[hub]'",
            file=member.name,
        ) from error
    with tempfile.TemporaryFile() as copy:
        source: Any = member.path
        if source is None:
            # Parquet is read from its end, which a compressed stream cannot do.
            with member.open() as stream:
                shutil.copyfileobj(stream, copy)
            copy.seek(0)
            source = copy
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(source) as file:
                odd = any(word in str(file.schema_arrow) for word in _NOT_JSON)
                for batch in file.iter_batches(batch_size=512):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, plain_value(row) if odd else row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise RowError(
                f"the parquet file is damaged: {reason}",
                code="damaged-file",
                hint="Download it again.",
                file=member.name,
                line=number + 1,
            ) from error


def plain_value(value: Any, *, inside: bool = False) -> Any:
    """A table's value as JSON would have it: dates and the like as text, a map as an object.

    In a table all objects of a column have the same keys, and null means that an object has no such key; so inside of a
    row such keys are left out. A row's own null stays: some formats say something with it.
    """
    if isinstance(value, dict):
        return {k: plain_value(v, inside=True) for k, v in value.items() if v is not None or not inside}
    if isinstance(value, (list, tuple)):
        return [plain_value(inner, inside=True) for inner in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)
