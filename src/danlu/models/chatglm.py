"""ChatGLM-6B (Du et al. 2022, arXiv 2103.10360; Zeng et al. 2023): GLM with a bidirectional context and 2-D positions.

Everything before `<sop>` sees all of the context, what follows sees what is before it. Both public revisions; masks and
positions are derived from ids where they are not given (`chatglm_positions.py`).

Axes: B batch, T tokens, S keys (cache and tokens), H heads, K head width, D model width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
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

from danlu.exceptions import ModelError
from danlu.models.chatglm_chat import ChatGLMChat
from danlu.models.chatglm_config import ChatGLMConfig, is_first_generation
from danlu.models.chatglm_heads import (
    PASSED,
    CausalHead,
    ScoreHead,
    cache_of,
    load_folder,
    open_quantized,
    with_prefix,
)
from danlu.models.chatglm_positions import Rules, hidden_keys, positions_after, step_inputs
from danlu.models.chatglm_prefix import ChatGLMPrefix, LoadsPrefix, freeze_all_but_prefix
from danlu.models.registry import Family
from danlu.text.chatglm_tokenizers import ChatGLMTokenizer, open_first

# The residual is scaled by sqrt(2 * layers) as in DeepNorm (Wang et al. 2022), but the original never hands its blocks the
# number of layers: the default of 28 stands in every size.
ALPHA = math.sqrt(2 * 28)
HIDDEN = -10000.0  # what the score of a hidden key becomes less


class ChatGLMPreTrainedModel(LoadsPrefix, PreTrainedModel):  # type: ignore[misc]
    """What the classes of ChatGLM-6B share."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _skip_keys_device_placement = "past_key_values"
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012

    @property
    def quantized(self) -> bool:
        """Whether the blocks' linear layers are ChatGLM's int8 or int4."""
        return bool(self.config.quantization_bit)


def rotation(position_ids: Tensor, width: int, parts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, 1, T, parts, width / parts]` for positions `[B, parts, T]` (Su et al. 2021).

    Frequencies are rounded to fp16, as the published weights were trained with; angles are fp32 in every dtype.
    """
    part = width // parts
    steps = torch.arange(0, part, 2, device=position_ids.device).float() / part
    frequencies = (1.0 / 10000**steps).half().float()
    angles = position_ids.transpose(1, 2)[:, None, :, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[B, H, T, K]`, each part of its width rotated by its own positions, halves against each other."""
    parts = x.unflatten(-1, cos.shape[-2:])
    low, high = parts.chunk(2, dim=-1)
    turned: Tensor = parts * cos + torch.cat([-high, low], dim=-1) * sin
    return turned.flatten(-2)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel 2016); `(1 + tanh u) / 2 = sigmoid(2 u)` takes half of torch's time on a CPU."""
    if x.requires_grad or x.dtype != torch.float32 or x.device.type != "cpu":
        return nn.functional.gelu(x, approximate="tanh")
    twice = 2 * math.sqrt(2 / math.pi)
    return x.square().mul_(0.044715 * twice).add_(twice).mul_(x).sigmoid_().mul_(x)


class SelfAttention(nn.Module):
    """Queries, keys and values are fused head by head."""

    def __init__(self, config: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer
        self.heads = config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        prefix: tuple[Tensor, Tensor] | None,
        past_key_values: Any,
    ) -> Tensor:
        """x `[B, T, D]`, bias `[B, 1, T, S]` or None: all keys are seen; prefix: keys and values `[B, H, pre, K]`.

        The original divides scores by the layer's number and multiplies them again before the softmax, so that fp16 does not
        overflow; the product is the plain scaling, which is taken here.
        """
        fused = self.query_key_value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        key, value = with_prefix(key, value, prefix)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.dense(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GLU(nn.Module):
    """The feed-forward part; not gated, in spite of its original name."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(x)))  # type: ignore[no-any-return]


class GLMBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """The residual is the normalised input, times alpha."""

    def __init__(self, config: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = GLU(config)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        prefix: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        normed = self.input_layernorm(x)
        x = torch.add(self.attention(normed, bias, rotary, prefix, past_key_values), normed, alpha=ALPHA)
        normed = self.post_attention_layernorm(x)
        return torch.add(self.mlp(normed), normed, alpha=ALPHA)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The transformer without its output layer.

    Attributes:
        derives_positions: masks and positions are a function of the ids, not of a token's place alone (see
            `models/padded.py` and `generation/past.py`).
        prefix_length: virtual tokens that stand before all others in the cache.
        danlu_prefix_shift: P-Tuning leaves the positions of the text as they are, as the original does.
    """

    derives_positions = True
    danlu_prefix_shift = False

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLMBlock(config, n) for n in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.rules = Rules.of(config)
        self.gradient_checkpointing = False
        self.prefix_length = config.pre_seq_len or 0
        if self.prefix_length:
            width = 2 * config.num_layers * config.hidden_size
            small, hidden = config.hidden_size, config.hidden_size
            self.prefix_encoder = (
                ChatGLMPrefix(self.prefix_length, width, width=small, hidden=hidden)
                if config.prefix_projection
                else ChatGLMPrefix(self.prefix_length, width, width=None, hidden=None)
            )
        open_quantized(config, self.layers)
        self.post_init()
        freeze_all_but_prefix(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value  # type: ignore[assignment]

    def inputs_of(self, rows: Sequence[Sequence[int]], new: int) -> dict[str, Tensor]:
        """Mask and positions for the last `new` tokens of each row, the rows padded on the left to the longest one."""
        return step_inputs(self.rules, rows, new, self.word_embeddings.weight.device)

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
        **_: Any,
    ) -> Any:
        """Hidden states after the last norm.

        Args:
            input_ids: `[B, T]`; with a cache, the tokens after it.
            position_ids: `[B, 2, T]` (`[B, T]` where positions have one dimension). None: derived.
            attention_mask: bool `[B, 1, T, S]`, True where a key is hidden; or `[B, S]` with 1 at tokens and 0 at padding on
                either side. None: derived; padding is seen then, as in the original.
            past_key_values: a transformers cache, or the original's tuple of `(key, value)` `[S, B, H, K]`.
        """
        first = inputs_embeds if inputs_embeds is not None else self.word_embeddings(input_ids)
        batch, tokens = first.shape[:2]
        past = cache_of(past_key_values, use_cache if use_cache is not None else self.config.use_cache)
        seen = past.get_seq_length() if past is not None else 0
        known = max(seen - self.prefix_length, 0)
        prefix: list[Any] = [None] * len(self.layers)
        if self.prefix_length and not seen:
            prefix = self.prefix_encoder.states(len(self.layers), self._heads, batch)
        if input_ids is None:
            input_ids = torch.zeros(batch, tokens, dtype=torch.int64, device=first.device)
        if position_ids is None:
            position_ids = positions_after(self.rules, input_ids, attention_mask, known)
        hidden = hidden_keys(self.rules, input_ids, attention_mask, known, self.prefix_length)
        parts = 2 if self.config.position_encoding_2d else 1
        if position_ids.dim() == 2:
            position_ids = position_ids[:, None]
        if position_ids.shape[1] < parts:
            raise ModelError(
                "position_ids have one row, expected two: [B, 2, T]", hint="leave them out: they are derived"
            )
        rotary = rotation(position_ids[:, :parts], self.config.hidden_size // self._heads, parts, first.dtype)
        bias = None if hidden is None else torch.zeros_like(hidden, dtype=first.dtype).masked_fill_(hidden, HIDDEN)
        wanted = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        x, states = first, []
        for layer, own in zip(self.layers, prefix, strict=True):
            states += [x] if wanted else []
            x = layer(x, bias, rotary, own, past_key_values=past)
        x = self.final_layernorm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past,
            hidden_states=(*states, x) if wanted else None,
        )
        return output if return_dict is not False else output.to_tuple()

    @property
    def _heads(self) -> int:
        return int(self.config.num_attention_heads)


class ChatGLMForConditionalGeneration(CausalHead, ChatGLMChat, ChatGLMPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """ChatGLM-6B as it was published; `chat`, `stream_chat` and `quantize` are as they were there."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig, *_: Any, **__: Any) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        freeze_all_but_prefix(self)

    @property
    def blocks(self) -> nn.Module:
        """What `quantize` replaces the linear layers of."""
        return self.transformer.layers

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value  # type: ignore[assignment]

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers' own; takes the mask that the original's tokenizer makes, bool `[B, 1, T, T]`, too."""
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            ids = inputs if inputs is not None else kwargs["input_ids"]
            kwargs |= {"full_attention_mask": mask, "attention_mask": torch.ones_like(ids)}
        return super().generate(inputs, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: Mapping[str, Any]) -> Tensor:
        return positions_after(self.transformer.rules, inputs_tensor, model_kwargs.get("attention_mask"), 0)

    def _expand_inputs_for_generation(
        self, *args: Any, expand_size: int = 1, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """For several answers to a prompt; transformers takes positions `[B, 2, T]` for another family's `[3, B, T]`."""
        positions = kwargs.pop("position_ids", None)
        ids, found = super()._expand_inputs_for_generation(*args, expand_size=expand_size, **kwargs)
        if positions is not None:
            found["position_ids"] = positions.repeat_interleave(expand_size, dim=0)
        return ids, found

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        full_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What one step of `generate` reads: all ids at first, the last one with a cache."""
        rules = self.transformer.rules
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        known = max(seen - self.transformer.prefix_length, 0)
        if position_ids is None or (known and not rules.two_dimensional):
            # A single step takes the mask's place in one dimension, whatever positions went before (a quirk of the original).
            position_ids = positions_after(rules, input_ids, attention_mask, known, whole=True)
        new = input_ids.shape[1] - known
        passed = {key: value for key, value in kwargs.items() if key in PASSED}
        return {
            "input_ids": input_ids[:, -new:],
            "position_ids": position_ids[..., -new:],
            "attention_mask": attention_mask if full_attention_mask is None else full_attention_mask[:, :, -new:],
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **passed,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        positions = model_kwargs.pop("position_ids", None)
        masks = {k: model_kwargs.pop(k, None) for k in ("attention_mask", "full_attention_mask")}
        found = super()._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder, num_new_tokens)
        for _ in range(num_new_tokens):
            masks = {k: m if m is None else _grown(m) for k, m in masks.items()}
            if positions is not None:
                step = positions[..., -1:].clone()
                if positions.dim() == 3:
                    step[:, 1] += 1
                positions = torch.cat([positions, step], dim=-1)
        return {**found, **masks, "position_ids": positions}


def _grown(mask: Tensor) -> Tensor:
    """A mask with one token more: it sees what the last one sees, and itself; no token before sees it."""
    if mask.dim() == 2:
        return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    mask = torch.cat([mask, mask.new_ones(*mask.shape[:3], 1)], dim=3)
    row = mask[:, :, -1:].clone()
    row[..., -1] = 0
    return torch.cat([mask, row], dim=2)


class ChatGLMForSequenceClassification(ScoreHead, ChatGLMPreTrainedModel):
    """The transformer with a linear head on the last token: reward models, values and classes."""

    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


def says(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of ChatGLM-6B."""
    return config.get("model_type") == "chatglm" and is_first_generation(config)


def load(folder: Path, dtype: torch.dtype, scalar: bool) -> Any:
    """The model in a folder; see `chatglm_heads.load_folder`."""
    config = ChatGLMConfig.from_dict(json.loads((folder / "config.json").read_text("utf-8")))
    kind = ChatGLMForSequenceClassification if scalar else ChatGLMForConditionalGeneration
    return load_folder(kind, config, folder, dtype)


FAMILY = Family("ChatGLM-6B", says, load, open_first)

# One entry for all of `model_type: chatglm`; `ChatGLMConfig.from_dict` tells the generations apart.
AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
for _auto, _kind in (
    (AutoModel, ChatGLMForConditionalGeneration),  # as the published auto_map has it
    (AutoModelForCausalLM, ChatGLMForConditionalGeneration),
    (AutoModelForSeq2SeqLM, ChatGLMForConditionalGeneration),
    (AutoModelForSequenceClassification, ChatGLMForSequenceClassification),
):
    _auto.register(ChatGLMConfig, _kind, exist_ok=True)
AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
