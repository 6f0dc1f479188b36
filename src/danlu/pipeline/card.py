"""The model card beside an export: what the run's manifests say of data, recipe, metrics and gates, and how to run the model.

What is not known is said, never guessed. The front matter is that of the Hugging Face hub (its page "Model Cards").
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from danlu.data.files import is_hub
from danlu.data.language import language_of
from danlu.models.places import HUB_ID
from danlu.pipeline.listing import StageView, lineage, read_recipe, stage_view, stage_views
from danlu.training.runs import is_run
from danlu.types import OVERLAPS

MARK: Final = "<!-- written by danlu export -->"
_LINES: Final = 200  # of a data file, to tell its languages
_LEAST: Final = 0.1  # share of those lines that makes a language worth naming
_NUMBERS: Final = (
    *("eval_loss", "loss", "perplexity", "eval_accuracy", "eval_score", "eval_win_rate", "score", "kl"),
    *("perplexity_before", "perplexity_after", "vocab_size"),
)
_MODELS: Final = ("model", "models", "tokenizer", "reward_model")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model comes from.

    Attributes:
        run: the run folder; None: it was made by a stage alone, or where it comes from is not here any more.
        stage: the stage that made it.
        stages: those that it was made through, in order; `judged` what measured it.
        base: the model that the first of them started from: a hub id or a folder; "": fresh weights, or not known.
    """

    run: Path | None = None
    stage: str = ""
    stages: list[StageView] = field(default_factory=list)
    judged: list[StageView] = field(default_factory=list)
    base: str = ""


@dataclass(frozen=True, slots=True)
class Shipped:
    """What was exported: facts for the card.

    Attributes:
        files: names of the files that matter, with their bytes.
        run_with: sentences and commands, Markdown.
        licence: a licence id of the hub, or "" if nobody chose one.
        gate: the verdict of G-EXPORT.
    """

    name: str
    family: str
    parameters: int
    context: int
    kind: str
    files: list[tuple[str, int]]
    template: str
    run_with: str
    licence: str
    gate: Mapping[str, Any]
    checked: bool
    library: str
    tag: str = "text-generation"
    notes: Sequence[str] = ()


def origin_of(folder: Path) -> Origin:
    """Where a model comes from: `runs/NAME/NN-STAGE/model` knows its run, `OUT/model` of a stage alone the stage's manifest."""
    inside = folder.resolve().parent
    run = inside.parent
    if not is_run(run):
        return _made_alone(inside)
    name = inside.name.partition("-")[2]
    views = {v.name: v for v in stage_views(run)}
    if name not in views:
        return Origin()
    links = lineage(run)
    wanted, base = [name], ""
    for stage in wanted:  # grows while it is read
        for link in links:
            if link.stage != stage or views[stage].kind in ("eval",):
                continue
            if link.source in views and link.source not in wanted:
                wanted.append(link.source)
            elif link.source not in views and link.role == "model":
                base = link.source
    judged = [
        v
        for v in views.values()
        if v.name not in wanted
        and v.kind in ("eval", "quantize")
        and any(li.source in wanted for li in links if li.stage == v.name)
    ]
    return Origin(run, name, [v for v in views.values() if v.name in wanted], judged, base)


def _made_alone(inside: Path) -> Origin:
    """Of a stage outside of any run, and of those that made the models which it and they started from."""
    stages: list[StageView] = []
    base = ""
    while (view := stage_view(inside)) is not None and view.folder not in [s.folder for s in stages]:
        stages.insert(0, view)
        base = str(view.settings.get("model") or "")
        inside = Path(base).resolve().parent
    return Origin(None, stages[-1].name, stages, [], base) if stages else Origin()


def write(origin: Origin, shipped: Shipped) -> str:
    """The card's text."""
    parts = [
        _front(origin, shipped),
        MARK,
        f"# {shipped.name}",
        _summary(origin, shipped),
        "## How to run it",
        shipped.run_with,
        "## Data",
        _data(origin),
        "## Recipe",
        _recipe(origin),
        "## Metrics",
        _metrics(origin),
        "## Gates",
        _gates(origin, shipped),
        "## Limitations",
        _limits(origin, shipped),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(origin: Origin, shipped: Shipped) -> str:
    content: dict[str, Any] = {"license": shipped.licence or "unknown"}
    if languages := _languages(origin):
        content["language"] = languages
    content["library_name"] = "gguf" if shipped.kind in ("f16-gguf", "q8_0", "q4_0") else "transformers"
    content["pipeline_tag"] = shipped.tag
    if base := _hub_id(origin.base):
        content["base_model"] = base
    hub = sorted({i["path"].partition(":")[2] for _, i in _inputs(origin) if is_hub(i["path"])})
    if hub:
        content["datasets"] = hub
    content["tags"] = [
        "danlu",
        *dict.fromkeys(s.kind for s in origin.stages if s.kind in ("sft", "dpo", "ppo", "grpo")),
    ]
    return "---\n" + yaml.safe_dump(content, allow_unicode=True, sort_keys=False) + "---"


def _summary(origin: Origin, shipped: Shipped) -> str:
    lines = [
        f"A {shipped.family} model of {_count(shipped.parameters)} parameters that reads {shipped.context:,} tokens."
    ]
    if origin.stages:
        described = str(read_recipe(origin.run).get("description") or "").strip() if origin.run else ""
        of = f"run `{origin.run.name}`, stage `{origin.stage}`" if origin.run else f"stage `{origin.stage}`"
        lines.append(f"Made by danlu's {of}" + (f": {described}." if described else "."))
        base = origin.base if _hub_id(origin.base) else _short(origin.base)
        lines.append(f"It started from `{base}`." if base else "Its weights were made from nothing.")
    else:
        lines.append("It was not made by a run that danlu knows, so its data, recipe and metrics are not known here.")
    table = ["| File | Bytes |", "|---|---:|", *(f"| `{name}` | {size:,} |" for name, size in shipped.files)]
    return " ".join(lines) + f" Weights: {shipped.kind.removesuffix('-gguf')}.\n\n" + "\n".join(table)


def _hub_id(base: str) -> str:
    """The hub's name of a model; "" for a folder."""
    name = base.removeprefix("hf:")
    return name if base.startswith("hf:") or (HUB_ID.match(name) and not Path(base).is_dir()) else ""


def _count(number: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"


# -- what the manifests say -----------------------------------------------------------------------------------------------


def _inputs(origin: Origin) -> Iterator[tuple[StageView, dict[str, Any]]]:
    for stage in origin.stages:
        for given in stage.manifest.get("inputs") or []:
            if given.get("field", "").split(".")[0] not in _MODELS and not str(given.get("field", "")).startswith(
                "eval"
            ):
                yield stage, dict(given)


def _data(origin: Origin) -> str:
    rows = []
    for stage, given in _inputs(origin):
        records = given.get("records")
        licence = given.get("licence") or ("danlu's own (invented)" if _invented(given) else "not stated")
        rows.append(
            f"| {stage.name} | `{_short(given['path'])}` | {f'{records:,}' if records is not None else '–'} | "
            f"{_cell(licence)} | {_cell(given.get('from') or '–')} | `{str(given.get('sha256') or '')[:12] or '–'}` |"
        )
    if not rows:
        return "Not known: no manifest came with the model."
    head = ["| Stage | File | Records | Licence | Source | SHA-256 |", "|---|---|---:|---|---|---|"]
    note = ""
    if any(_invented(i) for _, i in _inputs(origin)):
        note = "\n\nFiles under `town/` were invented by danlu from a seed: nobody else's text is in them."
    if any(not i.get("licence") and not _invented(i) for _, i in _inputs(origin)):
        note += "\n\nWhere a licence is not stated, look it up at the source before you share the model."
    return "\n".join([*head, *rows]) + note


def _invented(given: Mapping[str, Any]) -> bool:
    return Path(str(given.get("path", ""))).parent.name == "town"


def _short(path: str) -> str:
    """A file's name with the folder that it lies in: whole paths are private."""
    return path if is_hub(path) else "/".join(Path(path).parts[-2:])


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _languages(origin: Origin) -> list[str]:
    """Languages of at least a tenth of the first lines of the data files that are still there."""
    found: Counter[str] = Counter()
    for path in dict.fromkeys(str(i["path"]) for _, i in _inputs(origin)):
        # Paths are relative to where the run was started: mostly the folder that `runs` lies in.
        places = [Path(path), *([origin.run.resolve().parent.parent / path] if origin.run else [])]
        file = next((p for p in places if p.is_file()), Path(path))
        if file.suffix == ".jsonl" and file.is_file():
            with file.open(encoding="utf-8", errors="replace") as stream:
                for _, line in zip(range(_LINES), stream, strict=False):
                    try:
                        found[language_of(_strings(json.loads(line)))] += 1
                    except json.JSONDecodeError:
                        continue  # a bad row is for `danlu data check` to name
    total = sum(found.values())
    return sorted(name for name, count in found.items() if name != "other" and count >= _LEAST * total)


def _strings(value: Any) -> Iterator[str]:
    """Texts of a row, without the names of roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "role":
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _recipe(origin: Origin) -> str:
    if not origin.stages:
        return "Not known."
    rows = ["| Stage | Kind | Seconds | Seed | Settings |", "|---|---|---:|---:|---|"]
    for stage in origin.stages:
        settings = ", ".join(f"{k} {v}" for k, v in _told(stage.settings))
        rows.append(
            f"| {stage.name} | {stage.kind} | {stage.seconds:.0f} | {stage.manifest.get('seed', 0)} | {_cell(settings)} |"
        )
    versions: dict[str, Any] = next((s.manifest["versions"] for s in origin.stages if s.manifest.get("versions")), {})
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join(rows) + (f"\n\nMade with {made}." if made else "")


def _told(settings: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Settings that say most about a stage."""
    wanted = (
        "starter",
        "vocab_size",
        "model_type",
        "adapter",
        "loss",
        "method",
        "epochs",
        "max_steps",
        "learning_rate",
    )
    for name in (*wanted, "schedule", "tokens_per_step", "max_length", "bits"):
        value = settings.get(name)
        if value is None or value == "" or (name == "starter" and settings.get("model")):
            continue
        if isinstance(value, Mapping):
            value = "(" + ", ".join(f"{k} {v}" for k, v in value.items()) + ")"
        yield name, value


def _metrics(origin: Origin) -> str:
    if not origin.stages:
        return "Not known."
    rows = []
    for stage in [*origin.stages, *origin.judged]:
        numbers = {k: v for k, v in (stage.manifest.get("metrics") or {}).items() if k in _NUMBERS}
        if numbers:
            rows.append(f"| {stage.name} | {', '.join(f'{k} {float(v):.4g}' for k, v in numbers.items())} |")
    parts = ["\n".join(["| Stage | Last values |", "|---|---|", *rows])] if rows else []
    answers = [dict(row) | {"by": s.name} for s in origin.judged for row in s.table]
    if answers:
        overlaps = [name for name in OVERLAPS if any(name in r for r in answers)]
        keys = ("rubric", "correct", *overlaps, "stop_rate", "length")
        names = ["Model", "Rubric", "Correct", *map(str.upper, overlaps), "Stops", "Length", "Measured by"]
        head = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        body = [
            f"| {r.get('model')} | " + " | ".join(_interval(r.get(k)) for k in keys) + f" | {r['by']} |"
            for r in answers
        ]
        parts.append("Held-out questions (95% intervals):\n\n" + "\n".join([*head, *body]))
    return "\n\n".join(parts) or "None were measured."


def _interval(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['mean']:.3f} ({value['low']:.3f}–{value['high']:.3f})"
    return f"{value:.3g}" if isinstance(value, int | float) else "–"


def _gates(origin: Origin, shipped: Shipped) -> str:
    rows = ["| Gate | Stage | Verdict | What was found |", "|---|---|---|---|"]
    for stage in [*origin.stages, *(s for s in origin.judged if s.kind == "quantize")]:
        rows += [
            f"| {g['code']} | {stage.name} | {_verdict(g)} | {_cell(g.get('sentence', ''))} |" for g in stage.gates
        ]
    verdict = _verdict(shipped.gate) if shipped.checked else "not checked"
    rows.append(f"| {shipped.gate['code']} | export | {verdict} | {_cell(shipped.gate['sentence'])} |")
    return "\n".join(rows)


def _verdict(gate: Mapping[str, Any]) -> str:
    return "holds" if gate.get("passed") else "warns" if gate.get("warning") else "**does not hold**"


def _limits(origin: Origin, shipped: Shipped) -> str:
    lines = [
        "It can be wrong, and does not know when it is. Check what matters.",
        "It knows nothing beyond its data, and may repeat the errors and prejudices in it.",
    ]
    if shipped.parameters < 10**9:
        lines.append(
            f"{_count(shipped.parameters)} parameters are few: do not expect facts or reasoning outside its data."
        )
    if not shipped.licence:
        lines.append("Nobody has chosen a licence for these weights yet (`danlu export --licence ID`).")
    if not origin.stages:
        lines.append("Where it comes from is not recorded: ask whoever gave it to you.")
    if shipped.tag == "text-generation" and not shipped.template:
        lines.append("It has no chat template, so it continues texts rather than answers.")
    lines += list(shipped.notes)
    return "\n".join(f"- {line[0].upper()}{line[1:]}{'' if line.endswith('.') else '.'}" for line in lines)
