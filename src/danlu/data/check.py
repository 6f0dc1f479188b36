"""Checking data before a second of training: what is in it, and what is wrong with it, row by row, in flat memory."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from danlu.data import signs
from danlu.data.contents import answers, dialogues, fingerprint, hash_of, texts
from danlu.data.formats.base import Format, RowDropped
from danlu.data.kinds import as_kind, kind_of
from danlu.data.language import language_of
from danlu.data.problems import Problem, problem_of
from danlu.data.split import prompt_text
from danlu.exceptions import DataError, TemplateError
from danlu.types import Comparison, Conversation, Document, Origin, Record, RecordKind, Unpaired

Measure = Callable[[Sequence[Record]], list[int]]
"""Lengths of records in tokens, a batch at a time."""

WARNINGS: Final[dict[str, str]] = {
    "duplicate": "Remove it with `danlu data dedup`; what comes twice is learnt twice.",
    "empty-answer": "Write the answer, or remove the row; training leaves it out.",
    "equal-answers": "Remove the row; it prefers nothing, and training leaves it out.",
    "tie": "Remove the row; equal scores prefer nothing, and training leaves it out.",
    "left-out": "Training leaves the row out; change it if you need it.",
    "mojibake": "The text was decoded with the wrong table: make the file again from its source, as UTF-8.",
    "too-long": "Shorten it, raise max_length, or let training drop the oldest turns.",
    "cut-off": "It seems to end in the middle of a sentence: finish it, or remove it; a model learns to stop like this.",
    signs.UNSUPPORTED: "A model learns to invent numbers from this: check where the number comes from.",
    "placeholder": "Fill the placeholders in, or the model says them.",
    "template-refuses": "Choose another --template, or change the row.",
    "too-few": "Add rows, or expect little of this stage.",
}
"""What is found in rows that can be read, by code, with what to do. Such rows are no error; problems of reading are."""

ENOUGH: Final[dict[RecordKind, tuple[int, str]]] = {
    "conversation": (1001, "supervised fine-tuning wants more than 1,000 conversations"),
    "comparison": (100, "a reward model wants at least 100 comparisons"),
    "ranking": (100, "a reward model wants at least 100 comparisons"),
    "prompt": (1001, "reinforcement learning wants more than 1,000 prompts"),
}
_CODES: Final = {
    "empty answer": "empty-answer",
    "chosen equals rejected": "equal-answers",
    "all scores equal": "tie",
}
# Said of whole files or sources: the count says it all.
_ONLY_COUNTED: Final = ("no commercial use", "unknown licence", "more rows like the first one")
CUT_SHARE: Final = 0.95  # of prose answers must end properly before one that does not is suspicious
PLACEHOLDER_SHARE: Final = 0.2  # of rows with `{{name}}`: fewer may well speak of templates
BATCH: Final = 256


def characters(record: Record) -> int:
    """The length of a record: with its longest answer, since training sees one at a time."""
    if isinstance(record, Document):
        return len(record.text)
    return max(sum(len(message["content"]) for message in turns) for turns in dialogues(record))


def _is_imitated(name: str, record: Record) -> bool:
    """Whether an answer is one to learn from: others may well have been rejected for their end."""
    return name.startswith(("messages", "chosen")) or (isinstance(record, Unpaired) and record.label)


class Findings:
    """Problems as they come.

    Args:
        keep: how many of each code are kept; all are counted. None keeps all.
    """

    def __init__(self, keep: int | None) -> None:
        self.counts: Counter[str] = Counter()
        self.errors = 0
        self.kept: list[Problem] = []
        self._keep = keep

    def add(self, problem: Problem) -> None:
        """Note one."""
        self.counts[problem.code] += 1
        self.errors += problem.code not in WARNINGS
        if self._keep is None or self.counts[problem.code] <= self._keep:
            self.kept.append(problem)

    def warn(self, code: str, origin: Origin | None, field: str, message: str) -> None:
        """Note something about a row that can be read."""
        file, line = (origin.file, origin.line) if origin else ("", 0)
        self.add(Problem(code, file, line, field, message, WARNINGS[code]))


@dataclass
class Summary:
    """What was found in one path."""

    path: str
    unit: str = "characters"
    records: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("I"))
    duplicates: int = 0
    distinct_prompts: int = 0
    answers: int = 0
    answers_without_stop: int = 0
    pairs: int = 0
    chosen_longer: int = 0

    def to_json(self, findings: Findings) -> dict[str, Any]:
        """The document that `danlu data check --json` prints for one path."""
        return {
            "path": self.path,
            "format": self.formats.most_common(1)[0][0] if self.formats else None,
            "formats": dict(self.formats),
            "records": self.records,
            "kinds": dict(self.kinds),
            "languages": dict(self.languages),
            "lengths": length_summary(self.lengths, self.unit),
            "duplicates": self.duplicates,
            "distinct_prompts": self.distinct_prompts,
            "empty": findings.counts["empty-answer"],
            "mojibake": findings.counts["mojibake"],
            "too_long": findings.counts["too-long"],
            "answers": {"count": self.answers, "without_stop": self.answers_without_stop},
            "pairs": {"count": self.pairs, "chosen_longer": self.chosen_longer},
            "sources": dict(self.sources),
            "licences": dict(self.licences),
            "dropped": dict(self.dropped),
            "errors": findings.errors,
            "warnings": findings.counts.total() - findings.errors,
            "counts": dict(findings.counts),
            "problems": [problem_json(problem) for problem in findings.kept],
        }


def problem_json(problem: Problem) -> dict[str, Any]:
    """A problem as it stands in JSON."""
    return {
        "code": problem.code,
        "severity": "warning" if problem.code in WARNINGS else "error",
        "file": problem.file,
        "line": problem.line,
        "field": problem.field,
        "message": problem.message,
        "hint": problem.hint,
    }


def length_summary(lengths: Sequence[int], unit: str) -> dict[str, Any]:
    """Mean, quantiles and extremes of lengths."""
    if not len(lengths):
        return {"unit": unit}
    values = np.asarray(lengths)
    low, middle, high, highest = (int(np.quantile(values, q, method="nearest")) for q in (0.1, 0.5, 0.9, 0.99))
    return {
        "unit": unit,
        "total": int(values.sum()),
        "mean": round(float(values.mean()), 1),
        "min": int(values.min()),
        "p10": low,
        "median": middle,
        "p90": high,
        "p99": highest,
        "max": int(values.max()),
    }


class Checker:
    """Takes the records of one path, one after the other, and says at the end what is in them.

    Args:
        path: as the user gave it.
        findings: where problems go.
        kind: what the data is for; None: each record for its own kind.
        max_length: the limit in tokens (characters without `measure`).
        measure: lengths in tokens.
    """

    def __init__(
        self,
        path: str,
        findings: Findings,
        *,
        kind: RecordKind | None = None,
        max_length: int | None = None,
        measure: Measure | None = None,
    ) -> None:
        self.summary = Summary(path, "tokens" if measure else "characters")
        self.findings = findings
        self._kind, self._limit, self._measure = kind, max_length, measure
        self._waiting: list[Record] = []
        self._files: dict[str, int] = {}
        # With its length 32 bytes a record: memory grows by that alone.
        self._places = array("I"), array("Q")
        self._hashes, self._prompts = array("Q"), array("Q")
        self._prose = 0
        self._cut: list[tuple[Origin | None, str, str]] = []
        self._blanks: list[tuple[Origin | None, str, str]] = []
        self._with_blanks = 0

    def problem(self, problem: Problem) -> None:
        """A row or file that cannot be read."""
        self.findings.add(problem)

    def dropped(self, reason: str, origin: Origin | None) -> None:
        """A row that is left out as known noise."""
        self.summary.dropped[reason] += 1
        if not reason.startswith(_ONLY_COUNTED):
            self.findings.warn(_CODES.get(reason, "left-out"), origin, "", reason)

    def add(self, entry: Format, record: Record) -> None:
        """A row that can be read."""
        found, origin = self.summary, record.origin
        found.formats[entry.name] += 1
        if origin is not None:
            found.sources[origin.source] += 1
            found.licences[origin.licence] += 1
        for used in self._usable(record):
            found.records += 1
            found.kinds[kind_of(used)] += 1
            found.languages[language_of(text for _, text in texts(used))] += 1
            self._remember(used)
            self._check_texts(used)
            self._check_answers(used)
            if self._measure is None:
                self._length(used, characters(used))
            else:
                self._waiting.append(used)
                if len(self._waiting) == BATCH:
                    self._flush()

    def finish(self) -> Summary:
        """What was found; call it once, at the end."""
        self._flush()
        self._finish_duplicates()
        prose_ends = 1 - len(self._cut) / max(self._prose, 1)
        if prose_ends >= CUT_SHARE:
            for origin, name, end in self._cut:
                self.findings.warn("cut-off", origin, name, f"the answer ends with '…{end}'")
        if self._with_blanks >= max(PLACEHOLDER_SHARE * self.summary.records, 2):
            for origin, name, blank in self._blanks:
                self.findings.warn("placeholder", origin, name, f"found the placeholder {blank}")
        self._check_size()
        return self.summary

    def _usable(self, record: Record) -> Iterable[Record]:
        try:
            return as_kind(record, self._kind or kind_of(record))
        except RowDropped as reason:
            self.dropped(str(reason), record.origin)
        except DataError as error:
            self.problem(problem_of(error))
        return ()

    def _remember(self, record: Record) -> None:
        origin = record.origin
        file, line = (origin.file, origin.line) if origin else ("", 0)
        self._places[0].append(self._files.setdefault(file, len(self._files)))
        self._places[1].append(line)
        self._hashes.append(fingerprint(record))
        self._prompts.append(hash_of([prompt_text(record)]))

    def _check_texts(self, record: Record) -> None:
        broken = blank = False
        for name, text in texts(record):
            if not broken and (shown := signs.mojibake(text)) is not None:
                broken = True
                self.findings.warn("mojibake", record.origin, name, f"found '{shown}', which looks wrongly decoded")
            if not blank and (found := signs.placeholder(text)) is not None:
                blank = True
                self._with_blanks += 1
                self._blanks.append((record.origin, name, found))

    def _check_answers(self, record: Record) -> None:
        if isinstance(record, Document):
            return
        for name, message in answers(record):
            text = message["content"]
            if not text.strip():
                continue
            self.summary.answers += 1
            prose, stops = signs.is_prose(text), signs.has_stop(text)
            self._prose += prose
            self.summary.answers_without_stop += not stops
            if prose and not stops and _is_imitated(name, record):
                self._cut.append((record.origin, f"{name}.content", " ".join(text[-30:].split())))
        if isinstance(record, Comparison):
            self.summary.pairs += 1
            better, worse = (sum(len(m["content"]) for m in turns) for turns in (record.chosen, record.rejected))
            self.summary.chosen_longer += better > worse
        if isinstance(record, Conversation):
            self._check_tools(record)

    def _check_tools(self, record: Conversation) -> None:
        for index, number, result in signs.unsupported_numbers(record.messages):
            self.findings.warn(
                signs.UNSUPPORTED,
                record.origin,
                f"messages[{index}].content",
                f"the answer says {number}, but the tool's result is '{' '.join(result[:60].split())}'",
            )

    def _length(self, record: Record, length: int) -> None:
        self.summary.lengths.append(min(length, 2**32 - 1))
        if self._limit is not None and length > self._limit:
            message = f"{length:,} {self.summary.unit}, the limit is {self._limit:,}"
            self.findings.warn("too-long", record.origin, "", message)

    def _flush(self) -> None:
        if not self._waiting or self._measure is None:
            return
        try:
            lengths = self._measure(self._waiting)
        except TemplateError:
            lengths = [self._measured_alone(record) for record in self._waiting]
        for record, length in zip(self._waiting, lengths, strict=True):
            if length >= 0:
                self._length(record, length)
        self._waiting.clear()

    def _measured_alone(self, record: Record) -> int:
        assert self._measure is not None
        try:
            return self._measure([record])[0]
        except TemplateError as error:
            self.findings.warn("template-refuses", record.origin, "", error.message)
            return -1

    def _finish_duplicates(self) -> None:
        hashes = np.frombuffer(self._hashes, dtype=np.uint64) if self._hashes else np.zeros(0, np.uint64)
        self.summary.distinct_prompts = len(np.unique(np.frombuffer(self._prompts, np.uint64))) if self._prompts else 0
        order = np.argsort(hashes, kind="stable")
        again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
        firsts: dict[int, int] = {}
        pairs: list[tuple[int, int]] = []
        for position in again.tolist():
            # The sort is stable, so the first of a run of equal hashes is the first in the files.
            before, here = int(order[position - 1]), int(order[position])
            firsts[here] = firsts.get(before, before)
            pairs.append((here, firsts[here]))
        self.summary.duplicates = len(pairs)
        names = list(self._files)
        for here, first in sorted(pairs):
            origin = Origin(names[self._places[0][here]], self._places[1][here])
            place = f"{names[self._places[0][first]]}:{self._places[1][first]}"
            self.findings.warn("duplicate", origin, "", f"the same as {place}")

    def _check_size(self) -> None:
        wanted: dict[RecordKind, int] = {}
        for kind, count in self.summary.kinds.items():
            key: RecordKind = "comparison" if kind == "ranking" else kind  # type: ignore[assignment]
            wanted[key] = wanted.get(key, 0) + count
        for kind, count in wanted.items():
            if kind in ENOUGH and count < ENOUGH[kind][0]:
                message = f"found {count:,}; {ENOUGH[kind][1]}"
                self.findings.add(Problem("too-few", self.summary.path, 0, "", message, WARNINGS["too-few"]))
