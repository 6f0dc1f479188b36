"""Memory and disk that run out: said in a sentence with what to change, or, for memory, met with smaller micro-batches."""

from __future__ import annotations

import errno
import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from danlu import atomic
from danlu.alignment_config import GrpoSettings, PpoSettings
from danlu.exceptions import DanluError, TrainingError
from danlu.train_config import TrainSettings
from danlu.training import distributed
from danlu.training.peak import hand_back

CHOICE = "micro_tokens.json"
# Allocators and serialisers of torch and safetensors raise RuntimeErrors and errors of their own with these words.
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc|STATUS_ALLOC_FAILED", re.I)
NO_DISK = re.compile(
    r"No space left on device|os error 28\b|Disk quota exceeded|File too large|os error 27\b|file write failed"
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

S = TypeVar("S", bound=TrainSettings)
Result = TypeVar("Result")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, is an allocator's."""
    return any(
        isinstance(e, MemoryError | torch.OutOfMemoryError)
        or (isinstance(e, RuntimeError) and NO_MEMORY.search(str(e)) is not None)
        for e in _chain(error)
    )


def disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, is that a file could not be written for lack of room."""
    if isinstance(error, DanluError):
        return False  # said already
    return any(
        e.errno in FULL if isinstance(e, OSError) and e.errno is not None else NO_DISK.search(str(e)) is not None
        for e in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def disk_sentence(folder: Path) -> TrainingError:
    """What to say when files cannot be written into `folder` for lack of room."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free / 2**20
    return TrainingError(
        f"the disk (or its quota) is full: {free:,.0f} MB free",
        file=folder,
        hint="make room and run the same command again to go on from the last checkpoint; "
        "fewer keep_checkpoints or adapter: lora need less",
    )


def memory_sentence(settings: TrainSettings) -> TrainingError:
    """What to say when memory runs out: what these settings can still change, what costs least first."""
    smaller = max(settings.max_length, settings.micro_tokens // 2)
    ways = []
    if settings.micro_tokens > settings.max_length:
        ways.append(
            f"micro_tokens: {smaller} (now {settings.micro_tokens}; the result stays the same) or on_oom: halve"
        )
    if isinstance(settings, PpoSettings | GrpoSettings) and settings.rollout.batch > 8:
        ways.append(f"a smaller rollout.batch (now {settings.rollout.batch})")
    if not settings.activation_checkpointing:
        ways.append("activation_checkpointing: true")
    if settings.adapter == "full":
        ways.append("adapter: lora")
        if settings.optimizer == "adamw":
            ways.append("optimizer: adamw8bit" + (" or adamw_offload" if torch.cuda.is_available() else ""))
    ways.append(f"a smaller max_length (now {settings.max_length})")
    place = (
        f"the GPU's {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GB of "
        if torch.cuda.is_available()
        else ""
    )
    return TrainingError(
        f"{place}memory ran out at micro_tokens {settings.micro_tokens}",
        file=settings.out or None,
        hint="; or ".join(ways) + ". Then run the same command again; `danlu plan` estimates what a recipe needs",
    )


def within_limits(train: Callable[[S], Result]) -> Callable[[S], Result]:
    """A trainer that ends with a sentence when memory or disk run out, and with `on_oom: halve` goes on with half the
    micro_tokens: micro-batches do not change what is computed, so the step is done again and the rest follows.

    The smaller number is kept in the stage's folder, for what is resumed later. Several processes stop: the others wait in a
    sum for the one that ran out.

    Raises:
        TrainingError: nothing is left to halve, or `on_oom: stop`.
    """

    @functools.wraps(train)
    def limited(settings: S) -> Result:
        choice = Path(settings.out) / CHOICE
        if settings.on_oom == "halve" and choice.is_file():
            kept = int(json.loads(choice.read_text("utf-8"))["micro_tokens"])
            settings = settings.model_copy(update={"micro_tokens": min(kept, settings.micro_tokens)})
        hand_back()
        while True:
            try:
                return train(settings)
            except Exception as error:
                if disk_full(error):
                    raise disk_sentence(Path(settings.out)) from error
                if not out_of_memory(error):
                    raise
                at_end = settings.micro_tokens <= settings.max_length or distributed.world()[1] > 1
                if settings.on_oom == "stop" or at_end:
                    raise memory_sentence(settings) from error
            # Outside of the except block: the error's frames, which hold the step's tensors, are gone.
            hand_back()
            smaller = max(settings.max_length, settings.micro_tokens // 2)
            settings = settings.model_copy(update={"micro_tokens": smaller})
            atomic.write_json(choice, {"micro_tokens": smaller})

    return limited
