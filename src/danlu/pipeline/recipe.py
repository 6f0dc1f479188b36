"""Recipes: one YAML file, every field typed, checked before anything runs.

description: one line
seed: 0                      # of every stage that does not set its own
model: null                  # a folder or hub id: then nothing is trained from nothing
processes: 1                 # of every training stage that does not set its own; strategy likewise
licences: {data/alpaca: CC-BY-NC-4.0}   # of data that do not say theirs, by where they lie; for the model's card
data_root: data              # any extra top-level text can be used as ${data_root}, as can ${model}, in stages and in later keys
stages:
  - kind: sft                # tokenizer, pretrain, sft, reward, dpo, ppo, grpo, eval, quantize
    name: sft                # default: the kind; unique
    data: ${data_root}/my.jsonl
    learning_rate: 1.0e-3
    with_model: {learning_rate: 2.0e-5}   # what is otherwise where `model` is given; or `skip`: the stage is left out then
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from danlu.config import KINDS, POLICY_KINDS
from danlu.exceptions import SettingsError, UsageError
from danlu.parsing import parse
from danlu.train_config import StageSettings

TOP = ("description", "seed", "model", "processes", "strategy", "licences", "stages")
# Settings that are sources.
DATA = ("data", "eval_data", "instruction_data", "prompts", "questions", "replay", "calibration")
WITH_MODEL, SKIP = "with_model", "skip"
VERBATIM = ("pattern", "json_schema", "rubric")  # of reward terms: a dollar sign there is one


@dataclass(frozen=True)
class Stage:
    """A stage of a resolved recipe. `settings` still names other stages where a model is wanted; `pipeline/run.py` places them."""

    index: int
    name: str
    kind: str
    settings: StageSettings

    @property
    def folder(self) -> str:
        return f"{self.index:02d}-{self.name}"


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `resolved` is what is saved in the run folder."""

    file: str
    description: str
    stages: list[Stage]
    resolved: dict[str, Any]


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, processes: str | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        overrides: `key=value` texts as given to `--set`: a top-level key, or `stage.field` (also `stage.group.field`).
        processes: of every training stage, whatever the recipe says.

    Raises:
        SettingsError: not a recipe, an unknown key, a value out of range, stages out of order.
        UsageError: an override that names no key.
    """
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], n=1)
        hint = f"did you mean {file.parent / near[0]}?" if near else "list the recipes with `danlu recipes`"
        raise SettingsError("no such recipe", file=file, hint=hint)
    try:
        raw = yaml.safe_load(file.read_text("utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else None
        problem = getattr(error, "problem", None) or str(error)
        raise SettingsError(f"not valid YAML: {problem}", file=file, line=line) from error
    except UnicodeDecodeError as error:
        raise SettingsError("the file is not UTF-8", file=file, hint="save it as UTF-8") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("stages"), list) or not raw["stages"]:
        raise SettingsError("a recipe is a mapping with a list 'stages'", file=file, hint="see recipes/quickstart.yaml")
    top = {k: v for k, v in raw.items() if k != "stages"}
    stages = [_plain_stage(s, file) for s in raw["stages"]]
    names = [s["name"] for s in stages]
    twice = [n for n in names if names.count(n) > 1]
    if twice:
        raise SettingsError(
            f"two stages are named '{twice[0]}'", file=file, hint="give one of them a 'name' of its own"
        )
    for stage in stages:
        if processes is not None and "processes" in KINDS[stage["kind"]].model_fields:
            stage["processes"] = processes
    named = {s["name"]: s for s in stages}
    for text in [t for t in overrides if not _of_stage(t)]:
        _override(text, top, named)
    left_out = [s for s in stages if not _with_model(s, bool(top.get("model")), file)]
    for text in filter(_of_stage, overrides):  # these win over what a stage says for a given model
        _override(text, top, named)
    _check_top(top, file)
    variables = _variables({k: str(v) for k, v in top.items() if k not in TOP or (k == "model" and v)}, file)
    stages = [s for s in stages if s not in left_out]
    licences = _substitute(
        {"name": "licences", "pairs": list(map(list, top.get("licences", {}).items()))}, variables, file
    )
    stages = [_licensed(_substitute(s, variables, file), dict(licences["pairs"])) for s in stages]
    checked = [
        Stage(i, s["name"], s["kind"], _settings(s, top, str(file)))
        for i, s in enumerate(_wire(stages, top, file), start=1)
    ]
    resolved = {**top, "stages": [{"kind": s.kind, "name": s.name, **_changed(s.settings)} for s in checked]}
    return Recipe(str(file), str(top.get("description", "")), checked, resolved)


def _changed(settings: StageSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude={"out"})


def _plain_stage(stage: Any, file: Path) -> dict[str, Any]:
    if not isinstance(stage, dict) or "kind" not in stage:
        raise SettingsError(f"a stage is a mapping with a 'kind' (found: {stage!r})", file=file)
    if stage["kind"] not in KINDS:
        near = difflib.get_close_matches(str(stage["kind"]), KINDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"kinds: {', '.join(KINDS)}"
        raise SettingsError(f"there is no stage kind '{stage['kind']}'", file=file, hint=hint)
    return {"name": stage["kind"], **stage}


def _with_model(stage: dict[str, Any], given: bool, file: Path) -> bool:
    """Applies what a stage says of itself under `with_model`, if a model is given; False: then it is left out.

    Raises:
        SettingsError: it is neither `skip` nor settings.
    """
    says = stage.pop(WITH_MODEL, {})
    if says != SKIP and not isinstance(says, dict):
        raise SettingsError(
            f"expected skip, or settings that hold where a model is given (found: {says!r})",
            file=file,
            field=f"{stage['name']}.{WITH_MODEL}",
        )
    if not given:
        return True
    if says == SKIP or stage["kind"] == "tokenizer":
        return False
    for key, value in says.items():
        own = stage.get(key)
        stage[key] = {**own, **value} if isinstance(own, dict) and isinstance(value, dict) else value
    return True


def _check_top(top: Mapping[str, Any], file: Path) -> None:
    licences = top.get("licences", {})
    if not isinstance(licences, dict) or not all(isinstance(v, str) and v for v in licences.values()):
        raise SettingsError(f"expected paths and their licences (found: {licences!r})", file=file, field="licences")
    for key, value in top.items():
        if key not in TOP and not isinstance(value, str | int | float):
            near = difflib.get_close_matches(key, TOP, n=1)
            raise SettingsError(
                "there is no such top-level key",
                file=file,
                field=key,
                hint=f"did you mean '{near[0]}'?" if near else "",
            )


def _of_stage(text: str) -> bool:
    """Whether a `--set` names a setting of a stage."""
    return "." in text.partition("=")[0]


def _override(text: str, top: dict[str, Any], stages: Mapping[str, dict[str, Any]]) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set wants key=value (found: {text!r})")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    path = key.split(".")
    if len(path) == 1:
        known = [*top, "model", "seed", "processes", "strategy"]
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *stages], n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"top-level keys: {', '.join(sorted(set(known)))}"
            raise UsageError(f"--set {key}: the recipe has no such key", hint=hint)
        top[key] = parsed
        return
    if path[0] not in stages:
        near = difflib.get_close_matches(path[0], list(stages), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"stages: {', '.join(stages)}"
        raise UsageError(f"--set {key}: the recipe has no stage '{path[0]}'", hint=hint)
    target = stages[path[0]]
    for part in path[1:-1]:
        group = target.get(part) or {}
        if not isinstance(group, dict):
            raise UsageError(f"--set {key}: '{part}' is a value, not a group of settings")
        target[part] = target = dict(group)
    target[path[-1]] = parsed


def _variables(given: Mapping[str, str], file: Path) -> dict[str, str]:
    """Extra top-level keys by name; one may speak of those before it, as `prompts: ${data_root}/prompts.jsonl`."""
    found: dict[str, str] = {}
    for key, value in given.items():
        found[key] = _substitute({"name": key, "value": value}, found, file)["value"]
    return found


def _substitute(stage: dict[str, Any], variables: Mapping[str, str], file: Path) -> dict[str, Any]:
    def fill(value: Any) -> Any:
        if isinstance(value, str) and "$" in value:
            try:
                return string.Template(value).substitute(variables)
            except (KeyError, ValueError) as error:
                raise SettingsError(
                    f"'{value}' names an unknown variable ({error})", file=file, field=stage["name"]
                ) from None
        if isinstance(value, list):
            return [fill(v) for v in value]
        if isinstance(value, dict):
            return {k: v if k in VERBATIM else fill(v) for k, v in value.items()}
        return value

    return {k: fill(v) for k, v in stage.items()}


def _licensed(value: Any, licences: Mapping[str, str], *, source: bool = False) -> Any:
    """A stage's settings, with a licence on each source that does not say its own: that of the nearest folder (or file) named."""
    if source and isinstance(value, str):
        value = {"path": value}
    if source and isinstance(value, dict):
        path = str(value.get("path", ""))
        known = [place for place in licences if path == place or path.startswith(f"{place}/")]
        found = licences[max(known, key=len)] if known else ""
        if found and not value.get("licence"):
            return {**value, "licence": found}
        return value["path"] if list(value) == ["path"] else value
    if isinstance(value, list):
        return [_licensed(v, licences, source=source) for v in value]
    if isinstance(value, dict):
        return {k: _licensed(v, licences, source=k in DATA) for k, v in value.items()}
    return value


def _wire(stages: list[dict[str, Any]], top: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    """Fills in which stage's model a stage starts from, and refuses stages out of order."""
    policy = str(top.get("model") or "")
    last: dict[str, str] = {}
    for stage in stages:
        kind, name = stage["kind"], stage["name"]

        def need(what: str, kind: str = kind, name: str = name) -> None:
            raise SettingsError(
                f"stage '{name}' ({kind}) needs {what} before it", file=file, hint="reorder the stages, or set a model"
            )

        if kind == "pretrain" and not stage.get("model"):
            stage["model"] = policy  # it goes on from the policy before it, if there is one
            if not stage["model"] and not stage.get("tokenizer"):
                if "tokenizer" not in last:
                    need("a tokenizer stage (or a model)")
                stage["tokenizer"] = f"stage:{last['tokenizer']}"
        if kind in ("sft", "reward", "dpo", "ppo", "grpo", "teach", "quantize") and not stage.get("model"):
            if not policy:
                need("a stage that trains a policy (pretrain or sft)")
            stage["model"] = policy
        if kind == "ppo" and "reward" not in last and not {"reward_model", "rewards", "verifier"} & stage.keys():
            need("a reward stage (or rewards, or a verifier)")
        if kind in ("ppo", "grpo") and "reward" in last:
            stage.setdefault("reward_model", f"stage:{last['reward']}")  # an empty one means: what else scores answers
        if kind == "eval" and not stage.get("models"):
            stage["models"] = [f"stage:{n}" for n in _policies(stages, name)]
            if not stage["models"] and policy:
                stage["models"] = [policy]
            if not stage["models"]:
                need("a stage that trains a policy")
        last[kind] = name
        if kind in POLICY_KINDS:
            policy = f"stage:{name}"
    _check_references(stages, file)
    return stages


def _check_references(stages: Sequence[Mapping[str, Any]], file: Path) -> None:
    names = [s["name"] for s in stages]
    for at, stage in enumerate(stages):
        named = [stage.get(field) for field in ("model", "reward_model", "eval_reward_model", "tokenizer", "models")]
        for value in (v for one in named for v in (one if isinstance(one, list) else [one])):
            name = str(value).removeprefix("stage:")
            if not str(value).startswith("stage:") or name in names[:at]:
                continue
            near = difflib.get_close_matches(name, names[:at], n=1)
            raise SettingsError(
                f"stage '{stage['name']}' names '{name}', which is no stage before it",
                file=file,
                hint=f"did you mean '{near[0]}'?" if near else f"stages before it: {', '.join(names[:at]) or 'none'}",
            )


def _policies(stages: Sequence[Mapping[str, Any]], before: str) -> list[str]:
    found = []
    for stage in stages:
        if stage["name"] == before:
            break
        if stage["kind"] in POLICY_KINDS:
            found.append(stage["name"])
    return found


def _settings(stage: Mapping[str, Any], top: Mapping[str, Any], file: str) -> StageSettings:
    values = {k: v for k, v in stage.items() if k not in ("kind", "name")}
    values.setdefault("seed", top.get("seed", 0))
    cls = KINDS[stage["kind"]]
    for name in ("processes", "strategy"):
        if name in top and name in cls.model_fields:
            values.setdefault(name, top[name])
    return parse(cls, values, file=file, prefix=f"{stage['name']}.")
