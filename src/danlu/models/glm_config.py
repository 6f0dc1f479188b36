"""Configuration of the blank-infilling GLM, and what published folders say of it.

They say `model_type: glm`, as transformers' own GLM-4 does; keys tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers.configuration_utils import PretrainedConfig

from danlu.exceptions import ModelError
from danlu.models.blank import BlankIds
from danlu.models.own import own_keys, read_config, token_ids

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}
NAMES = {"sop": "<|startofpiece|>", "eop": "<|endofpiece|>"}
BLANKS = ("[MASK]", "[sMASK]", "[gMASK]")
# Where a folder has no tokenizer file that names them: the fixed numbering of the two published vocabularies.
CHINESE = {"<|startofpiece|>": 50006, "<|endofpiece|>": 50007, "[MASK]": 50003, "[sMASK]": 50008, "[gMASK]": 50009}
ENGLISH = {"<|startofpiece|>": 50257, "<|endofpiece|>": 50258, "[MASK]": 50260, "[gMASK]": 50263, "[sMASK]": 50264}
NUMBERING = {50048: CHINESE, 50304: ENGLISH}


class BlankGlmConfig(PretrainedConfig):  # type: ignore[misc]
    """Keys as published, and what the published files leave to the tokenizer.

    hidden_act: "gelu" (exact, the port) or "gelu_tanh" (the training repository; differs by 1e-3).
    attention_scale: >= 1, a numerical safeguard of fp16 training.
    block_position_encoding: positions have two rows.
    sop_token_id, mask_token_ids: with them masks and positions are found from ids where none are given.
    """

    model_type = "danlu_glm"
    attribute_map: ClassVar[Any] = {"num_hidden_layers": "num_layers", "max_position_embeddings": "max_sequence_length"}
    keys_to_ignore_at_inference: ClassVar[Any] = ["mems", "past_key_values"]

    def __init__(
        self,
        *,
        vocab_size: int = 50048,
        hidden_size: int = 1024,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        max_sequence_length: int = 1024,
        block_position_encoding: bool = True,
        attention_scale: float = 1.0,
        relative_encoding: bool = False,
        hidden_act: str = "gelu",
        layernorm_epsilon: float = 1e-5,
        embedding_dropout_prob: float = 0.1,
        attention_dropout_prob: float = 0.1,
        output_dropout_prob: float = 0.1,
        initializer_range: float = 0.02,
        output_predict: bool = True,
        pool_token: str = "cls",
        classifier_dropout: float = 0.1,
        sop_token_id: int | None = None,
        eop_token_id: int | None = None,
        mask_token_ids: Sequence[int] = (),
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if relative_encoding:
            raise ModelError("relative_encoding of GLM is not supported", field="relative_encoding")
        if kwargs.get("spell_length") is not None:
            raise ModelError("spell_length of GLM (its soft prompts) is not supported", field="spell_length")
        if hidden_act not in ACTIVATIONS:
            raise ModelError(f"hidden_act is '{hidden_act}'; known: {', '.join(ACTIVATIONS)}", field="hidden_act")
        if pool_token not in ("cls", "start", "pad"):
            raise ModelError(f"pool_token is '{pool_token}'; known: cls, start, pad", field="pool_token")
        if hidden_size % num_attention_heads:
            raise ModelError(
                f"hidden_size {hidden_size} is no multiple of {num_attention_heads} heads", field="hidden_size"
            )
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.num_attention_heads, self.max_sequence_length = num_attention_heads, max_sequence_length
        self.block_position_encoding, self.attention_scale = block_position_encoding, attention_scale
        self.relative_encoding, self.hidden_act = relative_encoding, hidden_act
        self.layernorm_epsilon = layernorm_epsilon
        self.embedding_dropout_prob, self.attention_dropout_prob = embedding_dropout_prob, attention_dropout_prob
        self.output_dropout_prob, self.initializer_range = output_dropout_prob, initializer_range
        self.output_predict, self.pool_token, self.classifier_dropout = output_predict, pool_token, classifier_dropout
        self.sop_token_id, self.eop_token_id = sop_token_id, eop_token_id
        self.mask_token_ids = list(mask_token_ids)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def blank_ids(self) -> BlankIds:
        """The tokens of blank infilling.

        Raises:
            ModelError: the configuration does not name them.
        """
        if self.sop_token_id is None or not self.mask_token_ids:
            raise ModelError(
                "this GLM does not say which tokens start a piece and which mask",
                hint="set sop_token_id, eop_token_id and mask_token_ids in config.json",
            )
        end = self.eop_token_id if self.eop_token_id is not None else self.eos_token_id
        return BlankIds(tuple(self.mask_token_ids), self.sop_token_id, int(end), int(self.pad_token_id or 0))


def is_blank_glm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this family: `glm` with the old keys (GLM-4 has num_key_value_heads), or ours."""
    kind = config.get("model_type")
    old = "block_position_encoding" in config or "num_layers" in config
    return kind == BlankGlmConfig.model_type or (kind == "glm" and old and "num_key_value_heads" not in config)


def config_of(folder: Path) -> BlankGlmConfig:
    """The configuration of a folder, with the ids of the tokens of blank infilling if its files or its vocabulary say them."""
    keys = own_keys(read_config(folder))
    named = {**NUMBERING.get(keys.get("vocab_size", 0), {}), **token_ids(folder)}
    for field, text in NAMES.items():
        if keys.get(f"{field}_token_id") is None and text in named:
            keys[f"{field}_token_id"] = named[text]
    if not keys.get("mask_token_ids"):
        keys["mask_token_ids"] = [named[text] for text in BLANKS if text in named]
    return BlankGlmConfig(**keys)
