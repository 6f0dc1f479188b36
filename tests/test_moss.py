"""MOSS against its own code: every recorded case, the quantised layout, and what a user does with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import assert_close, assert_gradient, recorded
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CodeGenForCausalLM

import danlu
from danlu.exceptions import ModelError
from danlu.models.load import load_model, save_model
from danlu.models.moss import codegen_config
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.text.tokenizer import load_tokenizer
from danlu.training.step import language_loss
from danlu.tree import TreeBatch, conversation, forest


@pytest.fixture(scope="module")
def moss() -> Any:
    return recorded("moss")


@pytest.fixture(scope="module")
def model(moss: Any) -> Any:
    return load_model(moss.folder).eval()


def test_it_is_a_plain_codegen(model: Any) -> None:
    assert type(model) is CodeGenForCausalLM and model.config.model_type == "codegen"
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()


@pytest.mark.parametrize("case", ["single", "batch_rightpad", "batch_leftpad", "batch_leftpad_defaultpos"])
def test_logits_and_hidden_states(moss: Any, model: Any, case: str) -> None:
    names = ("input_ids", "attention_mask", "position_ids")
    given = {name: moss[f"{case}.{name}"] for name in names if f"{case}.{name}" in moss.tensors}
    with torch.no_grad():
        found = model(**given, output_hidden_states=True)
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    assert_close(found.logits, moss[f"{case}.logits"], real)
    for layer, hidden in enumerate(found.hidden_states):
        assert_close(hidden, moss[f"{case}.hidden_states"][layer], real)


@pytest.mark.parametrize("case", ["single", "batch_rightpad"])
def test_loss_and_gradients(moss: Any, model: Any, case: str) -> None:
    mask = moss.tensors.get(f"{case}.attention_mask")
    model.zero_grad()
    loss = model(
        input_ids=moss[f"{case}.input_ids"], attention_mask=mask, labels=moss[f"{case}.labels"], use_cache=False
    ).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(moss[f"{case}.loss"]), rel=1e-5)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    facts = moss.facts["grad_norm_and_sum"][case]
    assert facts.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_gradient(gradient, facts[name], name)
        if f"{case}.grad.{name}" in moss.tensors:
            assert_close(gradient, moss[f"{case}.grad.{name}"])


def test_cached_steps(moss: Any, model: Any) -> None:
    with torch.no_grad():
        found = model(input_ids=moss["incremental.prompt_ids"], use_cache=True)
        assert_close(found.logits, moss["incremental.step0.logits"])
        for layer, cached in zip(moss["incremental.step0.past_key_values"], found.past_key_values.layers, strict=True):
            assert_close(torch.stack([cached.keys, cached.values]), layer)
        for step in range(1, 5):
            ids = moss[f"incremental.step{step}.input_ids"]
            found = model(input_ids=ids, past_key_values=found.past_key_values, use_cache=True)
            assert_close(found.logits, moss[f"incremental.step{step}.logits"])


@pytest.mark.parametrize("case", ["greedy", "greedy_batch", "greedy_batch_rp102", "chat_greedy"])
def test_greedy_tokens(moss: Any, model: Any, case: str) -> None:
    """The same tokens by transformers' `generate` and by danlu's engine."""
    source = case.removesuffix("_rp102")
    ids, expected = moss[f"{source}.input_ids"], moss[f"{case}.output_ids"]
    mask = moss.tensors.get(f"{source}.attention_mask", torch.ones_like(ids))
    penalty = 1.02 if case.endswith("rp102") else 1.0
    new = expected.shape[1] - ids.shape[1]
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=503,
        repetition_penalty=penalty,
    )
    assert found.tolist() == expected.tolist()

    from danlu.generation.engine import LocalEngine
    from danlu.generation.protocol import Request, SamplingParams, generate

    params = SamplingParams(max_new_tokens=new, temperature=0, repetition_penalty=penalty)
    # The original counts the padding of a row among what must not be repeated; it is token 503, which no row repeats here.
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    answers = generate(LocalEngine(load_model(moss.folder)), [Request(p, params) for p in prompts])
    assert [list(a.ids) for a in answers] == expected[:, ids.shape[1] :].tolist()


def test_tokenizer(moss: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(moss.folder)
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, load_tokenizer(tmp_path)):
        for case in moss.facts["tokenizer"]:
            ids = one(case["text"], add_special_tokens=False)["input_ids"]
            assert ids == case["ids"]
            assert one.decode(ids) == case["decoded"]
            assert one.decode(ids, skip_special_tokens=True) == case["decoded_skip"]
    for token, number in moss.facts["special_ids"].items():
        assert tokenizer.convert_tokens_to_ids(token) == number


def test_prompts_of_the_chat_are_the_recorded_ones(moss: Any) -> None:
    assistant = danlu.load(moss.folder)
    assert assistant.template is not None and assistant.template.name == "moss"
    meta, rest = moss.facts["prompts"][0]["prompt"].split("<|Human|>: ")
    first = {"role": "user", "content": rest.split("<eoh>")[0]}
    system = {"role": "system", "content": meta}
    found = assistant.template.encode_prompt([system, first])
    assert found == moss.facts["prompts"][0]["ids"]
    turns = [system, first, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "推荐五部电影"}]
    assert assistant.template.encode_prompt(turns) == moss.facts["prompts"][1]["ids"]
    plugins, _, asked = moss.facts["prompts"][2]["prompt"].partition("<|Human|>: ")
    thinking = [{"role": "system", "content": plugins}, {"role": "user", "content": asked.split("<eoh>")[0]}]
    assert assistant.template.encode_prompt(thinking) == moss.facts["prompts"][2]["ids"]
    # What greedy decoding says of the first prompt, up to the token that stops it.
    greedy = danlu.generation.protocol.SamplingParams(max_new_tokens=10, temperature=0)
    reply = assistant.generate([[system, first]], greedy)[0]
    expected = moss["chat_greedy.output_ids"][0, len(found) :].tolist()
    assert list(reply.ids) == expected[: len(reply.ids)]


def test_a_2023_user_chats(moss: Any) -> None:
    assistant = danlu.load(moss.folder)
    assistant.defaults = danlu.generation.protocol.SamplingParams(max_new_tokens=6, temperature=0)
    response, history = assistant.chat("你好", history=[])
    assert history == [("你好", response)]
    *_, (streamed, again) = assistant.stream_chat("Hi", history=history)
    assert again == [("你好", response), ("Hi", streamed)]


def test_the_loss_of_the_recorded_sample(moss: Any, model: Any) -> None:
    """By transformers, and through a token tree with the recorded labels as weights."""
    ids, labels = moss["sft_sample.input_ids"], moss["sft_sample.labels"]
    with torch.no_grad():
        found = model(input_ids=ids, labels=labels)
    assert_close(found.logits, moss["sft_sample.logits"])
    expected = float(moss["sft_sample.loss"])
    assert float(found.loss) == pytest.approx(expected, rel=1e-5)
    weights = (labels[0] != -100).float()
    weights[0] = 0.0
    root = RootModel(SeparateModels({"policy": load_model(moss.folder)}, ["policy"])).eval()
    tree = TreeBatch.of(forest([conversation(ids[0].tolist(), weights.tolist())]))
    loss, _ = root(tree, "policy", lambda out: language_loss(out, float(weights.sum())))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


# -- other sizes, other files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [8, 16])
def test_other_sizes(tmp_path: Path, heads: int) -> None:
    """Several heads in each of the four partitions; saved as CodeGen, loaded as MOSS."""
    config = {"model_type": "moss", "n_embd": 64, "n_head": heads, "n_layer": 1, "n_ctx": 32, "n_positions": 32}
    config |= {"rotary_dim": 2, "vocab_size": 40, "n_inner": 24, "bos_token_id": 0, "eos_token_id": 1}
    plain = CodeGenForCausalLM(codegen_config(config)).eval()
    save_model(plain, None, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config), "utf-8")
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert load_model(tmp_path / "m").eval()(ids).logits.equal(plain(ids).logits)


def test_heads_that_no_partition_can_hold_are_refused() -> None:
    with pytest.raises(ModelError, match="n_head is 6 and n_embd 48; MOSS's fused projection has 4 partitions"):
        codegen_config({"model_type": "moss", "n_head": 6, "n_embd": 48})


def pack(weight_OI: Tensor, bits: int, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """A layer in GPTQ's layout, one number after the other; and the weight that it stands for."""
    outputs, inputs = weight_OI.shape
    levels, per = 1 << bits, 32 // bits
    qweight = torch.zeros(inputs // per, outputs, dtype=torch.int64)
    qzeros = torch.zeros(inputs // group, outputs // per, dtype=torch.int64)
    scales = torch.zeros(inputs // group, outputs)
    exact = torch.zeros_like(weight_OI)
    for o in range(outputs):
        for g in range(inputs // group):
            part = weight_OI[o, g * group : (g + 1) * group]
            scale = float((part.max() - part.min()) / (levels - 1)) or 1.0
            scale = float(torch.tensor(scale).half())
            zero = min(max(round(float(-part.min()) / scale), 1), levels)  # stored minus 1
            scales[g, o] = scale
            qzeros[g, o // per] |= (zero - 1) << (bits * (o % per))
            for k in range(group):
                i = g * group + k
                q = min(max(round(float(weight_OI[o, i]) / scale) + zero, 0), levels - 1)
                qweight[i // per, o] |= q << (bits * (i % per))
                exact[o, i] = (q - zero) * scale
    named = {
        "qweight": _signed(qweight),
        "qzeros": _signed(qzeros),
        "scales": scales.half(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // group,
    }
    return named, exact


def _signed(values: Tensor) -> Tensor:
    return torch.where(values >= 1 << 31, values - (1 << 32), values).to(torch.int32)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_releases(moss: Any, tmp_path: Path, bits: int) -> None:
    """Packed by a slow packer of the test's own; the head is left alone, as in the published files."""
    state = load_file(moss.folder / "model.safetensors")
    exact = dict(state)
    packed = {}
    for name, tensor in state.items():
        if ".attn." in name and name.endswith("_proj.weight"):
            parts, exact[name] = pack(tensor, bits, 32)
            layer = name.removesuffix(".weight")
            packed |= {f"{layer}.{part}": t for part, t in parts.items()}
            packed[f"{layer}.bias"] = torch.zeros(len(tensor), dtype=torch.float16)  # which the packer adds
        else:
            packed[name] = tensor
    for folder, weights, more in (
        (tmp_path / "q", packed, {"wbits": bits, "groupsize": 32}),
        (tmp_path / "e", exact, {}),
    ):
        folder.mkdir()
        save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors")
        config = json.loads((moss.folder / "config.json").read_text("utf-8")) | more
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    ids = moss["single.input_ids"]
    with torch.no_grad():
        found, expected = (load_model(tmp_path / f).eval()(ids).logits for f in ("q", "e"))
    assert_close(found, expected)
    assert (expected - moss["single.logits"]).abs().max() > 1e-4  # the packing has changed something


def test_sharded_fp16_pickles_with_original_names(moss: Any, tmp_path: Path) -> None:
    folder = tmp_path / "moss"
    shutil.copytree(moss.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    state = {
        n: t.half() if t.is_floating_point() else t for n, t in load_file(moss.folder / "model.safetensors").items()
    }
    names = sorted(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:20], "pytorch_model-00002-of-00002.bin": names[20:]}
    for file, part in parts.items():
        torch.save({n: state[n] for n in part}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")
    model = load_model(folder).eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        found = model(moss["single.input_ids"]).logits
    assert (found - moss["single.logits"]).abs().max() < 0.05
    assert found.argmax(-1).equal(moss["single.logits"].argmax(-1))


def test_a_reward_model_of_it(moss: Any, tmp_path: Path) -> None:
    """transformers has no CodeGen with a scalar head; danlu makes one, which is saved and found again."""
    model = load_model(moss.folder, scalar=True).eval()
    assert not model.score.weight.any()
    torch.nn.init.normal_(model.score.weight)
    ids = moss["single.input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        hidden = moss["single.hidden_states"][-1][0, -1]
        assert float(expected) == pytest.approx(float(hidden @ model.score.weight[0]), abs=1e-3)
        model.config.pad_token_id = 503
        save_model(model, None, tmp_path / "rm")
        assert_close(load_model(tmp_path / "rm", scalar=True).eval()(ids).logits, expected)
