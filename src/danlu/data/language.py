"""Which language a record is in, told by its script: Chinese, Latin (taken as English) or other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Literal

Language = Literal["zh", "en", "other"]

LOOKED_AT: Final = 2000  # characters; the script of a text shows at once
_HAN: Final = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f]+")
_KANA_HANGUL: Final = re.compile(r"[\u3041-\u30fa\u1100-\u11ff\uac00-\ud7af]+")
_LATIN: Final = re.compile(r"[A-Za-z]+")
_LETTERS: Final = re.compile(r"[^\W\d_]+")
# A Chinese character says about as much as four Latin letters, so a Chinese text with English names stays Chinese.
HAN_WEIGHT: Final = 4
FOREIGN_LETTERS: Final = (
    0.02  # more letters outside ASCII than that (and two for a name): Latin script, but not English
)


def language_of(texts: Iterable[str]) -> Language:
    """The language of a record's texts by script: `zh`, `en`, or `other` (also for text without letters).

    Other languages in Latin script are told from English only by their accented letters.
    """
    shown = _first(texts)
    if shown.isascii():
        return "en" if _LATIN.search(shown) else "other"
    han = _count(_HAN, shown)
    kana = _count(_KANA_HANGUL, shown)
    latin = _count(_LATIN, shown)
    foreign = _count(_LETTERS, shown) - han - kana - latin
    if kana * 5 > han and kana * HAN_WEIGHT > latin:
        return "other"
    if han and han * HAN_WEIGHT >= latin + foreign:
        return "zh"
    return "en" if latin and foreign + kana <= FOREIGN_LETTERS * latin + 2 else "other"


def _first(texts: Iterable[str]) -> str:
    found: list[str] = []
    left = LOOKED_AT
    for text in texts:
        found.append(text[:left])
        left -= len(found[-1])
        if left <= 0:
            break
    return " ".join(found)


def _count(pattern: re.Pattern[str], text: str) -> int:
    return sum(map(len, pattern.findall(text)))
