"""CPM-1, mapped onto transformers' GPT-2; and the family entry of CPM-1 and CPM-2 (`models/cpm2.py`).

CPM-1 is Megatron's GPT-2: LayerNorm first, learned positions, tanh GELU, and a fused projection of three blocks
(Zhang et al. 2020, CPM: A Large-scale Generative Chinese Pre-trained Language Model).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from danlu.exceptions import ModelError
from danlu.models import cpm2
from danlu.models.megatron import columns, joined, renamed, replicated, rows, whole_state
from danlu.models.registry import Family
from danlu.models.scalar import scalar_class
from danlu.models.weights import build
from danlu.text.cpm_tokenizers import cpm_tokenizer

EOD: Final = 7
KEYS: Final = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
NAMES: Final = {
    "word_embeddings": "transformer.wte",
    "position_embeddings": "transformer.wpe",
    "transformer.final_layernorm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "attention.query_key_value": "attn.c_attn",
    "attention.dense": "attn.c_proj",
    "mlp.dense_h_to_4h": "mlp.c_fc",
    "mlp.dense_4h_to_h": "mlp.c_proj",
}
# How Megatron's ranks share a tensor, by the end of its name; the rest each of them holds whole.
SPLITS: Final = (
    ("word_embeddings.weight", rows(1)),
    ("query_key_value.weight", rows(3)),
    ("query_key_value.bias", rows(3)),
    ("dense_h_to_4h.weight", rows(1)),
    ("dense_h_to_4h.bias", rows(1)),
    ("attention.dense.weight", columns),
    ("dense_4h_to_h.weight", columns),
    ("", replicated),
)


def says(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of CPM-1; one without a model_type is told by its keys."""
    kind = config.get("model_type")
    own = "max_sequence_length" in config and "layernorm_epsilon" in config and all(k in config for k in KEYS)
    return kind in ("cpm1", "cpm") or (not kind and own)


def gpt2_config(config: Mapping[str, Any]) -> Any:
    """The GPT-2 configuration of a CPM-1 config.json, which repeats the original's command line.

    Raises:
        ModelError: a size is missing.
    """
    from transformers import GPT2Config

    missing = [name for name in KEYS if name not in config]
    if missing:
        raise ModelError(
            f"CPM-1's config.json has no {', '.join(missing)}",
            field=missing[0],
            hint="the published model has num_layers 32, hidden_size 2560, num_attention_heads 32, vocab_size 30000",
        )
    end = config.get("eod_token_id", EOD)
    return GPT2Config(
        vocab_size=config["vocab_size"],
        n_positions=config.get("max_sequence_length", config.get("max_position_embeddings", 1024)),
        n_embd=config["hidden_size"],
        n_layer=config["num_layers"],
        n_head=config["num_attention_heads"],
        embd_pdrop=config.get("embedding_dropout_prob", 0.1),
        attn_pdrop=0.0,  # token trees know no dropout of attention; that of embeddings and outputs stays
        resid_pdrop=config.get("output_dropout_prob", 0.1),
        layer_norm_epsilon=config.get("layernorm_epsilon", 1e-5),
        activation_function="gelu_new",
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=config.get("pad_token_id", 5),
        tie_word_embeddings=True,
    )


def gpt2_state(shards: Sequence[Mapping[str, Tensor]], vocabulary: int) -> dict[str, Tensor]:
    """CPM-1's weights under GPT-2's names; GPT-2 keeps its matrices transposed.

    Args:
        shards: one, or one a rank of Megatron's model parallelism.
        vocabulary: rows of the embedding; what Megatron pads it with is cut off.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in joined(shards, SPLITS).items():
        new = renamed(name.replace("transformer.layers.", "transformer.h."), NAMES)
        matrix = tensor.dim() == 2 and ".h." in new
        state[new] = tensor.T.contiguous() if matrix else tensor
    table = state.get("transformer.wte.weight")
    if table is not None:
        state["transformer.wte.weight"] = table[:vocabulary]
    return state


def load(folder: Path, dtype: torch.dtype, scalar: bool) -> Any:
    """A GPT-2 model with the weights of a CPM-1 folder. Its `forward` also takes what the original's took.

    Raises:
        ModelError: weights are missing, or do not fit the configuration.
    """
    from transformers import GPT2LMHeadModel

    raw = json.loads((folder / "config.json").read_text("utf-8"))
    if cpm2.says(raw):
        return cpm2.load(folder, dtype, scalar)
    config = gpt2_config(raw)
    state = gpt2_state(whole_state(folder), config.vocab_size)
    kind: Any = GPT2LMHeadModel
    if scalar:
        config.num_labels = 1
        kind = scalar_class(config)
        state["score.weight"] = torch.zeros(1, config.n_embd)
    model = build(kind, config, state, dtype, folder)
    model.register_forward_pre_hook(_as_the_original, with_kwargs=True)
    return model


def _as_the_original(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The original is called with ids, positions and a mask `[b or 1, 1, q, k]` with 1 where a token is seen."""
    if len(args) > 1 and isinstance(args[1], Tensor):
        kwargs |= dict(zip(("position_ids", "attention_mask"), args[1:], strict=False))
        args = args[:1]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 4:
        tokens = args[0] if args else kwargs.get("input_ids")
        batch = len(tokens) if tokens is not None else len(mask)
        kwargs["attention_mask"] = additive(mask, next(module.parameters()).dtype).expand(batch, -1, -1, -1)
    return args, kwargs


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores for a mask of zeros and ones; a mask that is added already stays as it is."""
    if mask.dtype == torch.bool or float(mask.min()) >= 0.0:
        return (1.0 - mask.to(dtype)) * torch.finfo(dtype).min
    return mask.to(dtype)


def _either(config: Mapping[str, Any]) -> bool:
    return says(config) or cpm2.says(config)


FAMILY = Family("CPM-1 and CPM-2", _either, load, cpm_tokenizer)
