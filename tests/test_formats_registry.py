"""All formats at once: their examples, which of them claims a row, and rows that nobody should have to see."""

from __future__ import annotations

import copy
import importlib.util
import json
import typing
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.data.formats import plain_text
from danlu.data.formats.base import Format, RowDropped
from danlu.data.formats.registry import FORMATS, REFUSED, by_name, detect
from danlu.data.kinds import as_kind, kind_of, serves
from danlu.exceptions import DataError
from danlu.types import Origin, RecordKind

ORIGIN = Origin("data.jsonl", 7)
KINDS: tuple[RecordKind, ...] = typing.get_args(RecordKind)
READABLE = [entry for entry in FORMATS if entry not in REFUSED]
# The same rows read for another end: a stage that needs conversations gets these.
TWINS = {"gsm8k-solution": "gsm8k"}

formats = pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
readable = pytest.mark.parametrize("entry", READABLE, ids=lambda entry: entry.name)


@formats
def test_every_format_says_what_it_is(entry: Format) -> None:
    assert entry.about.endswith(".") and len(entry.about) > 20
    assert entry.shape and entry.name == entry.name.lower() and " " not in entry.name
    assert json.loads(json.dumps(entry.example)) == entry.example, "an example is a row of a JSON file"
    assert entry.example
    assert by_name(entry.name) is entry


def test_names_are_unique() -> None:
    assert len({entry.name for entry in FORMATS}) == len(FORMATS)


@readable
def test_every_example_is_a_row_of_its_natural_kind(entry: Format) -> None:
    before = copy.deepcopy(entry.example)
    records = entry.parse(entry.example, ORIGIN)
    assert records and {kind_of(record) for record in records} == {entry.holds}
    assert all(record.origin is not None and record.origin.line == 7 for record in records)
    assert entry.example == before, "parsing leaves the row alone"


@readable
def test_every_example_serves_what_its_kind_serves(entry: Format) -> None:
    for kind in KINDS:
        if serves(entry.holds, kind):
            for record in entry.parse(entry.example, ORIGIN):
                if kind == "comparison" and getattr(record, "responses", [0, 0])[1:] == []:
                    continue  # one scored answer alone is compared with nothing
                if kind == "prompt" and getattr(record, "tools", ()):
                    continue
                if kind == "conversation" and getattr(record, "label", True) is False:
                    continue  # nobody imitates what nobody liked
                assert {kind_of(found) for found in as_kind(record, kind)} == {kind}


@formats
def test_no_earlier_format_claims_an_example(entry: Format) -> None:
    if entry is plain_text.FORMAT:
        assert detect(entry.example) is not entry, "only the reader knows that a file is plain text"
        return
    assert detect(entry.example, entry.holds) is entry
    found = detect(entry.example)
    assert found is not None and found.name == TWINS.get(entry.name, entry.name)


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.name)
def test_a_shape_that_cannot_be_read_says_why_and_what_to_do(entry: Format) -> None:
    with pytest.raises(DataError) as caught:
        entry.parse(entry.example, ORIGIN)
    error = caught.value
    assert (error.file, error.line) == ("data.jsonl", 7)
    assert error.message.startswith("found ") and error.hint.endswith(".")
    assert getattr(error, "code", "") in ("ambiguous", "not-data")


# --- no row crashes a reader ------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.floats(), st.text(max_size=6), st.sampled_from(["A", "true", "[1"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def put(row: Any, path: tuple[Any, ...], value: Any, *, remove: bool) -> None:
    for key in path[:-1]:
        row = row[key]
    if remove:
        del row[path[-1]]
    else:
        row[path[-1]] = value


@given(data=st.data())
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_no_faulty_row_crashes_any_format(data: st.DataObject) -> None:
    """A real row with one or two parts replaced or taken out is read, dropped or refused with its place."""
    entry = data.draw(st.sampled_from([entry for entry in FORMATS if entry.name != "vocabulary"]))
    row = copy.deepcopy(entry.example)
    for _ in range(data.draw(st.integers(1, 2))):
        known = list(places(row))
        if not known:
            break
        put(row, data.draw(st.sampled_from(known)), data.draw(VALUES), remove=data.draw(st.booleans()))
    for candidate in FORMATS:
        candidate.matches(row)
    for candidate in {entry.name: entry, **{found.name: found for found in [detect(row)] if found}}.values():
        try:
            records = candidate.parse(row, ORIGIN)
        except RowDropped as reason:
            assert str(reason)
        except DataError as error:
            assert error.file == "data.jsonl" and error.line == 7
        else:
            assert {kind_of(record) for record in records} == {candidate.holds}


@given(row=st.dictionaries(st.text(max_size=8), VALUES, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_format_copes_with_any_row(row: dict[str, Any]) -> None:
    """Users can force a format upon any file."""
    for entry in FORMATS:
        entry.matches(row)
        with suppress(RowDropped, DataError):
            entry.parse(row, ORIGIN)


# --- the pages --------------------------------------------------------------------------------------------------------


def test_the_pages_of_formats_are_what_the_registry_says() -> None:
    docs = Path(__file__).parents[1] / "docs"
    spec = importlib.util.spec_from_file_location("generate", docs / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (docs / "formats.md").read_text("utf-8") == generate.formats_page(), "run `make docs`"
    for entry in FORMATS:
        assert f"[{entry.name}](formats/{entry.name}.md)" in generate.formats_page()
        page = (docs / "formats" / f"{entry.name}.md").read_text("utf-8")
        assert page == generate.format_page(entry), "run `make docs`"
        assert entry.about in page
        _, marker, example = page.partition("\n## Example\n\n```json\n")
        if marker:
            assert json.loads(example.partition("\n```")[0]) == entry.example
    assert len(list((docs / "formats").glob("*.md"))) == len(FORMATS)
