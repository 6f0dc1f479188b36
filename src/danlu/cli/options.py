"""Options made from settings: a stage's flags are its settings' fields, with their types, ranges and descriptions."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from danlu.exceptions import UsageError

SOURCES = ("data", "eval_data", "questions", "prompts", "replay", "instruction_data", "calibration")
TERMS = ("rewards", "eval_rewards")
SEVERAL = (
    "data",
    "eval_data",
    "models",
    "report_to",
    "questions",
    "target",
    "reward_model",
    "replay",
    "instruction_data",
    "calibration",
)
# Given once it is the thing itself, not a list of one.
ALONE = (
    "data",
    "eval_data",
    "questions",
    "lora__target",
    "reward_model",
    "replay",
    "target",
    "instruction_data",
    "calibration",
)
WRITTEN = (*SOURCES, "actions")  # values that may be YAML


def options_of(cls: type[BaseModel], prefix: str = "") -> list[click.Option]:
    """One option per field; fields of groups as `--group.field`."""
    found: list[click.Option] = []
    for name, field in cls.model_fields.items():
        kind = _bare(field.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += options_of(kind, f"{prefix}{name}.")
            continue
        found.append(_option(prefix + name, kind, field))
    return found


def _bare(annotation: Any) -> Any:
    """The type without `None` and what is noted beside it; of several its first."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [a for a in get_args(annotation) if a is not type(None)]
        if int in rest and len(rest) > 1:  # a number or a word
            return str
        return _bare(rest[0]) if rest else str
    return annotation


def _option(name: str, kind: Any, field: FieldInfo) -> click.Option:
    flag = "--" + name.replace("_", "-")
    help_text = field.description or ""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if default not in (None, "", [], {}) and not isinstance(default, BaseModel):
        help_text += f"  [default: {default}]"
    several = name.rpartition(".")[2] in SEVERAL
    if get_origin(kind) is list:
        kind, several = get_args(kind)[0], True
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", _variable(name)], default=None, help=help_text)
    choice: Any = str
    if get_origin(kind) is Literal and all(isinstance(a, str) for a in get_args(kind)):
        choice = click.Choice([str(a) for a in get_args(kind)])
    elif kind in (int, float):
        choice = kind
    elif get_origin(kind) is Literal:
        choice = int
    return click.Option([flag, _variable(name)], type=choice, default=None, multiple=several, help=help_text)


def _variable(name: str) -> str:
    return name.replace(".", "__")


def given_values(arguments: dict[str, Any]) -> dict[str, Any]:
    """What was given on the command line, nested as the settings are; the rest keeps its default."""
    values: dict[str, Any] = {}
    for key, value in arguments.items():
        if value is None or value == ():
            continue
        plain = list(value) if isinstance(value, tuple) else value
        if key.rpartition("__")[2] in WRITTEN:
            plain = [_written(one) for one in plain] if isinstance(plain, list) else _written(plain)
        if key in TERMS:
            plain = [term for one in plain for term in _terms(one, f"--{key.replace('_', '-')}")]
        if isinstance(plain, list) and len(plain) == 1 and key in ALONE:
            plain = plain[0]
        target = values
        *groups, last = key.split("__")
        for group in groups:
            target = target.setdefault(group, {})
        target[last] = plain
    return values


def _written(given: Any) -> Any:
    """What has more to say than one word is written as in a recipe: `{path: x.csv, weight: 2}`."""
    if not isinstance(given, str) or not given.startswith("{"):
        return given
    return _yaml(given, "a source", "--data '{path: x.csv, weight: 2}'")


def _terms(given: Any, flag: str) -> list[Any]:
    """A reward term is written as in a recipe, in YAML or JSON: `{kind: length, limit: 200}`; or several as a list of these."""
    hint = f"{flag} '{{kind: length, limit: 200, weight: 0.5}}'"
    found = _yaml(given, "a reward term", hint) if isinstance(given, str) else given
    terms = found if isinstance(found, list) else [found]
    wrong = [one for one in terms if not isinstance(one, dict)]
    if wrong:
        raise UsageError(f"{flag} wants objects with a kind (found: {wrong[0]!r})", hint=hint)
    return terms


def _yaml(given: str, what: str, hint: str) -> Any:
    try:
        return yaml.safe_load(given)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"found {what} that is not valid YAML: {reason}", hint=hint) from error
