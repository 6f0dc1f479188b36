"""A subset of JSON Schema, enough to say what an answer must look like; what is not in it is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

_TYPES: Final[dict[str, Callable[[Any], bool]]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "integer": lambda v: not isinstance(v, bool) and (isinstance(v, int) or (isinstance(v, float) and v.is_integer())),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}
_KNOWN: Final = (
    "type",
    "properties",
    "required",
    "enum",
    "items",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "pattern",
    "additionalProperties",
)
_SAYS_NOTHING: Final = ("$schema", "$id", "$comment", "title", "description", "default", "examples")


def schema_fault(schema: Any, place: str = "") -> str | None:
    """What is wrong with a schema, in a sentence, or None if values can be held against it.

    Args:
        place: where in a larger schema it stands.
    """
    at = f" at {place}" if place else ""
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, Mapping):
        return f"found {type(schema).__name__}{at}, expected an object"
    unknown = sorted(set(schema) - {*_KNOWN, *_SAYS_NOTHING})
    if unknown:
        return f"'{unknown[0]}'{at} is not supported; what is: {', '.join(_KNOWN)}"
    types = schema.get("type", [])
    for name in [types] if isinstance(types, str) else types:
        if name not in _TYPES:
            return f"there is no type '{name}'{at}; there are: {', '.join(_TYPES)}"
    if "pattern" in schema:
        try:
            re.compile(schema["pattern"])
        except (re.error, TypeError) as error:
            return f"the pattern{at} is no regular expression ({error})"
    for key in ("minimum", "maximum", "minLength", "maxLength"):
        if key in schema and not _TYPES["number"](schema[key]):
            return f"found {schema[key]!r} as {key}{at}, expected a number"
    if not isinstance(schema.get("enum", []), list) or not isinstance(schema.get("required", []), list):
        return f"enum and required{at} are lists"
    if not isinstance(schema.get("properties", {}), Mapping):
        return f"properties{at} is an object"
    parts = {f"{place}.{name}".lstrip("."): part for name, part in schema.get("properties", {}).items()}
    parts |= {f"{place}.{key}".lstrip("."): schema[key] for key in ("items", "additionalProperties") if key in schema}
    return next((fault for name, part in parts.items() if (fault := schema_fault(part, name))), None)


def misfit(value: Any, schema: Any, place: str = "the value") -> str | None:
    """Why a JSON value does not fit a schema, in a sentence, or None if it does.

    Args:
        schema: one without a `schema_fault`.
        place: what the value is called in the sentence.
    """
    if isinstance(schema, bool):
        return None if schema else f"{place} is not allowed"
    types = schema.get("type")
    wanted = [types] if isinstance(types, str) else types
    if wanted and not any(_TYPES[name](value) for name in wanted):
        return f"{place} is no {' or '.join(wanted)}"
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        return f"{place} is none of {json.dumps(schema['enum'], ensure_ascii=False)}"
    if isinstance(value, str):
        return _text_misfit(value, schema, place)
    if _TYPES["number"](value):
        if value < schema.get("minimum", value):
            return f"{place} is below {schema['minimum']}"
        return f"{place} is above {schema['maximum']}" if value > schema.get("maximum", value) else None
    if isinstance(value, list):
        items = schema.get("items", True)
        return next((m for i, one in enumerate(value) if (m := misfit(one, items, f"{place}[{i}]"))), None)
    return _object_misfit(value, schema, place) if isinstance(value, dict) else None


def _text_misfit(value: str, schema: Mapping[str, Any], place: str) -> str | None:
    if len(value) < schema.get("minLength", 0):
        return f"{place} is shorter than {schema['minLength']}"
    if len(value) > schema.get("maxLength", len(value)):
        return f"{place} is longer than {schema['maxLength']}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return f"{place} does not match {schema['pattern']!r}"
    return None


def _object_misfit(value: dict[str, Any], schema: Mapping[str, Any], place: str) -> str | None:
    missing = [name for name in schema.get("required", []) if name not in value]
    if missing:
        return f"{place} has no '{missing[0]}'"
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, one in value.items():
        if found := misfit(one, properties.get(name, others), f"{place}.{name}"):
            return found
    return None


def _same(one: Any, other: Any) -> bool:
    """JSON's equality: true is not 1, but 1 is 1.0."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return bool(one == other)


def parsed(text: str) -> Any:
    """A text that is one JSON document.

    Raises:
        ValueError: it is none; NaN and Infinity are not JSON, and neither is what is nested beyond all bounds.
    """
    try:
        return json.loads(text, parse_constant=_refused)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
