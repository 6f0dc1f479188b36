"""The most memory this process has held, and giving back what it no longer needs."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from danlu import heap


def hand_back() -> None:
    """Gives memory that nobody uses back to the system and the card, before much more is asked for.

    Models hold on to themselves in circles, which only a collection finds.
    """
    gc.collect()
    torch.cuda.empty_cache()
    heap.trim()


def reset_peak_memory() -> None:
    """Linux counts a process's peak since the last reset; elsewhere the peak is that of the whole process."""
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not allowed in some containers: the peak then covers the earlier stages too
            return


def peak_memory_mb() -> float:
    """Resident, in megabytes, since the last reset."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    import resource

    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1)
