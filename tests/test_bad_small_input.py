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
from danlu.parsing import parse
from danlu.trainers import sft


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
