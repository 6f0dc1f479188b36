"""What the verbs of `danlu data` share: how files are read, the bar meanwhile, and what is said of rows left out."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from danlu.cli.console import people, say
from danlu.exceptions import DataError, SettingsError, UsageError

if TYPE_CHECKING:
    from danlu.data.formats.base import Format
    from danlu.data.problems import Problem
    from danlu.data.read import ReadOptions
    from danlu.types import Origin, Record, RecordKind

SHOWN = 20
KINDS = ("conversation", "comparison", "prompt", "document", "ranking", "unpaired")
PLAIN_EVERY_SECONDS = 10.0
BAR_EVERY_ROWS = 512
COUNT_LINES_UNDER = 256 << 20  # bytes; beyond that, counting lines for the bar costs more than the bar is worth

Command = Callable[..., Any]

kind_option = click.option(
    "--kind", type=click.Choice(KINDS), default=None, help="Read the rows as this kind, whatever they hold."
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
out_option = click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="File to write: .jsonl or .json."
)
force_option = click.option("--force", is_flag=True, help="Overwrite what is there.")


def reading_options(command: Command) -> Command:
    """The options that say how files are read; the command gets them as one `reading`."""

    @click.option(
        "--as", "format_name", default=None, metavar="FORMAT", help="A format's name, instead of recognising it."
    )
    @click.option(
        "--map", "columns", default="", metavar="A=B,...", help="Own columns: prompt=content,response=summary."
    )
    @click.option("--licence", default="", help="Of rows that name none.")
    @click.option("--source", default="", help="Of rows that name none.")
    @click.option("--commercial-only", is_flag=True, help="Only rows whose licence allows commercial use.")
    @click.option("--skip-bad", is_flag=True, help="Leave faulty rows out, and say how many and why.")
    @wraps(command)
    def wrapped(
        *args: Any,
        format_name: str | None,
        columns: str,
        licence: str,
        source: str,
        commercial_only: bool,
        skip_bad: bool,
        **kwargs: Any,
    ) -> Any:
        from danlu.data.read import ReadOptions

        options = ReadOptions(
            format=format_name,
            columns=parse_columns(columns),
            licence=licence,
            source=source,
            commercial_only=commercial_only,
            skip_bad=skip_bad,
        )
        return command(*args, reading=options, **kwargs)

    return wrapped


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=content,response=summary` as a mapping from danlu's fields to the table's columns."""
    found: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        field, equals, column = item.partition("=")
        if not equals or not field.strip() or not column.strip():
            raise UsageError(f"--map: found '{item}', expected a field and a column, as in prompt=content")
        found[field.strip()] = column.strip()
    return found


@contextmanager
def wrong_usage() -> Iterator[None]:
    """Settings that were given as options: a wrong one is wrong usage."""
    try:
        yield
    except SettingsError as error:
        raise UsageError(str(error)) from None


@dataclass
class Left:
    """Rows that were left out: problems of reading (errors unless `--skip-bad`), and known noise by reason."""

    problems: Any
    dropped: Counter[str]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        from danlu.data.check import problem_json

        return {
            "dropped": dict(self.dropped),
            "skipped": dict(self.problems.counts),
            "problems": [problem_json(problem) for problem in self.problems.first],
        }

    def say(self) -> None:
        """For people: how many rows are missing, and why."""
        for reason, count in self.dropped.items():
            say(f"left out, {reason}: {count:,}")
        for code, count in self.problems.counts.items():
            say(f"left out, faulty ({code}): {count:,}")
        for problem in self.problems.first[:SHOWN]:
            say(f"  {problem}")


class Reader:
    """Reads for a verb that writes: every problem is collected, and all are told at the end.

    Args:
        reading: how to read.
        label: what the bar says.
    """

    def __init__(self, reading: ReadOptions, label: str, *, quiet: bool = False) -> None:
        from danlu.data.problems import Collected

        self._reading, self._label, self._quiet = reading, label, quiet
        self.left = Left(Collected(), Counter())

    def entries(self, paths: Sequence[str], kind: RecordKind | None = None) -> Iterator[tuple[Format, Record]]:
        """The records of all paths with their formats, each fit for its own kind, or turned into `kind`."""
        from danlu.data.formats.base import RowDropped
        from danlu.data.kinds import as_kind, kind_of

        for entry, record in pooled(self.natural(paths, kind), kind):
            try:
                for made in as_kind(record, kind or kind_of(record)):
                    yield entry, made
            except RowDropped as reason:
                self.left.dropped[str(reason)] += 1

    def records(self, paths: Sequence[str], kind: RecordKind | None = None) -> Iterator[Record]:
        """The same without formats."""
        return (record for _, record in self.entries(paths, kind))

    def natural(self, paths: Sequence[str], kind: RecordKind | None = None) -> Iterator[tuple[Format, Record]]:
        """The records of all paths as their formats read them; with `kind` only formats that can serve it."""
        from danlu.data.read import scan

        def dropped(reason: str, origin: Origin) -> None:
            self.left.dropped[reason] += 1

        found = scan(list(paths), self._reading, kind=kind, on_problem=self.left.problems.add, on_dropped=dropped)
        with RowBar(self._label, paths, quiet=self._quiet) as bar:
            yield from bar.watch(found)

    def problem(self, problem: Problem) -> None:
        """A row that cannot be used after all."""
        self.left.problems.add(problem)

    def finish(self) -> None:
        """Raises the collected problems, unless they were to be skipped."""
        if self.left.problems.counts and not self._reading.skip_bad:
            raise self.left.problems.error()


def pooled(found: Iterator[tuple[Format, Record]], kind: RecordKind | None) -> Iterator[tuple[Format, Record]]:
    """Records as they come; where pairs are wanted, answers scored one by one wait for the others to their prompt."""
    from danlu.data.kinds import pool_singles
    from danlu.types import Ranking

    waiting: list[Record] = []
    known: Format | None = None
    for entry, record in found:
        if kind in ("comparison", "ranking") and isinstance(record, Ranking) and len(record.responses) == 1:
            waiting.append(record)
            known = entry
        else:
            yield entry, record
    for record in pool_singles(waiting):
        assert known is not None
        yield known, record


class RowBar:
    """The live bar of reading: lines of files where they can be counted at once, rows otherwise; lines when piped."""

    def __init__(self, label: str, paths: Sequence[str], *, quiet: bool = False) -> None:
        self._label = label
        self._rows = 0
        self._begun = self._said = time.monotonic()
        self._quiet = quiet
        self._live: Any = None
        self._before, self._file, self._line = 0, "", 0
        if people.is_terminal and not quiet:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=people,
                transient=True,
            )
            self._task = self._live.add_task(label, total=_line_count(paths), note="")

    def __enter__(self) -> RowBar:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def watch(self, found: Iterator[tuple[Format, Record]]) -> Iterator[tuple[Format, Record]]:
        """The same, with the bar moving."""
        for entry, record in found:
            yield entry, record
            self._rows += 1
            if self._rows % BAR_EVERY_ROWS == 0:
                self._show(record.origin)

    def _show(self, origin: Origin | None) -> None:
        now = time.monotonic()
        note = f"{self._rows:,} rows, {self._rows / max(now - self._begun, 1e-6):,.0f}/s"
        if origin is not None:
            if origin.file != self._file:
                self._before, self._file = self._before + self._line, origin.file
            self._line = origin.line
        if self._live is not None:
            self._live.update(self._task, completed=self._before + self._line, note=note)
        elif not self._quiet and now - self._said > PLAIN_EVERY_SECONDS:
            self._said = now
            print(f"{self._label}: {note}", file=sys.stderr, flush=True)


def _line_count(paths: Sequence[str]) -> int | None:
    """The lines of all files, or None if they cannot be counted fast: then the bar moves without an end."""
    from danlu.data.files import find_files, is_hub

    try:
        if any(is_hub(path) for path in paths):
            return None
        files = find_files(list(paths))
        plain = all(file.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv", ".txt") for file in files)
        if not plain or sum(file.stat().st_size for file in files) > COUNT_LINES_UNDER:
            return None
        total = 0
        for file in files:
            with file.open("rb") as opened:
                total += sum(block.count(b"\n") for block in iter(lambda: opened.read(1 << 20), b""))
    except (OSError, DataError):
        return None
    return total if total > len(files) else None


def licence_rows(licences: Mapping[str, int], dropped: Mapping[str, int]) -> list[dict[str, Any]]:
    """The licence table: rows kept and left out by licence, and whether it allows commercial use (null: not known)."""
    from danlu.data.licences import commercial_use

    left: Counter[str] = Counter()
    for reason, count in dropped.items():
        head, _, licence = reason.partition(": ")
        if head in ("no commercial use", "unknown licence"):
            left["" if licence == "none given" else licence] += count
    return [
        {
            "licence": name,
            "rows": licences.get(name, 0),
            "left_out": left[name],
            "commercial": commercial_use(name),
        }
        for name in sorted({*licences, *left}, key=lambda n: (-licences.get(n, 0) - left[n], n))
    ]


def say_licences(rows: Sequence[Mapping[str, Any]]) -> None:
    """The licence table for people, if any licence is known or was asked for."""
    if not any(row["licence"] or row["left_out"] for row in rows):
        return
    from rich.table import Table
    from rich.text import Text

    words = {True: "yes", False: "no", None: "not known"}
    table = Table("licence", "rows", "left out", "commercial use", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for row in rows:
        name = Text(row["licence"] or "none given")
        table.add_row(name, f"{row['rows']:,}", f"{row['left_out']:,}", words[row["commercial"]])
    people.print(table)
