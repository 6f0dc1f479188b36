"""`danlu quantize` on families of other shapes: encoder-decoders are refused, ChatGLM's published folders are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import seq2seq_models
import torch
from chatglm import model, recorded
from families import make

import danlu
from danlu.cli.main import run
from danlu.exceptions import ModelError
from danlu.models.load import load_model, save_model
from danlu.models.quantize import load_in_bits, load_quantized, quantize_model, save_quantized


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_are_refused(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = seq2seq_models.folder(tmp_path / "model", kind)
    out = tmp_path / "out"
    assert run(["quantize", str(folder), "--bits", "8", "--out", str(out)]) == 1
    assert "an encoder-decoder cannot be quantised" in capfd.readouterr().err
    assert not (out / "model").exists(), "nothing half-written"
    with pytest.raises(ModelError, match="an encoder-decoder cannot be quantised"):
        load_in_bits(folder, 4)
    with pytest.raises(ModelError, match="an encoder-decoder cannot be quantised"):
        danlu.load(folder, bits=8)


@pytest.mark.parametrize(
    ("name", "bits", "near"), [("chatglm2", 8, 0.05), ("chatglm_v1", 8, 0.05), ("chatglm2", 4, 0.8)]
)
def test_published_chatglm_folders(name: str, bits: int, near: float, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(["quantize", str(recorded(name).folder), "--bits", str(bits), "--out", str(out)]) == 0
    small = danlu.load(out / "model", dtype="float32").model
    assert type(small) is type(model(name))
    ids = torch.tensor([[9, 10, 11]])
    with torch.no_grad():
        exact, found = model(name)(input_ids=ids).logits, small(input_ids=ids).logits
    assert 0 < (found - exact).norm() / exact.norm() < near


def test_a_published_packed_folder_is_not_packed_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["quantize", str(recorded("chatglm2_int8").folder), "--bits", "4", "--out", str(out)]) == 1
    assert "quantised already" in capfd.readouterr().err
    assert not (out / "model").exists()


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_neo"])
def test_buffers_that_want_more_than_the_configuration(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale of an embedding, a mask: not stored, and their modules are not made of the configuration alone."""
    folder = save_model(make(family), None, tmp_path / "model")
    whole = quantize_model(load_model(folder), 4)
    monkeypatch.setattr("danlu.models.quantize.load_model", lambda *_, **__: pytest.fail("held whole"))
    packed = save_quantized(whole, None, tmp_path / "packed")
    ids = torch.tensor([[9, 10, 11]])
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        for found in (load_in_bits(folder, 4), load_quantized(packed)):
            assert torch.equal(found(input_ids=ids).logits, expected)
            assert not any(t.is_meta for t in (*found.parameters(), *found.buffers()))
