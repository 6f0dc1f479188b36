"""Products with packed weights on a CUDA card, as Triton kernels; Triton comes with torch's builds for CUDA.

With few rows a product waits for its weights, so a kernel that reads four or eight bits a weight is faster than a dense one. With
many rows the weights are made whole in one pass, for the library's product. Codes are exact in bfloat16, so tensor cores multiply
them as they are, sums are fp32, and a group's scale comes afterwards.

Axes: M rows, N rows of a weight, K columns, G groups of a row.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch for CPUs
    triton = None

MOST_ROWS = 16  # of the kernels: a tensor core's tile
TOLERANCE = 0.02  # of the largest entry: bfloat16 rounds to 8 bits

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator,unused-ignore]
    def _few4(
        x_ptr: Any, codes_ptr: Any, scale_ptr: Any, zero_ptr: Any, out_ptr: Any, rows: Any, count: Any, width: Any,
        groups: Any, HAS_ZERO: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
    ) -> None:  # fmt: skip
        """out[M, N] of x[M, K] and codes [N, K / 2]; a step of the loop is one group: HALF bytes of each of BLOCK_N rows."""
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = tl.arange(0, TILE)
        j = tl.arange(0, HALF)
        inside = n < count
        total = tl.zeros((TILE, BLOCK_N), dtype=tl.float32)
        for g in range(groups):
            at = g * HALF + j
            codes = tl.load(codes_ptr + n[:, None] * (width // 2) + at[None, :], mask=inside[:, None], other=0)
            even = tl.load(x_ptr + m[:, None] * width + 2 * at[None, :], mask=m[:, None] < rows, other=0.0)
            odd = tl.load(x_ptr + m[:, None] * width + 2 * at[None, :] + 1, mask=m[:, None] < rows, other=0.0)
            scale = tl.load(scale_ptr + n * groups + g, mask=inside, other=0.0).to(tl.float32)
            middle = 8.0
            if HAS_ZERO:
                middle = tl.load(zero_ptr + n * groups + g, mask=inside, other=0).to(tl.float32)[:, None]
            low = ((codes & 15).to(tl.float32) - middle).to(even.dtype)
            high = ((codes >> 4).to(tl.float32) - middle).to(even.dtype)
            part = tl.dot(even, tl.trans(low)) + tl.dot(odd, tl.trans(high))
            total += part * scale[None, :]
        tl.store(
            out_ptr + m[:, None] * count + n[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=(m[:, None] < rows) & inside[None, :],
        )

    @triton.jit  # type: ignore[untyped-decorator,unused-ignore]
    def _few8(
        x_ptr: Any, codes_ptr: Any, scale_ptr: Any, out_ptr: Any, rows: Any, count: Any, width: Any,
        BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
    ) -> None:  # fmt: skip
        """out[M, N] of x[M, K] and codes [N, K] with a scale for each row."""
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = tl.arange(0, TILE)
        inside = n < count
        total = tl.zeros((TILE, BLOCK_N), dtype=tl.float32)
        for first in range(0, width, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            codes = tl.load(
                codes_ptr + n[:, None] * width + k[None, :], mask=inside[:, None] & (k[None, :] < width), other=0
            )
            x = tl.load(
                x_ptr + m[:, None] * width + k[None, :], mask=(m[:, None] < rows) & (k[None, :] < width), other=0.0
            )
            total += tl.dot(x, tl.trans(codes.to(x.dtype)))
        scale = tl.load(scale_ptr + n, mask=inside, other=0.0).to(tl.float32)
        total = total * scale[None, :]
        tl.store(
            out_ptr + m[:, None] * count + n[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=(m[:, None] < rows) & inside[None, :],
        )

    @triton.jit  # type: ignore[untyped-decorator,unused-ignore]
    def _whole4(
        codes_ptr: Any, scale_ptr: Any, zero_ptr: Any, out_ptr: Any, total: Any, size: Any,
        HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr,
    ) -> None:  # fmt: skip
        """The weight of BLOCK bytes; size: columns of a group."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < total
        codes = tl.load(codes_ptr + at, mask=inside, other=0)
        group = 2 * at // size  # groups of all rows, end to end
        scale = tl.load(scale_ptr + group, mask=inside, other=0.0).to(tl.float32)
        middle = tl.full((BLOCK,), 8.0, dtype=tl.float32)
        if HAS_ZERO:
            middle = tl.load(zero_ptr + group, mask=inside, other=0).to(tl.float32)
        low = (((codes & 15).to(tl.float32) - middle) * scale).to(out_ptr.dtype.element_ty)
        high = (((codes >> 4).to(tl.float32) - middle) * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + 2 * at, low, mask=inside)
        tl.store(out_ptr + 2 * at + 1, high, mask=inside)


def fits4(width: int, groups: int) -> bool:
    """Whether the kernels know a row's groups: a power of two of at least 32 columns (a tile needs 16 bytes)."""
    size = width // groups
    return size >= 32 and size & (size - 1) == 0


def few4(rows: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """`rows W^T` for bf16 rows `[M, K]`, M <= 16; codes uint8 `[N, K / 2]`, scales and zeros `[N, G]`."""
    count, groups = scale.shape
    out = rows.new_empty(len(rows), count)
    half = rows.shape[1] // groups // 2
    block = 16 if count < 16384 else 32
    _few4[(-(-count // block),)](
        rows, codes, scale, zero if zero is not None else codes, out, len(rows), count, rows.shape[1], groups,
        HAS_ZERO=zero is not None, HALF=half, BLOCK_N=block, TILE=MOST_ROWS,
    )  # fmt: skip
    return out


def few8(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """`rows W^T` for bf16 rows `[M, K]`, M <= 16; codes int8 `[N, K]`, scales `[N]`."""
    count = len(scale)
    out = rows.new_empty(len(rows), count)
    block = 16 if count < 16384 else 32
    _few8[(-(-count // block),)](
        rows, codes, scale, out, len(rows), count, rows.shape[1], BLOCK_K=128, BLOCK_N=block, TILE=MOST_ROWS
    )
    return out


def whole4(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight `[N, K]` of uint8 codes `[N, K / 2]`."""
    count, half = codes.shape
    out = torch.empty(count, 2 * half, dtype=dtype, device=codes.device)
    block = 1024
    _whole4[(-(-codes.numel() // block),)](
        codes, scale, zero if zero is not None else codes, out, codes.numel(), 2 * half // scale.shape[1],
        HAS_ZERO=zero is not None, BLOCK=block,
    )  # fmt: skip
    return out


@functools.cache
def available(device: str) -> bool:
    """Whether Triton is there and its kernels give the plain result on this machine's card."""
    if triton is None or device != "cuda":
        return False
    try:
        fault = "" if right(device) else "their results are off"
    except Exception as error:  # compilers fail in ways of their own
        fault = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if fault:
        print(f"danlu: packed weights are computed with slowly, without Triton's kernels ({fault})", file=sys.stderr)
    return not fault


def right(device: str, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernels give what plain operations give, on small matrices.

    Args:
        dtype: of the rows; Triton's interpreter, which needs no card, knows float32 alone.
    """
    count, width, size = 40, 256, 64
    packed = (torch.arange(count * width // 2) * 37 % 256).to(torch.uint8).view(count, -1).to(device)
    scale = torch.linspace(0.01, 0.02, count * width // size).bfloat16().view(count, -1).to(device)
    zero = (torch.arange(scale.numel()) % 16).to(torch.uint8).view(scale.shape).to(device)
    rows = torch.linspace(-1, 1, 3 * width).sin().bfloat16().view(3, width).to(device, dtype)
    for middle in (zero, None):
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).float().view(count, -1, size)
        shifted = codes - (8.0 if middle is None else middle.float()[:, :, None])
        weight = (shifted * scale.float()[:, :, None]).view(count, width)
        if not torch.equal(whole4(packed, scale, middle, dtype), weight.to(dtype)):
            return False
        if not _near(few4(rows, packed, scale, middle), rows.float() @ weight.T):
            return False
    signed = (torch.arange(count * width) * 37 % 255 - 127).to(torch.int8).view(count, -1).to(device)
    one = scale[:, 0].float()
    return _near(few8(rows, signed, one), rows.float() @ (signed.float() * one[:, None]).T)


def _near(found: Tensor, expected: Tensor) -> bool:
    return bool((found.float() - expected).abs().max() <= TOLERANCE * expected.abs().max())
