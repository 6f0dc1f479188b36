"""The only place that knows about processes. One process: every function is the identity.

Data parallel over `torch.distributed` (gloo or nccl, started by torchrun): each rank takes every W-th micro-batch of a step,
gradients are summed (losses are divided by global denominators already), so W processes equal one.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Item = TypeVar("Item")


def start() -> None:
    """Joins the process group when launched by torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return world()[0] == 0


def mine(items: Sequence[Item]) -> list[Item]:
    """This rank's share of a step's micro-batches."""
    rank, size = world()
    return list(items[rank::size])


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds gradients up over the ranks, in one flat message; a parameter without gradient counts as zeros."""
    if world()[1] == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().float() for p in trained])
    dist.all_reduce(flat)
    offset = 0
    for p in trained:
        p.grad = flat[offset : offset + p.numel()].view_as(p).to(p.dtype)
        offset += p.numel()


def combine_numbers(values: dict[str, float], largest: Collection[str]) -> dict[str, float]:
    """Adds metrics up over the ranks (`largest`: takes the greatest); a rank without a micro-batch does not know all names."""
    size = world()[1]
    if size == 1:
        return values
    parts: list[dict[str, float]] = [{}] * size
    dist.all_gather_object(parts, values)
    names = sorted({n for p in parts for n in p})
    return {name: (max if name in largest else sum)(p.get(name, 0.0) for p in parts) for name in names}


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Rank 0's values everywhere."""
    if world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)
