"""Numbers about data: lengths of questions and answers, turns, languages, sources, licences."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from danlu.data.check import BATCH, Measure, characters, length_summary
from danlu.data.contents import answers, questions, texts, turn_count
from danlu.data.formats.base import Format
from danlu.data.kinds import kind_of
from danlu.data.language import language_of
from danlu.exceptions import TemplateError
from danlu.types import Comparison, Record

MANY: Final = 12  # sources or licences named one by one; the rest is put together


@dataclass
class Statistics:
    """Counts of records as they come.

    Args:
        measure: lengths of whole records in tokens; None: in characters. Questions and answers are always in characters.
    """

    measure: Measure | None = None
    records: int = 0
    unmeasured: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("I"))
    question_lengths: array[int] = field(default_factory=lambda: array("I"))
    answer_lengths: array[int] = field(default_factory=lambda: array("I"))
    chosen_lengths: array[int] = field(default_factory=lambda: array("I"))
    rejected_lengths: array[int] = field(default_factory=lambda: array("I"))
    _waiting: list[Record] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """Of whole records' lengths."""
        return "tokens" if self.measure else "characters"

    def add(self, entry: Format, record: Record) -> None:
        """One record."""
        self.records += 1
        self.formats[entry.name] += 1
        self.kinds[kind_of(record)] += 1
        self.languages[language_of(text for _, text in texts(record))] += 1
        self.sources[_source(record)] += 1
        self.licences[record.origin.licence if record.origin else ""] += 1
        self.turns[turn_count(record)] += 1
        self.question_lengths.extend(map(len, questions(record)))
        if isinstance(record, Comparison):
            self.chosen_lengths.append(sum(len(m["content"]) for m in record.chosen))
            self.rejected_lengths.append(sum(len(m["content"]) for m in record.rejected))
        else:
            self.answer_lengths.extend(len(message["content"]) for _, message in answers(record))
        if self.measure is None:
            self.lengths.append(characters(record))
            return
        self._waiting.append(record)
        if len(self._waiting) == BATCH:
            self._flush()

    def finish(self) -> None:
        """Measures what is left; call it once, at the end."""
        self._flush()

    def to_json(self) -> dict[str, Any]:
        """What `danlu data stats --json` prints."""
        return {
            "records": self.records,
            "formats": dict(self.formats),
            "kinds": dict(self.kinds),
            "languages": dict(self.languages),
            "sources": dict(self.sources),
            "licences": dict(self.licences),
            "turns": {str(count): rows for count, rows in sorted(self.turns.items())},
            "lengths": length_summary(self.lengths, self.unit),
            "questions": length_summary(self.question_lengths, "characters"),
            "answers": length_summary(self.answer_lengths, "characters"),
            "chosen": length_summary(self.chosen_lengths, "characters"),
            "rejected": length_summary(self.rejected_lengths, "characters"),
            "unmeasured": self.unmeasured,
        }

    def _flush(self) -> None:
        if not self._waiting or self.measure is None:
            return
        try:
            self.lengths.extend(self.measure(self._waiting))
        except TemplateError:
            for record in self._waiting:
                try:
                    self.lengths.extend(self.measure([record]))
                except TemplateError:
                    self.unmeasured += 1
        self._waiting.clear()


def _source(record: Record) -> str:
    """What the record says of its source, or its file (of an archive the archive)."""
    if record.origin is None:
        return ""
    file = record.origin.file
    archive, found, _ = file.partition(".zip/")
    return record.origin.source or Path(archive + ".zip" if found else file).name


def leading(counts: Counter[str], unknown: str) -> list[tuple[str, int]]:
    """The largest counts with their names, the small ones put together; the empty name is called `unknown`."""
    named = [(name or unknown, count) for name, count in counts.most_common()]
    if len(named) <= MANY:
        return named
    rest: Sequence[tuple[str, int]] = named[MANY - 1 :]
    return [*named[: MANY - 1], (f"{len(rest)} others", sum(count for _, count in rest))]
