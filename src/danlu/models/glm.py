"""GLM (Du et al. 2022), the blank-infilling model of 2021: pre-LN GPT-2 blocks, learned positions in two rows, prefix masks.

Parameter names are those of the published transformers port, and of the training repository's checkpoints without `glm.`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel

from danlu.exceptions import ModelError
from danlu.models.blank import Choices, blank_positions, choice_logprobs, context_lengths, visible_prefix
from danlu.models.glm_config import ACTIVATIONS, BlankGlmConfig, config_of, is_blank_glm
from danlu.models.own import load_own
from danlu.models.own_heads import TokenClasses, aligned_loss, at_places, classify_loss, last_places, new_part
from danlu.models.registry import Family

FILL = -65504.0  # what the original adds to scores that are masked


@dataclass
class BlankGlmOutput(ModelOutput):  # type: ignore[misc]
    """last_hidden_state `[B, T, D]`; mems: the input embeddings and every layer's output, with what was remembered before them."""

    last_hidden_state: Tensor | None = None
    mems: tuple[Tensor, ...] | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None
    logits: Tensor | None = None


class BlankGlmAttention(nn.Module):
    """Multi-head attention; the fused projection has three blocks `[q | k | v]`."""

    def __init__(self, config: BlankGlmConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.layer, self.scale = config.num_attention_heads, layer, config.attention_scale
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)
        self.attention_dropout = nn.Dropout(config.attention_dropout_prob)
        self.output_dropout = nn.Dropout(config.output_dropout_prob)

    def forward(self, hidden: Tensor, visible: Tensor, memory: Tensor | None, past: Any) -> Tensor:
        """hidden, memory: after the layer's input norm; visible: bool `[B, 1, T, K]`."""
        rows, length, width = hidden.shape
        whole = hidden if memory is None else torch.cat([memory, hidden], dim=1)
        q, k, v = (
            x.view(rows, -1, self.heads, width // self.heads).transpose(1, 2)
            for x in self.query_key_value(whole).chunk(3, dim=-1)
        )
        q = q[:, :, -length:]
        if past is not None:
            k, v = past.update(k, v, self.layer)
        out = self._attend(q, k, v, visible).transpose(1, 2).reshape(rows, length, width)
        result: Tensor = self.output_dropout(self.dense(out))
        return result

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        fill = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, FILL)
        if self.scale <= 1.0:
            dropout = self.attention_dropout.p if self.training else 0.0
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=fill, dropout_p=dropout)
        # Smaller products for fp16; the row's maximum is taken away before they are made large again.
        scores = (q / math.sqrt(self.scale)) @ (k / math.sqrt(q.shape[-1] * self.scale)).transpose(-1, -2)
        scores = scores * visible
        scores = (scores - scores.amax(-1, keepdim=True)) * self.scale + fill
        weights: Tensor = self.attention_dropout(scores.softmax(-1))
        return weights @ v


class BlankGlmMlp(nn.Module):
    """Four times as wide, GELU."""

    def __init__(self, config: BlankGlmConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.output_dropout_prob)
        self.approximate = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        inner = functional.gelu(self.dense_h_to_4h(hidden), approximate=self.approximate)
        out: Tensor = self.dropout(self.dense_4h_to_h(inner))
        return out


class BlankGlmLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Pre-LN block; memory is normalised by the layer's own input norm."""

    def __init__(self, config: BlankGlmConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = BlankGlmAttention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = BlankGlmMlp(config)

    def forward(self, hidden: Tensor, visible: Tensor, memory: Tensor | None = None, past: Any = None) -> Tensor:
        remembered = self.input_layernorm(memory) if memory is not None else None
        hidden = hidden + self.attention(self.input_layernorm(hidden), visible, remembered, past)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class BlankGlmTransformer(nn.Module):
    """Positions, layers and the last norm."""

    def __init__(self, config: BlankGlmConfig) -> None:
        super().__init__()
        rows = config.max_sequence_length + 1
        self.embedding_dropout = nn.Dropout(config.embedding_dropout_prob)
        if config.block_position_encoding:
            self.position_embeddings = nn.Embedding(rows, config.hidden_size)
            self.block_position_embeddings = nn.Embedding(rows, config.hidden_size)
        else:
            self.position_embeddings = nn.Embedding(config.max_sequence_length, config.hidden_size)
        self.layers = nn.ModuleList([BlankGlmLayer(config, i) for i in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)


class BlankGlmPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What all of them share."""

    config_class = BlankGlmConfig
    base_model_prefix = "glm"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[Any] = ["BlankGlmLayer"]
    _supports_sdpa = True


class BlankGlmModel(BlankGlmPreTrainedModel):
    """The transformer without a head."""

    def __init__(self, config: BlankGlmConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = BlankGlmTransformer(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mems: Sequence[Tensor] | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BlankGlmOutput:
        """Hidden states.

        Args:
            position_ids: `[B, 2, T]` as the original; `[B, T]` counts on, with zeros in the second row; none: arange.
            attention_mask: as the original: a number or `[B]` says how many first keys all see, the rest being causal (0 if
                none is given); `[B, 1, T, K]` is 1 where visible; `[B, T]` together with two-row positions is padding, and
                nothing is causal. `[B, K]` without two-row positions is transformers' padding mask of a causal model.
            mems: what an earlier call returned; past_key_values: transformers' cache, in its place.
        """
        embeds = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        rows, length = embeds.shape[:2]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        before = mems[0].shape[1] if mems is not None else 0
        if past_key_values is not None:
            before = past_key_values.get_seq_length()
        visible = _visible(attention_mask, position_ids, rows, length, before, embeds.device)
        hidden = self._embed(embeds, position_ids, attention_mask, before)
        states = [hidden]
        for index, layer in enumerate(self.transformer.layers):
            hidden = layer(hidden, visible, mems[index] if mems is not None else None, past_key_values)
            states.append(hidden)
        kept = tuple(
            s.detach() if mems is None else torch.cat([m, s.detach()], dim=1)
            for s, m in zip(states, mems if mems is not None else states, strict=True)
        )
        return BlankGlmOutput(
            last_hidden_state=self.transformer.final_layernorm(hidden),
            mems=kept,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _embed(self, embeds: Tensor, positions: Tensor | None, mask: Tensor | None, before: int) -> Tensor:
        rows, length = embeds.shape[:2]
        if positions is None:
            if mask is not None and mask.dim() == 2:
                positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
            else:
                positions = torch.arange(before, before + length, device=embeds.device).expand(rows, -1)
        transformer, limit = self.transformer, self.transformer.position_embeddings.num_embeddings
        if int(positions.max()) >= limit:
            raise ModelError(
                f"position {int(positions.max())} of a model that has {limit}", hint="shorten the text (max_length)"
            )
        if self.config.block_position_encoding:
            first, second = positions.unbind(1) if positions.dim() == 3 else (positions, torch.zeros_like(positions))
            embeds = embeds + transformer.position_embeddings(first) + transformer.block_position_embeddings(second)
        else:
            embeds = embeds + transformer.position_embeddings(positions[:, 0] if positions.dim() == 3 else positions)
        out: Tensor = transformer.embedding_dropout(embeds)
        return out


def _visible(
    mask: Tensor | None, positions: Tensor | None, rows: int, length: int, before: int, device: torch.device
) -> Tensor:
    """Bool `[B or 1, 1, T, before + T]` from any of the forms that `BlankGlmModel.forward` takes."""
    if mask is not None and mask.dim() == 4:
        return mask[..., -(before + length) :].bool()
    if mask is not None and mask.dim() == 3:
        return mask[:, None, :, -(before + length) :].bool()
    if mask is not None and mask.dim() == 2:
        real = mask.to(device).bool()
        if positions is not None and positions.dim() == 3:
            return real[:, None, None, -(before + length) :]
        everyone = torch.zeros(rows, dtype=torch.int64, device=device)
        return visible_prefix(everyone, real)[:, :, -length:]
    context = torch.as_tensor(0 if mask is None else mask, device=device).reshape(-1).expand(rows)
    own = visible_prefix(context, torch.ones(rows, length, dtype=torch.bool, device=device))
    return torch.cat([own.new_ones(rows, 1, length, before), own], dim=-1) if before else own


class BlankGlmForConditionalGeneration(BlankGlmPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """With the tied language-model head. `labels` are aligned with the inputs: the loss is not shifted."""

    _tied_weights_keys: ClassVar[Any] = {"lm_head.weight": "glm.word_embeddings.weight"}

    def __init__(self, config: BlankGlmConfig) -> None:
        super().__init__(config)
        self.glm = BlankGlmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        mems: Sequence[Tensor] | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BlankGlmOutput:
        """See `BlankGlmModel.forward`; labels of -100 carry no loss."""
        out: BlankGlmOutput = self.glm(
            input_ids,
            position_ids,
            attention_mask,
            mems,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(out.last_hidden_state)
        out.logits, out.loss = logits, aligned_loss(logits, labels)
        return out

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Fills the first blank of each row, or goes on after rows without a start-of-piece token.

        Takes `position_ids` `[B, 2, K]` and `generation_attention_mask` `[B, 1, K, K]` as the original did
        (`blank.generation_inputs`), or a plain `attention_mask` and finds both from the ids.
        """
        if kwargs.get("position_ids") is not None:
            kwargs["blank_positions"] = kwargs.pop("position_ids")
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        blank_positions: Tensor | None = None,
        generation_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The new tokens, with their part of masks and positions."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if blank_positions is None:
            blank_positions = blank_positions_of(self.config, input_ids, real)
        if generation_attention_mask is None:
            context = context_lengths(input_ids, self.config.sop_token_id)
            generation_attention_mask = visible_prefix(context, real.bool())
        kept = kwargs.get("use_cache", True)
        return new_part(input_ids, blank_positions, generation_attention_mask, past_key_values, kept)

    @torch.no_grad()
    def choose(self, choices: Choices) -> list[Tensor]:
        """Log-probabilities of the choices of each row (`blank.choice_inputs`): cloze classification."""
        inputs = {name: value.to(self.device) for name, value in choices.inputs.items()}
        return [found.cpu() for found in choice_logprobs(self(**inputs).logits, choices)]


def blank_positions_of(config: BlankGlmConfig, input_ids: Tensor, real: Tensor) -> Tensor:
    """Positions of rows by their ids, in as many rows as the model has."""
    positions = blank_positions(input_ids, real, config.mask_token_ids, config.sop_token_id)
    return positions if config.block_position_encoding else positions[:, 0]


class BlankGlmForSequenceClassification(BlankGlmPreTrainedModel):
    """A class (or one number) from the hidden state of `pool_token`: the first token, the first start-of-piece, or the last."""

    def __init__(self, config: BlankGlmConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.glm = BlankGlmModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits `[B, labels]`; masks and positions as in `BlankGlmModel.forward`."""
        hidden = self.glm(input_ids, position_ids, attention_mask, **kwargs).last_hidden_state
        place = torch.zeros_like(input_ids[:, 0])
        if self.config.pool_token == "start":
            place = context_lengths(input_ids, self.config.sop_token_id)
        elif self.config.pool_token == "pad":
            two = attention_mask is not None and attention_mask.dim() == 2
            real = attention_mask.long() if two and attention_mask is not None else torch.ones_like(input_ids)
            place = last_places(real)
        return classify_loss(self.score(self.dropout(at_places(hidden, place))), labels, self.config)


class BlankGlmForTokenClassification(TokenClasses, BlankGlmPreTrainedModel):
    """A class for every token; masks and positions as in `BlankGlmModel.forward`."""

    trunk = BlankGlmModel
    dropout_of = "classifier_dropout"


def _load(folder: Path, dtype: torch.dtype, scalar: bool) -> Any:
    config = config_of(folder)
    kind: Any = BlankGlmForConditionalGeneration
    if scalar:
        config.num_labels = 1
        kind = BlankGlmForSequenceClassification
    return load_own(kind, config, folder, dtype, blocks={"query_key_value": 3})


FAMILY = Family("GLM (blank infilling)", is_blank_glm, _load)
AutoConfig.register(BlankGlmConfig.model_type, BlankGlmConfig)
AutoModel.register(BlankGlmConfig, BlankGlmModel)
AutoModelForCausalLM.register(BlankGlmConfig, BlankGlmForConditionalGeneration)
AutoModelForSeq2SeqLM.register(BlankGlmConfig, BlankGlmForConditionalGeneration)
AutoModelForSequenceClassification.register(BlankGlmConfig, BlankGlmForSequenceClassification)
AutoModelForTokenClassification.register(BlankGlmConfig, BlankGlmForTokenClassification)
