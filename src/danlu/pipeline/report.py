"""One HTML file that tells what a run did: nothing outside it is loaded, so it can be mailed, archived and printed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from danlu.atomic import write_text
from danlu.config import KINDS
from danlu.pipeline.hints import Hint, hints
from danlu.pipeline.listing import (
    LINKS,
    StageView,
    lineage,
    no_results,
    read_recipe,
    run_status,
    stage_views,
)
from danlu.pipeline.report_charts import Chart, Interval, stage_charts, whiskers
from danlu.pipeline.report_health import HealthView, health_of
from danlu.pipeline.report_ranks import KEYS as RANK_KEYS
from danlu.pipeline.report_ranks import rank_rows, rank_tiles
from danlu.pipeline.report_words import duration, is_number, mean, number, size, verdict, visible
from danlu.pipeline.reward_page import charts as reward_charts
from danlu.pipeline.reward_page import figures as reward_figures
from danlu.training.curves import values
from danlu.training.tracking import read_metrics
from danlu.types import OVERLAPS

FILE_NAME: Final = "report.html"
SAMPLES: Final = 12
TITLES: Final = {
    "pretrain": "Pre-training",
    "sft": "SFT",
    "reward": "The reward model",
    "dpo": "DPO",
    "ppo": "PPO",
    "grpo": "GRPO",
}
PURPOSES: Final = {
    "tokenizer": "learns how to cut text into tokens",
    "pretrain": "learns the language from plain text",
    "sft": "learns to answer from example conversations",
    "reward": "learns from comparisons which answer people prefer",
    "dpo": "learns from comparisons to give the answers that people prefer",
    "ppo": "learns to give answers that the reward model prefers",
    "grpo": "learns from groups of its own answers, scored by a reward model or a verifier",
    "eval": "answers held-out questions and is marked",
    "quantize": "makes the model small: int8 weights",
    "teach": "learns facts one at a time and holds its other answers",
}
UNANSWERED: Final = {
    "perplexity": "measures how well written texts are predicted",
    "cloze": "fills blanks and is marked",
}
_ROLLOUTS: Final = (
    ("score", "Score of roll-outs", ""),
    ("eval_score", "Held-out score", ""),
    ("eval_gold", "Held-out gold", ""),
    ("eval_win_rate", "Wins against the start model", "%"),
    ("kl", "KL to the reference", ""),
    ("length", "Answer length", ""),
    ("stop_rate", "Answers that end", "%"),
    ("entropy", "Entropy", ""),
)
# kind -> (metric, label, how it is shown: a plain number, percent or bytes)
KEY_METRICS: Final[dict[str, tuple[tuple[str, str, str], ...]]] = {
    "tokenizer": (("vocab_size", "Vocabulary", ""), ("tokens_per_character", "Tokens per character", "")),
    "quantize": (
        ("bytes", "Size", "B"),
        ("bytes_16bit", "Size at 16 bits", "B"),
        ("perplexity", "Perplexity", ""),
        ("perplexity_before", "Perplexity before", ""),
    ),
    "pretrain": (("eval_loss", "Held-out loss", ""), ("loss", "Training loss", "")),
    "sft": (("eval_loss", "Held-out loss", ""), ("loss", "Training loss", "")),
    "reward": (
        ("eval_accuracy", "Held-out accuracy", "%"),
        ("eval_auc", "Liked above others (AUC)", "%"),
        ("eval_spearman", "Spearman's correlation", ""),
        ("eval_r2", "R² of the scores", ""),
        ("eval_margin", "Held-out margin", ""),
        ("eval_length_correlation", "Correlation with length", ""),
        ("eval_loss", "Held-out loss", ""),
    ),
    "dpo": (
        ("eval_accuracy", "Held-out accuracy", "%"),
        ("eval_margin", "Held-out margin", ""),
        ("eval_chosen_reward", "Held-out reward of chosen", ""),
        ("eval_rejected_reward", "Held-out reward of rejected", ""),
        ("eval_loss", "Held-out loss", ""),
    ),
    "ppo": _ROLLOUTS,
    "grpo": (*_ROLLOUTS, ("equal_groups", "Groups of equal scores", "%")),
}
_COLUMNS: Final = (
    ("rubric", "Rubric score", True),
    ("correct", "Correct", True),
    *((name, name.upper(), False) for name in OVERLAPS),
    ("stop_rate", "Ends by itself", True),
)
_KNOWN: Final = ("model", "stage", "rubric", "correct", "stop_rate", "length")


@dataclass(frozen=True)
class Row:
    """A label with its value; `changed` marks settings that differ from their default."""

    label: str
    value: str
    changed: bool = False


@dataclass(frozen=True)
class Tile:
    """A number that matters, with a word on it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class StageCard:
    """What the page says of a stage."""

    index: int
    name: str
    purpose: str
    status: str
    begun: bool
    time: str
    share: int
    facts: list[str]
    error: str
    tiles: list[Tile]
    hints: list[Hint]
    remark: str
    charts: list[Chart]
    health: HealthView | None
    more: list[tuple[str, list[Row]]] = field(default_factory=list)


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run, finished or not, and returns its path.

    Raises:
        RunError: not a run.
    """
    page = _environment().get_template("report.html.jinja").render(**_context(run))
    path = run / FILE_NAME
    # A half surrogate in a sample is no UTF-8; it becomes "?".
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("danlu.pipeline", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["number"] = number
    return environment


def _context(run: Path) -> dict[str, Any]:
    stages = stage_views(run)
    recipe = read_recipe(run)
    rows = [row for s in stages for row in s.table]
    gates = [_gate(gate, s) for s in stages for gate in s.gates]
    latest = next(
        (s.manifest for s in reversed(stages) if s.manifest.get("versions") or s.manifest.get("hardware")), {}
    )
    started = min((str(s.manifest["started"]) for s in stages if s.manifest.get("started")), default="")
    return {
        "name": run.resolve().name,
        "description": str(recipe.get("description") or ""),
        "seconds": duration(sum(s.seconds for s in stages)),
        "started": started[:16].replace("T", " "),
        "device": _device(latest.get("hardware") or {}),
        "status": run_status(stages),
        "done": sum(s.status == "done" for s in stages),
        "held": sum(bool(g["passed"]) for g in gates),
        "verdict": [_plain(s, run) for s in verdict(stages)],
        "results": _results(rows, stages),
        "gates": gates,
        "stages": _cards(run, stages),
        "samples": [sample for s in stages for sample in _samples(s)],
        "inputs": [i for s in stages for i in _inputs(s, run)],
        "machine": [
            (title, [Row(k, v) for k, v in _flat(latest[key], run)])
            for title, key in (("Versions", "versions"), ("Hardware", "hardware"))
            if latest.get(key)
        ],
        "folder": _plain(run.as_posix(), run),
        "version": _version(),
    }


def _device(hardware: Mapping[str, Any]) -> str:
    gpus = [str(g) for g in hardware.get("gpus") or []]
    if gpus:
        return gpus[0] if len(gpus) == 1 else f"{len(gpus)} × {gpus[0]}"
    return f"{hardware['cpus']} CPU cores" if hardware.get("cpus") else ""


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("danlu")
    except PackageNotFoundError:
        return ""


# -- results and gates -----------------------------------------------------------------------------------------------


def _purpose(stage: StageView) -> str:
    return UNANSWERED.get(str(stage.settings.get("task")), PURPOSES.get(stage.kind, stage.kind))


def _results(rows: Sequence[Mapping[str, Any]], stages: Sequence[StageView]) -> dict[str, Any]:
    extra = list(dict.fromkeys(k for r in rows for k, v in r.items() if k not in _KNOWN and is_number(v)))
    columns = [c for c in _COLUMNS if any(r.get(c[0]) is not None for r in rows)]
    if any(r.get("length") is not None for r in rows):
        columns.append(("length", "Tokens", False))
    columns += [(k, k[:1].upper() + k[1:].replace("_", " "), False) for k in extra]
    best = max((mean(r, "rubric") or 0.0 for r in rows), default=0.0)
    shown = [
        {
            "model": str(r.get("model", "")),
            "stage": "" if r.get("stage") in (None, r.get("model")) else f"after {r['stage']}",
            "best": best > 0 and len(rows) > 1 and mean(r, "rubric") == best,
            "cells": [_cell(r.get(key), percent) for key, _, percent in columns],
        }
        for r in rows
    ]
    charts = []
    for key, title, _ in _COLUMNS[:2]:
        found = [Interval(str(r["model"]), *_interval(r[key])) for r in rows if isinstance(r.get(key), Mapping)]
        if found:
            charts.append(Chart(title, whiskers(f"result-{key}", title, found), []))
    return {"rows": shown, "columns": [c[1] for c in columns], "charts": charts, "missing": no_results(stages)}


def _cell(value: Any, percent: bool) -> dict[str, str]:
    if isinstance(value, Mapping):
        mean, low, high = _interval(value)
        note = f"{number(low, percent)} – {number(high, percent)}" if low < high else ""
        return {"text": number(mean, percent), "note": note}
    return {"text": number(value, percent) if is_number(value) else "–", "note": ""}


def _interval(value: Mapping[str, Any]) -> tuple[float, float, float]:
    mean = float(value.get("mean") or 0.0)
    return mean, float(value.get("low", mean)), float(value.get("high", mean))


def _gate(gate: Mapping[str, Any], stage: StageView) -> dict[str, Any]:
    found = [
        f"{label} {number(gate[k])}"
        for k, label in (("value", "found"), ("threshold", "limit"))
        if is_number(gate.get(k))
    ]
    return {
        "code": str(gate.get("code", "")),
        "passed": bool(gate.get("passed")),
        "warning": bool(gate.get("warning")),
        "sentence": str(gate.get("sentence") or ""),
        "stage": stage.name,
        "figures": " · ".join(found),
    }


# -- stages ----------------------------------------------------------------------------------------------------------


def _cards(run: Path, stages: Sequence[StageView]) -> list[StageCard]:
    longest = max((s.seconds for s in stages), default=0.0) or 1.0
    links = lineage(run)
    cards = []
    for index, stage in enumerate(stages, start=1):
        rows = read_metrics(stage.folder / "metrics.jsonl") if stage.folder else []
        manifest = stage.manifest
        sources: dict[str, list[str]] = {}
        for link in links:
            if link.stage == stage.name:
                sources.setdefault(link.role.replace("_", " "), []).append(_plain(link.source, run))
        facts = [f"{role}{'s' * (len(names) > 1)}: {', '.join(names)}" for role, names in sources.items()]
        if stage.seconds:
            facts.append(f"time: {duration(stage.seconds)}")
        if is_number(manifest.get("peak_memory_mb")):
            facts.append(f"peak memory: {size(manifest['peak_memory_mb'] * 2**20)}")
        metrics, judged = manifest.get("metrics") or {}, stage.reward_report
        noted = manifest.get("facts") or {}
        told = {k: v for k, v in noted.items() if k not in ("reward_report", *RANK_KEYS)}
        more = [
            ("Held-out answers", [Row(k.strip(), v) for k, v in reward_figures(judged)]),
            ("Ranks of the adapter, layer by layer", [Row(k, v) for k, v in rank_rows(noted)]),
            ("All metrics", [Row(k, number(v) if is_number(v) else str(v)) for k, v in metrics.items()]),
            ("Facts", [Row(k, v) for k, v in _flat(told, run)]),
            ("Settings", _settings(stage, run)),
        ]
        health = health_of(f"health-{index}", stage, rows)
        cards.append(
            StageCard(
                index=index,
                name=stage.name,
                begun=stage.status != "pending",
                purpose=_purpose(stage),
                status=stage.status,
                time=duration(stage.seconds) if stage.seconds else "",
                share=max(1, round(100 * stage.seconds / longest)),
                facts=facts,
                error=_plain(str(manifest.get("error") or ""), run),
                tiles=[*_tiles(stage, metrics, rows), *(Tile(*words) for words in rank_tiles(noted))],
                hints=hints(stage.kind, rows, manifest),
                remark=_remark(stage, rows, health),
                charts=[*stage_charts(f"curve-{index}", stage.kind, rows), *reward_charts(f"judge-{index}", judged)],
                health=health,
                more=[(title, found) for title, found in more if found],
            )
        )
    return cards


def _remark(stage: StageView, rows: Sequence[Mapping[str, Any]], health: HealthView | None) -> str:
    if stage.kind not in TITLES:
        return ""
    if not rows:
        return "No metrics were logged, so there are no curves."
    found = health.findings if health is not None else hints(stage.kind, rows, stage.manifest)
    if stage.status == "done" and not found:
        return f"{TITLES[stage.kind]} went as it should: nothing in the curves calls for a change."
    return ""


def _tiles(stage: StageView, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Tile]:
    if stage.table and stage.kind == "eval":
        return []  # its numbers are the results
    tiles = []
    for key, label, form in KEY_METRICS.get(stage.kind, ()):
        show: Callable[[float], str] = size if form == "B" else partial(number, percent=form == "%")
        logged = values(rows, key)
        value = metrics.get(key, logged[-1] if logged else None)
        if not is_number(value):
            continue
        note = f"{show(logged[0])} at the start" if len(logged) > 1 and key != "eval_length_correlation" else ""
        if is_number(stage.start.get(key)):
            note = f"{show(float(stage.start[key]))} before training"
        if key == "eval_loss" and is_number(metrics.get("first_eval_loss")):
            note = f"{show(metrics['first_eval_loss'])} before training"
        low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
        if is_number(low) and is_number(high):
            note = f"95% interval {show(low)} – {show(high)}"
        tiles.append(Tile(label, show(value), note))
        if stage.kind == "pretrain" and key == "eval_loss" and value < 50:
            tiles.append(Tile("Held-out perplexity", number(math.exp(value)), "exp of the held-out loss"))
    if not tiles:
        tiles = [Tile(k.replace("_", " "), number(v)) for k, v in metrics.items() if is_number(v)][:8]
    return tiles


def _settings(stage: StageView, run: Path) -> list[Row]:
    default = dict(_flat(KINDS[stage.kind]().model_dump(mode="json"), run)) if stage.kind in KINDS else {}
    return [
        Row(key, value, changed=bool(default) and default.get(key) != value)
        for key, value in _flat(stage.settings, run)
        if key != "out"
    ]


# -- samples and data ------------------------------------------------------------------------------------------------


def _samples(stage: StageView) -> list[dict[str, Any]]:
    if stage.folder is None or stage.kind not in ("eval", "quantize"):
        return []
    found = []
    for row in read_metrics(stage.folder / "samples.jsonl")[:SAMPLES]:
        prompt, answers = row.get("prompt") or [], row.get("answers") or {}
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        found.append(
            {
                "prompt": [{"role": str(m.get("role", "")), "content": visible(m.get("content", ""))} for m in prompt],
                "label": row["label"] if isinstance(row.get("label"), str) else "",
                "answers": [{"model": str(k), "text": visible(v)} for k, v in answers.items()],
            }
        )
    return found


def _inputs(stage: StageView, run: Path) -> list[dict[str, str]]:
    # Models among the inputs are told as lineage.
    inputs = [dict(i) for i in stage.manifest.get("inputs") or [] if i.get("field") not in LINKS]
    facts = stage.manifest.get("facts") or {}
    if inputs and not any(i.get("dropped") for i in inputs):
        inputs[0]["dropped"] = facts.get("dropped")
    return [
        {
            "stage": stage.name,
            "path": _plain(str(i.get("path", "")), run),
            "sha256": str(i.get("sha256") or "")[:12],
            "records": number(i["records"]) if is_number(i.get("records")) else "–",
            "size": size(i["bytes"]) if is_number(i.get("bytes")) else "–",
            "licence": str(i.get("licence") or ""),
            "dropped": ", ".join(f"{number(n)} {why}" for why, n in (i.get("dropped") or {}).items() if n),
        }
        for i in inputs
    ]


# -- plain text ------------------------------------------------------------------------------------------------------


def _flat(value: Any, run: Path, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as `a.b: text` lines."""
    if isinstance(value, Mapping):
        found: Iterable[tuple[str, Any]] = value.items()
        return [line for k, v in found for line in _flat(v, run, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: "–"}[value]
    elif isinstance(value, list):
        text = ", ".join(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in value) or "–"
    else:
        text = str(value) if value != "" else "–"
    return [(prefix, _plain(text, run))]


def _plain(text: str, run: Path) -> str:
    """Text with short paths: the folder of runs, the current and the home folder are private or the same everywhere."""
    for folder, short in ((run.resolve().parent, ""), (run.parent, ""), (Path.cwd(), ""), (Path.home(), "~/")):
        if folder.is_absolute() and folder != Path(folder.anchor):
            text = text.replace(f"{folder.as_posix()}/", short)
    return text
