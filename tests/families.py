"""Tiny configurations of every family that token trees are tested with, with what is peculiar to it switched on."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 61
IDS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
HEADS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS |= {"max_position_embeddings": 64}
GROUPED = HEADS | {"num_key_value_heads": 2}
GPT = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}

# name: (prefix of the transformers classes, configuration)
FAST: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "gpt2": ("GPT2", GPT),
    "gpt_neox": ("GPTNeoX", HEADS | NO_DROPOUT | {"rotary_pct": 0.25, "use_parallel_residual": True}),
    "opt": ("OPT", HEADS | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}),
    "stablelm": ("StableLm", GROUPED | {"partial_rotary_factor": 0.5, "use_parallel_residual": True}),
    "glm": ("Glm", GROUPED | {"head_dim": 8, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "glm4": ("Glm4", GROUPED | {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "gemma": ("Gemma", HEADS | {"head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        GROUPED
        | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 12}
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        "Gemma3",
        GROUPED | {"head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 12},
    ),
    "phi": ("Phi", HEADS | {"partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi3": ("Phi3", GROUPED | {"sliding_window": 7, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "olmo2": ("Olmo2", GROUPED),
    "granite": ("Granite", GROUPED | {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7}),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        GROUPED
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4} | NO_DROPOUT),
    "codegen": ("CodeGen", GPT | {"rotary_dim": 4}),
    "gptj": ("GPTJ", GPT | {"rotary_dim": 4}),
    "falcon": ("Falcon", HEADS | NO_DROPOUT | {"multi_query": True, "new_decoder_architecture": False}),
    "falcon_alibi": ("Falcon", HEADS | NO_DROPOUT | {"alibi": True, "new_decoder_architecture": False}),
    "falcon_groups": ("Falcon", HEADS | NO_DROPOUT | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi_groups": (
        "Falcon",
        HEADS | NO_DROPOUT | {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    # Not among `families.TESTED`: compared with transformers when they are loaded.
    "cohere2": ("Cohere2", GROUPED | {"logit_scale": 0.5, "sliding_window": 6}),
    "nemotron": ("Nemotron", GROUPED),
}
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neo": (
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64, "window_size": 5}
        | {"attention_types": [[["global", "local"], 1]], "resid_dropout": 0.0, "embed_dropout": 0.0},
    ),
}
FAMILIES = FAST | PADDED


def own_attention(config: Any) -> str:
    """transformers' that is right: its eager attention of Falcon adds ALiBi to the mask and then once more to the scores."""
    return "sdpa" if getattr(config, "alibi", False) else "eager"


def padded(model: Any) -> None:
    """Makes a prepared model take the path of families whose attention takes no plan."""
    model.set_attn_implementation(own_attention(model.config))
    model.config._attn_implementation = own_attention(model.config)  # some families let nobody choose
    model.base_model.danlu_fast_path = False


def make(family: str, *, seed: int = 0, **options: Any) -> Any:
    """A causal language model of the family with large random weights: a wrong mask or position shows."""
    import transformers

    prefix, shape = FAMILIES[family]
    kind = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    config = getattr(transformers, kind)(**(shape | IDS | options))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=own_attention(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model
