"""Pre-training by corruption: it learns, is resumed to the bit, and its loss is the families' own."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import seq2seq_models as small
import tiny
import torch
from originals import original
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from danlu.config import KINDS, PRESETS, PretrainSettings
from danlu.exceptions import ModelError, SettingsError
from danlu.models import starters
from danlu.models.blank import generation_inputs
from danlu.models.load import load_model
from danlu.models.rows import OneModel, RowsRoot
from danlu.models.starters import opt
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.text.tokenizer import load_tokenizer
from danlu.trainers import denoise
from danlu.training.denoise import Text, Texts, rows_loss, rows_of, sentinels_of
from danlu.training.setup import plan_of


def settings_of(out: Path, objective: str, **changes: Any) -> Any:
    return parse(KINDS["pretrain"], tiny.stage("pretrain", out, objective=objective, **changes))


def train(out: Path, objective: str, **changes: Any) -> Any:
    return STAGES["pretrain"].run(settings_of(out, objective, **changes))


def test_glm_learns_and_writes_into_blanks(tmp_path: Path) -> None:
    found = train(tmp_path, "glm", max_steps=40, learning_rate=2e-2)
    assert found.metrics["first_eval_loss"] > 5 and found.metrics["eval_loss"] < 3.5
    model, tokenizer = load_model(tmp_path / "model").eval(), AutoTokenizer.from_pretrained(tmp_path / "model")
    text = tokenizer("Note 3: the[MASK]. ", add_special_tokens=False)["input_ids"]
    given = torch.tensor([[tokenizer.bos_token_id, *text]])
    ids = model.config.blank_ids()
    inputs = generation_inputs(given, torch.ones_like(given), ids, room=9)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=ids.pad)[0, given.shape[1] + 1 :]
    assert 0 < len(out) <= 8 and not set(out.tolist()) & set(ids.masks)


def test_unilm_learns_and_scores_in_all_four_modes(tmp_path: Path) -> None:
    found = train(tmp_path, "unilm", max_steps=40, learning_rate=2e-2)
    assert found.metrics["first_eval_loss"] > 5 and found.metrics["eval_loss"] < 4.0
    model, tokenizer = load_model(tmp_path / "model").eval(), AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "Note 3: the lamp is green. The lamp is green, as ever."
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]])
    fresh = starters.unilm(len(tokenizer), tiny.SHAPE, {"mask_token_id": model.config.mask_token_id}, 0).eval()
    for mode in ("bidirectional", "left-to-right", "right-to-left", "seq2seq"):
        scored, before = (float(m.score(ids, mode, source=5)[5:].mean()) for m in (model, fresh))
        assert scored > before + 0.5, mode


def test_t5_learns_and_its_loss_is_transformers_own(tmp_path: Path) -> None:
    found = train(tmp_path, "t5", max_steps=60, learning_rate=2e-2)
    assert found.metrics["first_eval_loss"] > 5 and found.metrics["eval_loss"] < 4.5
    model, tokenizer = (c.from_pretrained(tmp_path / "model") for c in (AutoModelForSeq2SeqLM, AutoTokenizer))
    settings = settings_of(tmp_path, "t5")
    texts = Texts([Text(list(range(5, 30))), Text(list(range(40, 52)))], rows_of(settings, model.config, tokenizer), 0)
    batch = texts.batch([0, 1], 0)
    labels = batch.targets_R.masked_fill(batch.loss_weight_R == 0, -100).view(2, -1)
    own = model.eval()(**batch.inputs, labels=labels).loss
    root = RowsRoot(OneModel(model)).eval()
    loss, _ = root(batch, "policy", lambda out: rows_loss(out, float(batch.loss_weight_R.sum())))
    torch.testing.assert_close(loss, own)
    # From a model: goes on where it ended.
    again = train(tmp_path / "more", "t5", model=str(tmp_path / "model"), tokenizer="", max_steps=1)
    assert again.metrics["first_eval_loss"] == pytest.approx(found.metrics["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("objective", ["glm", "unilm", "t5"])
def test_micro_batches_give_one_gradient(objective: str, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, objective, learning_rate=1e-3)
    tokenizer, model = denoise.start(settings)
    texts = Texts([Text(list(range(5, 30 + i))) for i in range(6)], rows_of(settings, model.config, tokenizer), 0)
    root = RowsRoot(OneModel(model))
    grads = []
    for cut in ([[0, 1, 2, 3, 4, 5]], [[i] for i in range(6)]):
        root.zero_grad()
        batches = [texts.batch(part, 3) for part in cut]
        total = sum(float(b.loss_weight_R.sum()) for b in batches)
        for batch in batches:
            root(batch, "policy", lambda out, t=total: rows_loss(out, t))[0].backward()
        grads.append(torch.cat([p.grad.flatten() for p in root.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("objective", ["glm", "unilm"])
def test_a_resumed_run_ends_with_the_same_weights(objective: str, tmp_path: Path) -> None:
    whole = {"max_steps": 6, "save_every": 3, "keep_checkpoints": 9}
    train(tmp_path / "a", objective, **whole)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "model")
    for folder in (tmp_path / "b" / "checkpoints").glob("step-*"):
        if folder.name > "step-00000003":
            shutil.rmtree(folder)
    train(tmp_path / "b", objective, **whole)
    assert tiny.weights(tmp_path / "a" / "model") == tiny.weights(tmp_path / "b" / "model")


def test_instructions_are_mixed_in_at_their_share(tmp_path: Path) -> None:
    changes = {"instruction_data": str(tiny.data()["conversations"]), "instruction_share": 0.25, "max_steps": 2}
    found = train(tmp_path, "glm", **changes)
    windows, rows = found.facts["windows"], found.facts["instructions"]
    assert rows / (rows + windows) == pytest.approx(0.25, abs=0.01)
    settings = settings_of(tmp_path, "glm", **changes)
    tokenizer, model = denoise.start(settings)
    text = denoise.instruction_rows(settings, tokenizer, windows)[0]
    batch = Texts([text], rows_of(settings, model.config, tokenizer), 0).batch([0], 0)
    learnt = batch.targets_R[batch.loss_index()].tolist()
    assert learnt == list(text.ids[text.prompt :]) and learnt[-1] == tokenizer.eos_token_id
    assert batch.inputs["attention_mask"].tolist() == [text.prompt + 1]


def test_lora_on_glm(tmp_path: Path) -> None:
    train(tmp_path / "base", "glm", max_steps=2)
    found = train(
        tmp_path / "lora", "glm", model=str(tmp_path / "base" / "model"), tokenizer="", adapter="lora", max_steps=3
    )
    assert found.metrics["loss"] > 0
    base, tuned = load_model(tmp_path / "base" / "model"), load_model(tmp_path / "lora" / "model")
    name = "glm.transformer.layers.0.attention.query_key_value.weight"
    assert not torch.equal(base.get_parameter(name), tuned.get_parameter(name))
    assert torch.equal(base.glm.word_embeddings.weight, tuned.glm.word_embeddings.weight)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="objective glm wants a GLM"):
        train(tmp_path, "glm", model=str(tiny.model()), tokenizer="")
    with pytest.raises(SettingsError, match="trains all weights"):
        train(tmp_path, "unilm", adapter="lora")
    with pytest.raises(SettingsError, match="instruction_data belongs"):
        settings_of(tmp_path, "causal", instruction_data="x.jsonl")
    with pytest.raises(SettingsError, match="shares of one whole"):
        settings_of(tmp_path, "glm", blanks={"blank": 0.8, "sentence": 0.4})


def test_presets_are_the_published_sizes(tmp_path: Path) -> None:
    settings = PretrainSettings(preset="opt-1.3b", tokenizer="x")
    assert (settings.learning_rate, settings.tokens_per_step, settings.max_length) == (2e-4, 2**20, 2048)
    assert PretrainSettings(preset="opt-1.3b", tokenizer="x", learning_rate=1e-5).learning_rate == 1e-5
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in _shape_only(PRESETS[name]).parameters()) / 1e9
            for name in ("opt-125m", "opt-1.3b")
        }
    assert counts["opt-125m"] == pytest.approx(0.125, rel=0.02) and counts["opt-1.3b"] == pytest.approx(1.32, rel=0.02)
    for wrong, words in (({"preset": "opt-2b"}, "not known"), ({"preset": "opt-125m", "model": "x"}, "from nothing")):
        with pytest.raises(SettingsError, match=words):
            parse(KINDS["pretrain"], wrong)
    size = {"hidden_size": 32, "layers": 2, "heads": 2, "context": 64}
    assert opt(61, size, {}, 0).config.ffn_dim == 128


def _shape_only(size: dict[str, Any]) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    width = size["hidden_size"]
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=width,
            word_embed_proj_dim=width,
            ffn_dim=4 * width,
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
        )
    )


def test_rows_are_a_function_of_seed_step_and_number(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "glm")
    tokenizer, model = denoise.start(settings)
    texts = Texts([Text(list(range(5, 40))) for _ in range(3)], rows_of(settings, model.config, tokenizer), 0)
    one, again, other = texts.batch([1], 5), texts.batch([0, 1], 5), texts.batch([1], 6)
    length = one.inputs["input_ids"].shape[1]
    assert torch.equal(one.inputs["input_ids"][0], again.inputs["input_ids"][1, :length])
    assert not torch.equal(one.targets_R, other.targets_R) or not torch.equal(one.loss_weight_R, other.loss_weight_R)
    assert len(plan_of(texts.lengths, settings)) > 0 and random.Random(0).random() < 1


def test_cpm2_learns_by_its_own_sentinels(tmp_path: Path) -> None:
    """`<s_0>`, ... of its list stand for spans; the folder is read as published, under the original names."""
    folder = tmp_path / "cpm2"
    shutil.copytree(original("cpm2"), folder, ignore=shutil.ignore_patterns("cases.*"))
    for file in folder.iterdir():
        file.chmod(0o644)
    pieces = ["<unk>", "<s>", "</s>", "\u2583", "<sep>", "<pad>", "<mask>", "<eod>", "\u2582"]
    pieces += [*map(chr, range(33, 127)), *(f"<s_{n}>" for n in range(190))]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", "utf-8")
    found = train(tmp_path / "out", "t5", model=str(folder), tokenizer="", max_steps=4)
    assert found.metrics["eval_loss"] < found.metrics["first_eval_loss"]
    assert sentinels_of(load_tokenizer(folder)) == list(range(103, 293))
    assert load_model(tmp_path / "out" / "model").config.danlu_family == "cpm2"
    with pytest.raises(ModelError, match="neither <extra_id_0>"):
        train(tmp_path / "x", "t5", model=str(small.folder(tmp_path / "bare", "t5")), tokenizer="")
