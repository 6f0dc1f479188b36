"""How much memory an engine may take for keys and values when nobody says."""

from __future__ import annotations

from pathlib import Path

import torch

SHARE = 0.25
MOST = {"cpu": 4 << 30, "cuda": 32 << 30}
UNKNOWN = 2 << 30  # free memory where the system does not tell


def default_memory(device: torch.device) -> int:
    """Bytes: a quarter of what is free on the device, at most 4 GiB on a CPU and 32 GiB on a GPU."""
    return min(int(SHARE * free_memory(device)), MOST.get(device.type, MOST["cpu"]))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return UNKNOWN
