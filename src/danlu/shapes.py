"""Sizes that come back. oneDNN compiles a bf16 product for every shape it has not met, which takes it longer than a small product
itself; trees and answers have lengths of their own in every step. So sizes are rounded up, and what was compiled serves again."""

from __future__ import annotations

import torch

PARTS = 8
LEAST = 16


def rounded(size: int, least: int = LEAST) -> int:
    """`size` or the next larger of a few sizes: at most a `PARTS`th more, from `PARTS * least` on.

    Args:
        size: >= 1.
        least: what every size is a multiple of; a power of two.
    """
    step = max(least, (1 << (size.bit_length() - 1)) // PARTS)
    return -(-size // step) * step


def power_of_two(size: int) -> int:
    """The power of two at `size` (>= 1) or above it."""
    return 1 << (size - 1).bit_length()


def part_of(whole: int, size: int) -> int:
    """`size` (>= 1) of a `whole`, or a little more: a power of two, or a multiple of a `PARTS`th of the power of two at `whole` or
    below it. Fewer sizes than `rounded` has, for parts that vary more than the whole: each costs memory for products of its own.
    """
    step = max(LEAST, (1 << (whole.bit_length() - 1)) // PARTS)
    return min(-(-size // step) * step, max(LEAST, power_of_two(size)))


def compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products there are compiled for their shapes: bf16 and fp16 on a CPU."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def computed_in(x: torch.Tensor) -> torch.dtype:
    """The dtype of products with `x`: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
