"""Embedding and head in 8 bits: what they compute, that nothing whole is held, what is left alone, adapters that change them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, VOCAB, make
from safetensors.torch import load_file, save_file
from test_quantize import logits
from torch import nn

import danlu
from danlu.assistant import Assistant
from danlu.config import SftSettings
from danlu.data.collate import Trees
from danlu.evals.perplexity import perplexity
from danlu.exceptions import ModelError
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models import packed
from danlu.models.adapter_files import save_adapter
from danlu.models.adapters import adapter_roles
from danlu.models.load import load_model, save_model
from danlu.models.packed import Int8Linear
from danlu.models.packed_tables import PackedEmbedding, Tables, unpack_tables
from danlu.models.quantize import load_in_bits, load_quantized, quantize_model, save_quantized
from danlu.tree import conversation

SCALED = ("gemma", "gemma2", "gemma3")  # embeddings of classes of their own
TREES = Trees([conversation([3, 9, 27, 12, 5], [0.0, 1.0, 1.0, 1.0, 1.0])])
GREEDY = SamplingParams(max_new_tokens=6, temperature=0.0)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Each row to 255 steps of its largest number, one number after the other."""
    rows = []
    for row in weight.tolist():
        step = max(abs(x) for x in row) / 127
        rows.append([round(x / step) * step for x in row])
    return torch.tensor(rows)


def reference(folder: Path, bits: int) -> Any:
    """The model with ordinary tables of the rounded numbers."""
    model = load_in_bits(folder, bits)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            whole = load_model(folder)
            same = whole.get_input_embeddings() if isinstance(layer, nn.Embedding) else whole.get_output_embeddings()
            layer.weight.copy_(rounded(same.weight))
    return model


def ids_of_engine(assistant: Assistant) -> list[int]:
    return list(generate(assistant.engine, [Request([5, 9, 30, 7], GREEDY)])[0].ids)


def ids_of(model: Any) -> list[int]:
    return ids_of_engine(Assistant(model, None))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SCALED)))
def test_rows_are_those_of_the_rounded_tables(family: str, tied: bool, bits: int, tmp_path: Path) -> None:
    folder = save_model(make(family, tie_word_embeddings=tied), None, tmp_path / "model")
    loaded = load_in_bits(folder, bits, tables=True)
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, Int8Linear)
    assert (embedding.table is head) == tied
    assert not any(t.is_floating_point() and VOCAB in t.shape and t.dim() > 1 for t in loaded.state_dict().values())
    expected = reference(folder, bits)
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-4, atol=1e-5)
    assert ids_of(loaded) == ids_of(expected)


@pytest.mark.parametrize("family", SCALED)
def test_embeddings_of_a_class_of_their_own_stay_whole(family: str, tmp_path: Path) -> None:
    folder = save_model(make(family), None, tmp_path / "model")
    loaded = load_in_bits(folder, 8, tables=True)
    assert isinstance(loaded.get_input_embeddings(), nn.Embedding) and not Tables(loaded).embedding
    assert torch.equal(logits(loaded), logits(load_in_bits(folder, 8)))


def test_a_stored_head_of_a_tied_model_is_not_asked(tmp_path: Path) -> None:
    folder = save_model(make("llama", tie_word_embeddings=True), None, tmp_path / "model")
    before = logits(load_in_bits(folder, 8, tables=True))
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = torch.randn_like(stored["model.embed_tokens.weight"])
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(before, logits(load_in_bits(folder, 8, tables=True)))


def test_packed_folders_and_whole_models_come_to_the_same(tmp_path: Path) -> None:
    folder = save_model(make("qwen2"), None, tmp_path / "model")
    small = save_quantized(quantize_model(load_model(folder), 8), None, tmp_path / "packed")
    loaded = [load_in_bits(place, 8, tables=True) for place in (folder, small)]
    assert torch.equal(logits(loaded[0]), logits(loaded[1]))
    assert isinstance(load_in_bits(folder, 8).get_input_embeddings(), nn.Embedding), "where it may learn"


def test_dtype_and_copies(tmp_path: Path) -> None:
    folder = save_model(make("llama", tie_word_embeddings=True), None, tmp_path / "model")
    model = load_in_bits(folder, 8, tables=True)
    copied = copy.deepcopy(model).to(torch.bfloat16)
    assert copied.get_input_embeddings().table is copied.get_output_embeddings()
    assert copied.get_input_embeddings()(torch.tensor([[3]])).dtype == torch.bfloat16
    assert model.get_input_embeddings().dtype == torch.float32
    rows = model.get_input_embeddings()(torch.tensor([3, 60]))
    assert torch.equal(rows, model.get_output_embeddings().dequantized()[[3, 60]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_perplexity_is_that_of_the_rounded_tables(dtype: str, tmp_path: Path) -> None:
    folder = save_model(make("llama"), None, tmp_path / "model")
    loaded = danlu.load(folder, bits=8, dtype=dtype, device="cpu").model
    expected = reference(folder, 8).to(getattr(torch, dtype))
    assert perplexity(loaded, TREES) == pytest.approx(
        perplexity(expected, TREES), rel=1e-4 if dtype == "float32" else 0.05
    )


@pytest.mark.parametrize("tied", [True, False])
def test_what_others_packed_is_taken_as_it_is(tied: bool, tmp_path: Path) -> None:
    """As GPTQ writes it: embedding and head stay whole, and a head that is packed, too, keeps its own numbers."""
    small = quantize_model(make("llama", tie_word_embeddings=tied), 4, group_size=16, symmetric=True)
    folder = save_quantized(small, None, tmp_path / "packed", layout="gptq")
    loaded = danlu.load(folder, dtype="float32", device="cpu").model
    assert isinstance(loaded.get_input_embeddings(), nn.Embedding)
    assert perplexity(loaded, TREES) == pytest.approx(perplexity(load_quantized(folder), TREES), rel=1e-6)


def test_a_model_that_was_loaded_to_answer_is_not_written(tmp_path: Path) -> None:
    folder = save_model(make("llama"), None, tmp_path / "model")
    with pytest.raises(ModelError, match="packed while it was loaded"):
        save_quantized(load_in_bits(folder, 8, tables=True), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bits_do_not_depend_on_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, products in many parts: the same tokens and log-probabilities alone and together."""
    monkeypatch.setattr(packed, "AT_ONCE", 2**12)
    wide = {"hidden_size": 256, "intermediate_size": 384, "vocab_size": 300}
    folder = save_model(make("llama", **wide), None, tmp_path / "model")
    engine = danlu.load(folder, bits=8, dtype="float32", device="cpu").engine
    asked = [
        Request([5, 9, 30 + n, 7 * n + 3][: 2 + n % 3], SamplingParams(max_new_tokens=4, seed=n)) for n in range(24)
    ]
    together = [(c.ids, c.logprobs) for c in generate(engine, asked)]
    assert [(c.ids, c.logprobs) for request in asked for c in generate(engine, [request])] == together


def test_copies_share_what_is_joined(tmp_path: Path) -> None:
    """After the first answer, a voice beside the model holds no second copy of its packed weights."""
    base = tiny.model()
    loaded = danlu.load(base, bits=8, dtype="bfloat16", device="cpu")
    ids_of_engine(loaded)
    held = [m.__dict__["danlu_joined"] for m in loaded.model.modules() if "danlu_joined" in m.__dict__]
    tensors = {id(t): t for t in (*loaded.model.parameters(), *loaded.model.buffers())}
    copied = copy.deepcopy(loaded.model, tensors)
    assert held and [m.__dict__["danlu_joined"] for m in copied.modules() if "danlu_joined" in m.__dict__] == held


@pytest.mark.parametrize("bits", [8, 4])
def test_state_is_contiguous_after_an_answer(bits: int, tmp_path: Path) -> None:
    """The kernel's layout is in memory alone; what is saved loads again with the same numbers."""
    wide = {"hidden_size": 256, "intermediate_size": 384}
    model = quantize_model(make("llama", **wide), bits).to(torch.bfloat16)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ids_of(model)
    after = model.state_dict()
    assert all(t.is_contiguous() for t in after.values()) and before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_only_what_an_adapter_changes_becomes_whole(name: str, tmp_path: Path) -> None:
    for tied in (True, False):
        folder = save_model(make("llama", tie_word_embeddings=tied), None, tmp_path / f"model-{tied}")
        model = load_in_bits(folder, 8, tables=True)
        before = logits(model)
        unpack_tables(model, [f"base_model.model.model.layers.0.{name}_not.weight"])
        assert isinstance(model.get_input_embeddings(), PackedEmbedding)
        place = "model.embed_tokens" if name == "embed_tokens" else "lm_head"
        unpack_tables(model, [f"base_model.model.{place}.weight"])
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(embedding, nn.Embedding) == (tied or name == "embed_tokens")
        assert isinstance(head, nn.Linear) == (tied or name == "lm_head")
        assert not tied or embedding.weight is head.weight
        torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("embeddings", [True, False])
def test_adapters_that_change_the_tables(embeddings: bool, tmp_path: Path) -> None:
    """One with an embedding and a head of its own gets ordinary ones, the model beside it keeps its packed ones."""
    base = tiny.model()
    settings = SftSettings(adapter="lora", model=str(base))
    roles = adapter_roles(load_model(base), ["policy"], settings, embeddings=embeddings)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in roles.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=noise))
    folder = save_adapter(roles, "policy", tmp_path / "adapter", None)
    loaded = danlu.load(base, bits=8, dtype="float32", device="cpu")
    before = perplexity(loaded.model, TREES)
    voice = loaded.with_adapter(folder).model
    assert isinstance(voice.get_input_embeddings(), PackedEmbedding) != embeddings
    assert isinstance(loaded.model.get_input_embeddings(), PackedEmbedding)
    assert perplexity(loaded.model, TREES) == before
    whole = perplexity(danlu.load(folder, dtype="float32", device="cpu").model, TREES)
    assert abs(whole - before) > 0.05 * before and perplexity(voice, TREES) == pytest.approx(whole, rel=0.02)
