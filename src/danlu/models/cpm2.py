"""CPM-2, mapped onto transformers' T5 v1.1, with what T5 lacks: prompt embeddings, and masks as the original takes them.

An encoder-decoder with RMS norms, relative position buckets, a gated tanh GELU (whatever its configuration says) and a head of
its own (Zhang et al. 2021, CPM-2: Large-scale Cost-effective Pre-trained Language Models).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from danlu.exceptions import ModelError
from danlu.models.megatron import columns, joined, replicated, rows, whole_state
from danlu.models.weights import build, checked

MARK: Final = "danlu_family"  # in the config.json of what we save, whose model_type is T5's
PAD, END, GO, PROMPTS = 5, 7, 1, "prompt_embeds.weight"
SPLITS: Final = (
    ("word_embeds.weight", rows(1)),
    ("lm_head.weight", rows(1)),
    ("project_q.weight", rows(1)),
    ("project_kv.weight", rows(2)),
    ("project.weight", rows(3)),
    ("wi_0.weight", rows(1)),
    ("wi_1.weight", rows(1)),
    ("relative_attention_bias.weight", columns),
    ("dense.weight", columns),
    ("wo.weight", columns),
    ("", replicated),
)
SIZES: Final = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size")


def says(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of CPM-2; one without a model_type is told by its keys."""
    kind = config.get("model_type")
    return kind == "cpm2" or config.get(MARK) == "cpm2" or (not kind and "do_dim_trick" in config)


def t5_config(config: Mapping[str, Any]) -> Any:
    """The T5 v1.1 configuration of a CPM-2 config.json.

    Raises:
        ModelError: a size is missing, or it asks for an option that no published model has.
    """
    missing = [name for name in SIZES if name not in config]
    if missing:
        raise ModelError(f"CPM-2's config.json has no {', '.join(missing)}", field=missing[0])
    if config.get("do_dim_trick"):
        raise ModelError("CPM-2 with do_dim_trick is not supported", field="do_dim_trick", hint="set it to false")
    return T5Config(
        **{name: config[name] for name in SIZES},
        num_decoder_layers=config["num_layers"],  # the original ignores num_decoder_layers
        relative_attention_num_buckets=config.get("relative_attention_num_buckets", 32),
        relative_attention_max_distance=128,
        dropout_rate=config.get("dropout_rate", 0.1),
        layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-6),
        feed_forward_proj="gated-gelu",  # whatever feed_forward_proj says
        tie_word_embeddings=False,
        pad_token_id=config.get("pad_token_id", PAD),
        eos_token_id=config.get("eos_token_id", END),
        decoder_start_token_id=config.get("decoder_start_token_id", GO),
        n_positions=config.get("max_position_embeddings", 512),
        **{MARK: "cpm2"},
    )


def t5_state(shards: Sequence[Mapping[str, Tensor]], vocabulary: int) -> dict[str, Tensor]:
    """CPM-2's weights under T5's names, fused projections taken apart.

    Args:
        shards: one, or one a rank of Megatron's model parallelism.
        vocabulary: rows of embedding and head; what pads them is cut off.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in joined(shards, SPLITS).items():
        if name in ("encoder.word_embeds.weight", "decoder.word_embeds.weight"):
            continue  # the shared embedding once more
        state |= dict(_parts(name, tensor))
    for table in ("shared.weight", "lm_head.weight"):
        if table in state:
            state[table] = state[table][:vocabulary].clone()
    return state


def _parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    plain = {"word_embeds.weight": "shared.weight", "encoder.prompt_embeds.weight": PROMPTS}
    if name in plain or ".blocks." not in name:
        return [(plain.get(name, name.replace(".final_layernorm.", ".final_layer_norm.")), tensor)]
    side, _, number, rest = name.split(".", 3)
    layer = f"{side}.block.{number}.layer"
    last = 2 if side == "decoder" else 1
    part, _, inner = rest.partition(".")
    place, kind = {"self_attn": (0, "SelfAttention"), "cross_attn": (1, "EncDecAttention"), "ff": (last, "")}[part]
    if inner.startswith("layer_norm."):
        return [(f"{layer}.{place}.{inner}", tensor)]
    if part == "ff":
        return [(f"{layer}.{place}.{inner.replace('dense_relu_dense', 'DenseReluDense')}", tensor)]
    inner = inner.partition(".")[2]
    target = f"{layer}.{place}.{kind}"
    fused = {"project": "qkv", "project_q": "q", "project_kv": "kv"}.get(inner.removesuffix(".weight"))
    if fused:
        chunks = tensor.chunk(len(fused))
        return [(f"{target}.{one}.weight", c.clone()) for one, c in zip(fused, chunks, strict=True)]
    return [(f"{target}.{inner.replace('dense.', 'o.')}", tensor)]


class Cpm2ForConditionalGeneration(T5ForConditionalGeneration):  # type: ignore[misc]
    """T5 v1.1, which also takes the original's inputs.

    Masks may have four dimensions, `[b, 1, queries, keys]` with 1 where a token is seen; the original's argument names are
    known beside T5's. In the encoder's ids, -k is the k-th prompt embedding.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        prompts = getattr(config, "prompt_tokens", 0)
        self.prompt_embeds = nn.Embedding(prompts, config.d_model) if prompts else None

    def embedded(self, ids: Tensor) -> Tensor:
        """What the encoder reads for ids, of which negative ones are prompts.

        Raises:
            ModelError: there is no such prompt embedding.
        """
        words: Tensor = self.shared(ids.clamp(min=0))
        if not bool((ids < 0).any()):
            return words
        count = self.prompt_embeds.num_embeddings if self.prompt_embeds is not None else 0
        if self.prompt_embeds is None or int(ids.min()) < -count:
            raise ModelError(f"the id {int(ids.min())} asks for a prompt embedding, and this model has {count}")
        prompts = self.prompt_embeds((-ids - 1).clamp(min=0))
        return torch.where((ids < 0)[..., None], prompts, words)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        enc_input_ids: Tensor | None = None,
        enc_attention_mask: Tensor | None = None,
        dec_input_ids: Tensor | None = None,
        dec_attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """See the class. `cross_attention_mask` `[b, 1, targets, sources]`: left out, it is the encoder's mask of keys."""
        input_ids = input_ids if input_ids is not None else enc_input_ids
        decoder_input_ids = decoder_input_ids if decoder_input_ids is not None else dec_input_ids
        source_mask = attention_mask if attention_mask is not None else enc_attention_mask
        target_mask = decoder_attention_mask if decoder_attention_mask is not None else dec_attention_mask
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = self._shift_right(labels)
        if cross_attention_mask is None and source_mask is not None:
            four = source_mask.dim() == 4
            cross_attention_mask = source_mask.amax(dim=2, keepdim=True) if four else source_mask
        dtype = self.shared.weight.dtype
        if encoder_outputs is None:
            if inputs_embeds is None and input_ids is not None:
                inputs_embeds = self.embedded(input_ids)
            encoder_outputs = self.encoder(
                inputs_embeds=inputs_embeds, attention_mask=_added(source_mask, dtype), **_shown(options)
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(last_hidden_state=encoder_outputs[0])
        options.pop("return_dict", None)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=_added(target_mask, dtype),
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=_added(cross_attention_mask, dtype),
            **options,
        )
        logits = self.lm_head(decoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )


def _shown(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k in ("output_hidden_states", "output_attentions")}


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Masks of two dimensions are transformers' own; of four, zeros and ones become what is added to scores."""
    if mask is None or mask.dim() != 4 or (mask.dtype != torch.bool and float(mask.min()) < 0.0):
        return mask
    return (1.0 - mask.to(dtype)) * torch.finfo(dtype).min


def load(folder: Path, dtype: torch.dtype, scalar: bool) -> Any:
    """A T5 model with the weights of a CPM-2 folder, the original's or one that danlu saved.

    Raises:
        ModelError: a scalar head is wanted, weights are missing, or they do not fit the configuration.
    """
    if scalar:
        raise ModelError("CPM-2 is an encoder-decoder; reward models and critics are decoders", file=folder)
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    if raw.get("model_type") == "t5":
        return checked(
            lambda: Cpm2ForConditionalGeneration.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                attn_implementation="eager",
            ),
            folder,
        )
    config = t5_config(raw)
    state = t5_state(whole_state(folder), config.vocab_size)
    if PROMPTS in state:
        config.prompt_tokens = len(state[PROMPTS])
    return build(Cpm2ForConditionalGeneration, config, state, dtype, folder)
