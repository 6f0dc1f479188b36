"""Tells models apart by some of their numbers, so that an adapter knows its base again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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
    # Evenly spread, and never with a step that a power of two of columns would make the same column of every row.
    places = torch.arange(SAMPLED, device=flat.device) * flat.numel() // SAMPLED
    values = flat[places].to(torch.bfloat16).view(torch.int16).cpu().numpy()
    return f"{tuple(tensor.shape)}".encode() + bytes(values.tobytes())


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
