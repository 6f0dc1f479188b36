"""Small models with fresh weights, of a family's shape: what a recipe pre-trains when no model is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from danlu.exceptions import ModelError
from danlu.text.tokenizer import quiet

# Products that lead back into the residual stream, by the ends of their names in all families.
BACK = ("o_proj", "down_proj", "c_proj", "out_proj", "fc_out", "fc2", ".dense", "dense_4h_to_h", ".down", ".o", ".wo")


def starter(
    vocab_size: int,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    context: int,
    seed: int,
    ids: dict[str, int],
    family: str = "llama",
) -> Any:
    """A small model whose weights are a function of its shape and seed alone (not of transformers' initialisation).

    Normal(0, 0.02); projections back into the residual stream are divided by sqrt(2 * layers) (Radford et al. 2019); norms
    are 1, biases 0.

    Args:
        hidden_size: a multiple of heads; Llama's MLP is 8/3 of it, rounded up to 32, the older families' 4 times as wide.
        kv_heads: of families with grouped-query attention; the others have one for each head.
        ids: `bos_token_id`, `eos_token_id`, `pad_token_id` of the tokenizer.
        family: one of `FAMILIES`.
    """
    import transformers

    config = starter_config(
        vocab_size,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        context=context,
        ids=ids,
        family=family,
    )
    quiet()
    return draw(transformers.AutoModelForCausalLM.from_config(config), layers, seed)


def draw(model: Any, layers: int, seed: int) -> Any:
    """Fills a model's parameters as `starter` says, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            back = name.removesuffix(".weight").endswith(BACK)
            parameter.normal_(0.0, 0.02 / (2 * layers) ** 0.5 if back else 0.02, generator=generator)
    return model


def starter_config(
    vocab_size: int,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    context: int,
    ids: dict[str, int],
    family: str = "llama",
) -> Any:
    """The configuration of `starter`, with its arguments.

    Raises:
        ModelError: no such family, or a shape that it cannot have.
    """
    import transformers

    if family not in FAMILIES:
        raise ModelError(f"there is no starter of the family '{family}'", hint=f"one of {', '.join(FAMILIES)}")
    named = FAMILIES[family](hidden_size, layers, heads, kv_heads, context)
    named |= {"vocab_size": vocab_size, "attn_implementation": "eager", **ids}
    if family == "chatglm2":
        from danlu.models import chatglm2  # registers the family
        from danlu.models.chatglm_config import ChatGLM2Config

        assert chatglm2.FAMILY is not None

        return ChatGLM2Config(**named)
    return transformers.AutoConfig.for_model(family, tie_word_embeddings=True, **named)


def _llama(width: int, layers: int, heads: int, kv_heads: int, context: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": -(-width * 8 // 3 // 32) * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
    }


def _gpt2(width: int, layers: int, heads: int, kv_heads: int, context: int) -> dict[str, Any]:
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": context, **dropouts}


def _codegen(width: int, layers: int, heads: int, kv_heads: int, context: int) -> dict[str, Any]:
    if heads % 4:
        raise ModelError(f"CodeGen keeps its heads in four parts, and {heads} are not a multiple of 4", hint="heads: 4")
    return _gpt2(width, layers, heads, kv_heads, context) | {"n_ctx": context, "rotary_dim": width // heads // 4 * 2}


def _bloom(width: int, layers: int, heads: int, kv_heads: int, context: int) -> dict[str, Any]:
    dropouts = dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.0)
    return {"hidden_size": width, "n_layer": layers, "n_head": heads, "seq_length": context, **dropouts}


def _neox(width: int, layers: int, heads: int, kv_heads: int, context: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
    }


def _opt(width: int, layers: int, heads: int, kv_heads: int, context: int) -> dict[str, Any]:
    own = {"ffn_dim": 4 * width, "word_embed_proj_dim": width, "dropout": 0.0, "attention_dropout": 0.0}
    return {k: v for k, v in _neox(width, layers, heads, kv_heads, context).items() if k != "intermediate_size"} | own


def _chatglm2(width: int, layers: int, heads: int, kv_heads: int, context: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "ffn_hidden_size": -(-width * 8 // 3 // 32) * 32,
        "num_layers": layers,
        "num_attention_heads": heads,
        "kv_channels": width // heads,
        "multi_query_attention": True,
        "multi_query_group_num": kv_heads,
        "add_qkv_bias": True,
        "seq_length": context,
    }


FAMILIES: dict[str, Callable[[int, int, int, int, int], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "gpt2": _gpt2,
    "codegen": _codegen,
    "bloom": _bloom,
    "gpt_neox": _neox,
    "opt": _opt,
    "chatglm2": _chatglm2,
}
"""What width, layers, heads, key/value heads and context are called in each family's configuration."""


def blank_glm(vocab: int, shape: Mapping[str, int], ids: Mapping[str, Any], seed: int) -> Any:
    """A GLM of a starter's width, depth, heads and context, without dropout.

    Args:
        ids: of special tokens, by the names of `BlankGlmConfig`.
    """
    from danlu.models.glm import BlankGlmForConditionalGeneration
    from danlu.models.glm_config import BlankGlmConfig

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


def opt(vocab: int, size: Mapping[str, Any], ids: dict[str, Any], seed: int) -> Any:
    """An OPT of a preset's size (`presets.json`), without dropout."""
    shape = {name: size[name] for name in ("hidden_size", "layers", "heads", "context")}
    return starter(vocab, **shape, kv_heads=size["heads"], seed=seed, ids=ids, family="opt")
