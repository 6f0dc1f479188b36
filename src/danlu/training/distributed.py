"""The only place that knows about processes. One process: every function is the identity.

Data parallel over `torch.distributed` (gloo, or nccl between GPUs): each rank takes every W-th micro-batch of a step and
gradients are summed (losses are divided by global denominators already), so W processes equal one. Ranks are started by
`training/launch.py`, torchrun or accelerate; how parameters are split over them is in `training/sharding.py`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danlu.exceptions import PeerLost, SettingsError
from danlu.training import place
from danlu.training.heartbeat import SILENT_SECONDS, Heartbeat

Item = TypeVar("Item")
Result = TypeVar("Result")
# Ranks wait for one another while rank 0 does a stage that is not shared. That one of them has died shows by its closed
# connection or its silence (`training/heartbeat.py`), and not by this limit.
LONGEST_WAIT = timedelta(hours=24)
_peers: list[tuple[str, int]] = []
_heartbeat: Heartbeat | None = None
_alone = False
_waits = 0  # `naming_the_lost` blocks that this process is in


def launched() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _say_and_end(error: PeerLost) -> None:
    print(f"danlu: {error}", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread cannot be called back out of a collective


def start(on_lost: Callable[[PeerLost], None] = _say_and_end) -> None:
    """Joins the process group when this process was started as one of several.

    Args:
        on_lost: called by a thread when another rank falls silent while this one is in `naming_the_lost`.

    Raises:
        SettingsError: there are more processes on this machine than GPUs.
    """
    place.adopt(os.environ)
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
    _begin_heartbeat(on_lost)


def _begin_heartbeat(on_lost: Callable[[PeerLost], None]) -> None:
    global _heartbeat
    from torch._C._distributed_c10d import (
        TCPStore,
    )  # `torch.distributed` has it without exporting it; not every build does

    def lost(other: int) -> None:
        if _waits:
            on_lost(_peer_lost(other, f"gave no sign of life for {SILENT_SECONDS:.0f} s"))

    rank, size = world()
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
    heartbeat = Heartbeat(store, f"danlu/{same(uuid.uuid4().hex)}", rank, size, lost)
    _peers[:] = gather((socket.gethostname(), os.getpid()))
    heartbeat.start()
    _heartbeat = heartbeat


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        if _heartbeat is not None:
            _heartbeat.end()
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
    """Turns a broken connection between ranks into a sentence that names the rank which is gone; and while a block is inside,
    a rank that falls silent ends this process.

    Raises:
        PeerLost: in place of torch's own errors.
    """
    global _waits
    _waits += 1
    try:
        yield
    except (RuntimeError, ConnectionError, KeyboardInterrupt) as error:
        if world()[1] == 1 or not _broke(error):
            raise
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would stop the sentence on its way
        raise _peer_lost(_gone(), "has ended") from error
    finally:
        _waits -= 1


def _broke(error: BaseException | None) -> bool:
    """Whether an error is that of a broken connection, or SIGTERM in the middle of one: torchrun ends whom a rank's death
    leaves.
    """
    if isinstance(error, KeyboardInterrupt):
        return _broke(error.__context__)
    lost = isinstance(error, dist.DistError | ConnectionError)
    return lost or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _peer_lost(rank: int | None, how: str) -> PeerLost:
    own, size = world()
    if rank is None:
        who = "another rank"
    elif rank == own:  # the launcher keeps the store, as torchrun's does
        who = "the launcher of rank 0"
    else:
        host, process = _peers[rank]
        who = f"rank {rank} of {size} (process {process} on {host})"
    return PeerLost(
        f"{who} {how}, and the others cannot go on without it",
        hint="its own message says why, if it could leave one; "
        "run the same command again to go on from the last checkpoint",
    )


def _gone(seconds: float = 2.0) -> int | None:
    """The lowest rank on this machine that has ended (a connection closes a moment before its process is gone), or the one
    of another machine that is not heard of any more.
    """
    here = socket.gethostname()
    end = time.monotonic() + seconds
    while _peers and time.monotonic() < end:
        for rank, (host, process) in enumerate(_peers):
            if host == here and not _is_alive(process):
                return rank
        time.sleep(0.05)
    return _heartbeat.missing() if _heartbeat is not None else None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{process}/stat")
    return not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
