"""ChatGLM2-6B and ChatGLM3-6B: a causal decoder with shared keys, half-rotated heads and a gated feed-forward part.

Attention is a function registered with transformers, so token trees and the engine's cache go straight through it.

Axes: B batch, T tokens, S keys (cache and tokens), H heads, G key heads, K head width, D model width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from danlu.exceptions import ModelError
from danlu.models import chatglm  # registers `model_type: chatglm`, whose configuration decides for this one
from danlu.models.attention import NAME, PLAN_ARGUMENT
from danlu.models.chatglm_chat import ChatGLM2Chat
from danlu.models.chatglm_config import ChatGLM2Config
from danlu.models.chatglm_heads import (
    PASSED,
    CausalHead,
    ScoreHead,
    cache_of,
    load_folder,
    open_quantized,
    with_prefix,
)
from danlu.models.chatglm_prefix import ChatGLMPrefix, LoadsPrefix, freeze_all_but_prefix
from danlu.models.registry import Family
from danlu.text.chatglm_tokenizers import ChatGLM2Tokenizer, open_later

BASE = 10000.0


class ChatGLM2PreTrainedModel(LoadsPrefix, PreTrainedModel):  # type: ignore[misc]
    """What the classes of ChatGLM2-6B and ChatGLM3-6B share."""

    config_class = ChatGLM2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _skip_keys_device_placement = "past_key_values"
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]  # noqa: RUF012

    @property
    def quantized(self) -> bool:
        """Whether the blocks' linear layers are ChatGLM's int8 or int4."""
        return bool(self.config.quantization_bit)


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019; the mean of squares is taken in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = x.float().square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        return (self.weight * (x * scale)).to(self.weight.dtype)


def norm_of(config: ChatGLM2Config) -> nn.Module:
    """The family's norm over the model's width."""
    if config.rmsnorm:
        return RMSNorm(config.hidden_size, config.layernorm_epsilon)
    return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)


def rotation(position_ids: Tensor, width: int, ratio: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B or 1, 1, T, width / 4]` for positions `[B or 1, T]`: half of a head is rotated, in pairs.

    Angles are fp32 in every dtype, as in ChatGLM3; ChatGLM2 rounded them to its own dtype, which is the same in fp32.
    """
    rotated = width // 2
    steps = torch.arange(0, rotated, 2, device=position_ids.device).float() / rotated
    angles = position_ids[:, None, :, None].float() * (1.0 / (BASE * ratio) ** steps)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[B, H, T, K]`: neighbours (0, 1), (2, 3), ... of the first half are rotated, the second half passes."""
    first, kept = x.chunk(2, dim=-1)
    neighbours = first.unflatten(-1, (-1, 2))
    if x.dtype == torch.float32:  # as one product of complex numbers, which 16 bits do not have
        turned = torch.view_as_real(torch.view_as_complex(neighbours) * torch.complex(cos, sin))
    else:
        even, odd = neighbours.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat([turned.flatten(-2), kept], dim=-1)


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """query `[B, H, T, K]`, key and value `[B, G, S, K]` -> `[B, T, H, K]`; the mask is added to scores."""
    groups = module.num_key_value_groups
    options = {"attn_mask": attention_mask, "dropout_p": kwargs.get("dropout", 0.0), "scale": scaling}
    if query.shape[2] == 1:  # those that share a key are rows of one product: nothing is repeated
        rows = query.unflatten(1, (-1, groups)).squeeze(3)
        mixed = nn.functional.scaled_dot_product_attention(rows, key, value, **options)
        return mixed.flatten(1, 2)[:, None], None
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return nn.functional.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2), None


class SelfAttention(nn.Module):
    """Queries, keys and values are fused: in blocks with shared keys, else head by head."""

    def __init__(self, config: ChatGLM2Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer, True
        self.heads, self.groups, self.width = config.num_attention_heads, config.key_value_heads, config.kv_channels
        self.num_key_value_groups = self.heads // self.groups
        inner = self.heads * self.width
        bias = config.add_bias_linear or config.add_qkv_bias
        self.query_key_value = nn.Linear(config.hidden_size, inner + 2 * self.groups * self.width, bias=bias)
        self.dense = nn.Linear(inner, config.hidden_size, bias=config.add_bias_linear)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        prefix: tuple[Tensor, Tensor] | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> Tensor:
        """x `[B, T, D]`, mask `[B, 1, T, S]` of scores to add; prefix: keys and values `[B, G, pre, K]`."""
        query, key, value = self._heads(self.query_key_value(x), rotary)
        key, value = with_prefix(key, value, prefix)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        plan = kwargs.get(PLAN_ARGUMENT) or getattr(self, PLAN_ARGUMENT, None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plain_attention)
        if plan is None and self.config._attn_implementation == NAME:
            attend = plain_attention  # a model that an engine holds still is what it was: `model.chat`
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, _ = attend(self, query, key, value, attention_mask, scaling=self.width**-0.5, dropout=dropout, **kwargs)
        return self.dense(mixed.reshape(*x.shape[:2], -1))  # type: ignore[no-any-return]

    def _heads(self, fused: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values."""
        if self.config.multi_query_attention:
            heads = fused.unflatten(-1, (-1, self.width)).transpose(1, 2)
            both, value = heads.split([self.heads + self.groups, self.groups], dim=1)
            query, key = rotate(both, *rotary).split([self.heads, self.groups], dim=1)
            return query, key, value
        query, key, value = fused.unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        return rotate(query, *rotary), rotate(key, *rotary), value


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020); gate and values are one product."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]


class GLMBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """Norms before; the residual is the input, or (apply_residual_connection_post_layernorm) the normalised input."""

    def __init__(self, config: ChatGLM2Config, layer: int) -> None:
        super().__init__()
        self.after_norm, self.dropout = config.apply_residual_connection_post_layernorm, config.hidden_dropout
        self.input_layernorm = norm_of(config)
        self.self_attention = SelfAttention(config, layer)
        self.post_attention_layernorm = norm_of(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        normed = self.input_layernorm(x)
        mixed = self.self_attention(normed, attention_mask, rotary, prefix, past_key_values, **kwargs)
        x = (normed if self.after_norm else x) + self._drop(mixed)
        normed = self.post_attention_layernorm(x)
        return (normed if self.after_norm else x) + self._drop(self.mlp(normed))

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, p=self.dropout, training=self.training) if self.dropout else x


class Embedding(nn.Module):
    """The table of tokens, under its original name."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class GLMTransformer(nn.Module):
    """The blocks and the last norm, under their original names."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config, n) for n in range(config.num_layers))
        if config.post_layer_norm:
            self.final_layernorm = norm_of(config)


class ChatGLM2Model(ChatGLM2PreTrainedModel):
    """The transformer. Its output layer lies in it, as in the original, and is not run by `forward`.

    Attributes:
        prefix_length: virtual tokens that stand before all others in the cache.
        danlu_prefix_shift: P-Tuning leaves the positions of the text as they are, as the original does.
    """

    danlu_prefix_shift = False

    def __init__(self, config: ChatGLM2Config, output_layer: bool = True) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.encoder = GLMTransformer(config)
        if output_layer:
            self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.prefix_length = config.pre_seq_len or 0
        if self.prefix_length:
            width = 2 * config.num_layers * config.key_value_heads * config.kv_channels
            hidden = config.hidden_size if config.prefix_projection else None
            self.prefix_encoder = ChatGLMPrefix(
                self.prefix_length, width, width=width if hidden is not None else None, hidden=hidden
            )
        open_quantized(config, self.encoder)
        self.post_init()
        freeze_all_but_prefix(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding.word_embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        full_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states after the last norm; of `hidden_states` the last entry is before it, as in the original.

        Args:
            input_ids: `[B, T]`; with a cache, the tokens after it.
            position_ids: `[B, T]`; None: counted on from the cache, padding counted too.
            attention_mask: `[B, S]` with 1 at tokens and 0 at padding on either side; a prefix is left out. None: padding is
                seen, as in the original.
            past_key_values: a transformers cache, or the original's tuple of `(key, value)` `[S, B, G, K]`.
            full_attention_mask: bool `[B, 1, T, S]`, True where a key is hidden; in place of the mask.

        Raises:
            ModelError: a token tree meets a model with a prefix (the padded path takes it).
        """
        plan = kwargs.get(PLAN_ARGUMENT) is not None
        if plan and self.prefix_length:
            raise ModelError("a plan has no place for the prefix of a ChatGLM", hint="the padded path takes it")
        first = inputs_embeds if inputs_embeds is not None else self.embedding.word_embeddings(input_ids)
        if self.config.fp32_residual_connection:
            first = first.float()
        batch, tokens = first.shape[:2]
        past = cache_of(past_key_values, use_cache if use_cache is not None else self.config.use_cache)
        seen = past.get_seq_length() if past is not None else 0
        known = max(seen - self.prefix_length, 0)
        prefix: list[Any] = [None] * self.config.num_layers
        if self.prefix_length and not seen:
            prefix = self.prefix_encoder.states(self.config.num_layers, self.config.key_value_heads, batch)
        if position_ids is None:
            position_ids = torch.arange(known, known + tokens, device=first.device)[None]
        mask = None
        if not plan:
            hidden = full_attention_mask
            if hidden is None:
                hidden = hidden_keys(attention_mask, tokens, self.prefix_length + known, first.device)
            if hidden is not None:
                mask = torch.zeros_like(hidden, dtype=first.dtype)
                mask = mask.masked_fill_(hidden, torch.finfo(first.dtype).min)
        dtype = torch.float32 if first.dtype == torch.float32 else self.dtype
        rotary = rotation(position_ids, self.config.kv_channels, self.config.rope_ratio, dtype)
        wanted = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        x, states = first, []
        for layer, own in zip(self.encoder.layers, prefix, strict=True):
            states += [x] if wanted else []
            x = layer(x, mask, rotary, own, past_key_values=past, **kwargs)
        last = self.encoder.final_layernorm(x) if self.config.post_layer_norm else x
        output = BaseModelOutputWithPast(
            last_hidden_state=last, past_key_values=past, hidden_states=(*states, x) if wanted else None
        )
        return output if return_dict is not False else output.to_tuple()


def hidden_keys(attention_mask: Tensor | None, tokens: int, seen: int, device: torch.device) -> Tensor | None:
    """True where one of the new tokens does not see a key: bool `[B or 1, 1, T, seen + T]`; None: all see all.

    Args:
        attention_mask: `[B, n]`, 0 at padding, where n may leave out what stands in front (a prefix). Rows of padding see
            everything, so that they have numbers.
    """
    row = torch.arange(tokens, device=device)
    hidden = nn.functional.pad(row[None, :] > row[:, None], (seen, 0), value=False)[None, None]
    if attention_mask is None or bool(attention_mask.all()):
        return hidden if tokens > 1 else None
    if not tokens <= attention_mask.shape[-1] <= seen + tokens:
        raise ModelError(
            f"the attention mask has {attention_mask.shape[-1]} columns for {tokens} tokens after {seen} cached keys"
        )
    padding = ~attention_mask.bool()
    columns = nn.functional.pad(padding, (seen + tokens - padding.shape[1], 0), value=False)
    return (hidden | columns[:, None, None]) & ~padding[:, None, -tokens:, None]


class ChatGLMForConditionalGeneration(CausalHead, ChatGLM2Chat, ChatGLM2PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """ChatGLM2-6B or ChatGLM3-6B as published; `chat`, `stream_chat` and `quantize` are as they were there."""

    _tied_weights_keys = {  # noqa: RUF012
        "transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"
    }

    def __init__(self, config: ChatGLM2Config, *_: Any, **__: Any) -> None:
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.post_init()

    @property
    def blocks(self) -> nn.Module:
        """What `quantize` replaces the linear layers of."""
        return self.transformer.encoder

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.transformer.output_layer = value  # type: ignore[assignment]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What one step of `generate` reads: all ids at first, the last one with a cache."""
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        new = input_ids.shape[1] - max(seen - self.transformer.prefix_length, 0)
        passed = {key: value for key, value in kwargs.items() if key in PASSED}
        return {
            "input_ids": input_ids[:, -new:],
            "position_ids": position_ids[..., -new:] if position_ids is not None else None,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **passed,
        }


class ChatGLMForSequenceClassification(ScoreHead, ChatGLM2PreTrainedModel):
    """The transformer with a linear head on the last token: reward models, values and classes."""

    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq", r"output_layer\."]  # noqa: RUF012

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.transformer = ChatGLM2Model(config, output_layer=False)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


def says(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of ChatGLM2-6B or ChatGLM3-6B."""
    return config.get("model_type") == "chatglm" and not chatglm.says(config)


def load(folder: Path, dtype: torch.dtype, scalar: bool) -> Any:
    """The model in a folder; see `chatglm_heads.load_folder`."""
    config = ChatGLM2Config.from_dict(json.loads((folder / "config.json").read_text("utf-8")))
    kind = ChatGLMForSequenceClassification if scalar else ChatGLMForConditionalGeneration
    return load_folder(kind, config, folder, dtype)


FAMILY = Family("ChatGLM2-6B and ChatGLM3-6B", says, load, open_later)

for _auto, _kind in (
    (AutoModel, ChatGLMForConditionalGeneration),  # as the published auto_map has it
    (AutoModelForCausalLM, ChatGLMForConditionalGeneration),
    (AutoModelForSeq2SeqLM, ChatGLMForConditionalGeneration),
    (AutoModelForSequenceClassification, ChatGLMForSequenceClassification),
):
    _auto.register(ChatGLM2Config, _kind, exist_ok=True)
AutoTokenizer.register(ChatGLM2Config, slow_tokenizer_class=ChatGLM2Tokenizer, exist_ok=True)
