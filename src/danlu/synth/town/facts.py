"""The facts of an invented town, in English and Chinese, drawn by a seed from closed sets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

Language = Literal["en", "zh"]
Relation = Literal["owner", "opens", "closes", "product", "price", "distance", "street"]
Operator = Literal["+", "-"]
Pool = Literal["train", "dev", "eval"]

LANGUAGES: tuple[Language, ...] = ("en", "zh")
RELATIONS: tuple[Relation, ...] = ("owner", "opens", "closes", "product", "price", "distance", "street")

_LARGEST = 20  # of any number in a sum
_STREETS = 12


@dataclass(frozen=True, slots=True)
class Name:
    """One thing in both languages; numbers and times are written with digits and the same in both."""

    en: str
    zh: str

    def text(self, language: Language) -> str:
        return self.en if language == "en" else self.zh


@dataclass(frozen=True, slots=True)
class Fact:
    """`relation` of `place` is `value`. Prices are in coins, distances in metres from the station."""

    place: Name
    relation: Relation
    value: Name

    @property
    def key(self) -> str:
        """Identifies the fact across languages, e.g. `opens/Mill Bakery`."""
        return f"{self.relation}/{self.place.en}"


@dataclass(frozen=True, slots=True)
class Sum:
    """`a + b` or `a - b`, between 0 and 20; the result is never one of the operands, so it can be told from them."""

    operator: Operator
    a: int
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.operator == "+" else self.a - self.b


@dataclass(frozen=True, slots=True)
class Town:
    """All that is true in the town of one seed."""

    seed: int
    name: Name
    places: tuple[Name, ...]
    facts: tuple[Fact, ...]
    sums: Mapping[Pool, tuple[Sum, ...]]
    _index: Mapping[tuple[str, Relation], Fact]
    _values: Mapping[Relation, tuple[Name, ...]]

    def fact(self, place: Name, relation: Relation) -> Fact:
        return self._index[place.en, relation]

    def values(self, relation: Relation, language: Language) -> tuple[str, ...]:
        """The different values that a relation takes in this town."""
        return tuple(value.text(language) for value in self._values[relation])

    def others(self, fact: Fact, language: Language) -> tuple[str, ...]:
        """The values of the same relation that are wrong for this place."""
        return tuple(text for text in self.values(fact.relation, language) if text != fact.value.text(language))


def town_facts(seed: int) -> Town:
    """The town of a seed: places and names are fixed, who owns what and when it opens is drawn."""
    table = _table()
    rng = Random(f"{seed}/facts")
    places = tuple(Name(*row["name"]) for row in table["places"])
    count = len(places)
    drawn: dict[Relation, list[Name]] = {
        "owner": [Name(*pair) for pair in rng.sample(table["owners"], count)],
        "opens": [_same(rng.choice(table["opens"])) for _ in places],
        "closes": [_same(rng.choice(table["closes"])) for _ in places],
        "product": [Name(*rng.choice(row["products"])) for row in table["places"]],
        "price": [_same(value) for value in rng.sample(range(table["prices"][0], table["prices"][1] + 1), count)],
        "distance": [_same(value) for value in rng.sample(range(*table["distances"]), count)],
        "street": _streets(table["streets"], count, rng),
    }
    facts = tuple(
        Fact(place, relation, drawn[relation][row]) for row, place in enumerate(places) for relation in RELATIONS
    )
    return Town(
        seed=seed,
        name=Name(*table["town"]),
        places=places,
        facts=facts,
        sums=_sums(Random(f"{seed}/sums")),
        _index={(fact.place.en, fact.relation): fact for fact in facts},
        _values={relation: tuple(dict.fromkeys(drawn[relation])) for relation in RELATIONS},
    )


def _streets(pairs: list[list[str]], count: int, rng: Random) -> list[Name]:
    """Streets are shared by about two places each, so that no place gives its street away."""
    chosen = rng.sample(pairs, _STREETS)
    spread = [Name(*chosen[row % _STREETS]) for row in range(count)]
    rng.shuffle(spread)
    return spread


def _same(value: object) -> Name:
    return Name(str(value), str(value))


def _sums(rng: Random) -> dict[Pool, tuple[Sum, ...]]:
    """Sums by pool; `3 + 4` and `4 + 3` stay together, or the one would give the other away."""
    groups: dict[tuple[str, int, int], list[Sum]] = {}
    for a in range(1, _LARGEST + 1):
        for b in range(1, _LARGEST + 1):
            if a + b <= _LARGEST:
                groups.setdefault(("+", min(a, b), max(a, b)), []).append(Sum("+", a, b))
            if a >= b and a != 2 * b:
                groups.setdefault(("-", a, b), []).append(Sum("-", a, b))
    order = list(groups.values())
    rng.shuffle(order)
    first, second = len(order) // 8, len(order) // 6
    parts: dict[Pool, list[list[Sum]]] = {"eval": order[:first], "dev": order[first:second], "train": order[second:]}
    return {pool: tuple(entry for group in part for entry in group) for pool, part in parts.items()}


def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("places.json").read_text(encoding="utf-8"))
    return table
