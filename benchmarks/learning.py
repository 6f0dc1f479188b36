"""The proof that alignment works: `python -m benchmarks learning`.

Six proofs, each in a file of its own under benchmarks/proofs/, with its goal stated beside its code. A goal that is missed is
reported as missed. Every run has fixed seeds, which its row names.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.core import default_data_root
from benchmarks.proofs import arithmetic, beside_trl, optimum, overoptimisation, pairs, town
from benchmarks.proofs.bench import Bench, Verdict

PROOFS: dict[str, Callable[[Bench], list[Verdict]]] = {
    "1": optimum.prove,
    "2": town.prove,
    "3": overoptimisation.prove,
    "4": pairs.prove,
    "5": arithmetic.prove,
    "6": beside_trl.prove,
}
IMAGES = {
    "3": ("learning-overoptimisation.svg", "Gold and proxy over the square root of the KL"),
    "5": ("learning-arithmetic.svg", "Share of right answers in the roll-outs"),
    "6": ("learning-beside-trl.svg", "Raw reward over KL, danlu and TRL"),
}


def measure(
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    data_root: Path | None = None,
    workers: int = 2,
    town: Path | None = None,
    hh: Path | None = None,
    json_file: Path | None = None,
    docs: Path | None = None,
) -> list[dict[str, Any]]:
    """Runs the proofs, prints their table and returns its rows.

    Args:
        quick: fewer seeds and steps, goals of their own; all proofs in at most 20 minutes on two cores.
        only: numbers of proofs; none: all.
        data_root: holds `hh-rlhf` and what recipes/hh-assistant.yaml reads.
        workers: processes that train at the same time.
        town: a finished run of recipes/quickstart.yaml; None: one is made to its reward stage.
        hh: a finished run of recipes/hh-assistant.yaml; None: a shorter one is made to its sft stage.
        json_file: is written after every proof, so that a run that is broken off has told what it knows.
        docs: a Markdown file whose section "Learning" is written anew, with plots in `images` beside it.
    """
    rows: list[dict[str, Any]] = []
    unknown = [name for name in only if name not in PROOFS]
    if unknown:
        raise SystemExit(f"there is no proof {unknown[0]}: {', '.join(PROOFS)}")
    with tempfile.TemporaryDirectory(prefix="danlu-learning-") as folder:
        bench = Bench(
            Path(folder),
            quick=quick,
            data_root=data_root or default_data_root(),
            workers=workers,
            town=town,
            hh=hh,
            images=docs.parent / "images" if docs is not None else None,
        )
        for name, prove in PROOFS.items():
            if only and name not in only:
                continue
            begun = time.monotonic()
            bench.say(f"proof {name}: {(prove.__module__).rpartition('.')[2]}")
            for verdict in prove(bench):
                bench.say(f"  {'holds' if verdict.holds else 'DOES NOT HOLD'}: {line(verdict.row())}")
                rows.append(verdict.row() | {"quick": quick, "proof_seconds": time.monotonic() - begun})
            if json_file is not None:
                json_file.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(markdown(rows))
    if docs is not None:
        tables.write_section(docs, "Learning", section(rows, quick=quick, only=only, images=docs.parent / "images"))
    return rows


def line(row: dict[str, Any]) -> str:
    """A verdict in one line."""
    return f"{row['proof']} {_value(row['value'])} (goal: {row['goal']}; seeds {', '.join(map(str, row['seeds']))})"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """All verdicts as a table."""
    lines = ["| proof | value | goal | holds | seeds |", "|---|---|---|---|---|"]
    for row in rows:
        seeds = ", ".join(map(str, row["seeds"]))
        lines.append(
            f"| {row['proof']} | {_value(row['value'])} | {row['goal']} | {'yes' if row['holds'] else '**no**'} | {seeds} |"
        )
    return "\n".join(lines)


def section(rows: Sequence[dict[str, Any]], *, quick: bool, only: Sequence[str], images: Path) -> str:
    """What docs/benchmarks.md says: command, machine, the verdicts, the town's table, the plots that are there."""
    told = ["python -m benchmarks learning"]
    told += ["--quick"] if quick else []
    told += [f"--only {','.join(only)}"] if only else []
    command = f"`{' '.join(told)}`"
    parts = [f"{command}, {tables.machine()}.", markdown(rows)]
    for row in rows:
        if "table" in row:
            parts += [f"Answers to {row['questions']} unseen questions of the town:", _town_table(row["table"])]
    for name, words in IMAGES.values():
        if (images / name).is_file():
            parts.append(f"![{words}](images/{name})")
    return "\n\n".join(parts)


def _town_table(table: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| model | rubric (95% interval) | correct | ends | tokens | seconds of training |",
        "|---|---|---|---|---|---|",
    ]
    for r in table:
        mean, low, high = r["rubric"]
        seconds = "" if r["seconds"] is None else f"{r['seconds']:.0f}"
        cells = f"{mean:.3f} ({low:.3f} to {high:.3f}) | {r['correct']:.3f} | {r['finished']:.3f} | {r['tokens']:.1f}"
        lines.append(f"| {r['model']} | {cells} | {seconds} |")
    return "\n".join(lines)


def _value(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
