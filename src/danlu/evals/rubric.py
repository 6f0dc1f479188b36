"""Score an answer against a reference by rule: is it right, complete, polite and brief?

Nothing here knows a particular data set; `danlu eval --task rubric` uses it on users' own files. A reference
(`Prompt.reference`) is a mapping with these keys, all optional:

- `answers`: list of lists. Every inner list is one required item, and any of its variants will do:
  `[["7:30", "half past seven"], ["Ada Brook"]]` asks for a time and a name.
- `forbidden`: list of strings that make the answer wrong wherever they occur, usually the other values of the relation
  that was asked for.
- `refuse`: true when the honest answer is that one does not know. Then `answers` must be empty.
- `max_chars`: up to this many characters an answer is brief; from twice as many it is not brief at all.
- `rude`: further phrases that are rude, on top of the small bilingual list in `rubric_phrases.json`.

Other keys are left alone: a file may carry more for other evaluators.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from danlu.exceptions import DataError

# Being right counts for more than all manners together, so that a polite wrong answer never beats a rude right one.
WEIGHT_RIGHT = 0.55
WEIGHT_COMPLETE = 0.15
WEIGHT_POLITE = 0.15
WEIGHT_BRIEF = 0.15

_TERMINAL = ".!?。！？"
_CLOSERS = "\"'”’」』）)]】*"
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|[。！？]+|\n+")
# Full-width letters, digits and the colon are typing variants; punctuation such as "，" keeps its role as a separator.
_VARIANTS = {0xFF01 + i: 0x21 + i for i in range(94) if chr(0x21 + i).isalnum() or chr(0x21 + i) == ":"}
_VARIANTS |= {0x2019: 0x27, 0x2018: 0x27, 0x2212: 0x2D, 0x3000: 0x20}

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RubricScore:
    """`total` is the weighted sum of the components; all lie in [0, 1], more is better."""

    total: float
    right: float
    complete: float
    polite: float
    brief: float


@dataclass(frozen=True, slots=True)
class _Reference:
    """A reference after checking, with its strings in the form that answers are matched in."""

    answers: tuple[tuple[str, ...], ...]
    forbidden: tuple[str, ...]
    rude: tuple[str, ...]
    refuse: bool
    max_chars: int | None


def score(answer: str, reference: Mapping[str, Any], finished: bool = True) -> RubricScore:
    """Score `answer`; `finished` says whether the model ended it itself (a stop token) rather than the length limit.

    - right: the share of the required items that are stated; 0 if a forbidden value or, where an answer is known, a
      refusal occurs. With `refuse`: 1 if a refusal phrase and no forbidden value occurs, else 0.
    - complete: finished, ends with . ! ? 。 ！ ？, and states some value (right or not) where one is asked for.
    - polite: no rude phrase.
    - brief: falls linearly from 1 at `max_chars` to 0 at twice that; 0 when a sentence is repeated word for word.

    total = 0.55 right + 0.15 (complete + polite + brief). An empty answer scores 0 everywhere.

    Raises:
        DataError: the reference has a key of the wrong type.
    """
    known = _checked(reference)
    if not answer.strip():
        return RubricScore(0.0, 0.0, 0.0, 0.0, 0.0)
    text = _normal(answer)
    hits, wrong = _items(text, known)
    refused = bool(_find_any(text, _phrases("refusal")))

    if wrong or refused != known.refuse:
        right = 0.0
    elif known.answers:
        right = sum(hits) / len(known.answers)
    else:
        right = 1.0

    stated = not known.answers or any(hits) or wrong
    complete = float(finished and stated and answer.rstrip().rstrip(_CLOSERS)[-1:] in tuple(_TERMINAL))
    polite = float(not _find_any(text, (*_phrases("rude"), *known.rude)))
    brief = _brief(answer, known.max_chars)
    total = WEIGHT_RIGHT * right + WEIGHT_COMPLETE * complete + WEIGHT_POLITE * polite + WEIGHT_BRIEF * brief
    # Rounding keeps sums such as 0.55 + 0.45 exactly 1, so that equal answers compare equal.
    return RubricScore(round(total, 6), right, complete, polite, brief)


def is_correct(answer: str, reference: Mapping[str, Any]) -> bool:
    """Whether `answer` is fully right: all required items and nothing forbidden, or an honest refusal if `refuse`."""
    return score(answer, reference).right == 1.0


def _items(text: str, known: _Reference) -> tuple[list[bool], bool]:
    """Which required items occur, and whether a forbidden value does, other than as part of a longer required one.

    So a required "三十" is not taken for a forbidden "三". The reverse needs no care: where a forbidden value holds a
    required one, the answer is wrong either way.
    """
    required = [[span for variant in item for span in _find(text, variant)] for item in known.answers]
    stated = [span for spans in required for span in spans]
    forbidden = [span for value in known.forbidden for span in _find(text, value)]
    return [bool(spans) for spans in required], any(not _inside(span, stated) for span in forbidden)


def _inside(span: Span, others: Iterable[Span]) -> bool:
    """Whether `span` is a proper part of one of `others`."""
    return any(start <= span[0] and span[1] <= end and (start, end) != span for start, end in others)


def _find_any(text: str, needles: Iterable[str]) -> bool:
    return any(_find(text, needle) for needle in needles)


def _find(text: str, needle: str) -> list[Span]:
    """Places where `needle` stands as a token of its own in `text`."""
    spans = []
    start = text.find(needle)
    while start >= 0:
        end = start + len(needle)
        if _free_left(text, start) and _free_right(text, end):
            spans.append((start, end))
        start = text.find(needle, start + 1)
    return spans


def _wordlike(char: str) -> bool:
    """Letters and digits that are written with spaces between words; Chinese characters (category Lo) are not."""
    return char.isalnum() and unicodedata.category(char) != "Lo"


def _free_left(text: str, start: int) -> bool:
    """Whether a token may begin at `start`: not inside a word, and not inside a number such as 17:30, 1.5 or -3."""
    if start == 0 or not _wordlike(text[start]):
        return True
    before = text[start - 1]
    if _wordlike(before):
        return False
    if not text[start].isdigit():
        return True
    farther = text[start - 2] if start >= 2 else ""
    if before in ".:":
        return not farther.isdigit()
    if before == ",":  # thousands: "1,000" holds no "000"
        return not (farther.isdigit() and re.match(r"\d{3}(?!\d)", text[start:]))
    if before == "-":  # a sign, unless it is a minus between two operands
        return farther.isalnum() or farther == ")"
    return True


def _free_right(text: str, end: int) -> bool:
    """Whether a token may end at `end`; the mirror of `_free_left`."""
    if end == len(text) or not _wordlike(text[end - 1]):
        return True
    if _wordlike(text[end]):
        return False
    if text[end - 1].isdigit():
        return not re.match(r"[.:]\d|,\d{3}(?!\d)", text[end : end + 5])
    return True


def _brief(answer: str, max_chars: int | None) -> float:
    sentences = Counter(part for part in (_normal(piece) for piece in _SENTENCE_END.split(answer)) if part)
    if any(count > 1 for count in sentences.values()):
        return 0.0
    if max_chars is None:
        return 1.0
    return min(1.0, max(0.0, 2.0 - len(answer.strip()) / max_chars))


@lru_cache(maxsize=16384)  # the same values and phrases are looked for in answer after answer
def _normal(text: str) -> str:
    """Without differences that do not matter: case, white space, full-width digits and letters, curly quotes."""
    return " ".join(unicodedata.normalize("NFC", text).translate(_VARIANTS).casefold().split())


@lru_cache(maxsize=1)
def _phrase_table() -> Mapping[str, list[str]]:
    table: dict[str, list[str]] = json.loads(
        Path(__file__).with_name("rubric_phrases.json").read_text(encoding="utf-8"),
    )
    return table


@lru_cache(maxsize=4)
def _phrases(kind: str) -> tuple[str, ...]:
    return tuple(_normal(phrase) for phrase in _phrase_table()[kind])


def _checked(reference: Mapping[str, Any]) -> _Reference:
    if not isinstance(reference, Mapping):
        raise _bad("reference", reference, "an object with the keys answers, forbidden, refuse, max_chars, rude")
    items = reference.get("answers", [])
    if not isinstance(items, list | tuple):
        raise _bad("answers", items, "a list of lists of strings")
    answers = tuple(_strings(item, "answers", "a list of lists of strings, none of them empty") for item in items)
    if not all(answers):
        raise _bad("answers", items, "at least one variant in every inner list")
    refuse = reference.get("refuse", False)
    if not isinstance(refuse, bool):
        raise _bad("refuse", refuse, "true or false")
    if refuse and answers:
        raise _bad("answers", items, "no answers where refuse is true")
    max_chars = reference.get("max_chars")
    if max_chars is not None and (isinstance(max_chars, bool) or not isinstance(max_chars, int) or max_chars < 1):
        raise _bad("max_chars", max_chars, "a whole number of at least 1")
    forbidden = _strings(reference.get("forbidden", []), "forbidden", "a list of strings, none of them empty")
    both = {variant for item in answers for variant in item} & set(forbidden)
    if both:
        raise _bad("forbidden", sorted(both)[0], "strings that are not among the answers as well")
    rude = _strings(reference.get("rude", []), "rude", "a list of strings, none of them empty")
    return _Reference(answers, forbidden, rude, refuse, max_chars)


def _strings(value: object, field: str, expected: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise _bad(field, value, expected)
    texts = []
    for entry in value:
        if not isinstance(entry, str) or not entry.strip():
            raise _bad(field, entry, expected)
        texts.append(_normal(entry))
    return tuple(texts)


def _bad(field: str, found: object, expected: str) -> DataError:
    where = "reference" if field == "reference" else f"reference.{field}"
    return DataError(
        f"expected {expected}, found {found!r:.80}",
        field=where,
        hint="correct the reference of this prompt; danlu/evals/rubric.py lists the keys",
    )
