"""JSON Schema (draft 2020-12) as what answers are held against, by the library `jsonschema`; nothing is fetched for a `$ref`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Final

from jsonschema import Draft202012Validator, SchemaError, ValidationError, validators
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

# What says nothing about a value, and so has no validator.
_SAYS_NOTHING: Final = frozenset(
    {"$schema", "$id", "$comment", "$defs", "definitions", "$anchor", "$dynamicAnchor", "$vocabulary", "then", "else"}
    | {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"}
    | {"minContains", "maxContains", "contentEncoding", "contentMediaType", "contentSchema"}
)
_PROBES: Final[tuple[Any, ...]] = (None, 0, "", [], {})


def _multiple(_: Any, step: float, value: Any, __: Any) -> Iterator[ValidationError]:
    """As written: 0.3 is a multiple of 0.1, though no binary number is."""
    if Draft202012Validator.TYPE_CHECKER.is_type(value, "number"):
        try:
            whole = (Fraction(str(value)) / Fraction(str(step))).denominator == 1
        except ValueError:  # what is beyond all numbers
            whole = False
        if not whole:
            yield ValidationError(f"{value!r} is not a multiple of {step!r}")


_Exact: Final = validators.extend(Draft202012Validator, {"multipleOf": _multiple})


def _validator(schema: Any) -> Any:
    return _Exact(schema, registry=Registry())


def schema_fault(schema: Any) -> str | None:
    """What is wrong with a schema, in a sentence, or None if values can be held against it.

    Keywords that JSON Schema does not know are a fault: a misspelt one would let every answer pass.
    """
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return f"at {error.json_path}: {error.message}"
    resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
    for part in _parts(schema):
        unknown = sorted(set(part) - {*_Exact.VALIDATORS, *_SAYS_NOTHING})
        if unknown:
            return f"JSON Schema has no keyword '{unknown[0]}'"
        if "$ref" in part:
            try:
                resolver.lookup(part["$ref"])
            except (Unresolvable, ValueError, TypeError):
                return f"$ref leads nowhere in this schema ({part['$ref']!r})"
    try:
        for probe in _PROBES:
            _validator(schema).is_valid(probe)
    except RecursionError:
        return "a $ref leads back to itself without going deeper into the value"
    return None


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for part in DRAFT202012.subresources_of(schema):
            yield from _parts(part)


def fits(value: Any, schema: Any) -> bool:
    """Whether a JSON value fits a schema that has no `schema_fault`; what is nested beyond all bounds does not."""
    try:
        return bool(_validator(schema).is_valid(value))
    except RecursionError:
        return False


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
