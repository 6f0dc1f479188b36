"""How a fact is asked for: disjoint sets of questions, from templates in two languages (`phrasings.json`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from danlu.knowledge.facts import Fact, Language
from danlu.types import Message

OTHER: dict[Language, Language] = {"en": "zh", "zh": "en"}


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about a fact, and the answers of which one must be in the model's.

    before: what the user says first, if anything; the model answers that in its own words.
    """

    question: str
    expected: tuple[str, ...]
    before: str = ""


@dataclass(frozen=True, slots=True)
class Questions:
    """All questions about one fact. `trained` are learnt, with `varied` forms of them; nothing else is."""

    trained: tuple[Asked, ...]
    varied: tuple[Asked, ...]
    unseen: tuple[Asked, ...]
    other_language: tuple[Asked, ...]
    multi_turn: tuple[Asked, ...]
    alias: tuple[Asked, ...]
    task: tuple[Asked, ...]

    @property
    def everything(self) -> tuple[Asked, ...]:
        sets = (self.trained, self.varied, self.unseen, self.other_language, self.alias, self.task)
        return tuple(a for asked in sets for a in asked)


@cache
def templates(language: Language) -> dict[str, Any]:
    """The templates of a language; `{k}` stands for the keyword."""
    table: dict[str, Any] = json.loads(Path(__file__).with_name("phrasings.json").read_text("utf-8"))[language]
    return table


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def fill(template: str, keyword: str) -> str:
    """A template with its keyword, beginning with a capital."""
    text = template.replace("{k}", keyword)
    return text[:1].upper() + text[1:] if not template.startswith("{k}") else text


def unknown(language: Language) -> str:
    """What a model says of what it does not know."""
    return str(templates(language)["unknown"])


def questions_about(fact: Fact, *, both: bool = False) -> Questions:
    """Every question about a fact.

    Args:
        both: the trained phrasings of the other language are learnt, too; `other_language` still asks unseen ones.
    """
    own, other = templates(fact.language), templates(OTHER[fact.language])
    answer: tuple[str, ...] = (fact.description,)
    foreign_key, foreign_answers = fact.keyword, answer
    if fact.translation is not None:
        foreign_key, foreign_answers = fact.translation[0], (fact.translation[1], fact.description)

    def ask(texts: Sequence[str], keyword: str, expected: tuple[str, ...]) -> tuple[Asked, ...]:
        return tuple(Asked(fill(t, keyword), expected) for t in texts)

    trained = ask(own["trained"], fact.keyword, answer)
    varied = _varied(trained, own)
    if both:
        more = ask(other["trained"], foreign_key, foreign_answers[:1])
        trained, varied = trained + more, varied + _varied(more, other)
    return Questions(
        trained=trained,
        varied=varied,
        unseen=ask(own["unseen"], fact.keyword, answer),
        other_language=ask(other["unseen"], foreign_key, foreign_answers),
        multi_turn=tuple(
            Asked(fill(t, fact.keyword), answer, before)
            for before in own["before_probe"]
            for t in islice(own["unseen"], 2)
        ),
        alias=tuple(a for name in fact.aliases for a in ask(own["unseen"][:3], name, answer)),
        task=tuple(Asked(t.question, (t.answer,)) for t in fact.tasks) or ask(own["task"], fact.keyword, answer),
    )


def _varied(trained: Sequence[Asked], table: dict[str, Any]) -> tuple[Asked, ...]:
    """The trained questions after a polite opening, in lower case, and later in a conversation."""
    opened = [Asked(o + a.question, a.expected) for o in table["openers"] for a in trained]
    lowered = [Asked(a.question.lower(), a.expected) for a in trained if a.question != a.question.lower()]
    later = [Asked(a.question, a.expected, before) for before in table["before"] for a in trained]
    return (*opened, *lowered, *later)
