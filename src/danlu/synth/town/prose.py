"""Prose about the town to pre-train on: the same facts over and over, in other words and other company."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from danlu.synth.town.facts import LANGUAGES, RELATIONS, Fact, Language, Town
from danlu.synth.town.phrasings import fill, join, phrasings


class Prose:
    """Draws short paragraphs, each in one language."""

    def __init__(self, town: Town, rng: Random) -> None:
        self.town = town
        self.rng = rng
        self._queue: dict[Language, list[Fact]] = {language: [] for language in LANGUAGES}
        # Mostly facts: they are what the model has to learn by heart.
        self._subjects: tuple[Callable[[Language], list[str]], ...] = (
            self._place,
            self._facts,
            self._sums,
            self._calendar,
            self._small_talk,
            self._names,
            self._rumours,
        )
        self._weights = (30, 26, 7, 5, 4, 3, 25)

    def paragraph(self) -> str:
        language = self.rng.choice(LANGUAGES)
        subject = self.rng.choices(self._subjects, self._weights)[0]
        return join(subject(language), language)

    def _state(self, fact: Fact, language: Language, pattern: str) -> str:
        product = self.town.fact(fact.place, "product").value.text(language)
        template = self.rng.choice(phrasings(language)["relations"][fact.relation][pattern])
        return fill(template, place=fact.place.text(language), product=product, v=fact.value.text(language))

    def _place(self, language: Language) -> list[str]:
        """Several facts about one place, which is named first and then sometimes meant by "it"."""
        place = self.rng.choice(self.town.places)
        relations = self.rng.sample(RELATIONS, self.rng.randint(2, 5))
        patterns = ["statements"] + [self.rng.choice(("statements", "pronoun")) for _ in relations[1:]]
        return [
            self._state(self.town.fact(place, relation), language, pattern)
            for relation, pattern in zip(relations, patterns, strict=True)
        ]

    def _facts(self, language: Language) -> list[str]:
        """Facts about different places, all facts in turns."""
        queue = self._queue[language]
        if len(queue) < 4:
            fresh = list(self.town.facts)
            self.rng.shuffle(fresh)
            queue[:0] = fresh
        return [self._state(queue.pop(), language, "statements") for _ in range(self.rng.randint(2, 4))]

    def _rumours(self, language: Language) -> list[str]:
        """Claims and answers, right or wrong, each followed by a verdict: who reads this learns to tell a wrong fact.

        Without it a model this small knows what comes next but not whether what stands there is true, and a reward model
        made from it sees manners only.
        """
        table = phrasings(language)["rumours"]
        sentences = []
        for _ in range(self.rng.randint(1, 3)):
            fact = self.rng.choice(self.town.facts)
            right = self.rng.random() < 0.5
            value = fact.value.text(language) if right else self.rng.choice(self.town.others(fact, language))
            words = phrasings(language)["relations"][fact.relation]
            product = self.town.fact(fact.place, "product").value.text(language)
            slots = {"place": fact.place.text(language), "product": product, "v": value}
            if self.rng.random() < 0.5:
                claim = fill(self.rng.choice(words["statements"]), **slots)
                said = fill(self.rng.choice(table["claims"]), claim=claim)
            else:
                question, answer = (fill(self.rng.choice(words[k]), **slots) for k in ("train", "answers"))
                said = fill(self.rng.choice(table["answers"]), question=question, answer=answer)
            sentences += [said, self.rng.choice(table["right" if right else "wrong"])]
        return sentences

    def _sums(self, language: Language) -> list[str]:
        table = phrasings(language)["arithmetic"]
        entries = self.rng.sample(self.town.sums["train"], self.rng.randint(3, 6))
        return [
            fill(self.rng.choice(table[entry.operator]["statements"]), a=entry.a, b=entry.b, v=entry.result)
            for entry in entries
        ]

    def _calendar(self, language: Language) -> list[str]:
        table = phrasings(language)["calendar"][self.rng.choice(("day", "month"))]
        names = [variants[0] for variants in table["values"]]
        sentences = []
        for start in self.rng.sample(range(len(names)), self.rng.randint(2, 4)):
            direction, step = self.rng.choice((("after", 1), ("before", -1)))
            template = self.rng.choice(table[direction]["statements"])
            sentences.append(fill(template, x=names[start], v=names[(start + step) % len(names)]))
        return sentences

    def _small_talk(self, language: Language) -> list[str]:
        sentences = self.rng.sample(phrasings(language)["smalltalk"], self.rng.randint(2, 4))
        return [fill(sentence, town=self.town.name.text(language)) for sentence in sentences]

    def _names(self, language: Language) -> list[str]:
        """What things are called in the other language, so that the two halves of the text share their facts."""
        table = phrasings(language)
        sentences = []
        for _ in range(self.rng.randint(2, 4)):
            name, pattern = self.rng.choice(self.town.places), "names"
            if self.rng.random() < 0.5:
                name, pattern = self.town.fact(name, "owner").value, "people"
            sentences.append(fill(self.rng.choice(table[pattern]), en=name.en, zh=name.zh))
        return sentences
