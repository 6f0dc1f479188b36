"""How llama.cpp names and lays out the weights of Llama-, Qwen- and GPT-2-like models, and what it must be told of their shape.

Names and keys are those of the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from danlu.exceptions import ModelError

Value = bool | int | float | str
# model_type of transformers -> architecture of llama.cpp
ARCHITECTURES: Final = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
POSSIBLE: Final = "Llama, Mistral, Qwen2, Qwen3 and GPT-2"
_GATED: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GATED_ENDS: Final = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_GPT2: Final = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_GPT2_ENDS: Final = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
_LAYER: Final = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)\.(weight|bias)")
# Which biases each architecture has a place for; llama.cpp would not read others.
_BIASES: Final = {
    "llama": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    "qwen2": ("attn_q", "attn_k", "attn_v"),
    "qwen3": ("attn_q", "attn_k", "attn_v"),
    "gpt2": ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"),
}


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the file.

    Attributes:
        name, shape: in the file.
        exact: it must stay in full precision.
        read: its values.
        source: its name in transformers, "" where there is none. `restore` turns the file's values into those of transformers.
    """

    name: str
    shape: tuple[int, ...]
    exact: bool
    read: Callable[[], Tensor]
    source: str = ""
    restore: Callable[[Tensor], Tensor] = lambda values: values


def architecture_of(config: Any) -> str:
    """The architecture of llama.cpp that computes what this model computes.

    Raises:
        ModelError: there is none among those that danlu writes, or the model has something that it does not know.
    """
    kind = str(getattr(config, "model_type", ""))
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"models of the family '{kind}' cannot be written as GGUF; {POSSIBLE} can",
            hint="danlu export --format hf writes a folder for transformers",
        )
    if kind == "gpt2":
        _refuse_unless(config, "activation_function", ("gelu_new", "gelu_pytorch_tanh"))
        for field, wanted in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
            _refuse_unless(config, field, (wanted,))
        return "gpt2"
    _refuse_unless(config, "hidden_act", ("silu", "swish"))
    rope = config.rope_parameters or {}
    known = ("default", "linear", "llama3", "yarn")
    if rope.get("rope_type", "default") not in known:
        raise ModelError(
            f"rotary positions of type '{rope['rope_type']}' cannot be written as GGUF; {', '.join(known)} can",
            hint="danlu export --format hf writes a folder for transformers",
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f"GGUF's '{kind}' turns whole heads; found partial_rotary_factor {rope['partial_rotary_factor']}"
        )
    if kind == "qwen2" and config.num_attention_heads * _head_dim(config) != config.hidden_size:
        raise ModelError("GGUF's 'qwen2' wants heads that together are as wide as the model")
    return ARCHITECTURES[kind]


def _refuse_unless(config: Any, field: str, known: tuple[Any, ...]) -> None:
    found = getattr(config, field, known[0])
    if found not in known:
        expected = " or ".join(repr(k) for k in known)
        raise ModelError(f"{field} is {found!r}; GGUF's {config.model_type} models have {expected}")


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_of(config: Any) -> int:
    """The length up to which llama.cpp computes the same: a sliding window, which these architectures lack there, limits it."""
    if config.model_type == "gpt2":
        return int(config.n_positions)
    length = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", True)
    return min(length, int(window)) if window and uses else length


def shape_of(config: Any) -> dict[str, Value]:
    """Keys of the file that say what the model looks like, without the architecture's prefix."""
    if config.model_type == "gpt2":
        return {
            "context_length": context_of(config),
            "embedding_length": config.n_embd,
            "feed_forward_length": config.n_inner or 4 * config.n_embd,
            "block_count": config.n_layer,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        }
    rope = config.rope_parameters or {}
    found: dict[str, Value] = {
        "context_length": context_of(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads or config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
        "rope.dimension_count": _head_dim(config),
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": config.vocab_size,
    }
    if rope.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": str(rope["rope_type"]), "rope.scaling.factor": float(rope["factor"])}
    if rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        found["rope.scaling.original_context_length"] = int(original)
    return found


def weights_of(model: Any) -> Iterator[Weight]:
    """The model's tensors as llama.cpp wants them.

    Raises:
        ModelError: a tensor has no place in the architecture.
    """
    config = model.config
    architecture = architecture_of(config)
    ends, middle = (_GPT2_ENDS, _GPT2) if architecture == "gpt2" else (_GATED_ENDS, _GATED)
    state: dict[str, Tensor] = model.state_dict()
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    for name, tensor in state.items():
        if tied and name == "lm_head.weight":
            continue  # llama.cpp takes the embeddings where there is no head
        yield _weight(_target(name, architecture, ends, middle), name, tensor, config)
    if architecture != "gpt2" and (config.rope_parameters or {}).get("rope_type") == "llama3":
        factors = llama3_factors(config)
        yield Weight("rope_freqs.weight", tuple(factors.shape), True, lambda: factors)


def _target(name: str, architecture: str, ends: Mapping[str, str], middle: Mapping[str, str]) -> str:
    found = _LAYER.fullmatch(name)
    if found is not None and found[2] in middle:
        part, suffix, place = middle[found[2]], found[3], f"blk.{found[1]}."
    else:
        stem, _, suffix = name.rpartition(".")
        part, place = ends.get(stem, ""), ""
    if not part or (suffix == "bias" and part not in _BIASES[architecture]):
        raise ModelError(f"GGUF's architecture '{architecture}' has no place for the weights '{name}'")
    return f"{place}{part}.{suffix}"


def _weight(name: str, source: str, tensor: Tensor, config: Any) -> Weight:
    part, architecture = name.split(".")[-2], ARCHITECTURES[config.model_type]
    values = tensor.detach()
    exact = tensor.dim() < 2 or part == "position_embd"
    if architecture == "gpt2" and tensor.dim() == 2 and name.startswith("blk."):  # Conv1D is [in, out]
        return Weight(name, (tensor.shape[1], tensor.shape[0]), exact, lambda: values.T, source, lambda found: found.T)
    shape = tuple(tensor.shape)
    if architecture == "llama" and part in ("attn_q", "attn_k"):
        heads = int(config.num_attention_heads if part == "attn_q" else config.num_key_value_heads)
        pairs = tensor.shape[0] // heads // 2
        return Weight(
            name,
            shape,
            exact,
            lambda: _halves_to(values, heads, 2, pairs),
            source,
            lambda found: _halves_to(found, heads, pairs, 2),
        )
    return Weight(name, shape, exact, lambda: values, source)


def _halves_to(weight: Tensor, heads: int, outer: int, inner: int) -> Tensor:
    """Rows `[heads * K, in]` (or a bias `[heads * K]`) in another order within each head: K = outer * inner, turned over.

    llama.cpp's 'llama' rotates neighbouring rows of queries and keys, transformers the two halves of a head. With
    (outer, inner) = (2, K / 2) transformers' order becomes llama.cpp's, with (K / 2, 2) the other way round.
    """
    rest = weight.shape[1:]
    return weight.reshape(heads, outer, inner, *rest).transpose(1, 2).reshape(weight.shape)


def llama3_factors(config: Any) -> Tensor:
    """What Llama 3 divides its rotary frequencies by `[K / 2]` (Llama 3.1 model card; transformers' rope type 'llama3').

    Waves longer than `original / low_freq_factor` positions are slowed by `factor`, those shorter than
    `original / high_freq_factor` are kept, and between the two the frequencies are interpolated.
    """
    rope = config.rope_parameters
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    width = _head_dim(config)
    found = []
    for at in range(0, width, 2):
        wave = 2 * math.pi * float(rope["rope_theta"]) ** (at / width)
        if wave < original / high:
            found.append(1.0)
        elif wave > original / low:
            found.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found, dtype=torch.float32)
