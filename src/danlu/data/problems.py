"""What can be wrong with a row or a file: an error with a short code, and the problem that reports and JSON show."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from danlu.exceptions import DataError

SHOWN: Final = 20
"""How many problems an error lists; the rest is counted."""

FILE_WIDE: Final = frozenset({"wrong-kind", "ambiguous"})
"""What is said of one row but is true of all: reading for a stage stops at the first."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of one row (or of a whole file: line 0).

    Attributes:
        code: a short kebab-case word to count by, such as `missing-field`.
        file: the file; of an archive `archive.zip/member`.
        line: its 1-based line, 0 if the whole file is meant.
        field: the field at fault, or "".
        message: what was found and what was expected.
        hint: what to do, or "".
    """

    code: str
    file: str
    line: int
    field: str
    message: str
    hint: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        field = f"field '{self.field}': " if self.field else ""
        hint = " ".join(self.hint.split("\n")[0].split())
        return f"{place}: {field}{self.message} [{self.code}]" + (f" -> {hint}" if hint else "")


class RowError(DataError):
    """A fault of one row or file, with the code that reports count it by."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        hint: str = "",
        file: str | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, file=file, line=line, field=field)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it comes whole out of another process."""
        told: dict[str, Any] = {"hint": self.hint, "file": self.file, "line": self.line, "field": self.field}
        return functools.partial(RowError, self.message, code=self.code, **told), ()


class FaultyRows(DataError):
    """Several faulty rows; `problems` holds the first ones, `counts` the number of all by code."""

    def __init__(self, problems: Sequence[Problem], counts: Mapping[str, int]) -> None:
        by_code = ", ".join(f"{code}: {count}" for code, count in counts.items())
        total = sum(counts.values())
        lines = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
        more = f"\n  ... and {total - len(problems[:SHOWN])} more" if total > len(problems[:SHOWN]) else ""
        first = problems[0]
        super().__init__(
            f"found {total} problems ({by_code}):{lines}{more}",
            hint="Mend these rows, or leave them out with --skip-bad; they are then counted.",
            file=first.file if len({problem.file for problem in problems}) == 1 else None,
        )
        self.problems = tuple(problems)
        self.counts = dict(counts)


def problem_of(error: DataError) -> Problem:
    """The problem that an error tells of."""
    code = error.code if isinstance(error, RowError) else "bad-data"
    return Problem(code, error.file or "", error.line or 0, error.field or "", error.message, error.hint)


def error_of(problem: Problem) -> RowError:
    """The error that tells of a problem."""
    return RowError(
        problem.message,
        code=problem.code,
        hint=problem.hint,
        file=problem.file or None,
        line=problem.line or None,
        field=problem.field or None,
    )


class Collected:
    """Problems as they come: the first `SHOWN` are kept, all are counted, so that memory stays flat."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.counts: Counter[str] = Counter()

    def add(self, problem: Problem) -> None:
        """Note one problem."""
        if len(self.first) < SHOWN:
            self.first.append(problem)
        self.counts[problem.code] += 1

    def error(self) -> DataError:
        """The error for what was collected: the problem itself if it is the only one."""
        if self.counts.total() == 1:
            return error_of(self.first[0])
        return FaultyRows(self.first, self.counts)
