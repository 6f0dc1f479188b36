"""Signs in a text that something went wrong with it: broken encodings, answers cut off, tools that found nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from danlu.types import Message

UNSUPPORTED: Final = "unsupported-number"

# What is left of a text that was decoded with the wrong table, by the table that did it.
_BROKEN: Final = re.compile(
    "\ufffd"  # a decoder met bytes it could not read
    "|[\x80-\x84\x86-\x9f]"  # Windows-1252 read as Latin-1
    "|锟斤拷|烫烫烫|屯屯屯"  # U+FFFD read as GBK; uninitialised memory read as GBK
    "|ï»¿|ï¿½"  # a byte order mark, or U+FFFD, read as Windows-1252
    "|Ã[\xa0-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"  # an accented letter in UTF-8 read as Windows-1252
    "|Â[\xa0-\xbf]"  # a sign such as ° or £, likewise
    "|â€[\x80-\xbf™œžŸ˜¦¢¡¥”“’]"  # a quote, dash or ellipsis, likewise
    "|ðŸ[\x80-\xbf˜’“”•–—‘]"  # an emoji, likewise
    "|(?:[ä-é][\x80-\xbf€-™][\x80-\xbf€-™]){2}"  # Chinese in UTF-8 read as Windows-1252
    "|(?:[锛銆鈥][^\n]{0,40}){2}"  # Chinese punctuation in UTF-8 read as GBK
)
_NOTHING_FOUND: Final = re.compile(
    r"\b(?:no|zero|0) (?:search |matching |relevant )?(?:results?|matches|records?|data|entries)\b|\bnot found\b|\bnothing found\b"
    r"|\bnone found\b|未找到|没有找到|找不到|没有结果|无结果|没有相关|未查询到|查无|无相关",
    re.IGNORECASE,
)
NOTHING_AT_MOST: Final = 200  # characters; a longer result says something besides
_NUMBER: Final = re.compile(r"\d+(?:[.,]\d+)*")

_SENTENCE_END: Final = re.compile(r"[.!?。！？](?=\s|$|[\u3400-\u9fff])")
_CODE: Final = re.compile(r"```|[{};]\s*$|^\s{4,}\S|</\w+>|\bdef \w+\(|\bimport \w+", re.MULTILINE)
PROSE_FROM: Final = 200  # characters; shorter answers may end as they like: a name, a title, a line of a list
LINE_FROM: Final = 40  # a shorter last line is a heading, a list item or a signature
_TAG: Final = re.compile(r"^[#@|]|https?:|www\.|^[01]+$")
_ITEM: Final = re.compile(r"\s*(?:[-*•#|>]|\(?\d{1,3}[.)、:]|[A-Za-z][.)]\s)")


def mojibake(text: str) -> str | None:
    """The first place where the text looks like one decoded with the wrong table, with what stands around it, or None."""
    if text.isascii():
        return None
    found = _BROKEN.search(text)
    if found is None:
        return None
    return " ".join(text[max(0, found.start() - 12) : found.end() + 12].split())


def found_nothing(result: str) -> bool:
    """Whether a tool's result says that there is none."""
    return len(result) <= NOTHING_AT_MOST and _NOTHING_FOUND.search(result) is not None


def numbers(text: str) -> set[str]:
    """The numbers in a text, without what groups their digits."""
    return {found.replace(",", "").rstrip(".") for found in _NUMBER.findall(text)}


def unsupported_numbers(messages: Sequence[Message]) -> Iterator[tuple[int, str, str]]:
    """Answers with a number that nobody said, after all their tools said that they found nothing: index, number, last result."""
    said: set[str] = set()
    results: list[str] = []
    for index, message in enumerate(messages):
        text = message["content"]
        if message["role"] == "tool":
            results.append(text)
        elif message["role"] == "user":
            results = []
        elif message["role"] == "assistant" and results and text.strip():
            invented = sorted(numbers(text) - said) if all(map(found_nothing, results)) else []
            if invented:
                yield index, invented[0], results[-1]
            results = []
        said |= numbers(text)


def has_stop(answer: str) -> bool:
    """Whether an answer ends as texts end: with punctuation (no comma), a closing quote or bracket, or a sign such as an emoji."""
    end = answer.rstrip()[-1:]
    return end not in ",，、" and not end.isalnum()


def is_prose(answer: str) -> bool:
    """Whether an answer is running text of some length, so that its end tells whether it was cut off."""
    if len(answer) < PROSE_FROM:
        return False
    last = answer.rstrip().rpartition("\n")[2]
    if len(last) < LINE_FROM or _ITEM.match(last) or _TAG.search(last.split()[-1]):
        return False
    return _CODE.search(answer) is None and len(_SENTENCE_END.findall(answer)) >= 3


_PLACEHOLDER: Final = re.compile(r"\{\{ ?[A-Za-z_]\w* ?\}\}")


def placeholder(text: str) -> str | None:
    """The first `{{name}}` in a text, or None."""
    found = _PLACEHOLDER.search(text) if "{{" in text else None
    return found[0] if found else None
