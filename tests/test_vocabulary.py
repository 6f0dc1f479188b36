"""New words before continued pre-training: rows are means, text is cut in fewer tokens, and the model goes on to learn."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny

from danlu.config import PretrainSettings
from danlu.exceptions import DataError, SettingsError
from danlu.models.load import load_model
from danlu.text.tokenizer import load_tokenizer
from danlu.trainers import pretrain
from danlu.training.vocabulary import learn_words

TEXT = "话说天下大势，分久必合，合久必分。丹炉丹炉，炼丹之炉。"


def test_rows_are_the_means_of_old_pieces() -> None:
    model, tokenizer = load_model(tiny.model()), load_tokenizer(tiny.model())
    before = copy.deepcopy(model.get_input_embeddings().weight.detach())
    assert tokenizer is not None
    found, facts = learn_words(model, tokenizer, [TEXT] * 6, 5)
    assert 0 < facts["new_words"] <= 5 and len(found) == len(tokenizer) + facts["new_words"]
    rows = model.get_input_embeddings().weight
    word = found.convert_ids_to_tokens(len(tokenizer))
    pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    assert rows[len(tokenizer)].tolist() == pytest.approx(before[pieces].mean(0).tolist(), abs=1e-6)
    assert rows[: len(tokenizer)].tolist() == before[: len(tokenizer)].tolist()
    count = facts["tokens_per_character"]["zh"]
    assert count["after"] < count["before"]
    with pytest.raises(DataError, match="frequent enough"):
        learn_words(model, tokenizer, ["a"], 5)


def test_a_model_reads_on_with_new_words(tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": TEXT + str(i)}) + "\n" for i in range(40)), "utf-8")
    options = {"data": str(data), "eval_fraction": 0.2, "max_length": 64, "micro_tokens": 256, "tokens_per_step": 256}
    options |= {"max_steps": 8, "dtype": "float32", "new_words": 8}
    settings = PretrainSettings(model=str(tiny.model()), out=str(tmp_path / "out"), **options)
    result = pretrain.train(settings)
    assert result.facts["new_words"] > 0
    assert result.metrics["eval_loss"] < result.metrics["first_eval_loss"]
    model, tokenizer = load_model(result.model), load_tokenizer(result.model)
    assert tokenizer is not None and model.config.vocab_size >= len(tokenizer)
    assert len(tokenizer(TEXT)["input_ids"]) < len(load_tokenizer(tiny.model())(TEXT)["input_ids"])  # type: ignore[misc]
    with pytest.raises(SettingsError, match="a starter has a tokenizer of its own"):
        pretrain.train(PretrainSettings(tokenizer=str(tiny.model()), out=str(tmp_path / "no"), **options))
