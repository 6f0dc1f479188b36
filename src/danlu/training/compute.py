"""Device, compute dtype and threads: chosen once by measuring, saved in the stage's folder and reused on resume."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from danlu import atomic

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Compute:
    """Weights and optimizer stay fp32; `dtype` is that of matrix products (autocast)."""

    device: str
    dtype: Literal["float32", "bfloat16"]
    threads: int

    def autocast(self) -> AbstractContextManager[object]:
        """The context every training forward runs in."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device, dtype=DTYPES[self.dtype])


def choose(folder: Path, wanted: str, width: int) -> Compute:
    """What a stage computes with: the choice saved in `folder/compute.json`, or a fresh one.

    Args:
        wanted: "float32", "bfloat16" or "auto". Auto takes bf16 on CUDA cards that have it, and on a CPU if a matrix product
            of this model's width is at least a fifth faster in it.
        width: D of the model.
    """
    saved = folder / "compute.json"
    if saved.is_file():
        found = Compute(**json.loads(saved.read_text("utf-8")))
        if wanted in ("auto", found.dtype) and (found.device == "cpu" or torch.cuda.is_available()):
            torch.set_num_threads(found.threads)
            return found
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16"]
    if wanted != "auto":
        dtype = "bfloat16" if wanted == "bfloat16" else "float32"
    elif device == "cuda":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    else:
        dtype = "bfloat16" if bf16_gain(width) >= 1.2 else "float32"
    choice = Compute(device, dtype, torch.get_num_threads())
    atomic.write_json(saved, asdict(choice))
    return choice


def bf16_gain(width: int, rows: int = 1024) -> float:
    """How many times faster a bf16 product `[rows, D] x [D, 4D]` is than the fp32 one on this CPU (best of five)."""
    times: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(rows, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
        x @ w.T
        best = float("inf")
        for _ in range(5):
            begun = time.perf_counter()
            x @ w.T
            best = min(best, time.perf_counter() - begun)
        times[dtype] = best
    return times[torch.float32] / times[torch.bfloat16]
