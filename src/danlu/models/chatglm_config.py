"""Configurations of ChatGLM-6B and of ChatGLM2-6B and ChatGLM3-6B. All say `model_type: chatglm`; keys tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from transformers import PretrainedConfig

from danlu.exceptions import ModelError

FIRST_VOCABULARY = 150528  # of the first public revision (March 2023): 20000 image tokens stand before the text's
LATER_KEYS = ("multi_query_attention", "padded_vocab_size", "ffn_hidden_size")
FIRST_KEYS = ("inner_hidden_size", "position_encoding_2d")
REFUSED = {
    "quantization_embeddings": "quantised embeddings",
    "use_xformers": "xformers attention",
}


def is_first_generation(config: Mapping[str, Any]) -> bool:
    """Whether a config.json with `model_type: chatglm` is of ChatGLM-6B, and not of its successors."""
    return not any(key in config for key in LATER_KEYS)


class ChatGLMConfig(PretrainedConfig):  # type: ignore[misc]
    """ChatGLM-6B. Defaults are the published model's; names are its own.

    Attributes:
        first_revision: the position rules of March 2023; None: by the vocabulary's size.
        mask_token_id, gmask_token_id: where the file does not name them, as the first revision's does not, they stand
            before the beginning of the answer as they do there.
        pre_seq_len, prefix_projection: see `chatglm_prefix.py`. quantization_bit: 8, 4 or 0; see `chatglm_quantized.py`.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
        "intermediate_size": "inner_hidden_size",
        "layer_norm_eps": "layernorm_epsilon",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = 3
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    position_encoding_2d: bool = True
    first_revision: bool | None = None
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    quantization_bit: int | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse(kwargs)
        if self.bos_token_id is None:
            raise ModelError("a ChatGLM needs bos_token_id, where its answers begin", field="bos_token_id")
        if self.mask_token_id is None:
            self.mask_token_id = self.bos_token_id - 4
        if self.gmask_token_id is None:
            self.gmask_token_id = self.bos_token_id - 3
        if self.first_revision is None:
            self.first_revision = self.vocab_size == FIRST_VOCABULARY
        parts = 2 if self.position_encoding_2d else 1
        _check_width(self.hidden_size, self.num_attention_heads, 2 * parts)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own; a ChatGLM2's dictionary makes a `ChatGLM2Config`, since both have one `model_type`."""
        if not is_first_generation(config_dict):
            return ChatGLM2Config.from_dict(config_dict, **kwargs)
        return super().from_dict(_known(config_dict), **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is not a default, and what tells the generations apart."""
        return {**super().to_diff_dict(), **{key: getattr(self, key) for key in FIRST_KEYS}}


class ChatGLM2Config(PretrainedConfig):  # type: ignore[misc]
    """ChatGLM2-6B and ChatGLM3-6B. Defaults are the published models'; names are their own.

    Attributes:
        rope_ratio: what the base of rotary positions is multiplied by (the variants for long texts).
        apply_query_key_layer_scaling, attention_softmax_in_fp32, bias_dropout_fusion, original_rope: kept, without effect on
            numbers here: scores are scaled alike, and softmax is always taken in fp32.
        pre_seq_len, prefix_projection: see `chatglm_prefix.py`. quantization_bit: 8, 4 or 0; see `chatglm_quantized.py`.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "seq_length",
        "intermediate_size": "ffn_hidden_size",
        "vocab_size": "padded_vocab_size",
        "head_dim": "kv_channels",
    }

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    seq_length: int = 2048
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    bias_dropout_fusion: bool = True
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    fp32_residual_connection: bool = False
    original_rope: bool = True
    rope_ratio: float = 1.0
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    quantization_bit: int | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse(kwargs)
        if self.num_attention_heads % self.key_value_heads:
            raise ModelError(
                f"{self.num_attention_heads} heads do not share {self.multi_query_group_num} keys evenly",
                field="multi_query_group_num",
            )
        if self.kv_channels % 4:
            raise ModelError(
                f"kv_channels is {self.kv_channels}; half of it is rotated in pairs, so 4 must divide it",
                field="kv_channels",
            )
        super().__post_init__(**kwargs)

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As transformers' own."""
        made: Self = super().from_dict(_known(config_dict), **kwargs)
        return made

    def to_diff_dict(self) -> dict[str, Any]:
        """What is not a default, and what tells the generations apart."""
        return {**super().to_diff_dict(), **{key: getattr(self, key) for key in LATER_KEYS}}


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what points at code in the folder, which is never run; saving would point at code that is not there."""
    return {key: value for key, value in config.items() if key != "auto_map"}


def _refuse(options: Mapping[str, Any]) -> None:
    for name, words in REFUSED.items():
        if options.get(name):
            raise ModelError(f"{words} of ChatGLM are not supported", field=name, hint=f"set {name} to false")


def _check_width(hidden: int, heads: int, divisor: int) -> None:
    if hidden % heads or (hidden // heads) % divisor:
        raise ModelError(
            f"hidden_size {hidden} over {heads} heads is no width that rotary positions can be given to",
            field="hidden_size",
        )
