"""torch's own products with packed weights on a CPU, each used only where it has been seen to give the plain result.

They read a weight's few bytes in place of making it whole, which is what one row at a time is bound by; they are slower than
dense bfloat16 products from some rows on (`FEW`). The int4 kernel wants its bytes in blocks of rows: byte (k, n) of a block
of B rows holds the code of row n in its low and of row n + B / 2 in its high half, and `w = (q - 8) * scale + zero` with
bfloat16 scales and zeros. The size of a block depends on the processor, so it is found out by packing a matrix.

Axes: N rows of a weight, K columns, G groups of a row.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FEW = 16  # rows up to which the kernels win (docs/quantization.md)
BLOCKS = (64, 32, 16)
GROUPS = (256, 128, 64, 32)  # what the int4 kernel knows
TOLERANCE = 0.02  # of the largest entry: bfloat16 rounds to 8 bits


def is_few(rows: Tensor) -> bool:
    """Whether rows `[T, K]` are of a dtype and number that the kernels are for."""
    return rows.dtype == torch.bfloat16 and len(rows) <= FEW


def fits_int8(width: int) -> bool:
    """Whether rows of a weight are whole vectors: torch's int8 kernel reads beyond the end of others without saying so."""
    return width % 32 == 0


@functools.cache
def has_int8(device: str) -> bool:
    """Whether `_weight_int8pack_mm` is there and right."""
    if device != "cpu":
        return False
    codes = (torch.arange(64 * 96, dtype=torch.int32) * 37 % 255 - 127).to(torch.int8).view(64, 96)
    scale, rows = torch.linspace(0.01, 0.02, 64).bfloat16(), _rows(96)
    try:
        found = torch._weight_int8pack_mm(rows, codes, scale)
    except (RuntimeError, AttributeError):  # not built for this processor
        return False
    return _near(found, rows.float() @ (codes.float() * scale.float()[:, None]).T)


@functools.cache
def int4_block(device: str) -> int:
    """Rows of a block of `_weight_int4pack_mm_for_cpu`; 0 where it is missing or gives something else."""
    if device != "cpu":
        return 0
    codes = (torch.arange(128 * 64, dtype=torch.int32) * 7 % 16).to(torch.uint8).view(128, 64)
    scale = torch.linspace(0.01, 0.02, 256).bfloat16().view(128, 2)
    zero = (torch.arange(256) % 16).to(torch.uint8).view(128, 2)
    rows = _rows(64)
    prepared = scale_and_zero(scale, zero, 2)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, 32, prepared)
    except (RuntimeError, AttributeError):  # not built for this processor
        return 0
    block = next((b for b in BLOCKS if torch.equal(blocked(codes, b), packed)), 0)
    grouped = codes.float().view(128, 2, 32)
    weight = ((grouped - zero.float()[:, :, None]) * scale.float()[:, :, None]).view(128, 64)
    return block if _near(found, rows.float() @ weight.T) else 0


def _rows(width: int) -> Tensor:
    return torch.linspace(-1, 1, 3 * width).sin().bfloat16().view(3, width)


def _near(found: Tensor, expected: Tensor) -> bool:
    return bool((found.float() - expected).abs().max() <= TOLERANCE * expected.abs().max())


def blocked(codes: Tensor, block: int) -> Tensor:
    """uint8 codes `[N, K]` as the int4 kernel's bytes `[N, K / 2]`; N is a multiple of the block."""
    count, width = codes.shape
    low, high = codes.view(-1, 2, block // 2, width).unbind(1)
    # A single block could be reshaped without a copy, and then lie the other way.
    return (low | (high << 4)).transpose(1, 2).contiguous().view(count, width // 2)


def unblocked(packed: Tensor, block: int) -> Tensor:
    """The inverse of `blocked`."""
    count, half = packed.shape
    parts = packed.view(-1, 2 * half, block // 2)
    return torch.cat([parts & 15, parts >> 4], dim=-1).transpose(1, 2).reshape(count, 2 * half)


def group_for(width: int, groups: int) -> int:
    """A group size that the int4 kernel knows and that divides a row's groups evenly; 0 if there is none."""
    size = width // groups
    return next((g for g in GROUPS if size % g == 0), 0)


def scale_and_zero(scale: Tensor, zero: Tensor | None, groups: int) -> Tensor:
    """bf16 `[groups, N, 2]` of scales and zeros `[N, G]`; groups is a multiple of G."""
    scale = scale.float()
    shift = torch.zeros_like(scale) if zero is None else (8 - zero.float()) * scale
    both = torch.stack([scale, shift], dim=-1).repeat_interleave(groups // scale.shape[1], dim=1)
    return both.transpose(0, 1).contiguous().bfloat16()


def transposed(packed: Tensor, block: int, prepared: Tensor) -> Tensor:
    """The bf16 weight `[K, N]` of the int4 kernel's bytes; for parts that stay in the cache.

    Bytes are turned while they are bytes, and long runs share an operation: half the time of unpacking block by block.
    """
    width, groups = 2 * packed.shape[1], prepared.shape[0]
    scale, zero = (prepared[:, :, i].contiguous()[:, None] for i in (0, 1))
    parts = packed.view(-1, width, block // 2).transpose(0, 1).view(torch.int8)
    # With its top bit turned a code less 8 is a signed number of four bits; in the upper half of a byte it is 16 times that.
    signed = torch.bitwise_xor(parts, -0x78)
    # Joined runs are copied whole; writing each half between the other's would cost an operation a run.
    codes = torch.cat([torch.bitwise_left_shift(signed, 4), torch.bitwise_and(signed, -0x10)], dim=-1)
    values = codes.to(torch.bfloat16).view(groups, width // groups, -1)
    return torch.addcmul(zero, values, scale / 16).view(width, -1)  # / 16 is exact
