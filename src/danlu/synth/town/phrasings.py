"""Sentence patterns per language, and the small ways in which people type the same question differently."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from danlu.synth.town.facts import Language, Pool

_OPENERS: dict[Language, tuple[str, ...]] = {
    "en": ("Hello. ", "Excuse me. ", "Please help. ", "One question. "),
    "zh": ("您好，", "打扰一下，", "我想知道，", "帮个忙，"),
}
_OPENED = ("Hey", "Hello", "Hi", "Please", "喂", "请", "你好", "您好")  # questions that need no second opening
_PUNCTUATION = " ?？!！.。,，"


@lru_cache(maxsize=2)
def phrasings(language: Language) -> dict[str, Any]:
    """The table `phrasings_<language>.json`.

    `relations.<relation>` has `statements` and `pronoun` for prose; `train`, `dev` and `eval` questions, which share
    words but no wording; `answers`; `follow_*` questions that need the dialogue so far; and the clauses `first`,
    `second`, `say_first`, `say_second` that questions for two facts and their answers are joined from.
    """
    path = Path(__file__).with_name(f"phrasings_{language}.json")
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table


def fill(template: str, **slots: object) -> str:
    """Put values into `{name}` slots and begin with a capital; slots that are not given stay."""
    for name, value in slots.items():
        template = template.replace("{" + name + "}", str(value))
    return capital(template)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def join(sentences: list[str], language: Language) -> str:
    """Sentences in a row; Chinese sets no space between them."""
    return (" " if language == "en" else "").join(sentences)


def clause(text: str) -> str:
    """A sentence without its final punctuation."""
    return text.rstrip(_PUNCTUATION)


def end(text: str, language: Language) -> str:
    return text + ("." if language == "en" else "。")


def question_mark(text: str, language: Language) -> str:
    return text + ("?" if language == "en" else "？")


def typed(text: str, language: Language, pool: Pool, rng: Random) -> str:
    """The question as somebody might type it: in lower case, without the question mark, with a polite opening.

    Questions of the evaluation are left alone more often and never opened: their wording is what is new about them.
    """
    draw = rng.random()
    if draw < (0.5 if pool == "train" else 0.85):
        return text
    if draw > 0.85 and pool == "train":
        return text if text.startswith(_OPENED) else rng.choice(_OPENERS[language]) + text
    style = rng.randrange(3)
    if style != 0 and len(clause(text)) > 1 and "=" not in text:
        text = clause(text)
    return text.lower() if style != 1 else text
