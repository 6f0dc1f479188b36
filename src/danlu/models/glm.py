"""GLM (Du et al. 2022), the blank-infilling model of 2021: pre-LN GPT-2 blocks, learned positions in two rows, prefix masks.

Its published configurations say `model_type: glm`, as transformers' own GLM-4 does; keys tell them apart. Parameter names are
those of the published transformers port, and of the training repository's checkpoints without `glm.`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from transformers.configuration_utils import PretrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel

from danlu.exceptions import ModelError
from danlu.models.blank import BlankIds, Choices, blank_positions, choice_logprobs, context_lengths, visible_prefix
from danlu.models.own import classify_loss, load_own, own_keys, read_config, token_ids
from danlu.models.registry import Family

FILL = -65504.0  # what the original adds to scores that are masked
ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}


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

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.word_embeddings = value

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

    def get_input_embeddings(self) -> nn.Module:
        return self.glm.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.glm.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm_head = new_embeddings

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
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        out.logits, out.loss = logits, loss
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
        total = input_ids.shape[1]
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if blank_positions is None:
            blank_positions = blank_positions_of(self.config, input_ids, real)
        if generation_attention_mask is None:
            context = context_lengths(input_ids, self.config.sop_token_id)
            generation_attention_mask = visible_prefix(context, real.bool())
        if total > min(blank_positions.shape[-1], generation_attention_mask.shape[-1]):
            raise ModelError(
                f"{total} tokens, but positions and mask were given for {blank_positions.shape[-1]}",
                hint="build the inputs with more room, or generate fewer tokens",
            )
        return {
            "input_ids": input_ids[:, before:],
            "position_ids": blank_positions[..., before:total],
            "attention_mask": generation_attention_mask[:, :, before:total, :total],
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
        }

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
            place = (real * torch.arange(input_ids.shape[1], device=input_ids.device)).argmax(1)
        pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), place]
        return classify_loss(self.score(self.dropout(pooled)), labels, self.config)


class BlankGlmForTokenClassification(BlankGlmPreTrainedModel):
    """A class for every token."""

    def __init__(self, config: BlankGlmConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.glm = BlankGlmModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits `[B, T, labels]`; labels of -100 carry no loss."""
        hidden = self.glm(input_ids, position_ids, attention_mask, **kwargs).last_hidden_state
        return classify_loss(self.score(self.dropout(hidden)), labels, self.config)


# -- published folders ---------------------------------------------------------------------------------------------------

NAMES = {"sop": "<|startofpiece|>", "eop": "<|endofpiece|>"}
BLANKS = ("[MASK]", "[sMASK]", "[gMASK]")
# Where a folder has no tokenizer file that names them: the fixed numbering of the two published vocabularies.
CHINESE = {"<|startofpiece|>": 50006, "<|endofpiece|>": 50007, "[MASK]": 50003, "[sMASK]": 50008, "[gMASK]": 50009}
ENGLISH = {"<|startofpiece|>": 50257, "<|endofpiece|>": 50258, "[MASK]": 50260, "[gMASK]": 50263, "[sMASK]": 50264}
NUMBERING = {50048: CHINESE, 50304: ENGLISH}


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
