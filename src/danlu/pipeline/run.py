"""Runs: one folder per run, one per stage; a finished stage with the same key is not run again, an interrupted one goes on.

A stage's key is a hash of the settings that affect its result, of its inputs' content and of the stage's algorithm version.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import danlu
from danlu import atomic
from danlu.alignment_config import RolloutSettings
from danlu.data.files import is_hub
from danlu.data.sources import files_of
from danlu.exceptions import DanluError, GateError, Interrupted, RunError
from danlu.pipeline.ranks import Runner
from danlu.pipeline.recipe import Recipe, Stage
from danlu.pipeline.stages import STAGES
from danlu.reward_config import TERM_NO_EFFECT
from danlu.synth.town.write import TOWN_FILES, write_town
from danlu.train_config import Source, StageSettings, as_list, as_models
from danlu.trainers.judges import following, opinions
from danlu.training import checkpoint, memory
from danlu.training.runs import MANIFEST, RECIPE, resolve_model

MANIFEST_SCHEMA = 1
# What a stage that failed early may leave and its next attempt would read.
LEFTOVERS = ("collected.jsonl", "compute.json", "metrics.jsonl")
TOWN = "town:"
STAGE = "stage:"
# How often something is looked at, shown or kept, and who computes it, does not change what comes out (within rounding).
NO_EFFECT = (
    "out",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "report_to",
    "processes",
    "strategy",
    "micro_tokens",
    "activation_checkpointing",
    "compile_head",
    "on_oom",
    "rollout.buffer",
    "rollout.vllm_memory",
    "follow_failed",
)


def execute(
    recipe: Recipe,
    folder: Path,
    *,
    until: str | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Runs the stages of a recipe in a run folder; finished ones are kept.

    Args:
        until: the last stage to run, by name.
        force: go on past failed gates.
        say: takes one line per stage for people.

    Raises:
        RunError: the folder holds results of other settings or inputs, or another process is at work in it.
        GateError: a gate does not hold.
    """
    names = [s.name for s in recipe.stages]
    if until is not None and until not in names:
        raise RunError(f"the recipe has no stage '{until}'", file=recipe.file, hint=f"stages: {', '.join(names)}")
    _refuse_missing_files(recipe)
    _refuse_other_settings(recipe, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), Runner() as runner:
        atomic.write_text(folder / RECIPE, yaml.safe_dump(recipe.resolved, allow_unicode=True, sort_keys=False))
        for stage in recipe.stages:
            settings = placed(stage, recipe, folder)
            run_stage(stage.name, stage.kind, settings, runner=runner, cache=folder, force=force, say=say)
            if stage.name == until:
                return


def _refuse_missing_files(recipe: Recipe) -> None:
    """Before anything runs: every data file of every stage is there, and what its kind requires."""
    for stage in recipe.stages:
        require = STAGES[stage.kind].require
        if require is not None:
            require(stage.settings)
        for field, value in _named(stage.settings, STAGES[stage.kind].inputs):
            for source in as_list(value):
                name = source.path.removeprefix(TOWN)
                if name == source.path:
                    files_of(source)
                elif name not in TOWN_FILES:
                    raise RunError(
                        f"{stage.name}.{field}: the town has no file '{name}'",
                        file=recipe.file,
                        hint=f"files: {', '.join(TOWN_FILES)}",
                    )


def placed(stage: Stage, recipe: Recipe, folder: Path) -> StageSettings:
    """A stage's settings with `stage:` and `town:` names turned into paths of this run."""
    folders = {s.name: folder / s.folder for s in recipe.stages}

    def place(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(STAGE):
            return str(folders[value.removeprefix(STAGE)] / "model")
        if isinstance(value, str) and value.startswith(TOWN):
            return str(_town_file(folder, value.removeprefix(TOWN), int(recipe.resolved.get("seed", 0))))
        if isinstance(value, list):
            return [place(v) for v in value]
        return {k: place(v) for k, v in value.items()} if isinstance(value, dict) else value

    values = place(stage.settings.model_dump()) | {"out": str(folder / stage.folder)}
    return type(stage.settings).model_validate(values)


def _town_file(folder: Path, name: str, seed: int) -> Path:
    """A file of the invented town, written on first use. The same seed always gives the same bytes."""
    path = folder / "town" / f"{name}.jsonl"
    if not path.is_file():
        write_town(folder / "town", seed)
    return path


def run_stage(
    name: str,
    kind: str,
    settings: StageSettings,
    *,
    runner: Runner | None = None,
    cache: Path | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """One stage into `settings.out`: skipped if finished with the same key, resumed if interrupted. Returns its manifest.

    Raises:
        RunError: `out` holds the result of other settings or inputs.
        GateError: a gate does not hold, or that of a reward model that the stage follows did not, and `force` is false.
    """
    out = Path(settings.out)
    inputs = _inputs(kind, settings, Hashes(cache or out))
    key = stage_key(kind, settings, inputs)
    old = _read_manifest(out)
    if old.get("key") not in (None, key) and _nothing_made(out, old):
        for leftover in LEFTOVERS:
            (out / leftover).unlink(missing_ok=True)
        old = {}
    if old.get("key") not in (None, key):
        raise RunError(
            f"stage '{name}' was made with other settings or inputs ({_what_changed(old, kind, settings, inputs)})",
            file=out,
            hint="give the run another --name, or delete this folder (and those after it) to do it again",
        )
    if old.get("status") == "done":
        failed = [g for g in old.get("gates", []) if not g["passed"] and not g.get("warning")]
        if failed and not force:
            raise _gate_error(name, failed)
        say(f"{name}: done before ({old['seconds']:.0f} s)")
        return old
    settings = following(settings) if force else settings
    judges = opinions(settings)
    out.mkdir(parents=True, exist_ok=True)
    # `out` differs when a run folder is moved; everything else is what the stage was asked to do.
    atomic.write_text(
        out / "settings.yaml", yaml.safe_dump(settings.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    )
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "name": name,
        "kind": kind,
        "status": "running",
        "key": key,
        "seconds": old.get("seconds", 0.0),
        "started": old.get("started") or _now(),
        "seed": settings.seed,
        "inputs": inputs,
        "versions": _versions(),
        "hardware": _hardware(),
    }
    atomic.write_json(out / MANIFEST, manifest)
    say(f"{name}: {'going on' if old else 'begins'}")
    for judge in judges:
        if judge.note:
            say(f"  {judge.note}")
    begun = time.monotonic()
    try:
        with _sigterm_interrupts(), nullcontext(runner) if runner else Runner() as used:
            outcome = used.run(kind, settings)
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        manifest |= {"status": "interrupted" if stopped else "failed", "error": str(error)}
        manifest["seconds"] += time.monotonic() - begun
        with suppress(OSError):  # the disk may be full: then the error that says so matters more
            atomic.write_json(out / MANIFEST, manifest)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted in stage '{name}'", hint="run the same command again to go on") from None
        if memory.disk_full(error):
            raise memory.disk_sentence(out) from error
        raise
    manifest["seconds"] += time.monotonic() - begun
    manifest |= {
        "status": "done",
        "finished": _now(),
        "metrics": outcome.metrics,
        "inputs": _with_origins(inputs, outcome.facts.pop("origins", [])),
        "facts": outcome.facts,
        "gates": [g.as_dict() for g in outcome.gates],
        "table": outcome.table,
        "peak_memory_mb": outcome.peak_memory_mb,
    }
    atomic.write_json(out / MANIFEST, manifest)
    say(f"{name}: done in {manifest['seconds']:.0f} s")
    for gate in outcome.gates:
        verdict = "holds" if gate.passed else "warns" if gate.warning else "DOES NOT HOLD"
        say(f"  {gate.code} {verdict}: {gate.sentence}")
    failed = [g.as_dict() for g in outcome.gates if not g.passed and not g.warning]
    if failed and not force:
        raise _gate_error(name, failed)
    return manifest


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM stops a stage as Ctrl-C does; inside a training loop `Session` saves first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _nothing_made(out: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a stage failed before its first checkpoint: then there is no result that other settings could overwrite."""
    return manifest.get("status") == "failed" and checkpoint.latest(out / "checkpoints") is None


def _gate_error(name: str, failed: list[dict[str, Any]]) -> GateError:
    gate = failed[0]
    return GateError(
        f"gate {gate['code']} after stage '{name}' does not hold: {gate['sentence']} (threshold {gate['threshold']})",
        hint="change the settings or the data, or go on anyway with --force",
    )


# -- keys ---------------------------------------------------------------------------------------------------------------


class Hashes:
    """SHA-256 of files, remembered by path, size and time in `.hashes.json`, so that large inputs are read once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".hashes.json"
        try:
            self._known: dict[str, Any] = json.loads(self._path.read_text("utf-8"))
        except (OSError, json.JSONDecodeError):
            self._known = {}

    def of(self, file: Path) -> str:
        """Hex digest of a file's content."""
        stat = file.stat()
        name, mark = str(file.resolve()), [stat.st_size, stat.st_mtime_ns]
        if self._known.get(name, [None])[0] != mark:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            self._known[name] = [mark, digest]
            atomic.write_json(self._path, self._known)
        return str(self._known[name][1])


def _inputs(kind: str, settings: StageSettings, hashes: Hashes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path, value in _named(settings, STAGES[kind].inputs):
        for number, source in enumerate(as_list(value)):
            found += [_said_of(source, number) | i for i in _source_inputs(path, source, hashes)]
    for path, value in _named(settings, STAGES[kind].models):
        for model in as_models(value):
            folder = Path(resolve_model(model))
            if folder.is_dir():
                found += [_input(path, f, hashes) for f in sorted(folder.rglob("*")) if f.is_file()]
            else:
                found.append({"field": path, "path": str(model), "sha256": "", "bytes": 0})
    for name in settings.reward_files() if isinstance(settings, RolloutSettings) else []:
        if not Path(name).is_file():
            raise RunError("there is no such file", file=name, field="rewards")
        found.append(_input("rewards", Path(name), hashes))
    return found


def _source_inputs(field: str, source: Source, hashes: Hashes) -> list[dict[str, Any]]:
    if is_hub(source.path):
        return [{"field": field, "path": source.path, "sha256": "", "bytes": 0}]
    return [_input(field, file, hashes) for file in files_of(source)]


def _said_of(source: Source, number: int) -> dict[str, Any]:
    """What the settings say about an input beside its path; it counts for the stage's key."""
    said = source.model_dump(mode="json", exclude={"path"}, exclude_defaults=True)
    return {"source": number, "options": said} if said else {}


def _named(settings: StageSettings, fields: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for field in fields:
        value: Any = settings
        for part in field.split("."):
            value = getattr(value, part, None)
        if value:
            yield field, value


def _input(field: str, file: Path, hashes: Hashes) -> dict[str, Any]:
    return {"field": field, "path": str(file), "sha256": hashes.of(file), "bytes": file.stat().st_size}


def _with_origins(inputs: list[dict[str, Any]], origins: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The inputs with how many records they gave and what is known of their licence; an archive's members together."""
    told = []
    for given in inputs:
        own = [o for o in origins if o["file"] == given["path"] or o["file"].startswith(given["path"] + "/")]
        if given["field"] != "data" or not own:
            told.append(given)
            continue
        words = {k: ", ".join(dict.fromkeys(o[k] for o in own if o[k])) for k in ("licence", "source")}
        extra = {"records": sum(o["records"] for o in own), "licence": words["licence"], "from": words["source"]}
        told.append(given | {k: v for k, v in extra.items() if v})
    return told


def stage_key(kind: str, settings: StageSettings, inputs: list[dict[str, Any]]) -> str:
    """See the module."""
    fields = (*STAGES[kind].inputs, *STAGES[kind].models)
    plain = _effective(settings.model_dump(mode="json"), fields)
    # Inputs count by content: a run folder may be moved.
    content = [
        [
            i["field"],
            Path(i["path"]).name,
            i["sha256"] or i["path"],
            *([i["source"], i["options"]] if "options" in i else []),
        ]
        for i in inputs
    ]
    document = json.dumps([kind, STAGES[kind].version, plain, content], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()


def _effective(values: Mapping[str, Any], more: Iterable[str] = ()) -> dict[str, Any]:
    """A stage's settings, as plain values, without those that cannot change its result, and without some more."""
    kept = _without(values, (*NO_EFFECT, *more))
    for name in ("rewards", "eval_rewards"):
        if name in kept:
            kept[name] = [{k: v for k, v in term.items() if k not in TERM_NO_EFFECT} for term in kept[name]]
    return kept


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Plain settings without some of them; `group.field` names one of a group."""
    found = dict(values)
    for name in names:
        group, _, field = name.partition(".")
        if not field:
            found.pop(group, None)
        elif isinstance(found.get(group), dict):
            found[group] = _without(found[group], [field])
    return found


def _refuse_other_settings(recipe: Recipe, folder: Path) -> None:
    """Before anything runs: settings of stages that exist must be the ones asked for now."""
    for stage in recipe.stages:
        others = [p.name for p in folder.glob(f"{stage.index:02d}-*") if p.name != stage.folder]
        if others:
            raise RunError(
                f"this run has '{others[0]}' where the recipe has stage '{stage.name}'", file=folder, hint="give --name"
            )
        out = folder / stage.folder
        path = out / "settings.yaml"
        if not path.is_file() or _nothing_made(out, _read_manifest(out)):
            continue
        old = _effective(yaml.safe_load(path.read_text("utf-8")))
        new = _effective(placed(stage, recipe, folder).model_dump(mode="json"))
        known = [k for k in new if k in old or new[k]]  # an empty setting that is younger than the run says nothing
        changed = [k for k in known if old.get(k) != new[k] and not _same_place(old.get(k), new[k], folder)]
        if changed:
            name, before, now = _leaf(changed[0], old.get(changed[0]), new[changed[0]])
            raise RunError(
                f"this run was made with {stage.name}.{name} = {before!r}; the recipe now says {now!r}",
                file=folder,
                hint=f"keep both: --name OTHER; or delete {folder / stage.folder} and what follows it to do it again",
            )


def _same_place(old: Any, new: Any, folder: Path) -> bool:
    """Whether two values differ only because the run folder was moved or named another way."""
    if not (isinstance(old, str | list | dict) and isinstance(new, type(old))):
        return False
    mark = f"/{folder.name}/"
    return [t.rpartition(mark)[2] for t in _texts(old)] == [t.rpartition(mark)[2] for t in _texts(new)]


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [t for k in sorted(value) for t in _texts(value[k])]
    if isinstance(value, list):
        return [t for v in value for t in _texts(v)]
    return [str(value)]


def _leaf(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The innermost setting that differs, with its dotted name."""
    while isinstance(old, dict) and isinstance(new, dict):
        key = next(k for k in [*new, *old] if old.get(k) != new.get(k))
        name, old, new = f"{name}.{key}", old.get(key), new.get(key)
    return name, old, new


def _what_changed(old: Mapping[str, Any], kind: str, settings: StageSettings, inputs: list[dict[str, Any]]) -> str:
    before = {i["path"]: i["sha256"] for i in old.get("inputs", [])}
    for now in inputs:
        if before.get(now["path"], now["sha256"]) != now["sha256"]:
            return f"{now['path']} has changed since"
    path = Path(settings.out) / "settings.yaml"
    saved = _effective(yaml.safe_load(path.read_text("utf-8"))) if path.is_file() else {}
    for key, value in _effective(settings.model_dump(mode="json")).items():
        if saved.get(key) != value:
            name, before_value, now_value = _leaf(key, saved.get(key), value)
            return f"{name} was {before_value!r}, now {now_value!r}"
    return f"danlu's {kind} stage itself has changed since"


# -- the record ---------------------------------------------------------------------------------------------------------


def _read_manifest(out: Path) -> dict[str, Any]:
    path = out / MANIFEST
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if found.get("schema", 0) > MANIFEST_SCHEMA:
        raise RunError(
            f"manifest.json has schema {found['schema']}, this danlu knows {MANIFEST_SCHEMA}",
            file=path,
            hint="update danlu",
        )
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time works in a run folder; the lock ends with the process, however it ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                "another process is at work in this run", file=folder, hint="wait for it, or use --name"
            ) from None
        yield


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers", "peft", "numpy")
    return {"danlu": danlu.__version__, "python": platform.python_version(), **{n: metadata.version(n) for n in names}}


def _hardware() -> dict[str, Any]:
    import torch

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": cuda}


def error_line(error: DanluError) -> str:
    """One line for a table."""
    return error.message.splitlines()[0]
