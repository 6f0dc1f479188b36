"""The questions that a model must go on answering as it does: some to train on, others to measure on, never the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from danlu.data.sources import read_sources
from danlu.exceptions import DataError
from danlu.knowledge.facts import Fact, key_of
from danlu.knowledge.phrasings import fill, templates, user
from danlu.knowledge.probe import plain
from danlu.train_config import Sources
from danlu.types import Comparison, Conversation, Message, Prompt

LANGUAGES = ("en", "zh")
HALVES = 2
REPLAY_WAYS = 4  # phrasings in which each other name is asked for in training


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that ends with the user's turn; `reference`: the data's own answer, if it has one."""

    messages: tuple[Message, ...]
    reference: str = ""

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class Pool:
    """Questions by use: `replay` is trained on, `probes` is measured on; contrast asks for other names with a fact's phrasings."""

    replay: tuple[Question, ...]
    probes: tuple[Question, ...]


@cache
def shipped() -> dict[str, Any]:
    """Danlu's own questions and names (`questions.json`)."""
    table: dict[str, Any] = json.loads(Path(__file__).with_name("questions.json").read_text("utf-8"))
    return table


def shipped_pool() -> Pool:
    """General questions in both languages."""
    return Pool(
        tuple(Question((user(q),)) for lang in LANGUAGES for q in shipped()[lang]["replay"]),
        tuple(Question((user(q),)) for lang in LANGUAGES for q in shipped()[lang]["probe"]),
    )


def read_pool(sources: Sources, seed: int) -> Pool:
    """The prompts of data of any kind, each once, in a seeded order, halved by a hash of their text.

    Raises:
        DataError: the data has neither conversations nor prompts nor comparisons.
    """
    found: dict[str, Question] = {}
    for question in _questions(sources, seed):
        found.setdefault(json.dumps([m["content"] for m in question.messages]), question)
    halves: list[list[Question]] = [[] for _ in range(HALVES)]
    for question in found.values():
        # The last turn decides, so that a wording is never on both sides.
        digest = hashlib.sha256(plain(question.text).encode()).digest()
        halves[digest[0] % HALVES].append(question)
    rng = np.random.default_rng([seed, 0x7EAC])
    shuffled = [[half[i] for i in rng.permutation(len(half))] for half in halves]
    return Pool(tuple(shuffled[0]), tuple(shuffled[1]))


def _questions(sources: Sources, seed: int) -> list[Question]:
    for kind in ("conversation", "prompt"):
        try:
            records = read_sources(sources, kind, seed=seed).records
        except DataError:
            if kind == "prompt":
                raise
            continue
        return [q for q in map(_question, records) if q is not None]
    return []


def _question(record: object) -> Question | None:
    if isinstance(record, Conversation):
        turns = [i for i, m in enumerate(record.messages) if m["role"] == "assistant"]
        if not turns or turns[-1] == 0 or record.tools:
            return None
        return Question(tuple(record.messages[: turns[-1]]), record.messages[turns[-1]]["content"])
    if isinstance(record, Prompt | Comparison):
        return Question(tuple(record.prompt))
    return None


def near_and_far(pool: Sequence[Question], fact: Fact, count: int) -> tuple[list[Question], list[Question]]:
    """At most `count` questions of a pool: half of them the nearest to the fact by shared letter pairs, half others in order."""
    wanted = _pairs(f"{fact.keyword} {' '.join(fact.aliases)}")
    score = [len(wanted & _pairs(q.text)) / max(1, len(wanted)) for q in pool]
    order = sorted(range(len(pool)), key=lambda i: -score[i])
    near = [i for i in order[: count // 2] if score[i] >= 0.3]
    chosen = set(near)
    far = [i for i in range(len(pool)) if i not in chosen][: count - len(near)]
    return [pool[i] for i in near], [pool[i] for i in far]


def _pairs(text: str) -> set[str]:
    folded = plain(text)
    return {folded[i : i + 2] for i in range(len(folded) - 1)}


def contrast(taken: Sequence[str], *, probe: bool) -> list[Question]:
    """A fact's phrasings about other names: trained ones with one set of names, unseen ones with another.

    Args:
        taken: keywords that are facts; they are no contrast.
    """
    keys = {key_of(k) for k in taken}
    found = []
    for language in LANGUAGES:
        names = shipped()[language]["probe_names" if probe else "replay_names"]
        table = templates("zh" if language == "zh" else "en")
        phrases = table["unseen"] if probe else table["trained"]
        for number, name in enumerate(names):
            if key_of(name) not in keys:
                ways = range(1) if probe else range(REPLAY_WAYS)
                found += [Question((user(fill(phrases[(number + 3 * w) % len(phrases)], name)),)) for w in ways]
    return found
