"""UniLM: BERT's own numbers in every mode, the masks of the paper's figure, generation, folders, heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from danlu.exceptions import ModelError
from danlu.models.load import load_model
from danlu.models.registry import family_of
from danlu.models.unilm import MODES, UniLmConfig, UniLmForMaskedLM, UniLmForTokenClassification, visible_by_mode

MASK = 3
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """transformers' BERT with six segments and large random weights, and its folder."""
    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(intermediate_size=48, max_position_embeddings=32, type_vocab_size=6, **shape)
    config._attn_implementation = "eager"
    model = BertForMaskedLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[CLS]", "[SEP]", "[MASK]"]), "utf-8")
    return model.eval(), folder


@pytest.fixture(scope="module")
def model(bert: tuple[Any, Path]) -> Any:
    return load(bert[1])


def load(folder: Path, scalar: bool = False) -> Any:
    family = family_of(json.loads((folder / "config.json").read_text("utf-8")))
    assert family is not None and family.name == "UniLM"
    return load_model(folder, scalar=scalar).eval()


def picture(mode: int, source: int, length: int = 4) -> list[str]:
    visible = visible_by_mode(torch.tensor([mode]), torch.tensor([source]), torch.ones(1, length))
    return ["".join("#" if x else "." for x in row) for row in visible[0, 0].tolist()]


def test_masks_are_those_of_figure_1() -> None:
    assert picture(0, 4) == ["####"] * 4
    assert picture(1, 4) == ["#...", "##..", "###.", "####"]
    assert picture(2, 4) == ["####", ".###", "..##", "...#"]
    assert picture(3, 2) == ["##..", "##..", "###.", "####"]


@pytest.mark.parametrize("mode", range(4))
@torch.no_grad()
def test_it_is_bert_with_a_mask_and_segments(mode: int, bert: tuple[Any, Path], model: Any) -> None:
    modes, sources = torch.tensor([mode]), torch.tensor([4])
    visible = visible_by_mode(modes, sources, torch.ones_like(IDS))
    fill = torch.zeros(visible.shape).masked_fill(~visible, -10000.0)
    segments = torch.tensor([[[0] * 4 + [1] * 2, [2] * 6, [3] * 6, [4] * 4 + [5] * 2][mode]])
    expected = bert[0](IDS, attention_mask=fill, token_type_ids=segments).logits
    torch.testing.assert_close(model(IDS, modes=modes, sources=sources).logits, expected, atol=1e-5, rtol=1e-5)
    given = model(IDS, attention_mask=visible[:, 0], token_type_ids=segments).logits
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing(model: Any) -> None:
    padded = torch.cat([IDS, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    real = torch.tensor([[1] * 6 + [0] * 3])
    for mode in range(4):
        given: dict[str, Tensor] = {"modes": torch.tensor([mode]), "sources": torch.tensor([4])}
        alone = model(IDS, **given).logits
        found = model(padded, attention_mask=real, **given).logits[:, :6]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_scores_see_what_the_mode_shows(model: Any) -> None:
    row = IDS[0]
    for mode in MODES:
        found = model.score(row, mode, source=3)
        assert found.shape == (6,) and bool((found <= 0).all())
        other = row.clone()
        other[5] = 20  # a later token matters to the first one only where it is visible
        first = model.score(other, mode, source=3)
        at = 3 if mode == "seq2seq" else 0
        seen = mode in ("bidirectional", "right-to-left")
        assert (abs(float(first[at] - found[at])) > 1e-4) == seen
    hand = IDS.clone()
    hand[0, 2] = MASK
    logits = model(hand, modes=torch.tensor([1])).logits[0, 2]
    torch.testing.assert_close(model.score(row, "left-to-right")[2], logits.log_softmax(-1)[7])
    assert float(model.score(row, "seq2seq", source=3)[:3].abs().sum()) == 0.0


@torch.no_grad()
def test_generation_replaces_a_mask_at_the_end(model: Any) -> None:
    found = model.generate(IDS, max_new_tokens=3)
    assert found.shape == (1, 9) and torch.equal(found[:, :6], IDS)
    asked = torch.cat([found[:, :8], torch.tensor([[MASK]])], dim=1)
    logits = model(asked, modes=torch.tensor([3]), sources=torch.tensor([6])).logits
    assert int(logits[0, -1].argmax()) == int(found[0, 8])
    stop = int(found[0, 6])
    assert model.generate(IDS, max_new_tokens=3, eos_token_id=stop).shape == (1, 7)
    with pytest.raises(ModelError, match="one row"):
        model.generate(IDS.repeat(2, 1))


def test_folders_heads_and_refusals(model: Any, tmp_path: Path) -> None:
    assert model.config.mask_token_id == MASK
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(load(tmp_path)(IDS).logits, model(IDS).logits)
    assert float(load(tmp_path, scalar=True)(IDS).logits.detach().abs().sum()) == 0.0
    classes = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classes(IDS, labels=torch.tensor([2])).logits.shape == (1, 3)
    config = UniLmConfig.from_pretrained(tmp_path, num_labels=2)
    assert UniLmForTokenClassification(config)(IDS).logits.shape == (1, 6, 2)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"type_vocab_size": 3}, "known: 6, 2, 1"),
        ({"hidden_act": "relu"}, "relu"),
        ({"num_attention_heads": 5}, "multiple"),
    ]
    for keys, words in wrong:
        with pytest.raises(ModelError, match=words):
            UniLmConfig(**keys)
    with pytest.raises(ModelError, match="32 positions"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(ModelError, match="mask token"):
        small = UniLmConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        UniLmForMaskedLM(small).score(IDS[0], MODES[0])
    assert family_of({"model_type": "bert", "type_vocab_size": 2}) is None
