"""What danlu knows about families of models by their configuration: which are refused, and how long a text may be."""

from __future__ import annotations

from typing import Any

from danlu.exceptions import ModelError

# Families whose fast path the tests compare with plain transformers, with windows, caps and heads. Others are compared when
# they are loaded, on a few tokens.
TESTED = frozenset(
    {"bloom", "codegen", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox", "gptj"}
    | {"granite", "llama", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3"}
    | {"qwen3_moe", "stablelm"}
)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
RECURRENT = (
    "ssm_state_size",
    "mamba_d_state",
    "mamba_d_conv",
    "state_size",
    "linear_num_value_heads",
    "lru_width",
    "conv_L_cache",
    "wkv_head_size",
)
RECURRENT_TYPES = frozenset({"rwkv", "xlstm", "recurrent_gemma"})
ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention"})
# Rotary factors that are a function of the longest row of a batch beyond the length the model was made for.
BATCH_DEPENDENT = frozenset({"dynamic", "longrope"})


def refuse(config: Any) -> None:
    """Ends with a sentence for families that token trees would train wrongly.

    Raises:
        ModelError: an encoder-decoder, a mixture of experts with a balancing loss, or layers that are not attention.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if name == "danlu_unilm":
        raise ModelError(
            "a UniLM predicts masked tokens and is no causal model",
            hint="pretrain --objective unilm, sft, model.generate",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"'{name}' is an encoder-decoder, and this needs a decoder",
            hint="sft, chat, serve, generate and eval take encoder-decoders; use a causal language model for the rest",
        )
    feed_forward = getattr(config, "ffn_config", None)
    mixture = any(_number(part, field) > 1 for part in (config, feed_forward) for field in EXPERTS)
    if mixture and getattr(config, "output_router_logits", False):
        raise ModelError(
            f"'{name}' is a mixture of experts whose config.json asks for the loss that balances them; that is an average over a "
            "batch, which packing and accumulation would change",
            hint="set output_router_logits to false in config.json (transformers' default): experts then learn by the text alone",
        )
    others = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION_TYPES)
    if others or name in RECURRENT_TYPES or any(_number(config, field) > 0 for field in RECURRENT):
        kind = f"layers of type '{others[0]}'" if others else "recurrent (state-space or linear attention) layers"
        raise ModelError(
            f"'{name}' has {kind}, whose state would run from one branch of a token tree into the next",
            hint="use a model whose layers all are full or sliding-window attention",
        )


def _number(config: Any, field: str) -> float:
    value = getattr(config, field, None)
    return float(value) if isinstance(value, int | float) else 0.0


def batch_dependent_from(config: Any) -> tuple[str, int] | None:
    """(kind, length) of rotary positions that change for the whole batch when one row is longer than the length; None: never."""
    scaling = getattr(config, "rope_parameters", None) or {}
    # One dictionary, or (Gemma 3) one for each type of layer.
    parts = [scaling, *(v for v in scaling.values() if isinstance(v, dict))]
    found = []
    for part in parts:
        kind = part.get("rope_type")
        if kind in BATCH_DEPENDENT:
            original = part.get("original_max_position_embeddings") if kind == "longrope" else None
            found.append((kind, int(original or config.max_position_embeddings)))
    return min(found, key=lambda f: f[1]) if found else None


def context_of(config: Any) -> int:
    """The most positions that a model may be given; 2^20 if its configuration sets no limit."""
    limits = [int(getattr(config, "max_position_embeddings", 0) or 1 << 20)]
    dependent = batch_dependent_from(config)
    if dependent is not None:
        limits.append(dependent[1])
    return min(limits)


TABLES = ("wpe", "embed_positions", "position_embeddings")


def check_table(trunk: Any, longest: int, prefix: int = 0) -> None:
    """Refuses positions for which a model has no table entry; where they are computed (rotary, ALiBi) nothing is refused.

    Args:
        longest: tokens of a text; prefix: positions that virtual tokens take before it.

    Raises:
        ModelError: with the numbers.
    """
    context = context_of(trunk.config)
    if longest + prefix <= context:
        return
    if _has_table(trunk):
        behind = f" behind a prefix of {prefix}" if prefix else ""
        together = f"max_length and prefix.tokens together can be {context} at most"
        raise ModelError(
            f"{longest} tokens{behind} exceed the {context} positions of this model",
            hint=together if prefix else f"set max_length to {context} or less",
        )


def hard_limit(model: Any) -> int | None:
    """The most tokens of a text that a model can read at all (`check_table`, `check_length`); None where there is no such limit."""
    dependent = batch_dependent_from(model.config)
    limits = [dependent[1]] if dependent is not None else []
    if _has_table(model):
        limits.append(context_of(model.config))
    return min(limits, default=None)


def _has_table(trunk: Any) -> bool:
    """Whether positions are looked up, so that there are no more than the table has."""
    names = [*(n for n, _ in trunk.named_modules()), *(n for n, _ in trunk.named_buffers())]
    return any(name.endswith(TABLES) for name in names)


def check_length(config: Any, longest: int) -> None:
    """Refuses a batch whose longest path would change the rotary positions of all others.

    Raises:
        ModelError: it is longer than the original context of a model with dynamic or long rope.
    """
    dependent = batch_dependent_from(config)
    if dependent is not None and longest > dependent[1]:
        kind, limit = dependent
        raise ModelError(
            f"{longest} tokens exceed the original context of {limit}, beyond which rotary positions of type '{kind}' "
            "depend on the longest row of a batch",
            hint=f"set max_length to {limit} or less, or rope_parameters.rope_type to 'yarn' or 'linear' in config.json",
        )
