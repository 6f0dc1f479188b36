"""Writes the town's data files: all that the quickstart trains on, and what it is evaluated with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from danlu.synth.town.dialogues import (
    MANNERS,
    aside_comparison,
    conversations,
    half_comparison,
    manners_comparison,
    refusal_comparison,
    value_comparison,
)
from danlu.synth.town.facts import Pool, Town, town_facts
from danlu.synth.town.prose import Prose
from danlu.synth.town.questions import Kind, Questioner

TOWN_FILES = (
    "pretrain", "pretrain_heldout", "sft", "sft_heldout", "comparisons", "comparisons_heldout", "prompts", "eval",
)  # fmt: skip
ERROR_RATE = 0.1  # of the simulated annotator
PRETRAIN_BYTES = 1_800_000
HELDOUT_BYTES = 60_000

_SFT: dict[Kind, int] = {
    "fact": 3400, "two_fact": 400, "follow_up": 1500, "refuse": 300, "arithmetic": 200, "calendar": 100, "chat": 100,
}  # fmt: skip
_SFT_HELDOUT: dict[Kind, int] = {
    "fact": 180, "two_fact": 30, "follow_up": 60, "refuse": 14, "arithmetic": 8, "calendar": 8,
}  # fmt: skip
_PROMPTS: dict[Kind, int] = {
    "fact": 2000, "two_fact": 280, "follow_up": 350, "refuse": 180, "arithmetic": 90, "calendar": 60, "chat": 40,
}  # fmt: skip
_EVAL: dict[Kind, int] = {
    "fact": 700, "two_fact": 100, "follow_up": 80, "refuse": 60, "arithmetic": 30, "calendar": 20, "chat": 10,
}  # fmt: skip
# Nineteen of twenty comparisons are about being right: manners are learned from a few hundred, some 340 facts (in two languages)
# against all the wrong values they could have are not.
_RIGHT_OR_WRONG: dict[Kind, int] = {
    "fact": 15000, "two_fact": 1300, "follow_up": 2000, "refuse": 2000, "arithmetic": 400, "calendar": 400,
}  # fmt: skip
_TO_THE_POINT: dict[Kind, int] = {
    "fact": 2400, "follow_up": 600, "arithmetic": 150, "calendar": 100, "chat": 150,
}  # fmt: skip
_WHOLE_OR_HALF: dict[Kind, int] = {"two_fact": 600}
_KNOWN_OR_REFUSED: dict[Kind, int] = {"fact": 1300}
_MANNERS: dict[Kind, int] = {
    "fact": 960, "two_fact": 80, "follow_up": 80, "refuse": 64, "arithmetic": 32, "calendar": 16, "chat": 48,
}  # fmt: skip
HELDOUT_SHARE = 0.02


def write_town(folder: Path, seed: int, scale: float = 1.0) -> dict[str, Path]:
    """Write all files of the town into `folder`; return name without suffix -> path.

    The bytes depend on `seed` and `scale` alone, and every file has a random stream of its own.

    Args:
        folder: made if it is missing; files of the same names are replaced.
        seed: decides the facts and everything drawn from them.
        scale: size relative to the default; small values are for tests.
    """
    town = town_facts(seed)
    folder.mkdir(parents=True, exist_ok=True)
    prose = _prose(town, scale)
    tables: dict[str, list[dict[str, Any]]] = {
        "pretrain": prose["pretrain"],
        "pretrain_heldout": prose["pretrain_heldout"],
        "sft": _sft(town, "sft", "train", _scaled(_SFT, scale)),
        "sft_heldout": _sft(town, "sft_heldout", "dev", _scaled(_SFT_HELDOUT, scale)),
        "comparisons": _comparisons(town, "comparisons", "train", scale),
        "comparisons_heldout": _comparisons(town, "comparisons_heldout", "dev", scale * HELDOUT_SHARE),
        "prompts": _prompts(town, "prompts", "train", _scaled(_PROMPTS, scale)),
        "eval": _prompts(town, "eval", "eval", _scaled(_EVAL, scale)),
    }
    return {name: _write(folder / f"{name}.jsonl", rows) for name, rows in tables.items()}


def _scaled(counts: Mapping[Kind, int], scale: float) -> dict[Kind, int]:
    return {kind: max(2, round(count * scale)) for kind, count in counts.items()}


def _prose(town: Town, scale: float) -> dict[str, list[dict[str, Any]]]:
    """Text to train on, and held-out text in which no paragraph of it occurs."""
    seen: set[str] = set()
    files: dict[str, list[dict[str, Any]]] = {}
    for name, size in (("pretrain", PRETRAIN_BYTES), ("pretrain_heldout", HELDOUT_BYTES)):
        source = Prose(town, Random(f"{town.seed}/{name}"))
        rows: list[dict[str, Any]] = []
        written = 0
        while written < size * scale:
            text = source.paragraph()
            if text in seen:
                continue
            seen.add(text)
            rows.append({"text": text})
            written += len(text.encode())
        files[name] = rows
    return files


def _sft(town: Town, name: str, pool: Pool, counts: Mapping[Kind, int]) -> list[dict[str, Any]]:
    rng = Random(f"{town.seed}/{name}")
    return conversations(Questioner(town, pool, rng).batch(counts), pool == "train", rng)


def _comparisons(town: Town, name: str, pool: Pool, scale: float) -> list[dict[str, Any]]:
    rng = Random(f"{town.seed}/{name}")
    source = Questioner(town, pool, rng)
    rows = [value_comparison(item, rng, ERROR_RATE) for item in source.batch(_scaled(_RIGHT_OR_WRONG, scale))]
    known = source.batch(_scaled(_KNOWN_OR_REFUSED, scale))
    rows += [refusal_comparison(item, rng, ERROR_RATE) for item in known]
    asked = source.batch(_scaled(_TO_THE_POINT, scale))
    # Elsewhere: in turn about the same place (another relation of it), and about anything.
    for number, item in enumerate(asked):
        others = [source.beside(item) if number % 2 else source.ask("fact", item.language, rng.choice(town.facts))]
        others += [source.ask("fact", item.language, fact) for fact in rng.sample(town.facts, 3)]
        found = (aside_comparison(item, other, rng, ERROR_RATE) for other in others)
        rows.append(next(row for row in found if row is not None))
    rows += [half_comparison(item, rng, ERROR_RATE) for item in source.batch(_scaled(_WHOLE_OR_HALF, scale))]
    polite = source.batch(_scaled(_MANNERS, scale))
    rows += [
        manners_comparison(item, flaw, rng, ERROR_RATE) for item, flaw in zip(polite, cycle(MANNERS), strict=False)
    ]
    rng.shuffle(rows)
    return rows


def _prompts(town: Town, name: str, pool: Pool, counts: Mapping[Kind, int]) -> list[dict[str, Any]]:
    questions = Questioner(town, pool, Random(f"{town.seed}/{name}")).batch(counts)
    if pool == "eval":
        return [{"prompt": list(q.prompt), "reference": dict(q.reference), "kind": q.kind} for q in questions]
    return [{"prompt": list(q.prompt), "reference": dict(q.reference)} for q in questions]


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON Lines, complete or not there at all."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return unfinished.replace(path)
