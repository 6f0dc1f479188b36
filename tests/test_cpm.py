"""CPM-1 and CPM-2 against their own code: every recorded case, model-parallel files, and tokenizers."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import assert_close, assert_gradient, original, recorded
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from danlu.exceptions import ModelError
from danlu.models.cpm2 import Cpm2ForConditionalGeneration
from danlu.models.load import load_model, save_model
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.text.cpm_tokenizers import Cpm2Tokenizer, CpmTokenizer
from danlu.text.tokenizer import load_tokenizer
from danlu.training.step import language_loss
from danlu.tree import TreeBatch, conversation, forest

COLUMNS = ("attention.dense.weight", "self_attn.dense.weight", "cross_attn.dense.weight", "4h_to_h.weight")
COLUMNS += ("wo.weight", "relative_attention_bias.weight")
FUSED = {"query_key_value": 3, "project.": 3, "project_kv": 2}
ROWS = (*FUSED, "word_embe", "lm_head", "dense_h_to_4h", "project_q", "wi_0", "wi_1")


@pytest.fixture(scope="module")
def one() -> Any:
    found = recorded("cpm1")
    return found, load_model(found.folder).eval()


@pytest.fixture(scope="module")
def two() -> Any:
    found = recorded("cpm2")
    return found, load_model(found.folder).eval()


def split(state: dict[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """What Megatron's ranks hold of a model, written down once more: rows, columns, or a part of each fused block."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in state.items():
        blocks = next((n for key, n in FUSED.items() if key in name), 1)
        for rank, part in enumerate(parts):
            if name.endswith(COLUMNS):
                width = tensor.shape[1] // ranks
                part[name] = tensor[:, rank * width : (rank + 1) * width].clone()
            elif any(key in name for key in ROWS):
                height = len(tensor) // blocks // ranks
                starts = [b * (len(tensor) // blocks) + rank * height for b in range(blocks)]
                part[name] = torch.cat([tensor[s : s + height] for s in starts])
            else:
                part[name] = tensor.clone()
    return parts


def write_ranks(recording: Any, folder: Path, ranks: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((recording.folder / "config.json").read_text("utf-8"), "utf-8")
    for rank, part in enumerate(split(load_file(recording.folder / "model.safetensors"), ranks)):
        torch.save({"module": part, "iteration": 5}, folder / f"mp_rank_{rank:02d}_model_states.pt")
    return folder


# -- CPM-1 --------------------------------------------------------------------------------------------------------------


def test_cpm1_logits_with_the_originals_masks_and_with_none(one: Any) -> None:
    found, model = one
    assert type(model) is GPT2LMHeadModel
    ids, positions, mask = (found[f"forward.{n}"] for n in ("input_ids", "position_ids", "attention_mask"))
    with torch.no_grad():
        for logits in (model(ids, positions, mask).logits, model(input_ids=ids).logits):
            assert_close(logits, found["forward.logits"])
        names = ("input_ids", "position_ids", "attention_mask")
        assert_close(model(**{n: found[f"reset_mask.{n}"] for n in names}).logits, found["reset_mask.logits"])
        # Documents that are reset stand as if alone, and as nodes of their own in a token tree.
        ids = found["reset_mask.input_ids"][0].tolist()
        root = RootModel(SeparateModels({"policy": load_model(found.folder)}, ["policy"])).eval()
        tree = TreeBatch.of(forest([conversation(part, [1.0] * 5) for part in (ids[:5], ids[5:])]))
        logits = root(tree, "policy", lambda out: out.logits(torch.arange(10)))
    assert_close(logits[None], found["reset_mask.logits"])


def test_cpm1_loss_and_gradients(one: Any) -> None:
    """Through a token tree, whose loss weights are the recorded mask."""
    found, _ = one
    model = load_model(found.folder)
    root = RootModel(SeparateModels({"policy": model}, ["policy"])).eval()
    ids, mask = found["forward.input_ids"], found["forward.loss_mask"]
    rows = [conversation(i.tolist(), [0.0, *m.tolist()]) for i, m in zip(ids, mask, strict=True)]
    tree = TreeBatch.of(forest(rows))
    loss, _ = root(tree, "policy", lambda out: language_loss(out, float(mask.sum())))
    assert float(loss.detach()) == pytest.approx(float(found["forward.loss"]), rel=1e-5)
    loss.backward()
    facts = found.facts["grad_norm_and_sum"]["forward"]
    names = {
        "word_embeddings": "wte",
        "position_embeddings": "wpe",
        "transformer.layers": "h",
        "input_layernorm": "ln_1",
    }
    names |= {"post_attention_layernorm": "ln_2", "attention.query_key_value": "attn.c_attn", "dense_h_to_4h": "c_fc"}
    names |= {"attention.dense": "attn.c_proj", "dense_4h_to_h": "c_proj", "transformer.final_layernorm": "ln_f"}
    for old, fact in facts.items():
        new = old
        for a, b in names.items():
            new = new.replace(a, b)
        gradient = model.transformer.get_parameter(new).grad
        assert_gradient(gradient, fact, old)
        if f"forward.grad.{old}" in found.tensors:
            assert_close(gradient.T, found[f"forward.grad.{old}"])


def test_cpm1_cached_steps_and_greedy_tokens(one: Any) -> None:
    found, model = one
    ids, answer = found["greedy.input_ids"], found["greedy.output_ids"]
    steps = sorted(k for k in found.tensors if k.startswith("incremental."))
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        assert_close(out.logits, found[steps[0]])
        for at, step in enumerate(steps[1:], start=ids.shape[1]):
            out = model(input_ids=answer[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            assert_close(out.logits, found[step])
    new = answer.shape[1] - ids.shape[1]
    greedy = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None
    )
    assert greedy.equal(answer)


@pytest.mark.parametrize(("name", "ranks"), [("cpm1", 2), ("cpm2", 2), ("cpm2", 4)])
def test_model_parallel_files(name: str, ranks: int, tmp_path: Path, one: Any, two: Any) -> None:
    found, model = one if name == "cpm1" else two
    folder = write_ranks(found, tmp_path / "m", ranks)
    loaded = load_model(folder)
    assert loaded.name_or_path == loaded.config.name_or_path == str(folder)  # by which adapters name their base
    for key, tensor in model.state_dict().items():
        assert loaded.state_dict()[key].equal(tensor), key
    (folder / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(ModelError, match=r"mp_rank_00_model_states\.pt is missing"):
        load_model(folder)


# -- CPM-2 --------------------------------------------------------------------------------------------------------------


def given(found: Any) -> dict[str, Tensor]:
    names = ("enc_input_ids", "enc_attention_mask", "dec_input_ids", "dec_attention_mask", "cross_attention_mask")
    return {name: found[f"forward.{name}"] for name in names}


def test_cpm2_hidden_states_and_logits(two: Any) -> None:
    found, model = two
    targets, sources = found["forward.loss_mask"].bool(), found["forward.enc_input_ids"] != 5
    with torch.no_grad():
        out = model(**given(found), output_hidden_states=True)
        plain = model(
            input_ids=found["forward.enc_input_ids"],
            attention_mask=sources.long(),
            decoder_input_ids=found["forward.dec_input_ids"],
        )
    assert_close(out.encoder_last_hidden_state, found["forward.encoder_last_hidden_state"], sources)
    assert_close(out.decoder_hidden_states[-1], found["forward.last_hidden_state"], targets)
    for logits in (out.logits, plain.logits):
        assert_close(logits, found["forward.logits"], targets)


def test_cpm2_loss_and_gradients(two: Any) -> None:
    found, model = two
    model.zero_grad()
    mask, labels = found["forward.loss_mask"], found["forward.labels"]
    logprobs = torch.log_softmax(model(**given(found)).logits, -1)
    loss = -(logprobs.gather(-1, labels[..., None]).squeeze(-1) * mask).sum() / mask.sum()
    assert float(loss.detach()) == pytest.approx(float(found["forward.loss"]), rel=1e-5)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    attention = {"self_attn": "SelfAttention", "cross_attn": "EncDecAttention"}
    for old, fact in found.facts["grad_norm_and_sum"]["forward"].items():
        parts = old.split(".")
        if len(parts) < 4:
            new = {"word_embeds.weight": "shared.weight"}.get(old, old.replace("final_layernorm", "final_layer_norm"))
            gradient = grads[new]
        else:
            side, number, kind = parts[0], parts[2], parts[3]
            place = {"self_attn": 0, "cross_attn": 1, "ff": 2 if side == "decoder" else 1}[kind]
            layer = f"{side}.block.{number}.layer.{place}."
            last = parts[-2]
            if last == "layer_norm":
                gradient = grads[f"{layer}layer_norm.weight"]
            elif kind == "ff":
                gradient = grads[f"{layer}DenseReluDense.{last}.weight"]
            else:
                into = {"project": "qkv", "project_q": "q", "project_kv": "kv", "dense": "o"}.get(last)
                names = [f"{layer}{attention[kind]}.{i}.weight" for i in into or ()]
                names = names or [f"{layer}{attention[kind]}.{last}.weight"]
                gradient = torch.cat([grads[n] for n in names])
        assert_gradient(gradient, fact, old)
        if f"forward.grad.{old}" in found.tensors:
            assert_close(gradient, found[f"forward.grad.{old}"], within=1e-3)


def test_cpm2_greedy_tokens_and_steps(two: Any) -> None:
    found, model = two
    ids, answer = found["greedy.enc_input_ids"], found["greedy.output_ids"]
    with torch.no_grad():
        for step in range(3):
            logits = model(input_ids=ids, decoder_input_ids=answer[:, : step + 1]).logits
            assert_close(logits, found[f"greedy.step{step}.logits"])
    new = answer.shape[1] - 1
    assert model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None).equal(answer)

    from danlu.generation.encoder_decoder import EncoderDecoderEngine
    from danlu.generation.protocol import Request, SamplingParams, generate

    engine = EncoderDecoderEngine(load_model(found.folder))
    params = SamplingParams(max_new_tokens=new, temperature=0)
    assert list(generate(engine, [Request(ids[0].tolist(), params)])[0].ids) == answer[0, 1:].tolist()


def test_cpm2_buckets(two: Any) -> None:
    found, _ = two
    for kind in ("bidirectional", "causal"):
        buckets = T5Attention._relative_position_bucket(
            found["buckets.relative_position"],
            bidirectional=kind == "bidirectional",
            num_buckets=32,
            max_distance=128,
        )
        assert buckets.tolist() == found[f"buckets.{kind}"].tolist()


def test_cpm2_prompts_and_what_is_saved(two: Any, tmp_path: Path) -> None:
    """Negative ids read prompt embeddings; what is saved is a T5, and danlu finds the prompts again."""
    found, _ = two
    folder = tmp_path / "prompted"
    folder.mkdir()
    state = load_file(found.folder / "model.safetensors")
    prompts = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    save_file({**state, "encoder.prompt_embeds.weight": prompts}, folder / "model.safetensors")
    (folder / "config.json").write_text((found.folder / "config.json").read_text("utf-8"), "utf-8")
    model = load_model(folder).eval()
    ids, start = torch.tensor([[-1, 17, -3]]), torch.tensor([[1]])
    words = torch.stack([prompts[0], state["word_embeds.weight"][17], prompts[2]])[None]
    with torch.no_grad():
        expected = model(inputs_embeds=words, decoder_input_ids=start).logits
        assert_close(model(input_ids=ids, decoder_input_ids=start).logits, expected)
        save_model(model, None, tmp_path / "saved")
        again = load_model(tmp_path / "saved").eval()
        assert type(again) is Cpm2ForConditionalGeneration
        assert_close(again(input_ids=ids, decoder_input_ids=start).logits, expected)
        plain = T5ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
        words = torch.tensor([[17, 20]])
        assert_close(
            plain(input_ids=words, decoder_input_ids=start).logits,
            model(input_ids=words, decoder_input_ids=start).logits,
        )
    with pytest.raises(ModelError, match="-4 asks for a prompt embedding, and this model has 3"):
        model(input_ids=torch.tensor([[-4]]), decoder_input_ids=start)


def test_options_without_a_published_model_are_refused(two: Any, tmp_path: Path) -> None:
    config = json.loads((two[0].folder / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"do_dim_trick": True}), "utf-8")
    with pytest.raises(ModelError, match="do_dim_trick is not supported"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "cpm1", "num_layers": 2}', "utf-8")
    with pytest.raises(ModelError, match=r"no hidden_size, num_attention_heads, vocab_size"):
        load_model(tmp_path)


# -- tokenizers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpm1_chinese_vocab", "cpm2_bpe_cn"])
def test_ids_of_the_published_files(name: str) -> None:
    """With the real files, if they lie in $DANLU_SHARED/fixtures/tokenizers_real (by their hash)."""
    import hashlib

    folder = original("tokenizers_real")
    facts = json.loads((folder / "cases.json").read_text("utf-8"))[name]
    files = [f for f in folder.iterdir() if hashlib.sha256(f.read_bytes()).hexdigest() == facts["sha256"]]
    if not files:
        pytest.skip(f"PUBLISHED TOKENIZER NOT TESTED: no file with sha256 {facts['sha256'][:12]} in {folder}")
    tokenizer = (CpmTokenizer if name.startswith("cpm1") else Cpm2Tokenizer)(str(files[0]))
    for case in facts["cases"]:
        assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids"]


def test_words_are_jiebas() -> None:
    from danlu.text.cpm_tokenizers import words

    facts = json.loads((original("tokenizers_real") / "cases.json").read_text("utf-8"))
    for case in facts["cpm1_chinese_vocab"]["cases"]:
        assert words(case["text"]) == case["jieba"]


def test_cpm2_list(tmp_path: Path) -> None:
    """Half-width forms but for Chinese punctuation, blocks for spaces and line ends, the longest pieces from the left."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "\u2583",
        "<sep>",
        "<pad>",
        "<mask>",
        "<eod>",
        "\u2582",
        "今天",
        "今天天气",
        "很",
        "好",
    ]
    pieces += ["，", "Full", "F", "u", "123", "12", "3"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", "utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "cpm2"}', "utf-8")
    tokenizer = load_tokenizer(tmp_path)

    def tokens(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert tokens("今天天气很好，") == ["今天天气", "很", "好", "，"]
    assert tokens("Ｆｕｌｌ１２３") == ["Full", "123"]
    assert tokens("Fu 12\n龘") == ["F", "u", "\u2582", "12", "\u2583", "<unk>"]
    assert tokenizer.decode(tokenizer("今天 很好\nFull")["input_ids"]) == "今天 很好\nFull"
    assert tokenizer.eos_token == "<eod>" and tokenizer.pad_token_id == 5
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again("Ｆｕｌｌ 3")["input_ids"] == tokenizer("Ｆｕｌｌ 3")["input_ids"]


def test_cpm1_pieces(tmp_path: Path) -> None:
    """Words joined by spaces, as the sentencepiece package reads them; texts come back."""
    spm = pytest.importorskip("sentencepiece")
    lines = ["今天 天气 很 好 ，", "Hello\u2582,\u2582how are you", "第一行 \u2583 第二行", "公园 散步 吧 。"] * 20
    (tmp_path / "text").write_text("\n".join(lines), "utf-8")
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "chinese_vocab"),
        vocab_size=75,
        control_symbols=["<pad>", "<eod>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text('{"model_type": "cpm1"}', "utf-8")
    tokenizer = load_tokenizer(tmp_path)
    reference = spm.SentencePieceProcessor(model_file=str(tmp_path / "chinese_vocab.model"))
    for text, joined in (
        ("今天天气很好，", "今天天气 很 好 ，"),
        ("Hello, how", "Hello , \u2582 how"),
        ("第一行\n第二行", "第一行 \u2583 第二行"),
    ):
        assert tokenizer(text)["input_ids"] == reference.encode(joined)
        shown = unicodedata.normalize("NFKC", text)  # SentencePiece's own rule, which the published file has too
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == shown
    assert tokenizer.eos_token == "<eod>"
