"""GGUF: names, order of rows, types, rotary factors, vocabularies, Modelfiles; what llama.cpp itself says is in test_foreign.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import tiny as small
import torch
from families import make

from danlu.exceptions import ModelError
from danlu.models import gguf
from danlu.models.gguf_layout import context_of, llama3_factors, shape_of, weights_of
from danlu.models.gguf_vocab import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary_of
from danlu.models.modelfile import around, go_template, modelfile
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import train_tokenizer

NO_WINDOW = {"use_sliding_window": False}
TEXTS = ["the red door, the blue boat: 12 + 34 = 46", "你好，世界。今天天气很好。"] * 20


def written(folder: Path, model: Any, kind: gguf.GgufType = "f16") -> Any:
    tokenizer = small.tokenizer()
    path = folder / "m.gguf"
    stops = ChatTemplate(tokenizer).stop_ids
    gguf.write(path, model, vocabulary_of(tokenizer, model.config.vocab_size, stops), kind, name="m", chat_template="x")
    return library.GGUFReader(str(path))


def model_of(family: str, **options: Any) -> Any:
    return make(family, vocab_size=len(small.tokenizer()), **(NO_WINDOW if family == "qwen2" else {}), **options)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_is_the_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(family, tie_word_embeddings=tied)
    reader = written(tmp_path, model)
    names = {t.name for t in reader.tensors}
    assert ("output.weight" in names) is not tied
    back = gguf.read_back(tmp_path / "m.gguf", model)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        # Half precision has 11 bits: within 2^-11 of each value.
        assert torch.allclose(back[name], tensor, rtol=2**-11, atol=1e-6), name
    types = {t.name: t.tensor_type for t in reader.tensors}
    assert types["blk.0.attn_norm.weight"] == library.GGMLQuantizationType.F32
    assert types["token_embd.weight"] == library.GGMLQuantizationType.F16


def test_rows_of_queries_stand_in_pairs(tmp_path: Path) -> None:
    # Heads of width 8: transformers turns row i with row i + 4, llama.cpp row 2i with row 2i + 1.
    model = model_of("llama")
    weight = model.model.layers[0].self_attn.k_proj.weight.detach()
    found = next(w for w in weights_of(model) if w.name == "blk.0.attn_k.weight").read()
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(found[:8], weight[order]) and torch.equal(found[8:16], weight[[8 + i for i in order]])
    qwen = model_of("qwen2")
    same = next(w for w in weights_of(qwen) if w.name == "blk.0.attn_k.weight").read()
    assert torch.equal(same, qwen.model.layers[0].self_attn.k_proj.weight)


def test_types_by_hand(tmp_path: Path) -> None:
    # Q8_0: the scale is 127 / 127 = 1, so whole numbers come back as they are. Q4_0: scale -8 / -8 = 1 and the same.
    values = torch.arange(-8.0, 8.0).repeat(2)[None].clone()
    values[0, 0] = -127.0
    types = library.GGMLQuantizationType
    q8 = gguf.converted(values, types.Q8_0, "w")
    assert q8.nbytes == 34  # 32 bytes and a scale of two
    assert np.array_equal(library.quants.dequantize(q8, types.Q8_0), values.numpy())
    four = torch.arange(-8.0, 8.0).repeat(2)[None]
    q4 = gguf.converted(four, types.Q4_0, "w")
    assert q4.nbytes == 18
    assert np.array_equal(library.quants.dequantize(q4, types.Q4_0), four.numpy())


def test_quantised_types_and_bytes(tmp_path: Path) -> None:
    model = model_of("llama")
    types = {t.name: t.tensor_type.name for t in written(tmp_path, model, "q4_0").tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_0" and types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 48 are no multiple of 32
    planned = gguf.plan(model, "q4_0")
    found = sum(int(t.n_bytes) for t in library.GGUFReader(str(tmp_path / "m.gguf")).tensors)
    assert found == planned.bytes


@pytest.mark.parametrize("bad", [1e5, float("nan")])
def test_values_that_half_precision_lacks_are_refused(bad: float) -> None:
    with pytest.raises(ModelError, match=r"half precision ends at 65504|no numbers"):
        gguf.converted(torch.full((1, 32), bad), library.GGMLQuantizationType.F16, "w")


@pytest.mark.parametrize("family", ["bloom", "codegen", "gptj", "gemma", "glm", "opt"])
def test_other_families_are_refused_by_name(family: str) -> None:
    with pytest.raises(ModelError, match=rf"family '{family}' cannot be written as GGUF; Llama, Mistral, Qwen2"):
        gguf.plan(make(family), "f16")


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type 'dynamic'"),
        ("qwen3", {"attention_bias": True}, "no place for the weights .*o_proj.bias"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        gguf.plan(make(family, **options), "f16")


def test_shape_and_rope() -> None:
    linear = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    shape = shape_of(model_of("llama", rope_parameters=linear).config)
    assert shape["rope.freq_base"] == 5e5 and shape["rope.scaling.type"] == "linear"
    assert shape["rope.scaling.factor"] == 4.0 and shape["attention.head_count_kv"] == 2
    assert context_of(model_of("mistral").config) == 8  # its window: beyond it, llama.cpp would see more
    assert context_of(model_of("llama").config) == 64


def test_llama3_factors_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = model_of("llama", rope_parameters=rope | {"original_max_position_embeddings": 32}, head_dim=16).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    bare = torch.tensor([1e4 ** (-i / 16) for i in range(0, 16, 2)])
    found = llama3_factors(config)
    assert torch.allclose(bare / found, scaled, rtol=1e-5) and len(set(found.tolist())) > 2


# -- vocabularies ---------------------------------------------------------------------------------------------------------


def test_own_byte_level_tokenizer() -> None:
    tokenizer = small.tokenizer()
    found = vocabulary_of(tokenizer, len(tokenizer) + 2, frozenset({3}))
    assert (found.model, found.pre, found.add_bos) == ("gpt2", "smollm", False)
    assert found.types[:4] == [CONTROL] * 4 and found.types[-2:] == [UNUSED] * 2
    assert found.ids == {"bos": 0, "eos": 3, "pad": 1} and not found.notes
    assert found.tokens[4] == tokenizer.convert_ids_to_tokens(4)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    tokenizer = small.tokenizer()
    with pytest.raises(ModelError, match=f"the tokenizer has {len(tokenizer)} tokens and the model embeddings for 100"):
        vocabulary_of(tokenizer, 100, frozenset())


def test_own_sentencepiece_tokenizers() -> None:
    bpe = train_tokenizer(TEXTS, 420, model_type="sentencepiece-bpe")
    found = vocabulary_of(bpe, len(bpe), frozenset({bpe.eos_token_id}))
    assert (found.model, found.prefix) == ("llama", False) and not found.notes
    assert found.types[bpe.convert_tokens_to_ids("<0x41>")] == BYTE and found.types[bpe.unk_token_id] == UNKNOWN
    merges = bpe.backend_tokenizer.to_str()
    assert '"merges"' in merges
    scores = dict(zip(found.tokens, found.scores, strict=True))
    best = max(scores, key=lambda t: scores[t])
    assert len(best) == 2 and scores[best] == 0.0  # the first pair that is joined
    unigram = train_tokenizer(TEXTS, 420, model_type="sentencepiece")
    found = vocabulary_of(unigram, len(unigram), frozenset({unigram.eos_token_id}))
    assert found.model == "t5" and "as unknown" in found.notes[0]
    assert all(s <= 0 and math.isfinite(s) for s in found.scores)


def test_added_words_are_user_defined() -> None:
    tokenizer = small.tokenizer()
    tokenizer.add_tokens(["丹炉"])
    found = vocabulary_of(tokenizer, len(tokenizer), frozenset({3}))
    assert found.types[-1] == USER_DEFINED and found.tokens[-1] == "丹炉"


@pytest.mark.parametrize(
    ("pattern", "ignore", "name"),
    [
        (r"\p{N}", False, "qwen2"),
        (r"\p{N}{1,3}", True, "llama-bpe"),
        (r"\p{N}{1,3}", False, "dbrx"),
        (r"\p{N}+", False, None),
    ],
)
def test_published_pre_tokenizers(pattern: str, ignore: bool, name: str | None) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, [], ignore_merges=ignore))
    split = pre_tokenizers.Split(Regex(contractions + pattern + rest), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    if name is None:
        with pytest.raises(ModelError, match="no pre-tokenizer that cuts texts"):
            vocabulary_of(tokenizer, 3, frozenset())
    else:
        assert vocabulary_of(tokenizer, 3, frozenset()).pre == name


# -- Modelfiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama2", "vicuna", "plain", "qwen", "alpaca", "hh"])
def test_templates_are_translated(name: str) -> None:
    template = ChatTemplate(small.tokenizer(), name)
    found = around(template)
    assert found is not None
    talk: list[Any] = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b."},
        {"role": "user", "content": "c?"},
    ]
    assert found.render(talk) == template.render(talk, add_generation_prompt=True)
    assert "{{ range" in go_template(found)


def test_a_template_that_counts_rounds_is_not() -> None:
    text, note = modelfile("m.gguf", ChatTemplate(small.tokenizer(), "chatglm"), {"num_ctx": 64})
    assert "\nTEMPLATE" not in text and "Ollama gets none" in note and "FROM ./m.gguf" in text


def test_modelfile_is_exactly_this() -> None:
    text, note = modelfile(
        "m.gguf", ChatTemplate(small.tokenizer()), {"temperature": 0.7, "num_ctx": 192}, stop_texts=["<|im_end|>"]
    )
    assert note == "" and text.splitlines()[2:] == [
        "FROM ./m.gguf",
        'TEMPLATE """{{ if .System }}<|im_start|>system',
        "{{ .System }}<|im_end|>",
        "<|im_start|>user",
        "{{ else }}<|im_start|>user",
        '{{ end }}{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ .Content }}<|im_end|>',
        "<|im_start|>assistant",
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>',
        "<|im_start|>user",
        '{{ end }}{{ end }}"""',
        "PARAMETER temperature 0.7",
        "PARAMETER num_ctx 192",
        'PARAMETER stop "<|im_end|>"',
    ]


def test_braces_in_templates_stay_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '{{' ~ m.role ~ '}}' ~ m.content ~ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}"
    )
    found = around(ChatTemplate(tokenizer))
    assert found is not None
    text = go_template(found)
    assert '{{ "{{" }}user}}' in text  # Go prints a quoted string as it is
