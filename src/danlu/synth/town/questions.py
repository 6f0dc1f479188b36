"""Questions about the town, each with all that is needed to write right and wrong answers and to judge any answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

from danlu.exceptions import DataError
from danlu.synth.town.facts import LANGUAGES, RELATIONS, Fact, Language, Pool, Relation, Town
from danlu.synth.town.phrasings import end, fill, phrasings, question_mark, typed
from danlu.types import Message

Kind = Literal["fact", "two_fact", "follow_up", "refuse", "arithmetic", "calendar", "chat"]

# Pairs of relations that one question asks for together. What "eval" and "dev" pair is never paired in training, where
# every relation still occurs with several others. Product and price never go together: to ask the price is to name the
# product.
_PAIRS: dict[Pool, tuple[tuple[Relation, Relation], ...]] = {
    "eval": (
        ("owner", "opens"), ("owner", "closes"), ("closes", "street"), ("price", "distance"), ("product", "opens"),
    ),
    "dev": (("opens", "street"), ("closes", "price")),
    "train": (
        ("owner", "product"), ("owner", "price"), ("owner", "distance"), ("owner", "street"), ("opens", "closes"),
        ("opens", "price"), ("opens", "distance"), ("closes", "product"), ("closes", "distance"),
        ("product", "distance"), ("product", "street"), ("price", "street"), ("distance", "street"),
    ),
}  # fmt: skip
_MARGIN = 8  # characters that an answer may be longer than ours and still count as brief
_ATTEMPTS = 60


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt (ending with the user's turn) and what is known of its answers.

    Attributes:
        kind: what is asked for.
        language: of question and answer.
        key: the fact asked for (`Fact.key`), or "".
        prompt: messages so far.
        templates: good answers, with slots.
        slots: the right value of every slot.
        others: wrong values of every slot.
        invented: whole wrong answers, where there is no slot to fill wrongly.
        halves: good answers to one half of a question for two things.
        reference: what the rubric judges answers by.
    """

    kind: Kind
    language: Language
    key: str
    prompt: tuple[Message, ...]
    templates: tuple[str, ...]
    slots: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    invented: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()
    reference: Mapping[str, Any] = field(default_factory=dict)

    def answers(self, rng: Random) -> tuple[str, str]:
        """A right and a wrong answer in the same wording, if the question has an answer at all."""
        template = rng.choice(self.templates)
        right = fill(template, **self.slots)
        if not self.slots:
            return right, rng.choice(self.invented)
        slot = rng.choice(sorted(self.slots))
        return right, fill(template, **{**self.slots, slot: rng.choice(self.others[slot])})


class Questioner:
    """Draws questions of one pool (training, dev or evaluation wordings)."""

    def __init__(self, town: Town, pool: Pool, rng: Random) -> None:
        self.town = town
        self.pool = pool
        self.rng = rng
        self._queue: dict[Language, list[Fact]] = {language: [] for language in LANGUAGES}

    def batch(self, counts: Mapping[Kind, int]) -> list[Question]:
        """That many questions of each kind, half of them in each language, shuffled.

        Facts are taken in turns, so that all are asked for about equally often. No prompt occurs twice as long as the
        wordings last; the evaluation never repeats one.
        """
        seen: set[tuple[str, ...]] = set()
        drawn = []
        for kind, count in counts.items():
            for number in range(count):
                language = LANGUAGES[number % 2]
                fact = self._next_fact(language)
                for _ in range(_ATTEMPTS):
                    question = self.ask(kind, language, fact)
                    said = tuple(message["content"].casefold() for message in question.prompt)
                    if said not in seen:
                        break
                else:
                    if self.pool == "eval":
                        raise DataError(f"cannot find {count} different questions of kind {kind}", hint="ask for fewer")
                seen.add(said)
                drawn.append(question)
        self.rng.shuffle(drawn)
        return drawn

    def ask(self, kind: Kind, language: Language, fact: Fact) -> Question:
        """One question; `fact` is what it is about for the kinds that ask for facts."""
        if kind == "fact":
            return self._fact(language, fact)
        if kind == "two_fact":
            return self._two_facts(language, fact)
        if kind == "follow_up":
            return self._follow_up(language, fact)
        if kind == "refuse":
            return self._refuse(language)
        if kind == "arithmetic":
            return self._arithmetic(language)
        if kind == "calendar":
            return self._calendar(language)
        return self._chat(language)

    def beside(self, question: Question) -> Question:
        """A question for another fact about the same place (any place, if `question` is about none)."""
        known = [fact for fact in self.town.facts if fact.key == question.key]
        near = [fact for fact in self.town.facts if known and fact.place == known[0].place and fact.key != question.key]
        return self._fact(question.language, self.rng.choice(near or self.town.facts))

    def _next_fact(self, language: Language) -> Fact:
        if not self._queue[language]:
            self._queue[language] = list(self.town.facts)
            self.rng.shuffle(self._queue[language])
        return self._queue[language].pop()

    def _typed(self, text: str, language: Language) -> str:
        return typed(text, language, self.pool, self.rng)

    def _names(self, fact: Fact, language: Language) -> dict[str, str]:
        product = self.town.fact(fact.place, "product").value
        return {"place": fact.place.text(language), "product": product.text(language)}

    def _fact(self, language: Language, fact: Fact) -> Question:
        table = phrasings(language)["relations"][fact.relation]
        names = self._names(fact, language)
        asked = self._typed(fill(self.rng.choice(table[self.pool]), **names), language)
        return self._about(fact, language, "fact", (user(asked),))

    def _about(self, fact: Fact, language: Language, kind: Kind, prompt: tuple[Message, ...]) -> Question:
        """A question for one fact, whatever its wording."""
        table = phrasings(language)["relations"][fact.relation]
        names = self._names(fact, language)
        value = fact.value.text(language)
        others = self.town.others(fact, language)
        return _judged(
            Question(
                kind=kind,
                language=language,
                key=fact.key,
                prompt=prompt,
                templates=tuple(fill(template, **names) for template in table["answers"]),
                slots={"v": value},
                others={"v": others},
            ),
            answers=[[value]],
            forbidden=list(others),
        )

    def _two_facts(self, language: Language, fact: Fact) -> Question:
        """Two facts about one place. The pair decides the relations, so only the place of `fact` counts."""
        relations = list(self.rng.choice(_PAIRS[self.pool]))
        self.rng.shuffle(relations)
        one, two = (self.town.fact(fact.place, relation) for relation in relations)
        table = phrasings(language)
        first, second = table["relations"][one.relation], table["relations"][two.relation]
        names = self._names(fact, language)
        joiner = table["joiner"]
        asked = question_mark(self.rng.choice(first["first"]) + joiner + self.rng.choice(second["second"]), language)
        said_two = joiner + second["say_second"].replace("{v}", "{v2}")
        starts = (first["say_first"], first["say_second"])
        values = [one.value.text(language), two.value.text(language)]
        others = [self.town.others(one, language), self.town.others(two, language)]
        return _judged(
            Question(
                kind="two_fact",
                language=language,
                key="",
                prompt=(user(self._typed(fill(asked, **names), language)),),
                templates=tuple(
                    end(fill(start.replace("{v}", "{v1}") + said_two, **names), language) for start in starts
                ),
                slots={"v1": values[0], "v2": values[1]},
                others={"v1": others[0], "v2": others[1]},
                halves=tuple(
                    end(fill(table["relations"][half.relation][form], **names, v=half.value.text(language)), language)
                    for half in (one, two)
                    for form in ("say_first", "say_second")
                ),
            ),
            answers=[[value] for value in values],
            forbidden=[*others[0], *others[1]],
        )

    def _follow_up(self, language: Language, fact: Fact) -> Question:
        """A later turn about the same place: "And when does it close?". In training also around small talk."""
        draw = self.rng.random()
        if self.pool == "train" and draw < 0.1:
            return self._after(self._chat(language, "greeting"), self._fact(language, fact))
        if self.pool == "train" and draw < 0.2:
            return self._after(self._fact(language, fact), self._chat(language, "thanks"))
        given_away = "price" if fact.relation == "product" else ""  # a price question names the product
        others = (self.town.fact(fact.place, relation) for relation in RELATIONS if relation != fact.relation)
        asked = self.rng.sample([other for other in others if other.relation != given_away], 2 if draw > 0.85 else 1)
        question = self._fact(language, asked[0])
        for later in (*asked[1:], fact):
            table = phrasings(language)["relations"][later.relation]
            text = self._typed(
                fill(self.rng.choice(table[f"follow_{self.pool}"]), **self._names(later, language)), language
            )
            question = self._after(question, self._about(later, language, "follow_up", (user(text),)))
        return question

    def _after(self, before: Question, question: Question) -> Question:
        """`question` as the next turn, after `before` was answered well."""
        answer, _ = before.answers(self.rng)
        return replace(question, kind="follow_up", prompt=(*before.prompt, assistant(answer), *question.prompt))

    def _refuse(self, language: Language) -> Question:
        """Something nobody here can know: an unknown place, a relation without facts, or the world outside."""
        table = phrasings(language)
        draw = self.rng.random()
        if draw < 0.15:
            row = self.rng.choice(table["outside"][self.pool])
            return self._unknown(language, row["ask"], (), [row["invent"]])
        if draw < 0.55:
            row = self.rng.choice(table["missing"][self.pool])
            place = self.rng.choice(self.town.places).text(language)
            values = self.town.values(row["like"], language)
            invented = [fill(row["invent"], v=value) for value in values]
            return self._unknown(language, fill(row["ask"], place=place), values, invented)
        fact = self.rng.choice(self.town.facts)
        relation = table["relations"][fact.relation]
        product = self._names(fact, language)["product"]
        names = {"place": self.rng.choice(table["unknown_places"][self.pool]), "product": product}
        values = self.town.values(fact.relation, language)
        said = fill(self.rng.choice(relation["answers"]), **names)
        asked = fill(self.rng.choice(relation[self.pool]), **names)
        return self._unknown(language, asked, values, [fill(said, v=value) for value in values])

    def _unknown(self, language: Language, asked: str, forbidden: tuple[str, ...], invented: list[str]) -> Question:
        return _judged(
            Question(
                kind="refuse",
                language=language,
                key="",
                prompt=(user(self._typed(asked, language)),),
                templates=tuple(phrasings(language)["refusals"]),
                invented=tuple(invented),
            ),
            refuse=True,
            forbidden=list(forbidden),
        )

    def _arithmetic(self, language: Language) -> Question:
        entry = self.rng.choice(self.town.sums[self.pool])
        table = phrasings(language)["arithmetic"][entry.operator]
        names = {"a": entry.a, "b": entry.b}
        known = {entry.a, entry.b, entry.result}
        others = tuple(str(number) for number in range(21) if number not in known)
        asked = fill(self.rng.choice(table[self.pool]), **names)
        return _judged(
            Question(
                kind="arithmetic",
                language=language,
                key="",
                prompt=(user(self._typed(asked, language)),),
                templates=tuple(fill(template, **names) for template in table["answers"]),
                slots={"v": str(entry.result)},
                others={"v": others},
            ),
            answers=[[str(entry.result)]],
            forbidden=list(others),
        )

    def _calendar(self, language: Language) -> Question:
        table = phrasings(language)["calendar"][self.rng.choice(("day", "month"))]
        step = self.rng.choice((1, -1))
        row = table["after" if step == 1 else "before"]
        names: list[list[str]] = table["values"]
        start = self.rng.randrange(len(names))
        target = (start + step) % len(names)
        others = [name for number, name in enumerate(names) if number not in (start, target)]
        asked = fill(self.rng.choice(row[self.pool]), x=names[start][0])
        return _judged(
            Question(
                kind="calendar",
                language=language,
                key="",
                prompt=(user(self._typed(asked, language)),),
                templates=tuple(fill(template, x=names[start][0]) for template in row["answers"]),
                slots={"v": names[target][0]},
                others={"v": tuple(name[0] for name in others)},
            ),
            answers=[names[target]],
            forbidden=[variant for name in others for variant in name],
        )

    def _chat(self, language: Language, topic: str = "") -> Question:
        table = phrasings(language)["chat"]
        topic = topic or self.rng.choice(sorted(table))
        row = table[topic]
        text = self.rng.choice(row[self.pool])
        invented = [answer for other in sorted(table) if other != topic for answer in table[other]["answers"]]
        # The evaluation has one line per wording; a variant of case would only repeat it.
        asked = text if self.pool == "eval" else self._typed(text, language)
        return _judged(
            Question(
                kind="chat",
                language=language,
                key="",
                prompt=(user(asked),),
                templates=tuple(row["answers"]),
                invented=tuple(answer for answer in invented if not any(word in answer for word in row["accept"])),
            ),
            answers=[row["accept"]],
        )


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _judged(question: Question, **reference: Any) -> Question:
    """The question with its reference; brevity is measured against our own longest good answer."""
    longest = max(len(fill(template, **question.slots)) for template in question.templates)
    return replace(question, reference={**reference, "max_chars": longest + _MARGIN})
