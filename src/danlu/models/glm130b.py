"""GLM-130B (Zeng et al. 2023): DeepNorm, GeGLU, rotary positions, a context that is read both ways.

The block is that of ChatGLM-6B but for the activation and the residual's weight alpha, which follows the configured number of
layers here. Parameter names are the published ones (SwissArmyTransformer).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from danlu.exceptions import ModelError
from danlu.models.blank import BlankIds, Choices, choice_logprobs, context_lengths, mask_places, visible_prefix
from danlu.models.own import load_own, own_keys, read_config, token_ids
from danlu.models.own_heads import at_places, classify_loss, last_places, new_part, shifted_loss
from danlu.models.registry import Family

FILL = -10000.0
PUBLISHED_VOCABULARY = 150528
PUBLISHED_IDS = {"mask_token_id": 150000, "gmask_token_id": 150001, "sop_token_id": 150004, "eop_token_id": 150005}
NAMES = {"mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]", "sop_token_id": "sop", "eop_token_id": "eop"}
AGAIN = {"sop": "<sop>", "eop": "<eop>"}


class Glm130bConfig(PretrainedConfig):  # type: ignore[misc]
    """Keys as published.

    position_encoding_2d: half of each head is turned by the place in the context, half by the place in the span.
    mask_token_id: positions of a span stay at the mask; gmask_token_id: they go on counting (with one row of positions).
    """

    model_type = "danlu_glm_130b"
    attribute_map: ClassVar[Any] = {"num_hidden_layers": "num_layers", "max_position_embeddings": "max_sequence_length"}
    keys_to_ignore_at_inference: ClassVar[Any] = ["past_key_values"]

    def __init__(
        self,
        *,
        vocab_size: int = PUBLISHED_VOCABULARY,
        hidden_size: int = 12288,
        inner_hidden_size: int = 32768,
        num_layers: int = 70,
        num_attention_heads: int = 96,
        max_sequence_length: int = 2048,
        layernorm_order: str = "post",
        layernorm_epsilon: float = 1e-5,
        position_encoding_2d: bool = False,
        rotary_base: float = 10000.0,
        initializer_range: float = 0.0052,
        mask_token_id: int | None = None,
        gmask_token_id: int | None = None,
        sop_token_id: int | None = None,
        eop_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if layernorm_order != "post":
            raise ModelError(f"layernorm_order '{layernorm_order}' is not supported", field="layernorm_order")
        if kwargs.get("quantization_bit", 0) not in (0, 4, 8, None):
            raise ModelError(f"quantization_bit {kwargs['quantization_bit']} is not 4 or 8", field="quantization_bit")
        if hidden_size % num_attention_heads or (hidden_size // num_attention_heads) % (
            4 if position_encoding_2d else 2
        ):
            raise ModelError(
                f"{num_attention_heads} heads do not divide hidden_size {hidden_size}", field="hidden_size"
            )
        self.vocab_size, self.hidden_size, self.inner_hidden_size = vocab_size, hidden_size, inner_hidden_size
        self.num_layers, self.num_attention_heads = num_layers, num_attention_heads
        self.max_sequence_length, self.layernorm_order = max_sequence_length, layernorm_order
        self.layernorm_epsilon, self.position_encoding_2d = layernorm_epsilon, position_encoding_2d
        self.rotary_base, self.initializer_range = rotary_base, initializer_range
        self.mask_token_id, self.gmask_token_id = mask_token_id, gmask_token_id
        self.sop_token_id, self.eop_token_id = sop_token_id, eop_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def mask_token_ids(self) -> list[int]:
        """The tokens that stand for a blank, [gMASK] first."""
        return [i for i in (self.gmask_token_id, self.mask_token_id) if i is not None]

    def blank_ids(self) -> BlankIds:
        """The tokens of blank infilling.

        Raises:
            ModelError: the configuration does not name them.
        """
        if self.sop_token_id is None or self.eop_token_id is None or not self.mask_token_ids:
            raise ModelError(
                "this model does not say which tokens start and end a piece and which mask",
                hint="set sop_token_id, eop_token_id, mask_token_id and gmask_token_id in config.json",
            )
        pad = self.pad_token_id if self.pad_token_id is not None else 0
        return BlankIds(tuple(self.mask_token_ids), self.sop_token_id, self.eop_token_id, int(pad))


def positions_of(config: Glm130bConfig, input_ids_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Positions by ids: `[B, T]`, or `[B, 2, T]` with `position_encoding_2d`.

    They count the tokens; from the start-of-piece token on they stay at the mask, but for [gMASK] in one row they count on.
    """
    context = context_lengths(input_ids_BT, config.sop_token_id)
    plain = (real_BT.long().cumsum(1) - 1).clamp(min=0)
    generic = config.gmask_token_id
    has_generic = (
        (input_ids_BT == generic).any(1) if generic is not None else torch.zeros_like(context, dtype=torch.bool)
    )
    both = mask_places(input_ids_BT, context, config.mask_token_ids)
    alone = mask_places(input_ids_BT, context, [generic] if generic is not None else [])
    mask = plain.gather(1, torch.where(has_generic, alone, both)[:, None])
    place = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)[None]
    span = (place >= context[:, None]) & (context[:, None] > 0)
    if not config.position_encoding_2d:
        return torch.where(span & ~has_generic[:, None], mask, plain)
    second = torch.where(span, place - context[:, None] + 1, torch.zeros_like(plain))
    return torch.stack([torch.where(span, mask, plain), second], dim=1)


def rotate(states: Tensor, positions_BT: Tensor, base: float) -> Tensor:
    """Rotary positions (Su et al. 2021) in the half-and-half form over the last dimension of `[B, H, T, K]`; angles in fp32."""
    half = states.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=states.device, dtype=torch.float32) / half)
    angles = positions_BT[:, None, :, None].float() * frequencies
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Glm130bAttention(nn.Module):
    """The fused projection holds q, k and v head by head."""

    def __init__(self, config: Glm130bConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.layer, self.base = config.num_attention_heads, layer, config.rotary_base
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor, positions: Tensor, visible: Tensor, past: Any) -> Tensor:
        """positions: `[B, T]` or `[B, 2, T]`; visible: bool `[B, 1, T, K]`."""
        rows, length, width = hidden.shape
        fused = self.query_key_value(hidden).view(rows, length, self.heads, 3 * width // self.heads)
        q, k, v = (x.transpose(1, 2) for x in fused.chunk(3, dim=-1))
        q, k = self._turn(q, positions), self._turn(k, positions)
        if past is not None:
            k, v = past.update(k, v, self.layer)
        # The original divides queries by layer + 1 and multiplies masked scores by it: the same but for what masked ones get.
        fill = max(FILL * (self.layer + 1), float(torch.finfo(q.dtype).min))
        mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, fill)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        result: Tensor = self.dense(out.transpose(1, 2).reshape(rows, length, width))
        return result

    def _turn(self, states: Tensor, positions: Tensor) -> Tensor:
        if positions.dim() == 2:
            return rotate(states, positions, self.base)
        parts = zip(states.chunk(2, dim=-1), positions.unbind(1), strict=True)
        return torch.cat([rotate(part, row, self.base) for part, row in parts], dim=-1)


class Glm130bMlp(nn.Module):
    """GeGLU (Shazeer 2020): a * gelu(b) of the halves a, b."""

    def __init__(self, config: Glm130bConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        first, second = self.dense_h_to_4h(hidden).chunk(2, dim=-1)
        out: Tensor = self.dense_4h_to_h(first * functional.gelu(second))
        return out


class Glm130bLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """DeepNorm (Wang et al. 2022): the residual is the normalised input, alpha = sqrt(2 * layers) times."""

    def __init__(self, config: Glm130bConfig, layer: int) -> None:
        super().__init__()
        self.alpha = math.sqrt(2 * config.num_layers)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = Glm130bAttention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = Glm130bMlp(config)

    def forward(self, hidden: Tensor, positions: Tensor, visible: Tensor, past: Any = None) -> Tensor:
        normed = self.input_layernorm(hidden)
        middle = self.post_attention_layernorm(normed * self.alpha + self.attention(normed, positions, visible, past))
        out: Tensor = middle * self.alpha + self.mlp(middle)
        return out


class Glm130bPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What all of them share."""

    config_class = Glm130bConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[Any] = ["Glm130bLayer"]
    _keys_to_ignore_on_load_unexpected: ClassVar[Any] = [r"rotary_emb\.inv_freq"]


class Glm130bModel(Glm130bPreTrainedModel):
    """The transformer without a head."""

    def __init__(self, config: Glm130bConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Glm130bLayer(config, i) for i in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states.

        Args:
            position_ids: `[B, T]`, or `[B, 2, T]` with `position_encoding_2d`; none: found from the ids.
            attention_mask: as the original, true at what is hidden, `[B, 1, T, K]` (bool); or 1 at tokens and 0 at padding,
                `[B, K]`: then the part before a row's first start-of-piece token is read both ways, and all else causally.
        """
        if inputs_embeds is None and input_ids is None:
            raise ModelError("neither input_ids nor inputs_embeds are given")
        embeds = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        ids = input_ids if input_ids is not None else torch.full(embeds.shape[:2], -1, device=embeds.device)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        whole = torch.ones(ids.shape[0], before + ids.shape[1], dtype=torch.bool, device=ids.device)
        if attention_mask is not None and attention_mask.dim() == 4:
            visible = ~attention_mask[..., -whole.shape[1] :].bool()
        else:
            whole = whole if attention_mask is None else attention_mask.bool()
            context = context_lengths(ids, self.config.sop_token_id)
            context = torch.where(context > 0, context + before, context)
            visible = visible_prefix(context, whole)[:, :, before:]
        if position_ids is None:
            position_ids = self._positions(ids, whole, before)
        elif self.config.position_encoding_2d and position_ids.dim() == 2:
            position_ids = torch.stack([position_ids, torch.zeros_like(position_ids)], dim=1)
        hidden = embeds
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, position_ids, visible, past_key_values)
            states.append(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden),
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _positions(self, ids: Tensor, whole: Tensor, before: int) -> Tensor:
        if not before:
            return positions_of(self.config, ids, whole)
        plain = (whole.long().cumsum(1) - 1).clamp(min=0)[:, before:]
        return torch.stack([plain, torch.zeros_like(plain)], dim=1) if self.config.position_encoding_2d else plain


class Glm130bForCausalLM(Glm130bPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """With the tied language-model head."""

    _tied_weights_keys: ClassVar[Any] = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: Glm130bConfig) -> None:
        super().__init__(config)
        self.transformer = Glm130bModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See `Glm130bModel.forward`; labels are those of causal models: token t is predicted at t - 1, -100 carries no loss."""
        out = self.transformer(
            input_ids, position_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache, **kwargs
        )
        logits = self.lm_head(out.last_hidden_state)
        loss = shifted_loss(logits, labels)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Takes the original's `[B, 1, K, K]` mask (true is hidden) and positions for the whole text, or a plain mask."""
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            kwargs["hidden_mask"] = kwargs.pop("attention_mask")
        if kwargs.get("position_ids") is not None:
            kwargs["span_positions"] = kwargs.pop("position_ids")
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        span_positions: Tensor | None = None,
        hidden_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The new tokens, with their part of masks and positions; what was not given for them goes on from the ids."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if span_positions is None:
            span_positions = positions_of(self.config, input_ids, real)
        if hidden_mask is None:
            context = context_lengths(input_ids, self.config.sop_token_id)
            hidden_mask = ~visible_prefix(context, real.bool())
        return new_part(input_ids, span_positions, hidden_mask, past_key_values, kwargs.get("use_cache", True))

    @torch.no_grad()
    def choose(self, choices: Choices) -> list[Tensor]:
        """Log-probabilities of the choices of each row (`blank.choice_inputs`): cloze classification."""
        inputs = {name: value.to(self.device) for name, value in choices.inputs.items()}
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        if not self.config.position_encoding_2d:
            first, inside = positions.unbind(1)
            generic = (ids == self.config.gmask_token_id).any(1, keepdim=True) & (inside > 0)
            context = (ids == self.config.sop_token_id).int().argmax(1, keepdim=True)
            positions = torch.where(generic, context + inside - 1, first)
        logits = self(ids, positions, ~inputs["attention_mask"].bool()).logits
        return [found.cpu() for found in choice_logprobs(logits, choices)]


class Glm130bForSequenceClassification(Glm130bPreTrainedModel):
    """Numbers or classes from the last token of a row: reward models and critics."""

    def __init__(self, config: Glm130bConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = Glm130bModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Logits `[B, labels]`; attention_mask `[B, T]` is 0 at padding."""
        hidden = self.transformer(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return classify_loss(self.score(at_places(hidden, last_places(real))), labels, self.config)


def is_glm_130b(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this family."""
    return config.get("model_type") in ("glm-130b", "glm_130b", Glm130bConfig.model_type)


def config_of(folder: Path) -> Glm130bConfig:
    """The configuration of a folder; special ids from its tokenizer files, or the published ones for the published vocabulary."""
    keys = own_keys(read_config(folder))
    named = token_ids(folder)
    for field, text in NAMES.items():
        if keys.get(field) is None:
            found = named.get(text, named.get(AGAIN.get(text, text)))
            published = PUBLISHED_IDS[field] if keys.get("vocab_size") == PUBLISHED_VOCABULARY else None
            keys[field] = found if found is not None else published
    return Glm130bConfig(**keys)


def _load(folder: Path, dtype: torch.dtype, scalar: bool) -> Any:
    config = config_of(folder)
    kind: Any = Glm130bForCausalLM
    if scalar:
        config.num_labels = 1
        kind = Glm130bForSequenceClassification
    return load_own(kind, config, folder, dtype, blocks={"dense_h_to_4h": 2})


FAMILY = Family("GLM-130B", is_glm_130b, _load)
AutoConfig.register(Glm130bConfig.model_type, Glm130bConfig)
AutoModel.register(Glm130bConfig, Glm130bModel)
AutoModelForCausalLM.register(Glm130bConfig, Glm130bForCausalLM)
AutoModelForSequenceClassification.register(Glm130bConfig, Glm130bForSequenceClassification)
