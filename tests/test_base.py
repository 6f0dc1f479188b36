"""`danlu base`: tokens, memory and perplexity per character worked out once more by hand; published models with sources."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import seq2seq_models as small
import torch
from families import make
from originals import original

from danlu.cli.main import run
from danlu.models.load import load_model, save_model
from danlu.pipeline.base import CHINESE, bases, known, own_chinese, page, stated
from danlu.text.coverage import plain_rates
from danlu.text.tokenizer import load_tokenizer

TEXT = "the cat sat 你好"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = {"vocab_size": small.VOCAB, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    path = save_model(make("llama", **ids), small.tokenizer(), tmp_path_factory.mktemp("base") / "m")
    (path / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n- zh\n---\n# A model\n", "utf-8")
    return path


def test_a_row_by_hand(folder: Path) -> None:
    (row,) = bases([str(folder)], [TEXT])
    assert (row.family, row.context, row.licence, row.languages) == ("llama", 64, "mit", ["en", "zh"])
    # One token a byte: 12 characters of English (spaces too), 2 of Chinese with three bytes each.
    assert row.tokens_per_character == {"en": 1.0, "zh": 3.0} and row.own_chinese == 0
    model = make("llama", vocab_size=small.VOCAB, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    assert row.parameters == sum(p.numel() for p in model.parameters())
    ids = [
        1,
        *small.tokenizer()(TEXT, add_special_tokens=False)["input_ids"],
        1,
    ]  # the end stands for the beginning, too
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    total = -sum(float(logprobs[at, token]) for at, token in enumerate(ids[1:]))
    assert row.perplexity_per_character == pytest.approx(math.exp(total / len(TEXT)), rel=1e-4)
    tables = 2 * small.VOCAB * 32
    cache = 2 * (2 * 2 * 2 * 8) * 64  # 16 bits, keys and values, 2 layers, 2 heads of 8, 64 positions
    assert row.inference_gb[16] == round((2 * row.parameters + cache) / 1e9, 3)
    assert row.inference_gb[4] <= row.inference_gb[8] <= row.inference_gb[16] <= row.lora_gb[16]
    assert tables < row.parameters


def test_chinese_characters_with_a_token() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab={"<unk>": 0, "你": 1, "好": 2, "a": 3}, merges=[], unk_token="<unk>"))
    assert own_chinese(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")) == 2


def test_llama_knows_about_seven_hundred(shared_data: Path) -> None:
    from danlu.text.tokenizer_files import open_tokenizer

    assert 650 < own_chinese(open_tokenizer(shared_data / "tokenizers" / "llama")) < 750


def test_what_is_not_stated(tmp_path: Path) -> None:
    assert stated(tmp_path) == (None, [])
    (tmp_path / "LICENSE").write_text("\n  Apache License\n", "utf-8")
    assert stated(tmp_path) == ("Apache License", [])
    (tmp_path / "README.md").write_text("---\n: [\n---\n", "utf-8")
    assert stated(tmp_path) == ("Apache License", [])


def test_every_known_model_has_a_source() -> None:
    rows = known()
    fields = {"name", "kind", "size", "tokens", "language", "licence", "commercial", "source"}
    assert len({r["name"] for r in rows}) == len(rows) >= 35
    for row in rows:
        assert fields <= row.keys() <= fields | {"base"} and row["source"].startswith("https://")
    names = " ".join(r["name"] for r in rows)
    wanted = "LLaMA Alpaca Vicuna BELLE ChatGLM-6B ChatGLM2-6B ChatGLM3-6B MOSS BLOOM OPT GPT-NeoX Pythia Dolly StableLM T5 mT0"
    wanted += " Flan CPM-1 CPM-2 GLM-130B UniLM Wenzhong PMC-LLaMA ChatDoctor HuaTuo Qwen Mistral Gemma Phi"
    assert [w for w in wanted.split() if w not in names] == []


def test_the_command(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "t.jsonl"
    text.write_text(json.dumps({"text": TEXT}, ensure_ascii=False) + "\n", "utf-8")
    html = tmp_path / "t.html"
    assert run(["base", str(folder), "--text", str(text), "--known", "--html", str(html), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["models"][0]["tokens_per_character"]["zh"] == 3.0 and len(found["known"]) == len(known())
    assert "<td>mit</td><td>en, zh</td>" in html.read_text("utf-8").replace("\n", "")
    assert "https://arxiv.org/abs/2302.13971" in html.read_text("utf-8")
    assert run(["base", str(folder), "--text", str(text)]) == 0
    assert "llama" in capfd.readouterr().err
    assert run(["base"]) == 2
    written = page([], [{**known()[0], "name": "<script>"}])
    assert "&lt;script&gt;" in written and "<script" not in written


@pytest.mark.parametrize("name", ["chatglm_v1", "chatglm2_int4", "moss"])
def test_danlus_own_families_have_every_column(name: str, tmp_path: Path) -> None:
    """Their tokenizers are no fast ones, int4 weights are no parameters, and MOSS is a CodeGen to whoever counts memory."""
    (row,) = bases([str(original(name))], ["今天天气很好，我们去公园散步吧。 Hello, how are you?"])
    assert row.tokens_per_character["zh"] > 0 and row.tokens_per_character["en"] > 0 and row.own_chinese
    assert set(row.inference_gb) == set(row.lora_gb) == {16, 8, 4} and row.perplexity_per_character
    model = load_model(original(name.removesuffix("_int4")))
    assert row.parameters == sum(p.numel() for p in model.parameters())


def test_tokens_of_a_tokenizer_that_is_no_fast_one() -> None:
    """ChatGLM2's on two stretches: its own tokens, without the space that it puts before a text."""
    tokenizer = load_tokenizer(original("chatglm2"))
    zh, en = "今天天气很好", "Hello how"
    cut = {text: [t for t in tokenizer.tokenize(text) if t != "\u2581"] for text in (zh, en)}
    rates = plain_rates(tokenizer, [f"{zh}{en}"])
    assert rates == {"zh": len(cut[zh]) / len(zh), "en": len(cut[en]) / len(en)}
    known = {t.lstrip("\u2581") for t in tokenizer.get_vocab()}
    assert own_chinese(tokenizer) == sum(c in known for c in CHINESE)
