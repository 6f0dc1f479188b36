"""What runs there are and what is in them, as plain values for `danlu runs`, `danlu run --json` and the report."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from danlu.exceptions import RunError
from danlu.training.runs import MANIFEST, RECIPE, StageFolder, is_run, runs_root, stages_of
from danlu.types import OVERLAPS

# Settings that name the model a stage starts from or reads.
LINKS = ("tokenizer", "model", "models", "reward_model", "eval_reward_model")
_STAGE_PATH = re.compile(r"(?:^|/)\d\d-([^/]+)(?:/|$)")


@dataclass(frozen=True)
class StageView:
    """A stage of the recipe, with its folder if it has one."""

    name: str
    kind: str
    status: str
    folder: Path | None
    manifest: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        return float(self.manifest.get("seconds") or 0.0)

    @property
    def gates(self) -> list[dict[str, Any]]:
        return [dict(g) for g in self.manifest.get("gates") or []]

    @property
    def table(self) -> list[dict[str, Any]]:
        return [dict(r) for r in self.manifest.get("table") or []]

    @property
    def start(self) -> dict[str, Any]:
        """Held-out metrics of the model before a stage that rolls out; empty for other stages."""
        return dict((self.manifest.get("facts") or {}).get("start") or {})

    @property
    def reward_report(self) -> dict[str, Any]:
        """What a reward model's held-out answers say of it; empty for other stages."""
        return dict((self.manifest.get("facts") or {}).get("reward_report") or {})


@dataclass(frozen=True)
class Link:
    """Stage `stage` reads what `source` made: a stage of this run, a folder or a hub id, as its `role` (model, ...)."""

    stage: str
    role: str
    source: str


def find_run(text: str, root: Path | None = None) -> Path:
    """A run folder for a name under `root` (default: where runs are kept) or a path.

    Raises:
        RunError: there is no such run; with the nearest name if one is close.
    """
    root = root or runs_root()
    given = Path(text)
    for folder in (root / text, given):
        if is_run(folder):
            return folder
    if given.is_dir():
        raise RunError(f"this folder is no run: it has no {RECIPE}", file=given, hint="list the runs with `danlu runs`")
    known = [p.name for p in _run_folders(root)]
    near = difflib.get_close_matches(given.name, known, n=1)
    if near:
        hint = f"did you mean '{near[0]}'?"
    else:
        hint = f"runs here: {', '.join(known)}" if known else "start one with `danlu run RECIPE`"
    raise RunError(f"there is no run '{text}'", hint=hint)


def read_recipe(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run.

    Raises:
        RunError: not a run, or its recipe cannot be read.
    """
    path = run / RECIPE
    if not path.is_file():
        raise RunError(f"this folder is no run: it has no {RECIPE}", file=run, hint="list the runs with `danlu runs`")
    try:
        recipe = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError("the recipe of this run is not valid YAML", file=path, hint="run the recipe again") from error
    return recipe if isinstance(recipe, dict) else {}


def no_results(stages: Sequence[StageView]) -> str:
    """Why a run has no table of results."""
    evals = [s for s in stages if s.kind == "eval"]
    waiting = [s for s in evals if s.status != "done"]
    if waiting:
        return f"No results yet: stage “{waiting[0].name}” has not finished."
    if evals:
        return "The evaluation compares no answers; its numbers are with its stage."
    return "This recipe evaluates nothing. Add a stage of kind eval to compare its models."


def stage_views(run: Path) -> list[StageView]:
    """Every stage: those of the recipe in its order, then folders that the recipe does not know."""
    folders = {s.name: s for s in stages_of(run)}
    views = []
    for planned in read_recipe(run).get("stages") or []:
        kind = str(planned.get("kind", ""))
        name = str(planned.get("name") or kind)
        views.append(_view(name, kind, folders.pop(name, None), planned))
    views += [_view(name, folder.kind, folder, {}) for name, folder in folders.items()]
    return views


def _view(name: str, kind: str, folder: StageFolder | None, planned: Mapping[str, Any]) -> StageView:
    settings = {k: v for k, v in planned.items() if k not in ("kind", "name")}
    if folder is None:
        return StageView(name, kind, "pending", None, {}, settings)
    own = folder.folder / "settings.yaml"
    if own.is_file():
        loaded = yaml.safe_load(own.read_text("utf-8"))
        settings = loaded if isinstance(loaded, dict) else settings
    # A folder is made before its manifest, so one without a manifest is from a run that was killed in between.
    status = str(folder.manifest.get("status") or "interrupted")
    return StageView(name, folder.kind or kind, status, folder.folder, folder.manifest, settings)


def stage_view(folder: Path) -> StageView | None:
    """A stage that was made outside of a run, by the folder that it was written into; None where there is no manifest of one."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if not isinstance(manifest, dict) or "kind" not in manifest:
        return None
    found = StageFolder(0, str(manifest.get("name") or manifest["kind"]), folder, manifest)
    return _view(found.name, found.kind, found, {})


def run_status(stages: Iterable[StageView]) -> str:
    """done, failed (also by a gate), interrupted, running, or unfinished when the next stage just was not started."""
    stages = list(stages)
    statuses = [s.status for s in stages]
    for status in ("failed", "interrupted", "running"):
        if status in statuses:
            return status
    if statuses and all(s == "done" for s in statuses):
        return "done"
    return "failed" if any(failed_gates(s) for s in stages) else "unfinished"


def failed_gates(stage: StageView) -> list[dict[str, Any]]:
    """Gates that do not hold and are no mere warnings."""
    return [g for g in stage.gates if not g.get("passed") and not g.get("warning")]


def describe(run: Path) -> dict[str, Any]:
    """A run as one JSON document.

    Returns:
        {"run", "seconds", "stages": [{"name", "kind", "status", "seconds", "metrics", "gates": [...]}], "table"};
        "seconds" is the sum of the stages' own times, "table" all stages' result rows in order.

    Raises:
        RunError: not a run.
    """
    stages = stage_views(run)
    return {
        "run": str(run),
        "seconds": round(sum(s.seconds for s in stages), 3),
        "stages": [
            {
                "name": s.name,
                "kind": s.kind,
                "status": s.status,
                "seconds": s.seconds,
                "metrics": dict(s.manifest.get("metrics") or {}),
                "gates": [{k: g.get(k) for k in ("code", "passed", "value", "threshold")} for g in s.gates],
            }
            for s in stages
        ],
        "table": [
            {k: row.get(k) for k in ("model", "rubric", "correct", "stop_rate", "length")}
            | {k: row[k] for k in OVERLAPS if k in row}
            for s in stages
            for row in s.table
        ],
    }


def list_runs(root: Path | None = None) -> list[dict[str, Any]]:
    """Every run under `root` (default: where runs are kept), the newest last.

    Returns:
        {"run", "description", "status", "done", "stages", "seconds", "started", "last"} each; "last" is the last row of
        the results or None.
    """
    found = []
    for folder in _run_folders(root or runs_root()):
        stages = stage_views(folder)
        rows = [row for s in stages for row in s.table]
        started = [str(s.manifest["started"]) for s in stages if s.manifest.get("started")]
        found.append(
            {
                "run": folder.name,
                "description": str(read_recipe(folder).get("description") or ""),
                "status": run_status(stages),
                "done": sum(s.status == "done" for s in stages),
                "stages": len(stages),
                "seconds": round(sum(s.seconds for s in stages), 3),
                "started": min(started, default=""),
                "last": rows[-1] if rows else None,
            }
        )
    return sorted(found, key=lambda r: (r["started"], r["run"]))


def _run_folders(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("*") if is_run(p)) if root.is_dir() else []


def lineage(run: Path) -> list[Link]:
    """Which stage's model every stage started from or read."""
    planned = {str(s.get("name") or s.get("kind")): s for s in read_recipe(run).get("stages") or []}
    links = []
    for stage in stage_views(run):
        # The recipe names stages ("stage:sft"), the stage's own settings name folders (".../02-sft/model").
        for role in LINKS:
            value = planned.get(stage.name, {}).get(role) or stage.settings.get(role)
            values = value if isinstance(value, list) else [value]
            links += [Link(stage.name, role.removesuffix("s"), _source(str(v))) for v in values if v]
    return links


def _source(text: str) -> str:
    if text.startswith("stage:"):
        return text.removeprefix("stage:")
    match = _STAGE_PATH.search(text.replace("\\", "/"))
    return match[1] if match else text
