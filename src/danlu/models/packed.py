"""Linear layers whose weights are kept in 8 or 4 bits, with a scale for each row or group; they compute in the input's dtype.

Int8: `w = scale * q`, q in [-127, 127], one scale a row (the layout ChatGLM-6B shipped for 8 bits); or a scale and a zero for each
group of columns, `w = scale * (q - zero)`. Int4: `w = scale * (q - zero)`, q and zero in [0, 15], by groups of columns; two codes
lie in a byte, the even column in the low half. Symmetric int4 keeps no zeros (they are 8).

What computes: with few rows of bfloat16 on a CPU the kernels of `packed_kernels`; else the weights are made whole for the product,
in parts, and thrown away, also in the backward pass, so that training against them holds no copy. In float32 no kernel is used, and
the parts follow from the layer's shape: then a row's numbers do not depend on what else is in the batch, as the engine promises.

Axes: N out_features, K in_features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danlu.exceptions import ModelError
from danlu.models import packed_cuda as cuda
from danlu.models import packed_kernels as kernels

GROUPS = (256, 128, 64, 32, 16)
ZERO4 = 8  # of symmetric int4
AT_ONCE = 2**21  # codes that are made whole at once: they stay in a core's cache
ROUNDED_AT_ONCE = 2**18  # weights that are rounded at once: what it takes beside them counts while loading
AT_ONCE_CUDA = 2**26  # the same on a card, which wants few large operations


class PackedLinear(nn.Module):
    """What layers of 8 and 4 bits share: use it for `isinstance`; layers are differentiable in their input, not in themselves.

    Args:
        scale: `[N]` or `[N, G]`.
        zero: `[N, G]` or None.
        bias: `[N]` or None.
        order: `[K]`, the input feature that each stored column belongs to (GPTQ's act-order of others); None: in order.
    """

    bits: int

    def __init__(
        self,
        out_features: int,
        in_features: int,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        order: Tensor | None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.scale: Tensor
        self.zero: Tensor | None
        self.bias: Tensor | None
        self.order: Tensor | None
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("bias", bias)
        self.register_buffer("order", order)
        self._prepared: Tensor | None = None  # scales as the kernel wants them

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b` for `[..., K]`."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                return self._linear(x)
        return self._linear(x)

    def _linear(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.requires_grad and torch.is_grad_enabled():
            out: Tensor = _Product.apply(rows, self)
        else:
            out = self.product(rows)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def product(self, rows: Tensor) -> Tensor:
        """`rows W^T` for `[T, K]`, without bias and without gradients."""
        raise NotImplementedError

    def whole(self, own: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight `[N, K]`, with columns as they are stored."""
        raise NotImplementedError

    def stored(self, dtype: torch.dtype) -> Tensor:
        """The weight `[N, K]` with columns as they are stored."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.scale.device)
        for own in self.parts():
            weight[own] = self.whole(own, dtype)
        return weight

    @property
    def rows_together(self) -> int:
        """Rows whose codes lie among one another, and are made whole together."""
        return 1

    def parts(self) -> Iterator[slice]:
        """Runs of rows that are made whole at once; the layer's shape alone decides them."""
        step = max(1, (AT_ONCE if self.scale.device.type == "cpu" else AT_ONCE_CUDA) // self.in_features)
        step = -(-step // self.rows_together) * self.rows_together
        return (slice(first, first + step) for first in range(0, self.out_features, step))

    def product_in_parts(self, rows: Tensor, weight: Callable[[slice], Tensor]) -> Tensor:
        """`rows W^T` by runs of W's rows: each is still in the cache when it is used, and leaves its memory to the next.

        Args:
            weight: makes a run of rows.
        """
        out = torch.empty(len(rows), self.out_features, dtype=rows.dtype, device=rows.device)
        for own in self.parts():
            out[:, own] = nn.functional.linear(rows, weight(own))
        return out

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]`; every entry is the exact product of its scale and code, rounded once to `dtype`."""
        weight = self.stored(dtype)
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order.long(), weight)

    def codes_as_stored(self) -> Tensor:
        """The packed codes themselves."""
        codes: Tensor = getattr(self, f"weight_int{self.bits}")
        return codes

    def rows_in_order(self, rows: Tensor) -> Tensor:
        """Input rows with their columns as the weight stores them."""
        return rows if self.order is None else rows.index_select(1, self.order)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to(dtype)` leaves the scales as they are: they belong to the codes, not to the computation."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        self._prepared = None
        return self

    def extra_repr(self) -> str:
        groups = self.scale.shape[1] if self.scale.dim() > 1 else 1
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, groups={groups}"


class _Product(torch.autograd.Function):
    """`rows W^T`; the backward pass makes the weight again in place of keeping it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dequantized(grads[0].dtype), None


class Int8Linear(PackedLinear):
    """Weights of 8 bits: one scale a row, or scales (and zeros) of groups of columns.

    Args:
        weight_int8: `[N, K]`, int8.
        scale: fp32 `[N]`, or `[N, G]`.
        zero: int8 `[N, G]` or None.
    """

    bits = 8

    def __init__(
        self,
        weight_int8: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        zero: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        super().__init__(weight_int8.shape[0], weight_int8.shape[1], scale, zero, bias, order)
        self.weight_int8: Tensor
        self.register_buffer("weight_int8", weight_int8)

    def product(self, rows: Tensor) -> Tensor:
        rows = self.rows_in_order(rows)
        if self.scale.dim() > 1:
            return self.product_in_parts(rows, lambda own: self.whole(own, rows.dtype))
        if _has_kernels(rows.device, rows.dtype) and len(rows) <= cuda.MOST_ROWS:
            return cuda.few8(rows.contiguous(), self.weight_int8, self.scale)
        if kernels.is_few(rows) and kernels.fits_int8(self.in_features) and kernels.has_int8(rows.device.type):
            if self._prepared is None:
                self._prepared = self.scale.to(rows.dtype)
            return torch._weight_int8pack_mm(rows.contiguous(), self.weight_int8, self._prepared)
        # Codes are exact in any dtype, so that scales can wait for the product.
        out = self.product_in_parts(rows, lambda own: self.weight_int8[own].to(rows.dtype))
        return out.mul_(self.scale.to(rows.dtype))

    def whole(self, own: slice, dtype: torch.dtype) -> Tensor:
        scale = self.scale if self.scale.dim() > 1 else self.scale[:, None]
        return _scaled(self.weight_int8[own], scale[own], None if self.zero is None else self.zero[own]).to(dtype)


class Int4Linear(PackedLinear):
    """Weights of 4 bits by groups of columns.

    Args:
        weight_int4: `[N, K / 2]`, uint8; byte j of a row holds column 2j in its low and 2j + 1 in its high half.
        scale: `[N, G]`, of any float dtype; G divides K.
        zero: uint8 `[N, G]`; None: 8 everywhere.
    """

    bits = 4

    def __init__(
        self, weight_int4: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, order: Tensor | None = None
    ) -> None:
        super().__init__(weight_int4.shape[0], 2 * weight_int4.shape[1], scale, zero, bias, order)
        self.weight_int4: Tensor
        self.register_buffer("weight_int4", weight_int4)
        self.blocked = 0  # rows of a block, once the bytes lie as the kernel wants them

    def codes(self) -> Tensor:
        """uint8 `[N, K]`."""
        if self.blocked:
            return kernels.unblocked(self.weight_int4, self.blocked)
        return unpack4(self.weight_int4)

    def for_cuda(self, dtype: torch.dtype) -> bool:
        """Whether a card's kernels take this weight and rows of a dtype."""
        known = _has_kernels(self.weight_int4.device, dtype) and not self.blocked
        return known and cuda.fits4(self.in_features, self.scale.shape[1])

    @property
    def rows_together(self) -> int:
        return self.blocked or 1

    def stored(self, dtype: torch.dtype) -> Tensor:
        if self.for_cuda(dtype):
            return cuda.whole4(self.weight_int4, self.scale, self.zero)
        return super().stored(dtype)

    def whole(self, own: slice, dtype: torch.dtype) -> Tensor:
        part = self.weight_int4[own]
        codes = kernels.unblocked(part, self.blocked) if self.blocked else unpack4(part)
        zero = None if self.zero is None else self.zero[own]
        return _scaled(codes, self.scale[own], zero, middle=ZERO4).to(dtype)

    def product(self, rows: Tensor) -> Tensor:
        rows = self.rows_in_order(rows)
        if self.for_cuda(rows.dtype) and len(rows) <= cuda.MOST_ROWS:
            return cuda.few4(rows.contiguous(), self.weight_int4, self.scale, self.zero)
        if self.for_cuda(rows.dtype):
            return nn.functional.linear(rows, self.stored(rows.dtype))
        if rows.dtype != torch.bfloat16 or not self.prepare():
            return self.product_in_parts(rows, lambda own: self.whole(own, rows.dtype))
        assert self._prepared is not None
        if kernels.is_few(rows):
            group = self.in_features // self._prepared.shape[0]
            out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.contiguous(), self.weight_int4, group, self._prepared
            )
            return out
        prepared = self._prepared
        return self.product_in_parts(
            rows, lambda own: kernels.transposed(self.weight_int4[own], self.blocked, prepared[:, own]).T
        )

    def prepare(self) -> bool:
        """Lays the bytes as the kernel wants them, at the first use; whether there is a kernel for this layer."""
        if self._prepared is not None:
            return True
        block = kernels.int4_block(self.weight_int4.device.type)
        group = kernels.group_for(self.in_features, self.scale.shape[1])
        if not block or not group or self.out_features % block:
            return False
        with torch.inference_mode(False):  # the model may be trained on later
            if not self.blocked:
                self.weight_int4 = kernels.blocked(self.codes(), block)
            self._prepared = kernels.scale_and_zero(self.scale, self.zero, self.in_features // group)
        self.blocked = block
        if len(self._prepared) == self.scale.shape[1] and self.scale.dtype == self._prepared.dtype:
            self.scale = self._prepared[:, :, 0].T  # the same numbers, held once
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Bytes that lie as a CPU's kernel wants them are put in order when they leave it."""
        super()._apply(fn, recurse)
        if self.blocked and self.weight_int4.device.type not in ("cpu", "meta"):
            self.weight_int4, self.blocked = pack4(self.codes()), 0
        if self.weight_int4.device.type not in ("cpu", "meta"):
            self.scale = self.scale.contiguous()  # on a CPU it may lie among what the kernel wants
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = self.scale.detach().contiguous()
        if self.blocked:
            destination[f"{prefix}weight_int4"] = pack4(self.codes())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}weight_int4" in state_dict:
            self.blocked, self._prepared = 0, None
        super()._load_from_state_dict(state_dict, prefix, *args)


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype == torch.bfloat16 and cuda.available("cuda")


def _scaled(codes: Tensor, scale: Tensor, zero: Tensor | None, middle: int = 0) -> Tensor:
    """fp32 `scale * (codes - zero)` of `[N, K]` codes with `[N, G]` scales; without zeros `middle` is subtracted."""
    grouped = codes.float().view(len(codes), scale.shape[1], -1)
    grouped.sub_(middle if zero is None else zero.float()[:, :, None])
    return grouped.mul_(scale.float()[:, :, None]).view(codes.shape)


# -- packing and rounding ---------------------------------------------------------------------------------------------------


def pack4(codes: Tensor) -> Tensor:
    """uint8 codes `[N, K]` in [0, 15], two in a byte: `[N, K / 2]`, even columns in the low half."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack4(packed: Tensor) -> Tensor:
    """The inverse of `pack4`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and fp32 scales of a weight `[N, K]`: `scale = max|row| / 127`, rounded to nearest."""
    scale = weight.float().abs().amax(dim=1) / 127.0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(weight.float() / scale[:, None]).clamp_(-127, 127).to(torch.int8), scale


def group_of(in_features: int, wanted: int) -> int:
    """Columns of a group: the largest of `GROUPS` up to `wanted` that divides the row; 0 if none does."""
    return next((g for g in GROUPS if g <= wanted and in_features % g == 0), 0)


def group_scales(grouped: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """bf16 scales and uint8 zeros of groups `[..., g]`, so that 16 codes span the group (and 0, which is a code's value).

    Symmetric: `scale = 2 max|w| / 15` and zero 8. Else `scale = (max - min) / 15`, `zero = round(-min / scale)`. Scales are
    rounded to bfloat16 before codes are chosen, so that every path computes with the same ones.
    """
    high, low = grouped.amax(-1).clamp_min(0), grouped.amin(-1).clamp_max(0)
    span = 2 * torch.maximum(high, -low) if symmetric else high - low
    scale = torch.where(span == 0, torch.ones_like(span), span / 15).bfloat16()
    # Below bfloat16's range a scale could become 0.
    scale = torch.where(scale == 0, torch.finfo(torch.bfloat16).tiny, scale)
    if symmetric:
        return scale, None
    return scale, torch.round(-low / scale.float()).clamp_(0, 15).to(torch.uint8)


def codes4(weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The nearest codes, float in [0, 15], of weights that share the trailing shape of scale and zero."""
    middle = float(ZERO4) if zero is None else zero.float()
    return torch.round(weight / scale.float() + middle).clamp_(0, 15)


def quantize_groups(weight: Tensor, group: int, *, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """uint8 codes `[N, K]`, bf16 scales `[N, G]` and zeros of a weight, rounded to nearest in groups of so many columns."""
    grouped = weight.float().view(len(weight), -1, group)
    scale, zero = group_scales(grouped, symmetric=symmetric)
    codes = codes4(grouped, scale[..., None], None if zero is None else zero[..., None])
    return codes.to(torch.uint8).view(weight.shape), scale, zero


def pack(
    weight: Tensor, bias: Tensor | None, bits: int, *, group_size: int = 64, symmetric: bool = False
) -> PackedLinear:
    """A layer of a weight `[N, K]`, rounded to nearest. Rows that no group divides are kept in 8 bits.

    Args:
        bits: 8 (one scale a row) or 4.
        group_size: columns that share a scale (4 bits), or the next smaller size that fits the row.
    """
    group = group_of(weight.shape[1], group_size)
    if bits == 4 and group:
        # Rows are independent: in parts, little is held in fp32.
        step = max(1, ROUNDED_AT_ONCE // weight.shape[1])
        parts = [quantize_groups(part, group, symmetric=symmetric) for part in weight.split(step)]
        codes = torch.cat([pack4(codes) for codes, _, _ in parts])
        zeros = [zero for _, _, zero in parts if zero is not None]
        return Int4Linear(codes, torch.cat([s for _, s, _ in parts]), torch.cat(zeros) if zeros else None, bias)
    if bits not in (8, 4):
        raise ModelError(f"weights of {bits} bits are not available", hint="use 8 or 4")
    return pack_rows(weight.shape, weight.__getitem__, bias)


def pack_rows(shape: Sequence[int], rows: Callable[[slice], Tensor], bias: Tensor | None) -> Int8Linear:
    """A layer of 8 bits, rounded in parts, so that its weight need not be held.

    Args:
        shape: `[N, K]`.
        rows: reads some rows of the weight.
    """
    place = rows(slice(0, 0)).device
    codes, scale = torch.empty(tuple(shape), dtype=torch.int8, device=place), torch.empty(shape[0], device=place)
    step = max(1, ROUNDED_AT_ONCE // shape[1])
    for first in range(0, shape[0], step):
        own = slice(first, first + step)
        codes[own], scale[own] = quantize_rows(rows(own))
    return Int8Linear(codes, scale, bias)


def from_chatglm(weight: Tensor, scale: Tensor, bits: int, bias: Tensor | None = None) -> PackedLinear:
    """A layer of ChatGLM's published weights: signed codes with one scale a row.

    Args:
        weight: int8 `[N, K]` for 8 bits; for 4 `[N, K / 2]`, a byte is `(q[2j] << 4) | (q[2j + 1] & 15)`, two's complement.
        scale: fp16 `[N]`.

    Raises:
        ModelError: other bits, or shapes that do not fit.
    """
    if bits not in (8, 4) or weight.dim() != 2 or scale.shape != weight.shape[:1]:
        raise ModelError(
            f"found weights {list(weight.shape)} with scales {list(scale.shape)} in {bits} bits, expected one scale a row"
            " and 8 or 4 bits"
        )
    if bits == 8:
        return Int8Linear(weight.to(torch.int8), scale.float(), bias)
    signed = weight.to(torch.int8).view(torch.uint8)
    halves = torch.stack([signed >> 4, signed & 15], dim=-1).flatten(1)
    return Int4Linear(pack4(halves ^ 8), scale[:, None], None, bias)  # two's complement plus 8 turns the top bit round


def joined(parts: Sequence[PackedLinear]) -> PackedLinear | None:
    """One layer of several that read the same input, output after output; None where they cannot lie side by side.

    Of 4 bits only layers that the kernel takes are joined: their blocks of rows then lie side by side as well.

    The layers' own codes become views of the joined ones, so nothing is held twice.
    """
    first = parts[0]
    names = ("scale", "zero", "bias", "order")
    alike = isinstance(first, Int8Linear | Int4Linear) and all(
        type(p) is type(first)
        and p.in_features == first.in_features
        and p.order is None
        and all((getattr(p, n) is None) == (getattr(first, n) is None) for n in names)
        and p.scale.shape[1:] == first.scale.shape[1:]
        for p in parts
    )
    if not alike:
        return None
    if isinstance(first, Int4Linear):
        here = [p for p in parts if isinstance(p, Int4Linear)]
        if not all(p.prepare() or p.for_cuda(torch.bfloat16) for p in here):
            return None
    with torch.inference_mode(False):  # the layers may be trained on later
        return _side_by_side(parts)


def _side_by_side(parts: Sequence[PackedLinear]) -> PackedLinear:
    first = parts[0]
    names = ("scale", "zero", "bias")
    together = {n: torch.cat([getattr(p, n) for p in parts]) for n in names if getattr(first, n) is not None}
    sizes = [p.out_features for p in parts]
    if isinstance(first, Int8Linear):
        codes = torch.cat([p.codes_as_stored() for p in parts])
        layer: PackedLinear = Int8Linear(codes, together["scale"], together.get("bias"), together.get("zero"))
        name = "weight_int8"
    else:
        codes = torch.cat([p.codes_as_stored() for p in parts])
        layer = Int4Linear(codes, together["scale"], together.get("zero"), together.get("bias"))
        layer.blocked = kernels.int4_block(codes.device.type)
        if layer.blocked and layer.prepare():
            together["scale"] = layer.scale
        name = "weight_int4"
    for part, own in zip(parts, codes.split(sizes), strict=True):
        setattr(part, name, own)
        part._prepared = None  # the joined layer has its own
    for key in ("scale", "zero", "bias"):
        for part, own in zip(parts, together[key].split(sizes) if key in together else [], strict=False):
            setattr(part, key, own)
    return layer
