"""Device, compute dtype and threads: chosen once by measuring, saved in the stage's folder and reused on resume.

Weights, gradients and optimizer states are fp32 whatever the dtype; only matrix products and what lies between them is bf16.
float16 is for cards that have no bfloat16: its largest number is 65,504 and its smallest steps lose gradients, so losses are
scaled up before the backward pass (Micikevicius et al. 2018, section 3.2).
"""

from __future__ import annotations

import json
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from danlu import atomic
from danlu.exceptions import SettingsError
from danlu.training import distributed

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A power of two costs no precision. Should it still overflow, the step is skipped like any whose gradient is no number.
FLOAT16_SCALE = 1024.0
# oneDNN keeps the compiled products of its last 1024 shapes, and on trees nearly every step has shapes of its own: after a
# hundred steps of a 2M model that was half a gigabyte. Sizes are rounded (`danlu/shapes.py`), so that 128 hold those of several
# steps (docs/log.md). It is read at the first product.
PRIMITIVES_KEPT = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


@dataclass(frozen=True)
class Compute:
    """`dtype` is that of matrix products (autocast); `threads` are those of each of the `processes`."""

    device: str
    dtype: Dtype
    threads: int
    processes: int = 1

    def autocast(self) -> AbstractContextManager[object]:
        """The context every training forward runs in."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device, dtype=DTYPES[self.dtype])

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by before the backward pass, and gradients divided by after it."""
        return FLOAT16_SCALE if self.dtype == "float16" else 1.0


def choose(folder: Path, wanted: Dtype | Literal["auto"], width: int) -> Compute:
    """What a stage computes with: the choice saved in `folder/compute.json`, or a fresh one. Rank 0 chooses for all.

    Args:
        wanted: auto takes bf16 on CUDA cards that have it, and on a CPU if a matrix product of this model's width is at least
            a fifth faster in it (those with AVX512-BF16 or AMX).
        width: D of the model.

    Raises:
        SettingsError: float16 where there is something better.
    """
    os.environ.setdefault(*PRIMITIVES_KEPT)
    found = distributed.same(_choice(folder, wanted, width) if distributed.is_main() else None)
    assert found is not None, "rank 0 chose"
    torch.set_num_threads(found.threads)
    return found


def _choice(folder: Path, wanted: Dtype | Literal["auto"], width: int) -> Compute:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "float16":
        _refuse_float16(device)
    path = folder / "compute.json"
    here = Compute(device, "float32", torch.get_num_threads(), distributed.world()[1])
    saved = Compute(**json.loads(path.read_text("utf-8"))) if path.is_file() else None
    if saved is not None and wanted in ("auto", saved.dtype) and device in ("cuda", saved.device):
        # Threads change the order of sums: as many as before, unless the work is shared in another way now.
        moved = replace(saved, threads=here.threads, processes=here.processes)
        choice = saved if saved.processes == here.processes else moved
    else:
        choice = replace(here, dtype=_fastest(device, width) if wanted == "auto" else wanted)
    if choice != saved:
        atomic.write_json(path, asdict(choice))
    return choice


def _fastest(device: str, width: int) -> Dtype:
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else bf16_gain(width) >= 1.2
    return "bfloat16" if bf16 else "float32"


def _refuse_float16(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return
    have = f"the {torch.cuda.get_device_name()}" if device == "cuda" else "a CPU"
    raise SettingsError(
        f"float16 overflows at 65,504 and rounds small gradients to zero; {have} has bfloat16, which has the range of float32",
        field="dtype",
        hint="dtype: bfloat16, or auto to take it where it is faster",
    )


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
