"""The only place that knows about processes. One process: every function is the identity.

Data parallel over `torch.distributed` (gloo, or nccl between GPUs): each rank takes every W-th micro-batch of a step and
gradients are summed (losses are divided by global denominators already), so W processes equal one. Ranks are started by
`training/launch.py`, torchrun or accelerate; how parameters are split over them is in `training/sharding.py`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danlu.exceptions import PeerLost, SettingsError

Item = TypeVar("Item")
Result = TypeVar("Result")
# Ranks wait for one another while rank 0 does a stage that is not shared. That one of them has died shows at once, by its
# closed connection, and not by this limit.
LONGEST_WAIT = timedelta(hours=24)
_peers: list[tuple[str, int]] = []
_alone = False


def launched() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start() -> None:
    """Joins the process group when this process was started as one of several.

    Raises:
        SettingsError: there are more processes on this machine than GPUs.
    """
    if not launched() or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise SettingsError(
                f"{os.environ.get('LOCAL_WORLD_SIZE', local + 1)} processes want a GPU each, this machine has {gpus}",
                field="processes",
                hint=f"at most {gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to compute on the CPU",
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    _peers[:] = gather((socket.gethostname(), os.getpid()))


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _peers.clear()


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not _alone else (0, 1)


@contextmanager
def alone() -> Iterator[None]:
    """As if this process were the only one: for what rank 0 does while the others wait for something else."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return world()[0] == 0


# -- what each rank does -------------------------------------------------------------------------------------------------


def mine(items: Sequence[Item]) -> list[Item]:
    """This rank's share of a step's micro-batches."""
    rank, size = world()
    return list(items[rank::size])


def share(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
    """`list(work(items))`, each rank at work on its own items only; everybody gets all results, in the order of the items.

    Args:
        work: one result per item, whatever the other items are.
    """
    size = world()[1]
    if size == 1:
        return list(work(items))
    results: dict[int, Result] = {}
    for rank, found in enumerate(gather(list(work(mine(items))))):
        results |= dict(zip(range(rank, len(items), size), found, strict=True))
    return [results[i] for i in range(len(items))]


# -- what ranks tell one another -----------------------------------------------------------------------------------------


def gather(value: Item) -> list[Item]:
    """Everybody's value, by rank. Values are pickled: small things only."""
    size = world()[1]
    if size == 1:
        return [value]
    found: list[Item] = [value] * size
    dist.all_gather_object(found, value)
    return found


def same(value: Item) -> Item:
    """Rank 0's value everywhere."""
    if world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]


def anyone(flag: bool) -> bool:
    """Whether it is true for any rank: so that all of them stop at the same step."""
    return most(int(flag)) > 0


def most(count: int) -> int:
    """The greatest of everybody's counts."""
    if world()[1] == 1:
        return count
    box = torch.tensor([count])
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def wait_for_all() -> None:
    """No rank goes on before all have come here."""
    most(0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds gradients up over the ranks, in one flat message.

    A parameter without gradient counts as zeros where another rank has one, and stays without where none has.
    """
    if world()[1] == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    parts = [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().float() for p in trained]
    present = torch.tensor([float(p.grad is not None) for p in trained], device=parts[0].device)
    flat = torch.cat([*parts, present])
    dist.all_reduce(flat)
    offset = 0
    for p, count in zip(trained, flat[-len(trained) :].tolist(), strict=True):
        p.grad = flat[offset : offset + p.numel()].view_as(p).to(p.dtype) if count else None
        offset += p.numel()


def combine_numbers(values: dict[str, float], largest: Collection[str]) -> dict[str, float]:
    """Adds metrics up over the ranks (`largest`: takes the greatest); a rank without a micro-batch does not know all names."""
    if world()[1] == 1:
        return values
    parts = gather(values)
    names = sorted({n for p in parts for n in p})
    return {name: (max if name in largest else sum)(p.get(name, 0.0) for p in parts) for name in names}


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Rank 0's values everywhere."""
    if world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


# -- when one of them is gone --------------------------------------------------------------------------------------------


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """Turns a broken connection between ranks into a sentence that names the rank which is gone.

    Raises:
        PeerLost: in place of torch's own errors.
    """
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if world()[1] == 1 or not (isinstance(error, dist.DistError | ConnectionError) or "gloo" in str(error)):
            raise
        gone = _gone()
        who = f"rank {gone} of {world()[1]} (process {_peers[gone][1]})" if gone is not None else "another rank"
        raise PeerLost(
            f"{who} has ended, and the others cannot go on without it",
            hint="its own message says why; run the same command again to go on from the last checkpoint",
        ) from error


def _gone(seconds: float = 2.0) -> int | None:
    """The lowest rank on this machine that has ended; a connection closes a moment before its process is gone."""
    here = socket.gethostname()
    end = time.monotonic() + seconds
    while _peers and time.monotonic() < end:
        for rank, (host, process) in enumerate(_peers):
            if host == here and not _is_alive(process):
                return rank
        time.sleep(0.05)
    return None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{process}/stat")
    return not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
