"""Options made from settings: a stage's flags are its settings' fields, with their types, ranges and descriptions."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

SEVERAL = ("data", "eval_data", "models", "report_to", "questions", "target")


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
    """The type without `None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [a for a in get_args(annotation) if a is not type(None)]
        return rest[0] if rest else str
    return annotation


def _option(name: str, kind: Any, field: FieldInfo) -> click.Option:
    flag = "--" + name.replace("_", "-")
    help_text = field.description or ""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if default not in (None, "", []) and not isinstance(default, BaseModel):
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
        if isinstance(plain, list) and len(plain) == 1 and key in ("data", "eval_data", "questions", "lora__target"):
            plain = plain[0]
        target = values
        *groups, last = key.split("__")
        for group in groups:
            target = target.setdefault(group, {})
        target[last] = plain
    return values
