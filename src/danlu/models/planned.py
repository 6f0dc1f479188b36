"""Attention by a plan for families of transformers whose layers call no attention interface: BLOOM, CodeGen, GPT-J and Falcon.

Their attention modules become subclasses of themselves, with the same parameters, that project, rotate and hand over to
`tree_attention` while the model's attention implementation is danlu's, and do what they did under any other. ALiBi (Press et al.
2022) is a `KeyBias` that the plan adds to its scores.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from danlu.models.attention import NAME, KeyBias, tree_attention


def alibi_slopes(heads: int) -> Tensor:
    """`[H, 1]`: 2^(-8/n), 2^(-16/n), ... for the power of two n below H; the heads beyond it take every second one of 2n heads."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return torch.tensor(slopes)[:, None]


def install(trunk: Any) -> None:
    """Lets the attention of a trunk take a plan where its family is one of these."""
    kinds = _kinds(trunk.config.model_type)
    bias = _bias(trunk.config)  # one for all layers, so that a plan works it out once
    for module in [m for m in trunk.modules() if type(m) in kinds]:
        module.__class__ = kinds[type(module)]
        module.config, module.danlu_key_bias = trunk.config, bias
    if kinds:
        trunk.config._attn_implementation = NAME  # transformers lets nobody choose another one for these


def _bias(config: Any) -> KeyBias | None:
    if config.model_type == "bloom":
        return KeyBias(alibi_slopes(config.n_head))
    if config.model_type == "falcon" and config.alibi:
        scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        return KeyBias(alibi_slopes(config.num_attention_heads), scale, torch.bfloat16)
    return None


def _planned(module: Any) -> bool:
    return bool(module.config._attn_implementation == NAME)


@functools.cache
def _kinds(family: str) -> dict[type[nn.Module], type[nn.Module]]:
    """Attention classes of a family, and what they become. Imported when asked for: modeling files are slow to load."""
    made = {"bloom": _bloom, "codegen": _codegen, "gptj": _gptj, "falcon": _falcon}.get(family)
    return made() if made is not None else {}


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """query [1, H, T, K], key and value [1, G, T, K] -> [1, T, H, K]."""
    options = {"dropout": dropout if module.training else 0.0, "key_bias": module.danlu_key_bias}
    # Rotary tables stay fp32 in a model of 16 bits, and so does what they have turned.
    query, key = query.to(value.dtype), key.to(value.dtype)
    mixed, _ = tree_attention(module, query, key, value, None, **options)
    return mixed


def _bloom() -> dict[type[nn.Module], type[nn.Module]]:
    from transformers.models.bloom.modeling_bloom import BloomAttention

    class PlannedBloomAttention(BloomAttention):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not _planned(self):
                return super().forward(hidden_states, residual, *args, **kwargs)
            query, key, value = self._reshape(self.query_key_value(hidden_states))
            mixed = _attend(self, query, key, value, self.attention_dropout.p)
            out = self.dense(mixed.flatten(2))
            return residual + nn.functional.dropout(out, self.hidden_dropout, self.training), None

    return {BloomAttention: PlannedBloomAttention}


def _sinusoidal(kind: Any) -> dict[type[nn.Module], type[nn.Module]]:
    """GPT-J and CodeGen, which differ in how queries, keys and values lie in their weights."""

    def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
        if not _planned(self):
            return kind._attn(self, query, key, value, attention_mask)
        return _attend(self, query, key, value, self.attn_dropout.p).transpose(1, 2), None

    return {kind: type(f"Planned{kind.__name__}", (kind,), {"_attn": _attn})}


def _codegen() -> dict[type[nn.Module], type[nn.Module]]:
    from transformers.models.codegen.modeling_codegen import CodeGenAttention

    return _sinusoidal(CodeGenAttention)


def _gptj() -> dict[type[nn.Module], type[nn.Module]]:
    from transformers.models.gptj.modeling_gptj import GPTJAttention

    return _sinusoidal(GPTJAttention)


def _falcon() -> dict[type[nn.Module], type[nn.Module]]:
    from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

    class PlannedFalconAttention(FalconAttention):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, alibi: Tensor | None, *args: Any, **kwargs: Any) -> Any:
            if not _planned(self):
                return super().forward(hidden_states, alibi, *args, **kwargs)
            query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
            if alibi is None:
                query, key = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
            dropout = self.attention_dropout.p if alibi is not None else 0.0  # with rotary positions it drops nothing
            mixed = _attend(self, query, key, value, dropout)
            return self.dense(mixed.flatten(2)), None

    return {FalconAttention: PlannedFalconAttention}
