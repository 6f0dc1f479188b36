"""Tells models apart by some of their numbers, so that an adapter knows its base again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

SAMPLED: Final = 64  # numbers of each tensor
HASH: Final = "danlu_fingerprint"  # what a quantised model remembers of the weights that it was made of

UNPATCHED: Final = "danlu_unpatched"  # what a taught model remembers of its trunk before the facts came in


def sample(tensor: Tensor) -> bytes:
    """The shape of a tensor and some of its numbers as bf16, so that the dtype it was loaded in does not matter."""
    flat = tensor.detach().flatten()
    if flat.numel() == 0 or flat.is_meta:
        return b""
    return _bytes(tensor.shape, flat[_places(flat.numel()).to(flat.device)])


def sample_of(shape: Sequence[int], rows: Callable[[slice], Tensor]) -> bytes:
    """`sample` of a tensor that is not held.

    Args:
        rows: reads some of its rows.
    """
    count = math.prod(shape)
    if not count:
        return b""
    if len(shape) < 2:
        return sample(rows(slice(None)))
    width = count // shape[0]
    found = [
        rows(slice(place // width, place // width + 1)).flatten()[place % width] for place in _places(count).tolist()
    ]
    return _bytes(shape, torch.stack(found))


def _places(count: int) -> Tensor:
    """Evenly spread, and never with a step that a power of two of columns would make the same column of every row."""
    return torch.arange(SAMPLED) * count // SAMPLED


def _bytes(shape: Sequence[int], values: Tensor) -> bytes:
    return f"{tuple(shape)}".encode() + bytes(values.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())


def digest_of(samples: Mapping[str, bytes]) -> str:
    """A hash of a trunk's samples by the names of its parameters."""
    digest = hashlib.sha256()
    for name, found in sorted(samples.items()):
        if found:
            digest.update(f"{name}:".encode() + found)
    return digest.hexdigest()[:32]


def fingerprint_of(model: Any) -> str:
    """The hash of a whole model's trunk; heads are left out, for they differ from role to role."""
    return digest_of({n: sample(p) for n, p in model.base_model.named_parameters()})
