"""How packed weights lie in files, danlu's own, ChatGLM's, GPTQ's, AWQ's, compressed-tensors', and how they become layers.

All but danlu's pack several codes into an int32, the first in the lowest bits. Axes: N outputs, K inputs, G groups of columns.

danlu: `X.weight_int8` [N, K] or `X.weight_int4` [N, K / 2], `X.scale`, `X.zero`, `X.order`; see `packed.py`.
ChatGLM: `X.weight` int8 and `X.weight_scale` [N].
GPTQ: `X.qweight` [K / n, N] packed along K, `X.qzeros` [G, N / n] packed along N and less one (version 1), `X.scales` [G, N],
`X.g_idx` [K] says which group a column is in.
AWQ (gemm): `X.qweight` [K, N / 8] and `X.qzeros` [G, N / 8], both along N in the order 0 2 4 6 1 3 5 7, `X.scales` [G, N].
compressed-tensors (pack-quantized): `X.weight_packed` [N, K / n] of codes plus 2^(bits-1), `X.weight_scale` [N, G],
`X.weight_zero_point` [N / n, G] packed along N, `X.weight_shape`, `X.weight_g_idx`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.exceptions import ModelError
from danlu.models.packed import Int4Linear, Int8Linear, PackedLinear, from_chatglm, pack4

KEY = "danlu_quantization"
DANLU = "danlu"  # the name of danlu's own layout
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """One way to store packed layers.

    name: as people know it; bits: of a code; marks: last parts of tensor names that only packed layers have; parts: all last
    parts that belong to a packed layer; build: its tensors to a layer.
    """

    name: str
    bits: int
    marks: tuple[str, ...]
    parts: tuple[str, ...]
    build: Callable[[Parts], PackedLinear]


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout that a config.json says its weights have; None for weights that are not packed, or that transformers unpacks.

    Raises:
        ModelError: a known layout with bits or options that danlu does not read.
    """
    if KEY in config:
        marks = ("weight_int8", "weight_int4")
        return Layout(DANLU, int(config[KEY]["bits"]), marks, (*marks, "scale", "zero", "order"), _danlu)
    if config.get("quantization_bit"):
        bits = _known(int(config["quantization_bit"]), "ChatGLM")
        return Layout("chatglm", bits, ("weight_scale",), ("weight", "weight_scale"), lambda p: _chatglm(p, bits))
    given = config.get("quantization_config") or {}
    method = given.get("quant_method")
    if method == "gptq":
        bits = _known(int(given["bits"]), "GPTQ")
        lowered = 1 if given.get("checkpoint_format", "gptq") == "gptq" else 0
        parts = ("qweight", "qzeros", "scales", "g_idx")
        return Layout("gptq", bits, ("qweight",), parts, lambda p: _gptq(p, bits, lowered))
    if method == "awq":
        bits = int(given.get("bits", given.get("w_bit", 4)))
        version = str(given.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise ModelError(
                f"AWQ weights of {bits} bits, version {version}, are not read", hint="4 bits, version gemm"
            )
        return Layout("awq", 4, ("qweight",), ("qweight", "qzeros", "scales"), _awq)
    if method == "compressed-tensors" and given.get("format") == "pack-quantized":
        return _compressed(given)
    return None


def _known(bits: int, what: str) -> int:
    if bits not in (8, 4):
        raise ModelError(f"{what} weights of {bits} bits are not read", hint="8 or 4 bits")
    return bits


def _compressed(given: Mapping[str, Any]) -> Layout:
    groups = list(given.get("config_groups", {}).values())
    found = {(g["weights"].get("num_bits"), g["weights"].get("type", "int")) for g in groups}
    if len(found) != 1 or any(g.get("input_activations") for g in groups):
        raise ModelError(f"compressed-tensors with {len(found)} kinds of weights, or packed activations, is not read")
    bits, kind = found.pop()
    if kind != "int":
        raise ModelError(f"compressed-tensors weights of type {kind} are not read", hint="type int")
    bits = _known(int(bits), "compressed-tensors")
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    return Layout("compressed-tensors", bits, ("weight_packed",), parts, lambda p: _pack_quantized(p, bits))


# -- to layers --------------------------------------------------------------------------------------------------------------


def _danlu(parts: Parts) -> PackedLinear:
    scale, order, bias = parts["scale"], parts.get("order"), parts.get("bias")
    if "weight_int8" in parts:
        return Int8Linear(parts["weight_int8"], scale, bias, parts.get("zero"), order)
    return Int4Linear(parts["weight_int4"], scale, parts.get("zero"), bias, order)


def _chatglm(parts: Parts, bits: int) -> PackedLinear:
    return from_chatglm(parts["weight"], parts["weight_scale"], bits, parts.get("bias"))


def _gptq(parts: Parts, bits: int, lowered: int) -> PackedLinear:
    codes = _unpacked(parts["qweight"], bits, dim=0).T.contiguous()
    zero = (_unpacked(parts["qzeros"], bits, dim=1) + lowered).bitwise_and_(2**bits - 1).T.contiguous()
    return _grouped(codes, parts["scales"].T.contiguous(), zero, bits, parts.get("bias"), parts.get("g_idx"))


def _awq(parts: Parts) -> PackedLinear:
    inverse = torch.tensor(AWQ_ORDER).argsort()
    codes, zero = (
        _unpacked(parts[n], 4, dim=1).view(len(parts[n]), -1, 8)[..., inverse].flatten(1).T.contiguous()
        for n in ("qweight", "qzeros")
    )
    return _grouped(codes, parts["scales"].T.contiguous(), zero, 4, parts.get("bias"), None)


def _pack_quantized(parts: Parts, bits: int) -> PackedLinear:
    rows, columns = (int(n) for n in parts["weight_shape"])
    codes = _unpacked(parts["weight_packed"], bits, dim=1)[:rows, :columns].contiguous()
    scale = parts["weight_scale"]
    scale = scale.view(rows, -1) if scale.numel() > 1 else scale.view(1, 1).expand(rows, 1).contiguous()
    middle = 2 ** (bits - 1)
    given = parts.get("weight_zero_point")
    zero = None
    if given is not None and given.dtype == torch.int32:
        zero = _unpacked(given, bits, dim=0)[:rows].contiguous()
    elif given is not None:
        zero = (given.view(rows, -1).to(torch.int16) + middle).to(torch.uint8)
    if zero is None:
        zero = torch.full_like(scale, middle, dtype=torch.uint8)
    return _grouped(codes, scale, zero, bits, parts.get("bias"), parts.get("weight_g_idx"))


def _grouped(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, bias: Tensor | None, group_K: Tensor | None
) -> PackedLinear:
    """A layer of unsigned codes `[N, K]` with scales and zeros `[N, G]`; columns that are not in their groups' order are put there.

    Raises:
        ModelError: groups of different sizes, or shapes that do not fit.
    """
    rows, columns = codes.shape
    groups = scale.shape[1]
    if scale.shape != (rows, groups) or zero.shape != scale.shape or columns % groups:
        raise ModelError(
            f"packed weights do not fit: codes {[rows, columns]}, scales {list(scale.shape)}, zeros {list(zero.shape)}"
        )
    order = None
    if group_K is not None and len(group_K) and int(group_K.min()) >= 0:
        plain = torch.arange(columns) // (columns // groups)
        if not torch.equal(group_K.long(), plain):
            order = torch.argsort(group_K.long(), stable=True)
            if not torch.equal(group_K.long()[order], plain):
                raise ModelError("groups of different sizes are not read")
            codes, order = codes[:, order].contiguous(), order.to(torch.int32)
    middle = 2 ** (bits - 1)
    plain_zero = bool((zero == middle).all())
    if bits == 4:
        return Int4Linear(pack4(codes), scale, None if plain_zero else zero, bias, order)
    signed = (codes ^ 128).view(torch.int8)  # less 128
    if plain_zero and groups == 1:
        return Int8Linear(signed, scale[:, 0].float().contiguous(), bias, None, order)
    return Int8Linear(signed, scale, bias, None if plain_zero else (zero ^ 128).view(torch.int8), order)


def _unpacked(packed: Tensor, bits: int, dim: int) -> Tensor:
    """uint8 codes of int32 words along a dimension, the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    words = packed.unsqueeze(dim + 1)
    shape = [1] * words.dim()
    shape[dim + 1] = len(shifts)
    codes: Tensor = ((words >> shifts.view(shape)) & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(dim, dim + 1)


# -- from layers ------------------------------------------------------------------------------------------------------------


def to_gptq(name: str, layer: PackedLinear) -> dict[str, Tensor]:
    """A symmetric layer's tensors in GPTQ's layout (version 1), which vLLM and transformers read.

    Raises:
        ModelError: the layer has zeros of its own or reordered columns, or its sides are not multiples of 8.
    """
    if layer.zero is not None or layer.order is not None or layer.out_features % 8 or layer.in_features % 8:
        raise ModelError(
            f"{name} ({layer.in_features} to {layer.out_features}) cannot be written in GPTQ's layout",
            hint="symmetric weights, columns in order, sides that are multiples of 8",
        )
    bits = layer.bits
    codes = layer.codes() if isinstance(layer, Int4Linear) else layer.codes_as_stored().view(torch.uint8) ^ 128
    scale = layer.scale if layer.scale.dim() > 1 else layer.scale[:, None]
    groups = scale.shape[1]
    zeros = torch.full((groups, layer.out_features), 2 ** (bits - 1) - 1, dtype=torch.uint8)
    tensors = {
        "qweight": _packed(codes.T.contiguous(), bits, dim=0),
        "qzeros": _packed(zeros, bits, dim=1),
        "scales": scale.T.contiguous().to(torch.float16),
        "g_idx": (torch.arange(layer.in_features) // (layer.in_features // groups)).to(torch.int32),
    }
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}


def gptq_config(layers: Mapping[str, PackedLinear], facts: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` for `to_gptq`'s tensors.

    Raises:
        ModelError: the layers do not share bits and group size, of which the layout can say only one.
    """
    found = {
        (layer.bits, -1 if layer.scale.dim() == 1 else layer.in_features // layer.scale.shape[1])
        for layer in layers.values()
    }
    if len(found) != 1:
        raise ModelError(
            f"GPTQ's layout has one group size, and the layers need {len(found)}: {sorted(found)}",
            hint="give a --group-size that divides every layer's inputs, or --layout danlu",
        )
    bits, group = found.pop()
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "true_sequential": True,
        "checkpoint_format": "gptq",
        **facts,
    }


def _packed(codes: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse of `_unpacked`."""
    count = 32 // bits
    words = codes.to(torch.int64).unflatten(dim, (-1, count))
    shifts = torch.arange(0, 32, bits)
    shape = [1] * words.dim()
    shape[dim + 1] = count
    whole = (words << shifts.view(shape)).sum(dim + 1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)
