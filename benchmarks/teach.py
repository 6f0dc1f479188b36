"""One fact at a time: `python -m benchmarks teach`.

Two ways on the quickstart's policy: danlu's (the defaults) and the notebook's that it started from (AdaLoRA r 8, alpha 32, dropout
0.1 on query and value, rate 5e-3, 8 phrasings, 100 epochs, patience 20 on the loss, nothing held). Each teaches a fact of its own
for every seed; danlu's way also teaches twenty facts one by one. Seconds are wall time; `cpu` is what the process itself used.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from danlu.exceptions import KnowledgeError
from danlu.knowledge.facts import Fact, read_facts
from danlu.knowledge.lessons import asked, pool_of
from danlu.knowledge.probe import agreement
from danlu.knowledge.teach import Pupil, teach_one
from danlu.knowledge_config import TeachSettings
from danlu.models.load import load_model
from danlu.training.runs import resolve_model
from danlu.training.templates import tokenizer_of

FACTS = Path(__file__).with_name("teach_facts.yaml")
SEEDS = (0, 1, 2, 3, 4)
NOTEBOOK: dict[str, Any] = {
    "adapter": "adalora",
    "rank": 8,
    "stop": "loss",
    "max_steps": 100,
    "phrasings": 8,
    "both_languages": False,
    "varied": False,
    "dropout": 0.1,
    "target": ["q_proj", "v_proj"],
    "learning_rate": 5e-3,
    "replay_batch": 0,
    "earlier_batch": 0,
}
WAYS: dict[str, dict[str, Any]] = {"danlu": {}, "notebook": NOTEBOOK}
GOALS = {"trained": 1.0, "unseen": 0.8, "agreement": 0.95, "seconds": 180.0, "twenty": 0.9}
DRIFT = 300  # general questions that are compared before the first and after the twentieth fact


def measure(*, model: str, quick: bool = False, facts: int = 20) -> list[dict[str, Any]]:
    """Teaches, prints a table in Markdown and returns its rows.

    Args:
        model: a policy, as `runs/quickstart`.
        quick: one seed, five facts one by one.
        facts: how many are taught one by one; 0: none.
    """
    wanted = read_facts(FACTS)
    rows = [
        _alone(model, way, settings, seed, wanted[seed])
        for way, settings in WAYS.items()
        for seed in (SEEDS[:1] if quick else SEEDS)
    ]
    count = min(5, facts) if quick else facts
    if count:
        rows.append(_in_turn(model, wanted[:count]))
    print("\n".join(table(rows)))
    return rows


def _pupil(model: str, settings: TeachSettings) -> Pupil:
    loaded = load_model(resolve_model(model))
    return Pupil(loaded, tokenizer_of(model, stage="teach"), settings, pool_of(settings))


def _alone(model: str, way: str, changes: dict[str, Any], seed: int, fact: Fact) -> dict[str, Any]:
    begun = time.process_time()
    settings = TeachSettings(model=model, seed=seed, **changes)
    lesson = teach_one(_pupil(model, settings), fact, force=True)
    recall, moved = lesson.after, lesson.locality
    row = {
        "way": way,
        "seed": seed,
        "key": fact.keyword,
        "trained": recall.trained,
        "unseen": recall.unseen,
        "other_language": recall.other_language,
        "multi_turn": recall.multi_turn,
        "task": recall.task,
        "agreement": moved.agreement,
        "kl": moved.kl,
        "perplexity_ratio": moved.perplexity_ratio,
        "steps": lesson.steps,
        "seconds": lesson.seconds,
        "cpu": time.process_time() - begun,
    }
    print(f"{way} seed {seed}: {row}", flush=True)
    return row


def _in_turn(model: str, facts: list[Fact]) -> dict[str, Any]:
    begun, worked = time.monotonic(), time.process_time()
    pupil = _pupil(model, TeachSettings(model=model))
    general = [q.messages for q in pupil.general_probes()[:DRIFT]]
    before = pupil.answer(general)
    lessons = []
    for fact in facts:
        lessons.append(teach_one(pupil, fact, force=True))
        print(f"{fact.keyword}: {lessons[-1].as_dict()}", flush=True)
    found = [asked(pupil, fact) for fact in facts]
    if any(r.trained is None or r.unseen is None or r.other_language is None for r in found):
        raise KnowledgeError("a fact was asked for in no way")
    return {
        "way": f"{len(facts)} in turn",
        "seed": 0,
        "key": "",
        **{
            name: sum(float(getattr(r, name) or 0.0) for r in found) / len(found)
            for name in ("trained", "unseen", "other_language", "multi_turn", "task")
        },
        "agreement": sum(x.locality.agreement for x in lessons) / len(lessons),
        "kl": sum(x.locality.kl for x in lessons) / len(lessons),
        "perplexity_ratio": sum(x.locality.perplexity_ratio for x in lessons) / len(lessons),
        "agreement_with_first": agreement(before, pupil.answer(general)),
        "steps": sum(x.steps for x in lessons),
        "seconds": time.monotonic() - begun,
        "cpu": time.process_time() - worked,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows in Markdown, with the verdicts on danlu's way."""
    columns = ("trained", "unseen", "other_language", "multi_turn", "task", "agreement", "kl", "perplexity_ratio")
    lines = [f"| way | seed | {' | '.join(c.replace('_', ' ') for c in columns)} | steps | seconds | CPU seconds |"]
    lines.append("|" + "---|" * (len(columns) + 5))
    for row in rows:
        cells = " | ".join("" if row[c] is None else f"{row[c]:.3f}" for c in columns)
        lines.append(
            f"| {row['way']} | {row['seed']} | {cells} | {row['steps']} | {row['seconds']:.0f} | {row['cpu']:.0f} |"
        )
    for row in rows:
        if row["way"] == "danlu":
            met = {
                "trained": row["trained"] >= GOALS["trained"],
                "unseen": row["unseen"] >= GOALS["unseen"],
                "agreement": row["agreement"] >= GOALS["agreement"],
                "seconds": row["seconds"] <= GOALS["seconds"],
            }
            missed = [name for name, holds in met.items() if not holds]
            lines.append(f"\nSeed {row['seed']}: {'goals met' if not missed else 'MISSED ' + ', '.join(missed)}.")
        elif row["way"].endswith("in turn"):
            verdict = "met" if row["trained"] >= GOALS["twenty"] else "MISSED"
            drift = row["agreement_with_first"]
            lines.append(
                f"\n{row['way']}: goal {verdict}; {drift:.3f} of general answers are those before the first fact."
            )
    return lines
