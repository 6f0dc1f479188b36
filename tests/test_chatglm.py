"""ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B against what their original code computed and said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import chatglm
import pytest
import torch
from chatglm import FIRST, FLOAT, LATER, model, real_tokens, recorded, tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import danlu
from danlu.exceptions import ModelError
from danlu.models.chatglm import ChatGLMForConditionalGeneration
from danlu.models.chatglm_config import ChatGLM2Config, ChatGLMConfig
from danlu.models.chatglm_positions import Rules, hidden_keys, positions_of, positions_of_step
from danlu.models.chatglm_quantized import (
    ChatGlmQuantizedLinear,
    pack_nibbles,
    quantize_rows,
    unpack_nibbles,
)
from danlu.models.load import load_model, save_model
from danlu.models.quantize import load_quantized


def states(past: Any) -> Tensor:
    """A cache in the recorded layout `[layers, 2, S, B, heads, K]`."""
    return torch.stack([torch.stack([x.permute(2, 0, 1, 3) for x in (y.keys, y.values)]) for y in past.layers])


def recorded_cache(layers: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((pair[0], pair[1]) for pair in layers)


# -- forward ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST + LATER)
def test_logits_hidden_states_and_losses(name: str) -> None:
    found = recorded(name)
    net = model(name)
    assert len(found.cases) == (2 if "int" in name else 6 if name in FIRST else 5)
    for case, one in found.cases.items():
        with torch.no_grad():
            output = net(**one.given, output_hidden_states=True)
        real = real_tokens(one.given, net.config.pad_token_id)
        assert (output.logits - one.found["logits"])[real].abs().max() < 1e-4, case
        if "hidden_states" in one.found:
            hidden = torch.stack(output.hidden_states)
            assert (hidden - one.found["hidden_states"].transpose(1, 2))[:, real].abs().max() < 1e-4, case
        if "loss" in one.found:
            assert float(output.loss) == pytest.approx(float(one.found["loss"]), rel=1e-5), case


@pytest.mark.parametrize("name", FLOAT)
def test_gradients(name: str) -> None:
    found = recorded(name)
    net = load_model(found.folder).eval()
    norms = found.texts["grad_norm_and_sum"]
    assert norms
    for case, expected in norms.items():
        net.zero_grad()
        one = found.cases[case]
        net(**one.given).loss.backward()
        grads = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
        assert grads.keys() == expected.keys()  # with a prefix, of the prefix alone
        for key, (norm, total) in expected.items():
            assert float(grads[key].norm()) == pytest.approx(norm, rel=1e-4, abs=1e-5), key
            assert float(grads[key].sum()) == pytest.approx(total, rel=1e-3, abs=1e-3), key
        for key, grad in one.found.items():
            if key.startswith("grad."):
                assert (grads[key.removeprefix("grad.")] - grad).abs().max() < 1e-4, key


@pytest.mark.parametrize("name", FLOAT)
def test_cached_steps(name: str) -> None:
    tensors = recorded(name).tensors
    net = model(name)
    with torch.no_grad():
        output = net(input_ids=tensors["incremental.prompt_ids"])
        assert (output.logits - tensors["incremental.step0.logits"]).abs().max() < 1e-4
        assert (states(output.past_key_values) - tensors["incremental.step0.past_key_values"]).abs().max() < 1e-4
        past: Any = recorded_cache(tensors["incremental.step0.past_key_values"])  # the original's own layout
        for step in range(1, 5):
            given = {k: tensors[f"incremental.step{step}.{k}"] for k in ("input_ids", "position_ids")}
            output = net(**given, past_key_values=past)
            past = output.past_key_values
            assert (output.logits - tensors[f"incremental.step{step}.logits"]).abs().max() < 1e-4


def generations(name: str) -> list[str]:
    return [key.removesuffix(".output_ids") for key in recorded(name).tensors if key.endswith(".output_ids")]


@pytest.mark.parametrize("name", FLOAT)
@pytest.mark.parametrize("masks", ["recorded", "plain", "no cache"])
def test_greedy_and_beam_tokens(name: str, masks: str) -> None:
    tensors = recorded(name).tensors
    net = model(name)
    assert len(generations(name)) == (2 if "pos1d" in name else 5 if name in FIRST else 4)
    for case in generations(name):
        source = "greedy_batch" if case == "beam3_batch" else case
        ids, expected = tensors[f"{source}.input_ids"], tensors[f"{case}.output_ids"]
        given = {k: tensors[f"{source}.{k}"] for k in ("attention_mask", "position_ids") if f"{source}.{k}" in tensors}
        if masks == "plain":
            given = {"attention_mask": (ids != net.config.pad_token_id).long()}
        written = net.generate(
            ids,
            **given,
            max_new_tokens=expected.shape[1] - ids.shape[1],
            num_beams=3 if "beam" in case else 1,
            do_sample=False,
            use_cache=masks != "no cache",
        )
        assert torch.equal(written, expected), case


@pytest.mark.parametrize("name", ["chatglm_v1", "chatglm_v1_ptuning", "chatglm2", "chatglm2_ptuning"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(name: str, side: str) -> None:
    """A plain mask hides padding; a row gives the logits that it gives alone."""
    net = model(name)
    one = recorded(name).cases["single_gmask" if name in FIRST else "single"].given["input_ids"]
    short = one[:, -9:]
    row = torch.full_like(one, net.config.pad_token_id)
    place = slice(one.shape[1] - 9, None) if side == "left" else slice(0, 9)
    row[:, place] = short
    mask = torch.zeros_like(row)
    mask[:, place] = 1
    ids, masks = torch.cat([one, row]), torch.cat([torch.ones_like(one), mask])
    positions = {} if name in FIRST else {"position_ids": (masks.cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad():
        both = net(input_ids=ids, attention_mask=masks, **positions).logits
        assert (both[0] - net(input_ids=one).logits[0]).abs().max() < 1e-4
        assert (both[1, place] - net(input_ids=short).logits[0]).abs().max() < 1e-4


# -- positions of ChatGLM-6B --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatglm_v1", "chatglm_v1_pos1d"])
def test_derived_masks_and_positions(name: str) -> None:
    tensors, rules = recorded(name).tensors, Rules.of(model(name).config)
    for case in ("single_gmask", "single_mask"):
        ids = tensors[f"{case}.input_ids"]
        assert torch.equal(positions_of(rules, ids), tensors[f"{case}.derived_position_ids"])
        assert torch.equal(hidden_keys(rules, ids, None), tensors[f"{case}.derived_attention_mask"])
    for step in range(1, 5):
        text = torch.cat([tensors["incremental.prompt_ids"], torch.zeros(1, step, dtype=torch.int64)], dim=1)
        assert torch.equal(positions_of_step(rules, text, None, 1), tensors[f"incremental.step{step}.position_ids"])


@pytest.mark.parametrize("case", ["gmask", "mask"])
@pytest.mark.parametrize("dimensions", ["1d", "2d"])
def test_positions_of_the_first_revision(case: str, dimensions: str) -> None:
    tensors = recorded("chatglm_v1_legacy150k_positions").tensors
    config = ChatGLMConfig(
        vocab_size=150528, bos_token_id=150004, eos_token_id=150005, position_encoding_2d=dimensions == "2d"
    )
    assert config.first_revision and (config.mask_token_id, config.gmask_token_id) == (150000, 150001)
    rules, key = Rules.of(config), f"{case}.{dimensions}"
    ids = tensors[f"{key}.input_ids"]
    assert torch.equal(positions_of(rules, ids), tensors[f"{key}.position_ids"])
    assert torch.equal(hidden_keys(rules, ids, None), tensors[f"{key}.attention_mask"])
    text = torch.cat([ids, torch.zeros(1, 2, dtype=torch.int64)], dim=1)
    assert torch.equal(positions_of_step(rules, text, None, 1), tensors[f"{key}.step2.position_ids"])


def test_first_revision_prefers_the_other_mask() -> None:
    """[MASK] at 1 and [gMASK] at 3 of a context of 4: the later revision goes back to 3, the first to 1."""
    ids = torch.tensor([[9, 6, 9, 7, 8, 9]])  # mask 6, gmask 7, bos 8
    later, first = (positions_of(Rules(8, 6, 7, True, revision), ids)[0, 0].tolist() for revision in (False, True))
    assert later == [0, 1, 2, 3, 3, 3] and first == [0, 1, 2, 3, 1, 1]
    # [gMASK] alone: the first revision goes on counting.
    alone = torch.tensor([[9, 9, 9, 7, 8, 9]])
    assert positions_of(Rules(8, 6, 7, True, True), alone)[0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_text_without_bos_is_causal() -> None:
    rules, ids = Rules(8, 6, 7, True, False), torch.tensor([[9, 9, 9]])
    assert positions_of(rules, ids)[0].tolist() == [[0, 1, 2], [0, 0, 0]]
    hidden = hidden_keys(rules, ids, None)
    assert hidden is not None and hidden[0, 0].tolist() == [[False, True, True], [False, False, True], [False] * 3]


def test_a_cached_step_without_positions_is_refused() -> None:
    net, tensors = model("chatglm_v1"), recorded("chatglm_v1").tensors
    past = net(input_ids=tensors["incremental.prompt_ids"]).past_key_values
    with pytest.raises(ModelError, match="depend on the text before"):
        net(input_ids=tensors["incremental.step1.input_ids"], past_key_values=past)


# -- chat ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in FLOAT if "pos1d" not in n])
def test_recorded_chats(name: str) -> None:
    found, net, words = recorded(name), model(name), tokenizer(name)
    chat = found.texts["chat_greedy"]
    new = found.tensors["chat_greedy.output_ids"].shape[1] - found.tensors["chat_greedy.input_ids"].shape[1]
    history = json.loads(json.dumps(chat["history"]))
    response, after = net.chat(words, chat["query"], history, do_sample=False, max_new_tokens=new)
    assert response == chat.get("chat_method_response", chat["response"])
    assert history == chat["history"]  # the history given is not changed
    assert after == chat.get("history_out", [*history, (chat["query"], response)])
    streamed = list(net.stream_chat(words, chat["query"], history, do_sample=False, max_new_tokens=new))
    assert len(streamed) == new
    last, _ = streamed[-2 if name == "chatglm3" else -1]  # ChatGLM3's chat takes its last token for a stop
    assert last == response


def test_a_stream_goes_on_from_its_cache() -> None:
    net, words = model("chatglm2"), tokenizer("chatglm2")
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
    *_, (answer, history, past) = net.stream_chat(words, "你好", return_past_key_values=True, **greedy)
    *_, (_, _, later) = net.stream_chat(
        words, "再见", history, past_key_values=past, return_past_key_values=True, **greedy
    )
    # The last token of an answer is not in the cache, as in the original: the round follows what is.
    first = words.encode(words.build_prompt("你好"))
    second = net.build_stream_inputs(words, "再见", history)["input_ids"].shape[1]
    assert later.get_seq_length() == len(first) + 3 + second + 3
    assert answer == history[0][1]


def test_recorded_stream_continuation() -> None:
    case = recorded("chatglm2").texts["stream_continuation"]
    found = model("chatglm2").build_stream_inputs(
        tokenizer("chatglm2"), case["query"], [("a", "b")] * case["history_len"]
    )
    assert found["input_ids"].tolist() == [case["ids"]]


@pytest.mark.parametrize("name", ["chatglm_v1", "chatglm3"])
def test_recorded_answers_are_read(name: str) -> None:
    cases = recorded(name).texts["process_response"]
    assert cases
    for case in cases:
        if name == "chatglm_v1":
            assert model(name).process_response(case["in"]) == case["out"]
        else:
            found = model(name).process_response(case["output"], case["history_in"])
            assert found == (case["content"], case["history_out"])


def test_scores_that_are_no_numbers_say_one_token() -> None:
    from danlu.models.chatglm_chat import InvalidScores

    ids = torch.zeros(1, 1, dtype=torch.int64)
    assert InvalidScores()(ids, torch.full((1, 9), float("nan"))).tolist() == [[0, 0, 0, 0, 0, 5e4, 0, 0, 0]]
    fine = torch.ones(1, 9)
    assert InvalidScores()(ids, fine) is fine


# -- quantised ----------------------------------------------------------------------------------------------------------


def test_nibbles_by_hand() -> None:
    """3 is 0011 and -5 is 1011: 0x3B = 59; -8 is 1000 and 7 is 0111: 0x87 = -121."""
    packed = pack_nibbles(torch.tensor([[3, -5, -8, 7]], dtype=torch.int8))
    assert packed.tolist() == [[59, -121]]
    assert unpack_nibbles(packed).tolist() == [[3, -5, -8, 7]]


def test_rows_by_hand() -> None:
    """max 3.5 / 7 = 0.5: 3.5 -> 7, -1.2 -> -2.4 -> -2, 0.3 -> 0.6 -> 1, 0 -> 0. A row of zeros stays one."""
    values, scale = quantize_rows(torch.tensor([[3.5, -1.2, 0.3, 0.0], [0.0] * 4]), 4)
    assert unpack_nibbles(values).tolist() == [[7, -2, 1, 0], [0] * 4]
    assert scale.dtype == torch.float16 and scale.tolist() == [0.5, 0.0]


@pytest.mark.parametrize("name", [n for n in FIRST + LATER if "int" in n])
def test_packed_weights_stay_packed_and_mean_what_was_recorded(name: str, tmp_path: Path) -> None:
    found, net = recorded(name), load_model(recorded(name).folder, dtype=torch.bfloat16)
    bits = 8 if name.endswith("8") else 4
    layers = [m for m in net.modules() if isinstance(m, ChatGlmQuantizedLinear)]
    assert len(layers) == 4 * net.config.num_layers and net.quantized
    assert all(x.weight.dtype == torch.int8 and x.weight_scale.dtype == torch.float16 for x in layers)
    assert all(x.weight.shape[1] * 8 // bits == x.in_features for x in layers)
    key = next(k for k in found.tensors if k.startswith("dequantised."))
    layer = net.get_submodule(key.removeprefix("dequantised.").removesuffix(".weight"))
    assert torch.equal(layer.dequantized().float(), found.tensors[key])
    assert type(load_quantized(found.folder).get_submodule(key[12:-7])) is ChatGlmQuantizedLinear
    # A change of dtype keeps the scales, and saving keeps the layout.
    assert torch.equal(net.float().get_submodule(key[12:-7]).dequantized().float(), found.tensors[key])
    again = load_model(save_model(net, None, tmp_path / "again")).eval()
    for one in found.cases.values():
        with torch.no_grad():
            real = real_tokens(one.given, net.config.pad_token_id)
            expected = one.found["logits"][real]
            assert (
                again(**one.given).logits[real] - expected
            ).norm() < 0.1 * expected.norm()  # bf16 norms and embeddings


@pytest.mark.parametrize("name", ["chatglm_v1", "chatglm2"])
def test_published_folders_by_bits(name: str) -> None:
    """Whole weights are rounded while they are read, packed ones kept; other bits than a folder's are refused."""
    ids = torch.tensor([[9, 10, 11]])
    with torch.no_grad():
        exact = model(name)(input_ids=ids).logits
        rounded = danlu.load(recorded(name).folder, bits=8, dtype="float32").model
        assert type(rounded) is type(model(name))
        found = rounded(input_ids=ids).logits
        assert 0 < (found - exact).norm() / exact.norm() < 0.05
        for bits in (8, 4):
            folder = recorded(f"{name}_int{bits}").folder
            packed = danlu.load(folder, bits=bits, dtype="float32").model
            assert torch.equal(packed(input_ids=ids).logits, model(f"{name}_int{bits}")(input_ids=ids).logits)
            with pytest.raises(ModelError, match=f"holds {bits}-bit weights; quantising them again"):
                danlu.load(folder, bits=12 - bits)
            with pytest.raises(ModelError, match=f"holds {bits}-bit weights only"):
                danlu.load(folder, bits=16)


@pytest.mark.parametrize("name", ["chatglm_v1", "chatglm2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_is_the_sum_of_its_rows(name: str, bits: int) -> None:
    """The product is that of dequantised weights, and its gradient flows to the input."""
    net, plain = load_model(recorded(name).folder).eval(), model(name)
    assert net.quantize(bits) is net and net.config.quantization_bit == bits and net.quantize(bits) is net
    with pytest.raises(ModelError, match="bits already"):
        net.quantize(12 - bits)
    layer = next(m for m in net.modules() if isinstance(m, ChatGlmQuantizedLinear))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(x).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    bias = layer.bias if layer.bias is not None else 0
    (expected @ layer.dequantized().float().T + bias).square().sum().backward()
    assert torch.allclose(x.grad, expected.grad, atol=1e-4)
    ids = recorded(name).cases["single_gmask" if name in FIRST else "single"].given["input_ids"]
    with torch.no_grad():
        left, right = net(input_ids=ids).logits, plain(input_ids=ids).logits
    assert 0 < (left - right).norm() / right.norm() < (0.05 if bits == 8 else 0.8)


# -- folders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatglm_v1", "chatglm2_ptuning"])
def test_auto_classes_and_saving(name: str, tmp_path: Path) -> None:
    folder, net = recorded(name).folder, model(name)
    assert type(AutoConfig.from_pretrained(folder)) is (ChatGLMConfig if name in FIRST else ChatGLM2Config)
    saved = save_model(net, tokenizer(name), tmp_path / "saved")
    assert "auto_map" not in json.loads((saved / "config.json").read_text("utf-8"))
    ids = recorded(name).tensors["greedy_batch.input_ids"]
    with torch.no_grad():
        expected = net(input_ids=ids).logits
        # AutoModel was what the published cards said.
        for kind, place in ((AutoModel, folder), (AutoModelForCausalLM, folder), (AutoModelForCausalLM, saved)):
            loaded = kind.from_pretrained(place, trust_remote_code=False).eval()
            assert (loaded(input_ids=ids).logits - expected).abs().max() < 1e-4


def rewritten(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a folder whose config.json is changed; None takes a key away."""
    shutil.copytree(source, target)
    for file in target.iterdir():
        file.chmod(0o644)
    config = json.loads((target / "config.json").read_text("utf-8")) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return target


@pytest.mark.parametrize("name", ["chatglm_v1_ptuning", "chatglm2_ptuning"])
def test_a_saved_prefix_beside_the_weights_is_applied(name: str, tmp_path: Path) -> None:
    """Whether config.json speaks of it or not; a `.bin` of the original's names is read alike."""
    from safetensors.torch import load_file

    folder = rewritten(recorded(name).folder, tmp_path / "model", pre_seq_len=None, prefix_projection=None)
    file = folder / "prefix_encoder.safetensors"
    torch.save(load_file(file), folder / "prefix_encoder.bin")
    file.unlink()
    net = load_model(folder).eval()
    assert net.config.pre_seq_len == 6
    one = recorded(name).cases["single_gmask" if name in FIRST else "single"]
    with torch.no_grad():
        assert (net(**one.given).logits - one.found["logits"]).abs().max() < 1e-4
    (folder / "prefix_encoder.bin").unlink()
    without = rewritten(folder, tmp_path / "without", pre_seq_len=6)
    with pytest.raises(ModelError, match=r"missing from the weights.*prefix_encoder"):
        load_model(without)


@pytest.mark.parametrize("name", ["chatglm_v1", "chatglm2"])
def test_a_projected_prefix_by_hand(name: str) -> None:
    """Keys and values of layer 1 are slots 2 and 3 of what table, tanh and two products make."""
    config = AutoConfig.from_pretrained(recorded(name).folder, pre_seq_len=3, prefix_projection=True)
    net = type(model(name))(config).eval()
    encoder = net.transformer.prefix_encoder
    groups, width = (config.num_attention_heads, 16) if name in FIRST else (config.multi_query_group_num, 16)
    total = 2 * config.num_layers * groups * width
    assert encoder.embedding.weight.shape == (3, 64 if name in FIRST else total)
    assert [tuple(p.shape) for n, p in encoder.named_parameters() if n.endswith("weight")][1:] == [
        (64, encoder.embedding.embedding_dim),
        (total, 64),
    ]
    rows = torch.tanh(encoder.embedding.weight @ encoder.trans[0].weight.T + encoder.trans[0].bias)
    rows = rows @ encoder.trans[2].weight.T + encoder.trans[2].bias
    past = net(input_ids=torch.tensor([[5, 6]])).past_key_values.layers[1]
    slots = rows.view(3, 2 * config.num_layers, groups, width)
    assert torch.allclose(past.keys[0, :, :3], slots[:, 2].transpose(0, 1), atol=1e-6)
    assert torch.allclose(past.values[0, :, :3], slots[:, 3].transpose(0, 1), atol=1e-6)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {
        f"transformer.prefix_encoder.{n}" for n, _ in encoder.named_parameters()
    }


def test_fp16_shards_of_bin_load(tmp_path: Path) -> None:
    folder = rewritten(recorded("chatglm_v1").folder, tmp_path / "model", torch_dtype="float16")
    state = {k: v.half() for k, v in model("chatglm_v1").state_dict().items()}
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    parts = [dict(list(state.items())[n::2]) for n in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    net = load_model(folder)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(torch.equal(p, state[k].float()) for k, p in net.state_dict().items())
    half = load_model(folder, dtype=torch.bfloat16).eval()
    one = recorded("chatglm_v1").cases["batch_leftpad"]
    with torch.no_grad():
        found = half(**{k: v for k, v in one.given.items() if k != "labels"}).logits
    real = real_tokens(one.given, 3)
    assert (found.float() - one.found["logits"])[real].norm() < 0.05 * one.found["logits"][real].norm()


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("chatglm_v1", {"quantization_embeddings": True}, "quantised embeddings"),
        ("chatglm_v1", {"num_attention_heads": 64}, "no width that rotary positions"),
        ("chatglm_v1", {"quantization_bit": 3}, "expected 8 or 4"),
        ("chatglm_v1", {"num_layers": 4}, "missing from the weights"),
        ("chatglm2", {"multi_query_group_num": 3}, "do not share 3 keys evenly"),
        ("chatglm2", {"kv_channels": 6}, "half of it is rotated"),
        ("chatglm2", {"ffn_hidden_size": 16}, "config.json asks for"),
    ],
)
def test_folders_that_do_not_fit(source: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = rewritten(recorded(source).folder, tmp_path / "model", **changes)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_configuration_keys_decide() -> None:
    from danlu.models.registry import family_of

    found = [family_of(json.loads((recorded(n).folder / "config.json").read_text("utf-8"))) for n in FIRST + LATER]
    assert [f.name if f else None for f in found] == ["ChatGLM-6B"] * 5 + ["ChatGLM2-6B and ChatGLM3-6B"] * 5
    assert family_of({"model_type": "llama"}) is None
    assert isinstance(model("chatglm_v1"), ChatGLMForConditionalGeneration)
    # Saving leaves defaults out, but never what tells the generations apart.
    for kind in (ChatGLMConfig, ChatGLM2Config):
        assert type(ChatGLMConfig.from_dict(json.loads(kind().to_json_string()))) is kind
    assert chatglm.model("chatglm2").config.vocab_size == 672
