"""G-EXPORT with llama.cpp itself: every family, type and kind of tokenizer. Run by `make foreign`, which builds it once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny as small
import torch
from families import make

from danlu.exceptions import GateError
from danlu.models import gguf, gguf_layout
from danlu.models.load import save_model
from danlu.pipeline import export_check
from danlu.pipeline.export import Order, export
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import train_tokenizer
from danlu.text.tokenizer_files import open_tokenizer

pytestmark = [
    pytest.mark.foreign,
    pytest.mark.skipif(export_check.llama_python() is None, reason=f"LLAMA.CPP NOT TESTED: {export_check.HOW}"),
]
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256, "head_dim": 16}
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALE = 0.25
LINES = [*export_check.LINES] * 40


def exported(folder: Path, model: Any, tokenizer: Any, kind: str = "f16") -> dict[str, Any]:
    ChatTemplate(tokenizer)
    source = save_model(model, tokenizer, folder / "model")
    done = export(Order(str(source), "gguf", kind, folder / "out", check=True))
    assert done.verdict.gate.passed
    return done.verdict.numbers


def family_of(family: str, tokenizer: Any, **options: Any) -> Any:
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    shape = {"n_embd": 64, "n_positions": 256} if family == "gpt2" else SHAPE
    if family == "qwen2":
        shape = {k: v for k, v in SHAPE.items() if k != "head_dim"} | {"use_sliding_window": False}
    model = make(family, vocab_size=len(tokenizer), **shape | ids | options)
    with torch.no_grad():  # weights that trained models have: larger ones blow up what half precision rounds
        for parameter in model.parameters():
            parameter.mul_(SCALE if parameter.dim() > 1 else 1.0)
    return model


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_families(family: str, kind: str, tmp_path: Path) -> None:
    tokenizer = small.tokenizer()
    numbers = exported(tmp_path, family_of(family, tokenizer), tokenizer, kind)
    assert numbers["lines_same"] == numbers["lines"] > 20 and numbers["prompts_same"] == 3


def _halves_left(weight: Any, heads: int, outer: int, inner: int) -> Any:
    return weight


def _other_base(config: Any) -> dict[str, Any]:
    return gguf_layout.shape_of(config) | {"rope.freq_base": 5e5}


def _without_a_norm(model: Any) -> Iterator[gguf_layout.Weight]:
    for weight in gguf_layout.weights_of(model):
        ones = torch.ones(weight.shape)
        lost = weight.name == "blk.1.attn_norm.weight"
        yield replace(weight, read=lambda ones=ones: ones) if lost else weight


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (gguf_layout, "_halves_to", _halves_left),
        (gguf, "shape_of", _other_base),
        (gguf, "weights_of", _without_a_norm),
    ],
    ids=["rows of queries and keys", "rope base", "norm"],
)
def test_what_is_written_wrongly_shows_at_this_scale(
    module: Any, name: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights' scale keeps what half precision rounds small; mistakes must stay far above the bound all the same."""
    tokenizer = small.tokenizer()
    source = save_model(family_of("llama", tokenizer), tokenizer, tmp_path / "model")
    monkeypatch.setattr(module, name, wrong)
    verdict = export(Order(str(source), "gguf", "f16", tmp_path / "out", check=True, force=True)).verdict
    assert not verdict.gate.passed
    assert verdict.numbers["logits"] > 10 * export_check.BOUNDS["f16"], verdict.numbers["logits"]


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_twice_the_rope_base_shows_in_quantised_files(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It moves logits no further than rounded activations do: only the same values written as F16 tell."""
    tokenizer = small.tokenizer()
    source = save_model(family_of("llama", tokenizer), tokenizer, tmp_path / "model")
    monkeypatch.setattr(gguf, "shape_of", lambda config: gguf_layout.shape_of(config) | {"rope.freq_base": 2e4})
    order = Order(str(source), "gguf", kind, tmp_path / "out", check=True, force=True)
    verdict = export(order).verdict
    assert verdict.numbers["logits"] < export_check.BOUNDS[kind], "the quantised file alone would have passed"
    assert verdict.numbers["logits_f16"] > 4 * verdict.numbers["bound_f16"] and not verdict.gate.passed
    assert not (tmp_path / "out" / "halves.gguf").exists()
    with pytest.raises(GateError, match="G-EXPORT"):
        export(replace(order, out=tmp_path / "refused", force=False))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("rope", [LLAMA3, ROPE | {"rope_type": "linear"}, ROPE | {"rope_type": "yarn"}])
@pytest.mark.parametrize("tied", [True, False])
def test_rotary_positions(rope: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    tokenizer = small.tokenizer()
    exported(tmp_path, family_of("llama", tokenizer, rope_parameters=rope, tie_word_embeddings=tied), tokenizer)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "sentencepiece-bpe"])
def test_own_tokenizers(kind: Any, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(LINES, 900, model_type=kind)
    numbers = exported(tmp_path, family_of("llama", tokenizer), tokenizer)
    assert numbers["lines"] >= 20 and numbers["lines_same"] == numbers["lines"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "chinese-llama"])
def test_published_tokenizers(name: str, shared_data: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(shared_data / "tokenizers" / name)
    exported(tmp_path, family_of("llama", tokenizer, hidden_size=32, intermediate_size=32, head_dim=8), tokenizer)
