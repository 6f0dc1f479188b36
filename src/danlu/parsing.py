"""Plain values to settings, checked before anything runs; an unknown key is refused with the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from danlu.exceptions import SettingsError
from danlu.train_config import Settings

S = TypeVar("S", bound=Settings)


def parse(cls: type[S], values: Mapping[str, Any], *, file: str | None = None, prefix: str = "") -> S:
    """Settings from plain values.

    Args:
        values: from YAML or the command line.
        file: named in errors.
        prefix: what stands before a field's name in errors, such as "sft.".

    Raises:
        SettingsError: an unknown key (with the nearest right name), a wrong type or a value out of range; the first one found.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        whole = [str(p) for p in first["loc"]]
        path = [p for p in whole if not p.startswith("<")]  # <...>: which shape of a union it has
        name = prefix + ".".join(path)
        if first["type"] == "extra_forbidden":
            known = _fields_at(cls, whole[:-1])
            near = difflib.get_close_matches(path[-1], known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
            raise SettingsError("there is no such setting", file=file, field=name, hint=hint) from None
        found = "" if first["type"] == "missing" else f" (found: {first['input']!r})"
        message = first["msg"].removeprefix("Value error, ")
        raise SettingsError(
            f"{message[0].lower()}{message[1:]}{found}", file=file, field=name.rstrip(".") or None
        ) from None


def _fields_at(cls: type[BaseModel], path: list[str]) -> list[str]:
    models = [cls]
    for name in path:
        found = models[0].model_fields.get(name)
        if found is not None:
            models = list(_models_in(found.annotation)) or models
        models = [
            m for m in models if "kind" in m.model_fields and f"<{m.model_fields['kind'].default}>" == name
        ] or models
    return [field.alias or name for name, field in models[0].model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
