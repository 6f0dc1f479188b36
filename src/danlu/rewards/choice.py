"""Which option of a multiple-choice question an answer settles on, in English and Chinese."""

from __future__ import annotations

import re
import string
import unicodedata
from typing import Final

LETTERS: Final = string.ascii_uppercase
# A letter, perhaps in brackets, bold or LaTeX's \text. As an article ("is A dog") or a pronoun ("I think") it is none.
_OPEN: Final = r"[\s*_$\"'“‘「【\[(]*(?:\\(?:text|mathrm|textbf|mathbf)\{[\s(]*)?"
_LETTER: Final = r"([A-Z])(?![A-Za-z0-9'’])"
_WORDS_AFTER: Final = "because|since|as|and|or|but|which|for|due|is|was"
_CONCLUSIONS: Final = re.compile(
    rf"\\boxed\{{{_OPEN}{_LETTER}"
    rf"|(?i:\b(?:answers?|choice|option)(?:\s+(?:must|should|would|will)\s+be|\s+is|\s*[:=])\s*:?"
    rf"(?:\s+(?:option|choice|letter))?)(?:\s+the\s+letter)?{_OPEN}{_LETTER}"
    rf"|(?i:\b(?:i|we)(?:\s+(?:would|will))?\s+(?:choose|pick|select)(?:\s+(?:option|choice))?){_OPEN}{_LETTER}"
    rf"|(?i:\b(?:option|choice)\s+){_OPEN}{_LETTER}[)*_\"'\]]*\s+(?i:is\s+(?:the\s+)?(?:correct|right|best))"
    rf"|答案[】\])」]?(?:应该|应当|应)?(?:是|为|选|就是)?\s*:?\s*(?:选项)?{_OPEN}{_LETTER}"
    rf"|(?<!不)(?<!不能)(?<!不应)(?<!不该)选(?:择|项为|项是)?\s*:?{_OPEN}{_LETTER}"
    rf"|(?:选项|(?<![A-Za-z0-9])){_LETTER}[)\]」】]*\s*(?:选项|项)?(?:是|为)?(?:正确|对)(?:的|答案)?"
)
# Alone: at the beginning of a line, as in "B." and "B) Paris", or in brackets.
_BARE: Final = re.compile(
    rf"^\s*[(\[*_\"]*{_LETTER}(?:[)\]*_\":.,、。]|\s*$)|(?<!not )(?<!n't )(?<!不)(?<!不是)(?<!不选)[(\[【]{_LETTER}[)\]】]",
    re.MULTILINE,
)
# A further letter beside the first, of which nothing else is said: "B or C", but not "B, A is wrong".
_SECOND: Final = re.compile(
    r"[)\]}*_\"'\s]*(?:or|and|/|,|、|或者?|和|与|及)\s*[(\[*_]*([A-Z])(?![A-Za-z0-9'’]|[)\]*_]*\s*(?:is|was|选项|不|错|:))"
)
_ALONE: Final = re.compile(r"(?<![A-Za-z0-9])[A-Z](?![A-Za-z0-9'’])")
_ARTICLE: Final = re.compile(rf"\s+(?!(?:{_WORDS_AFTER})\b)[a-z]")


def letter_in(text: str, options: int = 4) -> str | None:
    """The letter that an answer settles on, or None.

    What is stated as a conclusion counts ("The answer is (B)", "答案是B", "选B", "\\boxed{B}"), the last one if there are several,
    and none if it names two. Without a conclusion, letters that stand alone ("B.", "(B)") count if they are all the same.

    Args:
        options: how many there are, from A on; 1 to 26.
    """
    plain = unicodedata.normalize("NFKC", text)
    stated = [(m.start(), *_reading(plain, m, options)) for m in _CONCLUSIONS.finditer(plain)]
    readings = [(letter, sure) for _, letter, sure in sorted(stated) if letter]
    if readings:
        letter, sure = readings[-1]
        return letter if sure else None
    if any(_has_second(plain[m.end() :], options) for m in _ALONE.finditer(plain)):
        return None
    bare = {m[1] or m[2] for m in _BARE.finditer(plain)} & set(LETTERS[:options])
    return bare.pop() if len(bare) == 1 else None


def _reading(text: str, match: re.Match[str], options: int) -> tuple[str, bool]:
    """The letter of a conclusion, "" if it is none of the options, and whether it is the only one that is named."""
    group = next(i for i, found in enumerate(match.groups(), 1) if found)
    letter, rest = match[group], text[match.end(group) :]
    if letter not in LETTERS[:options] or (letter in "AI" and _ARTICLE.match(rest)):
        return "", False
    return letter, not _has_second(rest, options)


def _has_second(rest: str, options: int) -> bool:
    """Whether another option is named right after a letter."""
    found = _SECOND.match(rest)
    if found is None or found[1] not in LETTERS[:options]:
        return False
    return not (found[1] in "AI" and _ARTICLE.match(rest[found.end(1) :]))
