"""Wrong input to `danlu merge`, `chat`, `export` and `facts export`: a sentence, status 1, nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import seq2seq_models
import tiny
from test_taught_start import teach

from danlu.cli.main import run
from danlu.config import SftSettings
from danlu.exceptions import ModelError
from danlu.knowledge import lessons
from danlu.knowledge_config import TeachSettings
from danlu.models.load import load_model
from danlu.models.quantize import quantize_model, save_quantized
from danlu.parsing import parse
from danlu.trainers import classify, sft


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is said on stderr; the status is 1, and no traceback is shown."""
    assert run([str(a) for a in arguments]) == 1
    told = capfd.readouterr().err
    assert "danlu: " in told and "Traceback" not in told
    return told


def adapter(folder: Path, base: Path) -> Path:
    values = tiny.stage("sft", folder, model=str(base), max_steps=1, adapter="lora")
    sft.train(parse(SftSettings, values))
    return folder / "adapter"


def full_disk(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    usage: Any = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))


def test_an_adapter_of_another_base(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = tiny.model_folder(tmp_path / "base")
    learnt = adapter(tmp_path / "sft", base)
    shutil.rmtree(base)
    tiny.model_folder(base, seed=9)  # another model under the same name
    for asked in (("merge", learnt, "--into", tmp_path / "out"), ("chat", learnt, "--prompt", "hello")):
        told = refused(capfd, *asked)
        assert str(learnt) in told and str(base) in told, "both are named"
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_bases(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = (tiny.model_folder(tmp_path / f"base{n}", seed=n) for n in (1, 2))
    one, two = adapter(tmp_path / "a", first), adapter(tmp_path / "b", second)
    told = refused(capfd, "merge", one, two, "--into", tmp_path / "out")
    assert str(first) in told and str(second) in told
    assert not (tmp_path / "out").exists()


def test_a_full_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.model_folder(tmp_path / "base")
    learnt = adapter(tmp_path / "sft", base)
    teach(base)
    before = sorted(p.name for p in tmp_path.iterdir())
    full_disk(monkeypatch, tmp_path)
    assert "free" in refused(capfd, "merge", learnt, "--into", tmp_path / "out")
    assert "the disk is too small" in refused(capfd, "facts", "export", base, "--out", tmp_path / "out")
    assert "are free" in refused(capfd, "export", base, "--format", "hf", "--out", tmp_path / "out", "--no-check")
    assert "free" in refused(capfd, "quantize", tiny.model(), "--bits", "8", "--out", tmp_path / "q")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_quantizing_that_is_refused_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short, chinese = (tmp_path / f"{name}.txt" for name in ("short", "chinese"))
    short.write_text("hello\n", "utf-8")
    chinese.write_text("林井镇的老东门建于一四一二年。\n" * 300, "utf-8")
    base, out = tiny.model(), ("--out", tmp_path / "q")
    documents = tiny.data()["documents"]
    assert run(["quantize", str(base), "--bits", "8", "--out", str(tmp_path / "small")]) == 0
    capfd.readouterr()
    before = sorted(p.name for p in tmp_path.iterdir())
    # Before minutes of work: nobody should wait for a perplexity to read that the text is too short.
    monkeypatch.setattr("danlu.evals.perplexity.perplexity", lambda *_: pytest.fail("perplexity came first"))
    for told, *asked in (
        ("quantised already", tmp_path / "small" / "model", "--bits", "4"),
        ("quantised already", tmp_path / "small" / "model", "--bits", "8"),
        ("too short", base, "--calibration", short, "--eval-data", documents),
        ("is Chinese", base, "--calibration", chinese, "--eval-data", documents),
        ("no size of a file", base, "--bits", "8", "--max-shard-size", "large"),
        ("no such model folder", tmp_path / "nowhere", "--bits", "4"),
    ):
        assert told in refused(capfd, "quantize", *asked, *out)
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_encoder_decoder_has_no_gguf(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = seq2seq_models.folder(tmp_path / "t5", "t5")
    told = refused(capfd, "export", folder, "--format", "gguf", "--out", tmp_path / "out", "--no-check")
    assert "'t5'" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", tiny.mostly_slow(["ptuning"], ["prompt"]))
def test_what_would_lose_a_prefix(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = tiny.stage("sft", tmp_path / "one", max_steps=1, adapter=kind, prefix={"tokens": 4})
    sft.train(parse(SftSettings, values))
    start = tmp_path / "one" / "model"
    for stage, adapter_kind in (
        ("sft", "lora"),
        ("sft", "full"),
        ("dpo", "freeze"),
        ("ppo", "full"),
        ("reward", "full"),
    ):
        asked = tiny.stage(stage, tmp_path / "two", model=str(start), max_steps=1, adapter=adapter_kind)
        told = refused(capfd, *tiny.arguments(stage, asked))
        assert f"4 virtual tokens before every text ({kind})" in told and f"adapter: {kind}" in told
        assert not (tmp_path / "two" / "model").exists()
    with pytest.raises(ModelError, match="a classifier would lose"):
        classify.classifier(str(start), ["a", "b"], tiny.tokenizer(), per_token=False)
    asked = tiny.stage("sft", tmp_path / "three", model=str(start), max_steps=1, adapter=kind, prefix={"tokens": 4})
    assert run([*tiny.arguments("sft", asked), "--force"]) == 0


def test_facts_are_for_models_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    learnt = adapter(tmp_path / "sft", tiny.model())
    capfd.readouterr()
    told = refused(capfd, "teach", learnt, "--fact", "Amber Gate: the old gate")
    assert f"danlu merge {learnt} --into" in told
    assert sorted(p.name for p in (tmp_path / "sft").iterdir() if "patches" in p.name) == []
    values = tiny.stage("sft", tmp_path / "prefix", max_steps=1, adapter="ptuning", prefix={"tokens": 4})
    sft.train(parse(SftSettings, values))
    teaching = TeachSettings(model=str(tmp_path / "prefix" / "model"), out=str(tmp_path / "t"), facts=["a: b"])
    with pytest.raises(ModelError, match="virtual tokens"):
        lessons.stage(teaching)


def test_packed_folders_where_ordinary_weights_are_needed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = save_quantized(quantize_model(load_model(tiny.model())), tiny.tokenizer(), tmp_path / "int8")
    for changes, told in (
        ({"adapter": "full"}, "on which adapter: full cannot be trained"),
        ({"adapter": "dora"}, "on which adapter: dora cannot be trained"),
        ({"adapter": "qlora"}, "a base of 4 bits is asked for"),
        ({"adapter": "lora"}, "a base of 16 bits is asked for"),
    ):
        asked = tiny.stage("sft", tmp_path / "out", model=str(small), max_steps=1, **changes)
        assert told in refused(capfd, *tiny.arguments("sft", asked))
    with pytest.raises(ModelError, match="8-bit weights only"):
        load_model(small)
