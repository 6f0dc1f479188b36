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
    assert not (tmp_path / "q" / "model").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "q") == before


def test_an_encoder_decoder_has_no_gguf(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = seq2seq_models.folder(tmp_path / "t5", "t5")
    told = refused(capfd, "export", folder, "--format", "gguf", "--out", tmp_path / "out", "--no-check")
    assert "'t5'" in told
    assert not (tmp_path / "out").exists()
