"""What settings call data: paths and objects, weights, the hub, and what a run's manifest says of them."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
from rows import a, u, write

from danlu.alignment_config import RewardSettings
from danlu.cli.options import given_values
from danlu.config import KINDS, SftSettings
from danlu.data.formats.containers import RawRow, raw_rows
from danlu.data.hub import hub_rows
from danlu.data.problems import RowError
from danlu.data.read import ReadOptions, read
from danlu.data.sources import read_sources, weigh
from danlu.exceptions import DataError, RunError, SettingsError, UsageError
from danlu.parsing import parse
from danlu.pipeline.recipe import load_recipe
from danlu.pipeline.run import Hashes, _inputs, _refuse_missing_files, _with_origins, placed, stage_key
from danlu.train_config import Source, Sources, as_list
from danlu.training.setup import records_of
from danlu.training.templates import template_facts, template_of
from danlu.types import Comparison, Document, Record


def documents(count: int) -> list[Record]:
    return [Document(str(i)) for i in range(count)]


def texts(records: list[Any]) -> list[str]:
    return [record.text for record in records]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_data_is_a_path_an_object_or_a_list() -> None:
    def data(value: Any) -> Sources:
        return parse(SftSettings, {"data": value}).data

    assert as_list(data("a")) == as_list(data(["a", ""])) == as_list(data({"path": "a"})) == [Source(path="a")]
    both = data(["a", {"path": "b", "weight": 0.5, "as": "alpaca", "columns": {"prompt": "q"}}])
    assert [(s.path, s.weight, s.format) for s in as_list(both)] == [("a", 1, None), ("b", 0.5, "alpaca")]
    settings = SftSettings(data=both)
    assert settings.model_dump(mode="json")["data"][1]["as"] == "alpaca"
    assert SftSettings.model_validate(settings.model_dump()) == settings
    assert as_list("") == []


@pytest.mark.parametrize(
    ("value", "field", "said"),
    [
        (3, "sft.data", "expected a path, an object with a path, or a list of these (found: 3)"),
        ([["a"]], "sft.data.0", "expected a path, or an object with a path"),
        ([{"path": "a", "wieght": 2}], "sft.data.0.wieght", "there is no such setting"),
        ({"path": "a", "ass": "x"}, "sft.data.ass", "there is no such setting"),
        ({"path": "a", "weight": 0}, "sft.data.weight", "greater than 0"),
        ({"as": "alpaca"}, "sft.data.path", "required"),
        ({"path": ""}, "sft.data.path", "at least 1 character"),
    ],
)
def test_wrong_sources_are_named(value: Any, field: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(KINDS["sft"], {"data": value}, prefix="sft.")
    assert caught.value.field == field and said in caught.value.message
    if field.endswith(("wieght", "ass")):
        assert caught.value.hint == f"did you mean '{'weight' if 'wieght' in field else 'as'}'?"


def test_objects_on_the_command_line() -> None:
    given = given_values({"data": ("a.jsonl", "{path: b.csv, weight: 2}"), "collect__prompts": "{path: c, as: alpaca}"})
    assert given == {
        "data": ["a.jsonl", {"path": "b.csv", "weight": 2}],
        "collect": {"prompts": {"path": "c", "as": "alpaca"}},
    }
    assert given_values({"eval_data": ("{path: b}",)}) == {"eval_data": {"path": "b"}}
    with pytest.raises(UsageError, match="not valid YAML"):
        given_values({"data": ("{path: b",)})


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_repeat_and_thin_by_seed() -> None:
    records = documents(100)
    assert weigh(records, 1, 0, 0) == records
    assert weigh(records, 2, 0, 0) == records * 2
    half = weigh(records, 0.5, 0, 0)
    assert len(half) == 50 and half == sorted(half, key=records.index) and half == weigh(records, 0.5, 0, 0)
    assert half != weigh(records, 0.5, 1, 0) and half != weigh(records, 0.5, 0, 1)
    more = weigh(records, 1.25, 0, 0)
    assert more[:100] == records and len(more) == 125
    assert weigh(records, 0.001, 0, 0) == []


def test_sources_are_read_with_their_own_options(tmp_path: Path) -> None:
    one = write(tmp_path, [{"prompt": f"q{i}", "response": "r"} for i in range(4)], "one.jsonl")
    two = write(tmp_path, [{"content": "c", "summary": "s"}, {"content": "c"}], "two.jsonl")
    columns = {"prompt": "content", "response": "summary"}
    sources: Sources = [
        {"path": str(one), "weight": 0.5},  # type: ignore[list-item]
        {"path": str(two), "weight": 3, "columns": columns, "source_prefix": "Say: ", "licence": "MIT"},  # type: ignore[list-item]
    ]
    settings = SftSettings(data=sources, skip_bad=True, eval_fraction=0)
    data = read_sources(settings.data, "conversation", skip_bad=True)
    assert [r.messages[0]["content"] for r in data.records][2:] == ["Say: c"] * 3  # type: ignore[union-attr]
    assert len(data.records) == 5
    assert (data.files, data.skipped) == ([str(one), str(two)], {"missing-field": 1})
    assert [(o["records"], o["licence"]) for o in data.origins] == [(2, ""), (3, "MIT")]
    with pytest.raises(DataError, match="no such column"):
        read_sources(settings.data, "conversation")
    train, _, dataset = records_of(settings, "conversation")
    assert train == data.records and dataset.left_out == {"faulty row: missing-field": 1}
    with pytest.raises(DataError, match="weights and phases leave no record"):
        read_sources([Source(path=str(one), weight=0.01)], "conversation")
    # Bare paths are read together: a file that is named twice counts once.
    assert len(read_sources([str(one), str(tmp_path / "one*")], "conversation").records) == 4


def test_ranked_answers_become_the_pairs_that_are_asked_for(tmp_path: Path) -> None:
    row = {"prompt": [u("Q")], "responses": [[a("good")], [a("fair")], [a("bad")]], "scores": [3, 2, 0]}
    path = str(write(tmp_path, [row]))

    def pairs(**more: Any) -> list[tuple[str, str, float]]:
        train, _, _ = records_of(RewardSettings(data=path, eval_fraction=0, **more), "comparison")
        return [
            (r.chosen[0]["content"], r.rejected[0]["content"], r.margin) for r in train if isinstance(r, Comparison)
        ]

    assert pairs() == [("good", "bad", 0.0)]
    assert pairs(pairs="adjacent") == [("good", "fair", 0.0), ("fair", "bad", 0.0)]
    assert pairs(pairs="all", margin=True) == [("good", "fair", 1.0), ("good", "bad", 3.0), ("fair", "bad", 2.0)]


def test_a_template_that_differs_is_said_and_noted(capsys: pytest.CaptureFixture[str]) -> None:
    template = template_of(str(tiny.tokenizer_folder()), SftSettings(template="vicuna"), stage="sft")
    assert "'vicuna' was asked for and differs" in capsys.readouterr().err
    assert template_facts(template) == {"template": "vicuna", "template_note": template.note}
    plain = template_of(str(tiny.tokenizer_folder()), SftSettings(), stage="sft")
    assert capsys.readouterr().err == "" and template_facts(plain) == {"template": "tokenizer"}


# --- runs -------------------------------------------------------------------------------------------------------------


def test_what_is_said_of_a_source_counts_for_the_stage_key(tmp_path: Path) -> None:
    path = str(write(tmp_path, [{"messages": [u("Q"), a("A")]}]))

    def key(data: Any) -> str:
        settings = parse(SftSettings, {"data": data, "out": str(tmp_path / "out")})
        return stage_key("sft", settings, _inputs("sft", settings, Hashes(tmp_path)))

    plain = key(path)
    assert key({"path": path}) == key([path]) == plain
    others = [{"weight": 2}, {"weight": 3}, {"as": "messages"}, {"columns": {"text": "x"}}, {"source_prefix": "x"}]
    keys = [key({"path": path, **said}) for said in others]
    assert len({plain, *keys}) == 1 + len(others)
    write(tmp_path, [{"messages": [u("Q"), a("B")]}])
    assert key({"path": path, "weight": 2}) not in keys
    # A data set of the hub counts by its name.
    assert key("hf:a/b") != key("hf:a/c")


@pytest.mark.slow
def test_objects_in_a_recipe_may_name_the_town(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"

    def stages(town: str) -> str:
        data = f"[{{path: town:{town}, weight: 0.5, as: messages}}, town:sft]"
        return f"model: m\nstages:\n  - kind: sft\n    data: {data}\n"

    recipe.write_text(stages("sft"))
    loaded = load_recipe(recipe)
    _refuse_missing_files(loaded)
    placed_settings = placed(loaded.stages[0], loaded, tmp_path / "run")
    assert isinstance(placed_settings, SftSettings)
    [thinned, plain] = as_list(placed_settings.data)
    assert (thinned.weight, thinned.format, Path(thinned.path).is_file()) == (0.5, "messages", True)
    assert plain.path == thinned.path
    recipe.write_text(stages("nowhere"))
    with pytest.raises(RunError, match="the town has no file 'nowhere'"):
        _refuse_missing_files(load_recipe(recipe))


def test_the_manifest_tells_records_and_licences() -> None:
    inputs = [
        {"field": "data", "path": "a.jsonl", "sha256": "1", "bytes": 1},
        {"field": "data", "path": "b.zip", "sha256": "2", "bytes": 1},
        {"field": "model", "path": "b.zip", "sha256": "3", "bytes": 1},
    ]
    origins = [
        {"file": "b.zip/x.jsonl", "records": 2, "licence": "MIT", "source": "web"},
        {"file": "b.zip/y.jsonl", "records": 3, "licence": "", "source": ""},
    ]
    told = _with_origins(inputs, origins)
    assert told == [inputs[0], inputs[1] | {"records": 5, "licence": "MIT", "from": "web"}, inputs[2]]


# --- the hub ----------------------------------------------------------------------------------------------------------


class FakeDataset(list[Any]):
    info = types.SimpleNamespace(license="mit")


class BrokenDataset(FakeDataset):
    def __iter__(self) -> Any:
        yield from super().__iter__()
        raise RuntimeError("the shard is damaged")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the library `datasets` with the one function that is used."""
    sets: dict[str, Any] = {
        "a/b": {"train": FakeDataset([{"text": "x", "at": {"y": None}}]), "test": FakeDataset([{"text": "t"}])},
        "a/only": {"validation": FakeDataset([{"text": "v"}])},
        "a/many": {"dev": FakeDataset(), "test": FakeDataset()},
        "a/broken": {"train": BrokenDataset([{"text": "x"}])},
    }

    def load_dataset(name: str, configuration: str | None, *, split: str | None) -> Any:
        if name not in sets:
            raise ConnectionError("Couldn't reach the Hub\n at all")
        if configuration is not None and configuration != "main":
            raise ValueError(f"BuilderConfig '{configuration}' not found. Available: ['main']")
        return sets[name] if split is None else sets[name][split]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return sets


def test_data_sets_of_the_hub(hub: dict[str, Any]) -> None:
    data = read("hf:a/b", "document")
    assert texts(data.records) == ["x"] and data.files == ["hf:a/b"]
    origin = data.records[0].origin
    assert origin is not None and (origin.file, origin.line, origin.licence) == ("hf:a/b", 1, "mit")
    assert texts(read(["hf:a/b:test", "hf:a/only", "hf:a/b:main:test", "hf:a/b:test"], "document").records) == [
        "t",
        "v",
        "t",
    ]
    assert texts(read("hf:a/b", "document", ReadOptions(commercial_only=True)).records) == ["x"]
    assert read_sources([Source(path="hf:a/b", weight=2)], "document").origins[0]["records"] == 2


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [
        ("hf:a/b:odd:train", "hub-failed", "Available: ['main']"),
        ("hf:a/b:nope", "hub-failed", "nope"),
        ("hf:no/net", "hub-failed", "Couldn't reach the Hub at all"),
        ("hf:a/broken", "hub-failed", "the shard is damaged"),
        ("hf:a/many", "bad-path", "has the splits dev, test"),
        ("hf:", "bad-path", "names no data set"),
        ("hf:a/b:", "bad-path", "names no data set"),
        ("hf:a:b:c:d", "bad-path", "names no data set"),
    ],
)
def test_what_the_hub_cannot_give(hub: dict[str, Any], path: str, code: str, said: str) -> None:
    with pytest.raises(RowError) as caught:
        read(path, "document")
    assert (caught.value.code, caught.value.file) == (code, path)
    assert said in caught.value.message and caught.value.hint


def test_the_hub_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    [error] = hub_rows("hf:a/b")
    assert isinstance(error, RowError)
    assert (error.code, error.hint) == ("missing-library", "pip install 'danlu[hub]'")


def test_rows_of_the_real_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="HUB NOT TESTED: datasets is not installed")
    rows = [{"messages": [{"role": "user", "content": "Q", "name": None}]}, {"messages": []}]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(str(tmp_path / "x.parquet"))
    [first, _] = [row.value for row in raw_rows(tmp_path / "x.parquet") if isinstance(row, RawRow)]
    assert first == {"messages": [{"role": "user", "content": "Q"}]}
