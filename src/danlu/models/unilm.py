"""UniLM (Dong et al. 2019): one post-LN encoder whose mask says what it is: bidirectional, left to right, right to left, seq2seq.

A token is predicted where [MASK] stands, in every mode. Folders with the names of BERT (`bert.*`, `cls.predictions.*`), in which
the published weights are, are read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel

from danlu.exceptions import ModelError
from danlu.models.own import load_own, own_keys, read_config
from danlu.models.own_heads import TokenClasses, aligned_loss, classify_loss
from danlu.models.registry import Family

MODES = ("bidirectional", "left-to-right", "right-to-left", "seq2seq")
# Segment ids of the published model: by mode, for the first part and for the second.
SEGMENTS = {6: ((0, 1), (2, 2), (3, 3), (4, 5)), 2: ((0, 1), (0, 0), (0, 0), (0, 1)), 1: ((0, 0),) * 4}


class UniLmConfig(PretrainedConfig):  # type: ignore[misc]
    """Keys as BERT's.

    type_vocab_size: 6 segments as the published model (a pair of them for two modes, one for each of the others), 2 or 1.
    mask_token_id: what stands where a token is to be predicted.
    """

    model_type = "danlu_unilm"
    attribute_map: ClassVar[Any] = {"num_layers": "num_hidden_layers"}

    def __init__(
        self,
        *,
        vocab_size: int = 28996,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 6,
        layer_norm_eps: float = 1e-12,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        initializer_range: float = 0.02,
        mask_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if hidden_act != "gelu":
            raise ModelError(f"hidden_act '{hidden_act}' is not supported", field="hidden_act")
        if hidden_size % num_attention_heads:
            raise ModelError(
                f"hidden_size {hidden_size} is no multiple of {num_attention_heads} heads", field="hidden_size"
            )
        if type_vocab_size not in SEGMENTS:
            raise ModelError(f"type_vocab_size is {type_vocab_size}; known: 6, 2, 1", field="type_vocab_size")
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.max_position_embeddings, self.type_vocab_size = max_position_embeddings, type_vocab_size
        self.layer_norm_eps, self.hidden_act = layer_norm_eps, hidden_act
        self.hidden_dropout_prob, self.attention_probs_dropout_prob = hidden_dropout_prob, attention_probs_dropout_prob
        self.initializer_range, self.mask_token_id = initializer_range, mask_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def visible_by_mode(modes_B: Tensor, sources_B: Tensor, real_BT: Tensor) -> Tensor:
    """Bool `[B, 1, T, T]`, true where a query (row) sees a key (column): figure 1 of the paper.

    Args:
        modes_B: index into `MODES`.
        sources_B: tokens of the first part (seq2seq): they see one another, the rest sees them and what stands before.
        real_BT: false at padding, which nobody sees.
    """
    place = torch.arange(real_BT.shape[1], device=real_BT.device)
    query, key = place[None, :, None], place[None, None, :]
    mode, source = modes_B[:, None, None], sources_B[:, None, None]
    seen = (mode == 0) | ((mode == 1) & (key <= query)) | ((mode == 2) & (key >= query))
    seen = seen | ((mode == 3) & ((key < source) | ((query >= source) & (key <= query))))
    visible: Tensor = seen & real_BT[:, None, :].bool()
    return visible[:, None]


class UniLmAttention(nn.Module):
    """Multi-head attention."""

    def __init__(self, config: UniLmConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor, visible: Tensor) -> Tensor:
        """visible: bool `[B, 1, T, T]`."""
        rows, length, width = hidden.shape
        q, k, v = (
            f(hidden).view(rows, length, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        # A number and not -inf: a row of padding may see nothing at all.
        fill = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -10000.0)
        dropout = self.dropout if self.training else 0.0
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=fill, dropout_p=dropout)
        result: Tensor = self.dense(out.transpose(1, 2).reshape(rows, length, width))
        return result


class UniLmLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Post-LN block (Devlin et al. 2019)."""

    def __init__(self, config: UniLmConfig) -> None:
        super().__init__()
        self.attention = UniLmAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, visible: Tensor) -> Tensor:
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, visible)))
        out: Tensor = self.output_norm(hidden + self.dropout(self.down(functional.gelu(self.up(hidden)))))
        return out


class UniLmPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What all of them share."""

    config_class = UniLmConfig
    base_model_prefix = "unilm"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[Any] = ["UniLmLayer"]


class UniLmModel(UniLmPreTrainedModel):
    """Embeddings, layers, and the transformation before the head."""

    def __init__(self, config: UniLmConfig) -> None:
        super().__init__(config)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.segment_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.embedding_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList([UniLmLayer(config) for _ in range(config.num_hidden_layers)])
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width, eps=eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        modes: Tensor | None = None,
        sources: Tensor | None = None,
        output_hidden_states: bool | None = None,
        for_head: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Hidden states.

        Args:
            attention_mask: `[B, T]`, 0 at padding; or `[B, T, T]` or `[B, 1, T, T]`, 1 where visible, in place of modes.
            token_type_ids: segments; by default those of the modes.
            modes: `[B]`, index into `MODES`; bidirectional by default. sources: `[B]`, tokens of the first part, for seq2seq
                and for pairs (by default all).
            for_head: whether the result is transformed for the language-model head.
        """
        rows, length = input_ids.shape
        if length > self.config.max_position_embeddings:
            raise ModelError(
                f"{length} tokens for a model of {self.config.max_position_embeddings} positions",
                hint="lower max_length",
            )
        device = input_ids.device
        modes = torch.zeros(rows, dtype=torch.int64, device=device) if modes is None else modes
        sources = torch.full((rows,), length, device=device) if sources is None else sources
        place = torch.arange(length, device=device)
        if attention_mask is not None and attention_mask.dim() > 2:
            visible = attention_mask.bool()
            visible = visible[:, None] if visible.dim() == 3 else visible
        else:
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            visible = visible_by_mode(modes, sources, real)
        if token_type_ids is None:
            table = torch.tensor(SEGMENTS[self.config.type_vocab_size], device=device)
            second = (place[None] >= sources[:, None]).long()
            token_type_ids = table[modes].gather(1, second)
        positions = place[None] if position_ids is None else position_ids
        embeds = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        hidden = self.dropout(self.embedding_norm(embeds + self.segment_embeddings(token_type_ids)))
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, visible)
            states.append(hidden)
        if for_head:
            hidden = self.transform_norm(functional.gelu(self.transform(hidden)))
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=tuple(states) if output_hidden_states else None)


class UniLmForMaskedLM(UniLmPreTrainedModel):
    """With the tied head and its bias."""

    _tied_weights_keys: ClassVar[Any] = {"decoder.weight": "unilm.word_embeddings.weight"}

    def __init__(self, config: UniLmConfig) -> None:
        super().__init__(config)
        self.unilm = UniLmModel(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.decoder = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """See `UniLmModel.forward`; labels are aligned with the inputs, -100 carries no loss."""
        out = self.unilm(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)
        logits = self.decoder(out.last_hidden_state)
        return MaskedLMOutput(loss=aligned_loss(logits, labels), logits=logits, hidden_states=out.hidden_states)

    @torch.no_grad()
    def score(self, input_ids: Tensor, mode: str, source: int | None = None) -> Tensor:
        """Log-probability of every token of one row `[T]`, each when [MASK] stands in its place; fp32.

        Args:
            input_ids: `[T]`; mode: one of `MODES`; source: tokens of the first part (seq2seq), which get 0.

        Raises:
            ModelError: the configuration names no mask token.
        """
        length, mask = input_ids.shape[0], self._mask_id()
        rows = input_ids.repeat(length, 1)
        rows.fill_diagonal_(mask)
        modes = torch.full((length,), MODES.index(mode), device=rows.device)
        first = length if source is None else source
        logits = self(rows, modes=modes, sources=torch.full((length,), first, device=rows.device)).logits
        place = torch.arange(length, device=rows.device)
        found = torch.log_softmax(logits[place, place].float(), dim=-1).gather(1, input_ids[:, None]).squeeze(1)
        return found.masked_fill(place < first, 0.0) if mode == "seq2seq" else found

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int = 20,
        eos_token_id: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Goes on after one row `[1, T]`, which is the source: a [MASK] is put behind and replaced, again and again.

        Raises:
            ModelError: more than one row, or the configuration names no mask token.
        """
        if input_ids.shape[0] != 1:
            raise ModelError("UniLM generates one row at a time", hint="call generate for each row")
        mask, source = self._mask_id(), torch.tensor([input_ids.shape[1]], device=input_ids.device)
        modes = torch.full_like(source, MODES.index("seq2seq"))
        for _ in range(max_new_tokens):
            asked = torch.cat([input_ids, input_ids.new_full((1, 1), mask)], dim=1)
            logits = self(asked, modes=modes, sources=source).logits[:, -1].float()
            token = logits.argmax(-1, keepdim=True)
            if do_sample:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            input_ids = torch.cat([input_ids, token], dim=1)
            if eos_token_id is not None and int(token) == eos_token_id:
                break
        return input_ids

    def _mask_id(self) -> int:
        if self.config.mask_token_id is None:
            raise ModelError("config.json names no mask token", field="mask_token_id", hint="set mask_token_id")
        return int(self.config.mask_token_id)


class UniLmForSequenceClassification(UniLmPreTrainedModel):
    """A class (or one number) from the first token's hidden state, read both ways."""

    def __init__(self, config: UniLmConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.unilm = UniLmModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Logits `[B, labels]`."""
        hidden = self.unilm(input_ids, attention_mask, for_head=False, **kwargs).last_hidden_state
        return classify_loss(self.score(self.dropout(hidden[:, 0])), labels, self.config)


class UniLmForTokenClassification(TokenClasses, UniLmPreTrainedModel):
    """A class for every token, read both ways."""

    trunk = UniLmModel
    dropout_of = "hidden_dropout_prob"
    options: ClassVar[dict[str, Any]] = {"for_head": False}


# BERT's names -> ours; both BERT's and TensorFlow's names of a norm occur in published files.
RENAMED = {
    "bert.embeddings.word_embeddings": "unilm.word_embeddings",
    "bert.embeddings.position_embeddings": "unilm.position_embeddings",
    "bert.embeddings.token_type_embeddings": "unilm.segment_embeddings",
    "bert.embeddings.LayerNorm": "unilm.embedding_norm",
    "bert.encoder.layer": "unilm.layers",
    "attention.self.": "attention.",
    "attention.output.dense": "attention.dense",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "output_norm",
    "cls.predictions.transform.dense": "unilm.transform",
    "cls.predictions.transform.LayerNorm": "unilm.transform_norm",
    "cls.predictions.bias": "decoder.bias",
    "cls.predictions.decoder": "decoder",
    "norm.gamma": "norm.weight",
    "norm.beta": "norm.bias",
}


def own_name(name: str) -> str:
    """Our name of a parameter of a BERT-like file."""
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def is_unilm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this family: by its type, or six segments (BERT has two)."""
    kind = config.get("model_type")
    published = kind in (None, "unilm", "bert") and config.get("type_vocab_size") == 6
    return kind in (UniLmConfig.model_type, "unilm") or published


def _load(folder: Path, dtype: torch.dtype, scalar: bool) -> Any:
    keys = read_config(folder)
    config = UniLmConfig(**own_keys(keys, "position_embedding_type", "pooler_type"))
    if config.mask_token_id is None and (folder / "vocab.txt").is_file():
        words = (folder / "vocab.txt").read_text("utf-8").split("\n")
        config.mask_token_id = words.index("[MASK]") if "[MASK]" in words else None
    kind: Any = UniLmForMaskedLM
    if scalar:
        config.num_labels = 1
        kind = UniLmForSequenceClassification
    return load_own(kind, config, folder, dtype, blocks={}, rename=own_name)


FAMILY = Family("UniLM", is_unilm, _load)
AutoConfig.register(UniLmConfig.model_type, UniLmConfig)
AutoModel.register(UniLmConfig, UniLmModel)
AutoModelForMaskedLM.register(UniLmConfig, UniLmForMaskedLM)
AutoModelForSequenceClassification.register(UniLmConfig, UniLmForSequenceClassification)
AutoModelForTokenClassification.register(UniLmConfig, UniLmForTokenClassification)
