"""`danlu convert-model`: what comes out opens in plain transformers with the same logits; nothing stays of a failure."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_tiny
from originals import assert_close, original, recorded
from safetensors.torch import load_file

import danlu
from danlu.cli.main import run
from danlu.exceptions import ModelError
from danlu.generation.protocol import SamplingParams
from danlu.models import convert as converting
from danlu.models import stories
from danlu.models.convert import convert
from danlu.models.load import load_model, save_model

# The text that llama2.c's own test expects of this model at temperature 0 (test_all.py).
LILY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, "
LILY += "red ball. She wanted to play with it, but it was too high."


@pytest.mark.parametrize(("name", "kind"), [("moss", "codegen"), ("cpm1", "gpt2"), ("cpm2", "t5")])
def test_mapped_families_open_in_plain_transformers(
    name: str, kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, target = original(name), tmp_path / "plain"
    assert run(["convert-model", str(source), str(target), "--max-shard-size", "200KB", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["model_type"] == kind and told["plain"] and told["dtype"] == "float32" and len(told["files"]) > 1
    assert (target / "model.safetensors.index.json").is_file() and not list(target.glob("*.bin"))
    auto = transformers.AutoModelForSeq2SeqLM if name == "cpm2" else transformers.AutoModelForCausalLM
    plain = auto.from_pretrained(target).eval()
    found = recorded(name)
    with torch.no_grad():
        if name == "cpm2":
            ids, start = found["greedy.enc_input_ids"], found["greedy.output_ids"][:, :1]
            assert_close(plain(ids, decoder_input_ids=start).logits, found["greedy.step0.logits"])
        else:
            case = "single" if name == "moss" else "forward"
            assert_close(plain(found[f"{case}.input_ids"]).logits, found[f"{case}.logits"])
    if name == "moss":
        tokenizer = transformers.AutoTokenizer.from_pretrained(target)
        case = found.facts["prompts"][0]
        assert tokenizer(case["prompt"])["input_ids"] == case["ids"]
        asked = [{"role": "user", "content": "Hi"}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert text == "<|Human|>: Hi<eoh>\n<|MOSS|>:"


@pytest.mark.parametrize("name", ["chatglm_v1_int4", "chatglm2_int8"])
def test_chatglms_packed_weights_stay_packed(name: str, tmp_path: Path) -> None:
    """As published, but as safetensors; nothing in the folder speaks of code that is not there."""
    source = original(name)
    told = convert(source, tmp_path / "out")
    state, before = load_file(told.folder / "model.safetensors"), load_file(source / "model.safetensors")
    scaled = [n for n in before if n.endswith("weight_scale")]
    assert scaled and all(torch.equal(state[n], before[n]) for n in scaled)
    assert all(torch.equal(state[n.removesuffix("_scale")], before[n.removesuffix("_scale")]) for n in scaled)
    assert not [f.name for f in told.folder.glob("*.json") if "auto_map" in f.read_text("utf-8")]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert_close(load_model(told.folder).eval()(ids).logits, load_model(source).eval()(ids).logits)


def test_dtypes(tmp_path: Path) -> None:
    source = save_model(make_tiny("llama").half(), None, tmp_path / "half")
    assert convert(source, tmp_path / "kept").dtype == "float16"
    told = convert(source, tmp_path / "brain", dtype="bfloat16")
    assert told.dtype == "bfloat16" and load_model(told.folder).dtype == torch.float32
    with pytest.raises(ModelError, match="dtype 'int3' is not known"):
        convert(source, tmp_path / "x", dtype="int3")


def test_nothing_stays_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = save_model(make_tiny("llama"), None, tmp_path / "m"), tmp_path / "out"
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        convert(source, target)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    monkeypatch.undo()
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(ModelError, match=r"the weights need 0\.0 GiB and the disk has 0\.0 GiB free"):
        convert(source, target)
    monkeypatch.undo()
    convert(source, target)
    with pytest.raises(ModelError, match="there is something already"):
        convert(source, target)


# -- llama2.c -----------------------------------------------------------------------------------------------------------


def test_stories_260k_tells_its_story(shared_data: Path, tmp_path: Path) -> None:
    """A real trained model: the text that llama2.c's own test expects, from danlu and from plain transformers."""
    folder = shared_data / "model-stories260k"
    target = tmp_path / "stories"
    assert run(["convert-model", str(folder / "stories260K.bin"), str(target)]) == 0
    assistant = danlu.load(target)
    tokenizer = assistant.tokenizer
    assert tokenizer is not None and tokenizer("Once")["input_ids"][0] == 1
    ids = tokenizer("")["input_ids"][:1]
    from danlu.generation.protocol import Request, generate

    done = generate(assistant.engine, [Request(ids, SamplingParams(max_new_tokens=90, temperature=0))])[0]
    assert tokenizer.decode(done.ids).strip().startswith(LILY)
    plain = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    found = plain.generate(torch.tensor([ids]), max_new_tokens=90, do_sample=False, eos_token_id=None)
    assert found[0, 1:].tolist() == list(done.ids)


def slow_bpe(path: Path, text: str) -> list[int]:
    """llama2.c's encoder, read off its rule: characters or bytes, then the best-scoring neighbours until none join."""
    content = path.read_bytes()
    at, pieces = 4, []
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        pieces.append((content[at + 8 : at + 8 + length], score))
        at += 8 + length
    ids = {piece: number for number, (piece, _) in reversed(list(enumerate(pieces)))}
    found: list[int] = []
    for character in " " + text:
        raw = character.encode()
        found += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        joins = [
            (-pieces[ids[pieces[a][0] + pieces[b][0]]][1], place)
            for place, (a, b) in enumerate(itertools.pairwise(found))
            if pieces[a][0] + pieces[b][0] in ids
        ]
        if not joins:
            return found
        _, place = min(joins)
        found[place : place + 2] = [ids[pieces[found[place]][0] + pieces[found[place + 1]][0]]]


@pytest.mark.parametrize("text", ["Once upon a time", "Lily  had\n a dog, 42!", "héllo 你好", "a", " lead"])
def test_tokens_of_llama2c(shared_data: Path, text: str) -> None:
    folder = shared_data / "model-stories260k"
    tokenizer: Any = stories.tokenizer(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == slow_bpe(folder / "tok512.bin", text)
    assert tokenizer.decode(ids) == text


def test_damaged_models_of_llama2c(shared_data: Path, tmp_path: Path) -> None:
    content = (shared_data / "model-stories260k" / "stories260K.bin").read_bytes()
    file = tmp_path / "m.bin"
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"cut short: 528,270 bytes of 1,056,540"):
        stories.load(file, torch.float32)
    file.write_bytes(struct.pack("<2i", stories.NEWER, 1) + content[8:])
    with pytest.raises(ModelError, match=r"version 1 of llama2\.c's format"):
        stories.load(file, torch.float32)
    file.write_bytes(struct.pack("<7i", 64, 172, 5, 7, 4, 512, 512) + content[28:])
    with pytest.raises(ModelError, match=r"no model of llama2\.c \(found dim 64, .*n_heads 7"):
        stories.load(file, torch.float32)


def test_a_head_of_its_own_and_other_sizes(tmp_path: Path) -> None:
    """A file written by the test from a LLaMA, rotary rows interleaved: an untied head, one key head for two queries."""
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=12, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    layers = model.model.layers

    def interleaved(weight: torch.Tensor) -> torch.Tensor:
        heads = [weight[h * 8 : (h + 1) * 8] for h in range(len(weight) // 8)]
        return torch.cat([torch.stack([head[i // 2 + 4 * (i % 2)] for i in range(8)]) for head in heads])

    parts = [model.model.embed_tokens.weight]
    parts += [x.input_layernorm.weight for x in layers]
    parts += [interleaved(x.self_attn.q_proj.weight) for x in layers]
    parts += [interleaved(x.self_attn.k_proj.weight) for x in layers]
    parts += [x.self_attn.v_proj.weight for x in layers] + [x.self_attn.o_proj.weight for x in layers]
    parts += [x.post_attention_layernorm.weight for x in layers]
    for name in ("gate_proj", "down_proj", "up_proj"):
        parts += [getattr(x.mlp, name).weight for x in layers]
    parts += [model.model.norm.weight, torch.zeros(12, 4), torch.zeros(12, 4), model.lm_head.weight]
    file = tmp_path / "own.bin"
    data = b"".join(p.detach().numpy().astype("<f4").tobytes() for p in parts)
    file.write_bytes(struct.pack("<7i", 16, 24, 2, 2, 1, -11, 12) + data)
    ids = torch.tensor([[1, 5, 9, 3, 3, 10]])
    with torch.no_grad():
        assert_close(stories.load(file, torch.float32).eval()(ids).logits, model(ids).logits, within=1e-5)
