"""Training rows that hold an evaluation's prompts: shared n-grams, as GPT-3's authors looked for them (arXiv 2005.14165, C)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from danlu.data.contents import questions, texts
from danlu.data.ngrams import ngrams, units
from danlu.exceptions import SettingsError
from danlu.types import Document, Origin, Record

NGRAM: Final = 13
COMMON: Final = 10  # an n-gram of more prompts than that is a phrase of the test's form, no sign of a leak


@dataclass(frozen=True, slots=True)
class Match:
    """A training record that holds text of an evaluation's prompt."""

    origin: Origin | None
    prompt: Origin | None
    field: str
    text: str


class Benchmark:
    """The n-grams of an evaluation's prompts.

    A prompt shorter than `n` units matches only a question that is that prompt and nothing more, since short questions
    ("What is the capital of France?") are parts of many texts.

    Args:
        records: whose prompts must not be in the training data; of documents the whole text.
        n: units (words, Chinese characters) in a row that count as the same text.
    """

    def __init__(self, records: Iterable[Record], n: int = NGRAM) -> None:
        if n < 1:
            raise SettingsError(f"found {n}, expected at least 1", field="ngram")
        self.n = n
        self.origins: list[Origin | None] = []
        self._grams: dict[int, int] = {}  # hash of an n-gram -> the first prompt that has it
        self._whole: dict[int, int] = {}  # hash of a short prompt -> its place
        owners: dict[int, int] = {}
        for place, record in enumerate(records):
            self.origins.append(record.origin)
            asked = [record.text] if isinstance(record, Document) else questions(record)
            sequences = [found for found in map(units, asked) if found]
            for sequence in sequences:
                if len(sequence) < n:
                    self._whole.setdefault(hash(" ".join(sequence)), place)
            for gram in {hash(g) for s in sequences if len(s) >= n for g in ngrams(s, n)}:
                self._grams.setdefault(gram, place)
                owners[gram] = owners.get(gram, 0) + 1
        common = [gram for gram, count in owners.items() if count > COMMON]
        for gram in common:
            del self._grams[gram]
        self.common = len(common)
        self.short = len(self._whole)

    def match(self, record: Record) -> Match | None:
        """Where the record holds an evaluation's prompt: the first place, or None."""
        asked = set(questions(record))
        for field, text in texts(record):
            sequence = units(text)
            if len(sequence) < self.n:
                # An answer may well be as short as somebody's question ("Yes.").
                place = self._whole.get(hash(" ".join(sequence))) if sequence and text in asked else None
                if place is not None:
                    return Match(record.origin, self.origins[place], field, " ".join(sequence))
                continue
            for gram in ngrams(sequence, self.n):
                place = self._grams.get(hash(gram))
                if place is not None:
                    return Match(record.origin, self.origins[place], field, gram)
        return None
