"""JSON Schema as far as it says what an answer must look like, with references within it; what is not here is refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Final
from urllib.parse import unquote

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
    "enum",
    "const",
    "properties",
    "required",
    "additionalProperties",
    "minProperties",
    "maxProperties",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
    "uniqueItems",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "pattern",
    "anyOf",
    "oneOf",
    "allOf",
    "not",
    "$ref",
)
_NUMBERS: Final = tuple(key for key in _KNOWN if key.startswith(("min", "max", "exclusive", "multiple")))
_SEVERAL: Final = ("anyOf", "oneOf", "allOf", "prefixItems")  # lists of schemas
_ONE: Final = ("items", "additionalProperties", "not")  # a schema
_NAMED: Final = ("properties", "$defs", "definitions")  # schemas by name
_SAYS_NOTHING: Final = (
    *("$schema", "$id", "$comment", "$defs", "definitions"),
    *("title", "description", "default", "examples", "format"),
)


def schema_fault(schema: Any, place: str = "", root: Any = None) -> str | None:
    """What is wrong with a schema, in a sentence, or None if values can be held against it.

    Args:
        place: where in a larger schema it stands.
        root: the larger schema, which `$ref` points into; None: this one.
    """
    at = f" at {place}" if place else ""
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, Mapping):
        return f"found {type(schema).__name__}{at}, expected an object"
    unknown = sorted(set(schema) - {*_KNOWN, *_SAYS_NOTHING})
    if unknown:
        return f"'{unknown[0]}'{at} is not supported; what is: {', '.join(_KNOWN)}"
    whole = schema if root is None else root
    fault = _own_fault(schema, at) or _ref_fault(schema, at, whole)
    if fault:
        return fault
    parts = {f"{place}.{name}".lstrip("."): part for key in _NAMED for name, part in schema.get(key, {}).items()}
    parts |= {f"{place}.{key}".lstrip("."): schema[key] for key in _ONE if key in schema}
    for key in _SEVERAL:
        parts |= {f"{place}.{key}[{i}]".lstrip("."): part for i, part in enumerate(schema.get(key, []))}
    return next((fault for name, part in parts.items() if (fault := schema_fault(part, name, whole))), None)


def _own_fault(schema: Mapping[str, Any], at: str) -> str | None:
    """What is wrong with the values of a schema's own keywords."""
    types = schema.get("type", [])
    for name in [types] if isinstance(types, str) else types:
        if name not in _TYPES:
            return f"there is no type '{name}'{at}; there are: {', '.join(_TYPES)}"
    if "pattern" in schema:
        try:
            re.compile(schema["pattern"])
        except (re.error, TypeError) as error:
            return f"the pattern{at} is no regular expression ({error})"
    for key in _NUMBERS:
        if key in schema and not _TYPES["number"](schema[key]):
            return f"found {schema[key]!r} as {key}{at}, expected a number"
    if schema.get("multipleOf", 1) <= 0:
        return f"found {schema['multipleOf']!r} as multipleOf{at}, expected a number above 0"
    if not isinstance(schema.get("enum", []), list) or not isinstance(schema.get("required", []), list):
        return f"enum and required{at} are lists"
    for key in _SEVERAL:
        if key in schema and not (isinstance(schema[key], list) and schema[key]):
            return f"{key}{at} is a list of schemas, at least one"
    for key in _NAMED:
        if not isinstance(schema.get(key, {}), Mapping):
            return f"{key}{at} is an object"
    return None


def _ref_fault(schema: Mapping[str, Any], at: str, root: Any, seen: tuple[Any, ...] = ()) -> str | None:
    """Whether a reference leads nowhere, or back to itself without going deeper into the value."""
    inner = [part for key in ("anyOf", "oneOf", "allOf") for part in schema.get(key, []) if isinstance(part, Mapping)]
    inner += [schema["not"]] if isinstance(schema.get("not"), Mapping) else []
    if "$ref" in schema:
        ref = schema["$ref"]
        if ref in seen:
            return f"$ref{at} leads back to itself ({ref})"
        try:
            target = _target(ref, root)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            return f"$ref{at} leads nowhere in this schema ({ref!r})"
        seen = (*seen, ref)
        inner += [target] if isinstance(target, Mapping) else []
    return next((fault for part in inner if (fault := _ref_fault(part, at, root, seen))), None)


def _target(ref: str, root: Any) -> Any:
    """What a JSON pointer (RFC 6901) within a schema points to, such as `#/$defs/name`."""
    start, *names = ref.split("/")
    if start != "#":
        raise ValueError("not in this schema")
    found = root
    for name in names:
        plain = unquote(name).replace("~1", "/").replace("~0", "~")
        found = found[int(plain)] if isinstance(found, list) else found[plain]
    return found


def misfit(value: Any, schema: Any, place: str = "the value") -> str | None:
    """Why a JSON value does not fit a schema, in a sentence, or None if it does.

    Args:
        schema: one without a `schema_fault`.
        place: what the value is called in the sentence.
    """
    try:
        return _misfit(value, schema, place, schema)
    except RecursionError:
        return f"{place} is nested too deeply"


def _misfit(value: Any, schema: Any, place: str, root: Any) -> str | None:
    if isinstance(schema, bool):
        return None if schema else f"{place} is not allowed"
    types = schema.get("type")
    wanted = [types] if isinstance(types, str) else types
    if wanted and not any(_TYPES[name](value) for name in wanted):
        return f"{place} is no {' or '.join(wanted)}"
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    if allowed is not None and not any(_same(value, one) for one in allowed):
        return f"{place} is none of {json.dumps(allowed, ensure_ascii=False)}"
    found = _combined_misfit(value, schema, place, root)
    if found:
        return found
    if isinstance(value, str):
        return _text_misfit(value, schema, place)
    if _TYPES["number"](value):
        return _number_misfit(value, schema, place)
    if isinstance(value, list):
        return _list_misfit(value, schema, place, root)
    return _object_misfit(value, schema, place, root) if isinstance(value, dict) else None


def _combined_misfit(value: Any, schema: Mapping[str, Any], place: str, root: Any) -> str | None:
    """Of schemas that refer to others."""
    both = [*schema.get("allOf", []), *([_target(schema["$ref"], root)] if "$ref" in schema else [])]
    found = next((m for part in both if (m := _misfit(value, part, place, root))), None)
    if found:
        return found
    misses = [_misfit(value, part, place, root) for part in schema.get("anyOf", [])]
    if misses and None not in misses:
        return f"{place} fits none of anyOf ({misses[0]})"
    misses = [_misfit(value, part, place, root) for part in schema.get("oneOf", [])]
    if misses and misses.count(None) != 1:
        return f"{place} fits {misses.count(None)} of oneOf"
    if "not" in schema and _misfit(value, schema["not"], place, root) is None:
        return f"{place} fits what it must not"
    return None


def _number_misfit(value: float, schema: Mapping[str, Any], place: str) -> str | None:
    if value < schema.get("minimum", value):
        return f"{place} is below {schema['minimum']}"
    if value > schema.get("maximum", value):
        return f"{place} is above {schema['maximum']}"
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        return f"{place} is not above {schema['exclusiveMinimum']}"
    if "exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"]:
        return f"{place} is not below {schema['exclusiveMaximum']}"
    if "multipleOf" in schema and (not math.isfinite(value) or _exact(value) % _exact(schema["multipleOf"])):
        return f"{place} is no multiple of {schema['multipleOf']}"
    return None


def _exact(value: float) -> Fraction:
    """A number as it is written: 0.3 is three times 0.1."""
    return Fraction(str(value)) if isinstance(value, float) else Fraction(value)


def _list_misfit(value: list[Any], schema: Mapping[str, Any], place: str, root: Any) -> str | None:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        return f"{place} has {len(value)} items"
    if schema.get("uniqueItems") and any(_same(a, b) for i, a in enumerate(value) for b in value[:i]):
        return f"{place} has an item twice"
    first, items = schema.get("prefixItems", []), schema.get("items", True)
    held = [first[i] if i < len(first) else items for i in range(len(value))]
    pairs = enumerate(zip(value, held, strict=True))
    return next((m for i, (one, part) in pairs if (m := _misfit(one, part, f"{place}[{i}]", root))), None)


def _text_misfit(value: str, schema: Mapping[str, Any], place: str) -> str | None:
    if len(value) < schema.get("minLength", 0):
        return f"{place} is shorter than {schema['minLength']}"
    if len(value) > schema.get("maxLength", len(value)):
        return f"{place} is longer than {schema['maxLength']}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return f"{place} does not match {schema['pattern']!r}"
    return None


def _object_misfit(value: dict[str, Any], schema: Mapping[str, Any], place: str, root: Any) -> str | None:
    missing = [name for name in schema.get("required", []) if name not in value]
    if missing:
        return f"{place} has no '{missing[0]}'"
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)):
        return f"{place} has {len(value)} properties"
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, one in value.items():
        if found := _misfit(one, properties.get(name, others), f"{place}.{name}", root):
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
