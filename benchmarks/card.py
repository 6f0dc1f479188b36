"""The card that `benchmarks/gpu.py` measures: its rates, its memory."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import torch

# Dense bf16 rates that the cards' makers give, in FLOP/s; of others the measured products are the measure.
NOMINAL = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "B200": 2250e12}


@dataclass(frozen=True)
class Place:
    """Where it runs and what it made there."""

    device: str
    folder: Path
    tiny: bool
    rate: float

    @property
    def sizes(self) -> tuple[str, ...]:
        """Shapes that are measured here."""
        return ("tiny",) if self.tiny else ("1B", "7B")


def wait(device: str) -> None:
    """Until the card has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: str, size: int) -> float:
    """FLOP/s of a bf16 product of square matrices, best of five."""
    x = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    best = 0.0
    for _ in range(6):
        wait(device)
        begun = time.perf_counter()
        for _ in range(4):
            x @ x
        wait(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - begun))
    return best


def bandwidth(device: str, count: int) -> float:
    """Bytes per second that the device's memory reads and writes together, best of five copies of `count` floats."""
    x = torch.ones(count, device=device)
    y = torch.empty_like(x)
    best = 0.0
    for _ in range(6):
        wait(device)
        begun = time.perf_counter()
        y.copy_(x)
        wait(device)
        best = max(best, 2 * x.numel() * x.element_size() / (time.perf_counter() - begun))
    return best


def card_rate(place: Place) -> tuple[str, float]:
    """What a share is taken of: the maker's rate of a known card, else that of measured products."""
    name = torch.cuda.get_device_name() if place.device == "cuda" else ""
    known = [(f"{card}'s bf16 rate", rate) for card, rate in NOMINAL.items() if card in name]
    return known[0] if known else ("measured bf16 products", place.rate)


def free() -> None:
    """Gives memory back that nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocated_gb(device: str) -> float:
    """Gigabytes (2^30) that tensors hold on the card now; on a CPU 0."""
    return torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0.0


def peak_gb(device: str) -> float:
    """Gigabytes that the allocator had at most since `fresh_peak`; on a CPU 0."""
    return torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else 0.0


def fresh_peak(device: str) -> None:
    """Peaks count from now on."""
    free()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
