"""What ChatGLM's generations share: heads with their losses, caches, quantised blocks, and loading of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from danlu.exceptions import ModelError
from danlu.models.chatglm_prefix import NAME, prefix_file
from danlu.models.chatglm_quantized import LARGEST, put_empty, quantize_blocks
from danlu.models.weights import check_weights, checked
from danlu.text.tokenizer import quiet

IGNORED = -100  # labels that take no loss
PASSED = ("output_hidden_states", "return_dict", "logits_to_keep")  # from `generate` to each step


def cache_of(past_key_values: Any, use_cache: bool) -> Any:
    """The cache of a forward pass: the given one, a new one, or None.

    Args:
        past_key_values: a transformers cache, None, or the original's tuple of `(key, value)` `[S, B, H, K]` per layer.
    """
    if isinstance(past_key_values, tuple | list):
        cache = DynamicCache()
        for layer, pair in enumerate(past_key_values):
            key, value = (x.permute(1, 2, 0, 3) for x in pair)
            cache.update(key, value, layer)
        return cache
    return DynamicCache() if past_key_values is None and use_cache else past_key_values


def with_prefix(key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, H, T, K]` behind those of virtual tokens."""
    if prefix is None:
        return key, value
    return torch.cat([prefix[0].to(key.dtype), key], dim=2), torch.cat([prefix[1].to(value.dtype), value], dim=2)


def open_quantized(config: Any, blocks: nn.Module) -> None:
    """Makes the blocks ready for quantised weights if config.json says so."""
    if config.quantization_bit:
        if config.quantization_bit not in LARGEST:
            raise ModelError(f"found {config.quantization_bit}, expected 8 or 4", field="quantization_bit")
        put_empty(blocks, config.quantization_bit)


class CausalHead:
    """Logits, loss and quantisation of a model whose `transformer` makes hidden states."""

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits `[B, T, V]`, and the loss where there are labels: fp32 cross entropy of the next token, -100 ignored.

        Args:
            logits_to_keep: of the last tokens alone; 0: of all. Others: see the transformer's `forward`.
        """
        found = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        logits = self.get_output_embeddings()(found.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            flat = logits[:, :-1].flatten(0, 1).float()
            loss = nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=found.past_key_values, hidden_states=found.hidden_states
        )
        return output if return_dict is not False else output.to_tuple()

    def quantize(self: Any, bits: int, *_: Any, **__: Any) -> Any:
        """Packs the blocks' linear layers into ChatGLM's int8 or int4, in place; returns the model.

        Raises:
            ModelError: bits are neither 8 nor 4, or it is quantised otherwise already.
        """
        if self.quantized and self.config.quantization_bit != bits:
            raise ModelError(
                f"the model is quantised to {self.config.quantization_bit} bits already",
                hint="quantise the model it was made from",
            )
        if not self.quantized:
            quantize_blocks(self.blocks, bits)
            self.config.quantization_bit = bits
        return self


class ScoreHead:
    """Scores of a text, read at its last token by the linear layer `score`."""

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """`logits` `[B, num_labels]`; the loss is the squared error for one label, else cross entropy.

        Args:
            attention_mask: the last 1 of a row is its last token. Without a 2-D mask that is the last token that is not the
                padding token.
        """
        found = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        hidden = found.last_hidden_state
        real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -hidden.shape[1] :].bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        place = torch.arange(hidden.shape[1], device=hidden.device)
        last = (place * real).argmax(1)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        loss = None
        if labels is not None:
            one = self.config.num_labels == 1
            loss = (
                nn.functional.mse_loss(logits[:, 0].float(), labels.float())
                if one
                else nn.functional.cross_entropy(logits.float(), labels)
            )
        output = SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=found.past_key_values, hidden_states=found.hidden_states
        )
        return output if return_dict is not False else output.to_tuple()


def load_folder(kind: Any, config: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model of a class from a folder's weights, safetensors or `.bin`, whole or in shards.

    A saved prefix encoder beside them is applied; quantised blocks stay packed. A head of scores that is not there is left to
    the caller (`load_model` makes it 0).

    Raises:
        ModelError: weights are missing, damaged, or do not fit the configuration.
    """
    quiet()
    check_weights(folder)
    if issubclass(kind, ScoreHead):
        config.num_labels = 1
    try:
        return checked(
            lambda: kind.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the shapes can be told
                attn_implementation="eager",
            ),
            folder,
            absent=lambda name: name.startswith("score."),
        )
    except ModelError as error:
        if NAME in error.message and prefix_file(folder) is None:
            error.hint = "put the saved prefix encoder beside the weights, or take pre_seq_len out of config.json"
        raise
