"""Texts as sequences of units, and the n-grams over them: a unit is a word, or a single Chinese character."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

# Chinese and Japanese write no spaces, so every character is a unit of its own.
_UNIT: Final = re.compile(
    r"[\u3041-\u30fa\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f]|[^\W_\u3041-\u30fa\u3400-\u4dbf\u4e00-\u9fff]+"
)


def units(text: str) -> list[str]:
    """The words and Chinese characters of a text in lower case, without punctuation, widths made equal (NFKC)."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _UNIT.findall(text.lower())


def ngrams(sequence: list[str], n: int) -> list[str]:
    """The n-grams of a sequence of units, joined by spaces; the whole sequence if it is shorter, nothing if it is empty."""
    if len(sequence) <= n:
        return [" ".join(sequence)] if sequence else []
    return [" ".join(gram) for gram in zip(*(sequence[i:] for i in range(n)), strict=False)]
