"""MOSS (moss-moon-003), mapped onto transformers' CodeGen, which has the same parameters under the same names.

A checkpoint holds a causal mask per layer beside them, which CodeGen makes itself. Quantised releases pack their weights as
GPTQ does; they are unpacked while loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from danlu.exceptions import ModelError
from danlu.models.registry import Family
from danlu.models.scalar import scalar_class
from danlu.models.weights import build, check_weights, checked, read_weights, weight_files
from danlu.text.moss_tokenizer import moss_tokenizer

# What config.json leaves out is as the original configuration class has it.
DEFAULTS: Final[dict[str, Any]] = {
    "vocab_size": 107008,
    "n_positions": 2048,
    "n_ctx": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "bos_token_id": 106028,
    "eos_token_id": 106068,
    "tie_word_embeddings": False,
}
PARTITIONS: Final = 4  # of qkv_proj, in every size
PACKED: Final = "qweight"
MASK: Final = ".attn.causal_mask"


def says(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of MOSS."""
    return config.get("model_type") == "moss"


def codegen_config(config: Mapping[str, Any]) -> Any:
    """The CodeGen configuration of a MOSS config.json.

    Raises:
        ModelError: its heads cannot be shared out over the four partitions of the fused projection.
    """
    from transformers import CodeGenConfig

    values = {name: config.get(name, default) for name, default in DEFAULTS.items()}
    if values["n_head"] % PARTITIONS or values["n_embd"] % values["n_head"]:
        raise ModelError(
            f"n_head is {values['n_head']} and n_embd {values['n_embd']}; MOSS's fused projection has {PARTITIONS} "
            "partitions of whole heads",
            field="n_head",
            hint="n_head is a multiple of 4 and a divisor of n_embd",
        )
    return CodeGenConfig(**values)


def load(folder: Path, dtype: torch.dtype, scalar: bool) -> Any:
    """A CodeGen model with the weights of a MOSS folder.

    Raises:
        ModelError: weights are missing, or do not fit the configuration.
    """
    import json

    from transformers import CodeGenForCausalLM

    raw = json.loads((folder / "config.json").read_text("utf-8"))
    config = codegen_config(raw)
    check_weights(folder)
    if scalar:
        config.num_labels = 1
    kind: Any = scalar_class(config) if scalar else CodeGenForCausalLM
    if raw.get("wbits") or raw.get("quantization_config"):
        state = unpacked(read_weights(weight_files(folder)), int(_gptq(raw, "bits")), dtype)
        return build(kind, config, state, dtype, folder)
    return checked(
        lambda: kind.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            attn_implementation="eager",
        ),
        folder,
        absent=lambda name: scalar and name.startswith("score"),
    )


def _gptq(config: Mapping[str, Any], name: str) -> Any:
    written = config.get("quantization_config") or {"bits": config.get("wbits")}
    if written.get(name) not in (2, 4, 8):
        raise ModelError(
            f"this quantised MOSS has {written.get(name)} bits", field="wbits", hint="2, 4 and 8 bits can be read"
        )
    return written[name]


def unpacked(named: Iterable[tuple[str, Tensor]], bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of a MOSS whose linear layers are packed as GPTQ packs them; those that are not stay as they are.

    A layer `[out, in]` is `qweight` int32 `[in * bits / 32, out]`, `qzeros` int32 `[groups, out * bits / 32]` with the zero
    points minus 1, `scales` `[groups, out]` and `g_idx` int32 `[in]`; low bits come first (Frantar et al. 2022, as GPTQ-for-LLaMa
    writes it). `w = (q - (z + 1)) * scale`.
    """
    plain: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named:
        layer, _, part = name.rpartition(".")
        if name.endswith(MASK):
            continue
        if part in (PACKED, "qzeros", "scales", "g_idx"):
            packed.setdefault(layer, {})[part] = tensor
            if len(packed[layer]) == 4:  # so that no more than one layer is held twice
                plain[f"{layer}.weight"] = dequantise(**packed.pop(layer), bits=bits).to(dtype)
        elif not torch.is_floating_point(tensor) or not (part == "bias" and f"{layer}.{part}" in plain):
            plain[name] = tensor.to(dtype)
    for layer, parts in packed.items():
        raise ModelError(f"the packed weight of {layer} is incomplete: found {', '.join(sorted(parts))}")
    # Packers write a bias of zeros for layers that have none.
    return {n: t for n, t in plain.items() if not (n.endswith(("qkv_proj.bias", "out_proj.bias")) and not t.any())}


def dequantise(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, *, bits: int) -> Tensor:
    """A weight `[out, in]` in fp32 of a layer that GPTQ packed; see `unpacked`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    mask = (1 << bits) - 1
    values_IO = ((qweight[:, None, :] >> shifts[None, :, None]) & mask).flatten(0, 1)
    zeros_GO = ((qzeros[:, :, None] >> shifts) & mask).flatten(1) + 1
    group_I = g_idx.long()
    weight_IO = (values_IO - zeros_GO[group_I]).float() * scales.float()[group_I]
    return weight_IO.T.contiguous()


FAMILY = Family("MOSS", says, load, moss_tokenizer)
