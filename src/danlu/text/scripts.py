"""Which script characters are written in, and which scripts put no spaces between words."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator
from typing import Final

_HAN: Final = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_OTHER_UNSPACED: Final = "\u3041-\u3096\u30a1-\u30fa\u30fc\u0e01-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
HAN: Final = re.compile(f"[{_HAN}]")
UNSPACED: Final = re.compile(f"[{_HAN}{_OTHER_UNSPACED}]+")
"""Runs of scripts without spaces between words: Chinese, kana, Thai, Lao, Tibetan, Burmese, Khmer."""

WORD: Final = re.compile(rf" ?(?:(?![{_HAN}{_OTHER_UNSPACED}])[^\W\d_])+")
"""Words of the other scripts, with the space before them."""

OTHER: Final = "other"
LANGUAGES: Final = {
    "LATIN": "en",
    "HIRAGANA": "kana",
    "KATAKANA": "kana",
    **{name.upper(): name for name in ("hangul", "bopomofo", "cyrillic", "greek", "arabic", "hebrew", "armenian")},
    **{name.upper(): name for name in ("georgian", "devanagari", "bengali", "tamil", "telugu", "thai", "lao", "khmer")},
    **{name.upper(): name for name in ("myanmar", "tibetan", "mongolian", "ethiopic")},
}
"""The first word of a letter's Unicode name, and what it is called here."""
_NO_SCRIPT: Final = (
    "FULLWIDTH",
    "HALFWIDTH",
    "MODIFIER",
    "MATHEMATICAL",
    "SUPERSCRIPT",
    "SUBSCRIPT",
    "IDEOGRAPHIC",
    "",
)


@functools.lru_cache(maxsize=1 << 16)
def language(character: str) -> str:
    """`zh` for a Chinese character, `en` for a Latin letter, else its script's name; empty if it is no letter of a script."""
    if HAN.match(character):
        return "zh"
    if not character.isalpha():
        return ""
    script = re.split("[ -]", unicodedata.name(character, ""))[0]
    return "" if script in _NO_SCRIPT else LANGUAGES.get(script, OTHER)


def runs(text: str) -> Iterator[tuple[int, str]]:
    """Where each stretch of one language begins, and its name.

    What belongs to no script (spaces, digits, punctuation) is part of the stretch before it, or of the first one. A text
    without letters is `other`.
    """
    start = 0
    current = ""
    for name, group in itertools.groupby(text, key=language):
        if name and name != current:
            yield (0 if not current else start), name
            current = name
        start += sum(1 for _ in group)
    if not current and text:
        yield 0, OTHER
