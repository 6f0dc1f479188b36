"""Models from nothing for every objective and preset: weights are a function of shape and seed alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

STD = 0.02
# Projections back into the residual stream, divided by sqrt(2 * layers) (Radford et al. 2019).
BACK = (
    "dense.weight",
    "dense_4h_to_h.weight",
    "down.weight",
    "out_proj.weight",
    "fc2.weight",
    ".o.weight",
    ".wo.weight",
)


def draw(model: Any, layers: int, seed: int) -> Any:
    """Normal(0, 0.02) for matrices, ones for norms, zeros for biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, STD / (2 * layers) ** 0.5 if name.endswith(BACK) else STD, generator=generator)
    return model


def blank_glm(vocab: int, shape: Mapping[str, int], ids: Mapping[str, Any], seed: int) -> Any:
    """A GLM of a starter's width, depth, heads and context, without dropout.

    Args:
        ids: of special tokens, by the names of `BlankGlmConfig`.
    """
    from danlu.models.glm import BlankGlmConfig, BlankGlmForConditionalGeneration

    config = BlankGlmConfig(
        vocab_size=vocab,
        hidden_size=shape["hidden_size"],
        num_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        max_sequence_length=shape["context"],
        embedding_dropout_prob=0.0,
        attention_dropout_prob=0.0,
        output_dropout_prob=0.0,
        **ids,
    )
    return draw(BlankGlmForConditionalGeneration(config), shape["layers"], seed)


def unilm(vocab: int, shape: Mapping[str, int], ids: Mapping[str, Any], seed: int) -> Any:
    """A UniLM of a starter's width, depth, heads and context, without dropout."""
    from danlu.models.unilm import UniLmConfig, UniLmForMaskedLM

    config = UniLmConfig(
        vocab_size=vocab,
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        max_position_embeddings=shape["context"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **ids,
    )
    return draw(UniLmForMaskedLM(config), shape["layers"], seed)


def t5(vocab: int, shape: Mapping[str, int], ids: Mapping[str, Any], seed: int) -> Any:
    """A T5 v1.1 (gated GELU) with a starter's width, depth (of encoder and decoder) and heads, without dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=vocab,
        d_model=shape["hidden_size"],
        d_kv=shape["hidden_size"] // shape["heads"],
        d_ff=-(-shape["hidden_size"] * 8 // 3 // 32) * 32,
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        **ids,
    )
    return draw(T5ForConditionalGeneration(config), shape["layers"], seed)


def opt(vocab: int, size: Mapping[str, Any], ids: Mapping[str, Any], seed: int) -> Any:
    """An OPT of a preset's size (`presets.json`), without dropout."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=vocab,
        hidden_size=size["hidden_size"],
        word_embed_proj_dim=size["hidden_size"],
        ffn_dim=4 * size["hidden_size"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        max_position_embeddings=size["context"],
        dropout=0.0,
        attn_implementation="eager",
        **ids,
    )
    return draw(OPTForCausalLM(config), size["layers"], seed)
