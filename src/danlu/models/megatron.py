"""Checkpoints of Megatron's kind, as CPM was trained: one file a model-parallel rank, each with its part of every tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from danlu.exceptions import ModelError
from danlu.models.weights import read_pickle, read_weights, tensors_of, weight_files

Join = Callable[[Sequence[Tensor]], Tensor]
RANKS: Final = "mp_rank_*_model_states.pt"


def whole_state(folder: Path) -> list[dict[str, Tensor]]:
    """The weights of a folder: one mapping, or one a rank, in the ranks' order.

    Raises:
        ModelError: there are none, or a rank's file is missing.
    """
    files = weight_files(folder)
    if files:
        return [dict(read_weights(files))]
    ranks = sorted(folder.glob(RANKS)) or sorted(folder.glob(f"*/{RANKS}"))
    if not ranks:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise ModelError(
            f"no weights in this folder (found: {found})",
            file=folder,
            hint="expected model.safetensors, pytorch_model.bin, or mp_rank_00_model_states.pt and its sisters",
        )
    numbers = [int(re.findall(r"mp_rank_(\d+)", file.name)[0]) for file in ranks]
    if numbers != list(range(len(ranks))):
        absent = next(n for n in range(max(numbers) + 1) if n not in numbers)
        raise ModelError(
            f"mp_rank_{absent:02d}_model_states.pt is missing", file=ranks[0].parent, hint="fetch the missing files"
        )
    return [tensors_of(read_pickle(file), file) for file in ranks]


def rows(blocks: int) -> Join:
    """Ranks share the rows of a matrix; of a fused one (`blocks` matrices) each rank has a part of every matrix."""

    def join(parts: Sequence[Tensor]) -> Tensor:
        pieces = [part.chunk(blocks) for part in parts]
        return torch.cat([piece[block] for block in range(blocks) for piece in pieces])

    return join


def columns(parts: Sequence[Tensor]) -> Tensor:
    """Ranks share the columns."""
    return torch.cat(list(parts), dim=1)


def replicated(parts: Sequence[Tensor]) -> Tensor:
    """Every rank holds all of it."""
    return parts[0]


def joined(shards: Sequence[Mapping[str, Tensor]], splits: Sequence[tuple[str, Join]]) -> dict[str, Tensor]:
    """Whole tensors by name; the `module.` that wrappers put before names is taken off.

    Args:
        splits: how ranks share a tensor, by the end of its name; the first that fits.

    Raises:
        ModelError: the ranks do not hold the same names.
    """
    bare = [{re.sub(r"^(module\.)+", "", n): t for n, t in shard.items()} for shard in shards]
    for rank, shard in enumerate(bare):
        if shard.keys() != bare[0].keys():
            name = sorted(shard.keys() ^ bare[0].keys())[0]
            raise ModelError(f"ranks 0 and {rank} do not hold the same weights: {name} is in one of them only")
    if len(bare) == 1:
        return bare[0]
    return {
        name: next(join for end, join in splits if name.endswith(end))([shard[name] for shard in bare])
        for name in bare[0]
    }


def renamed(name: str, names: Mapping[str, str]) -> str:
    """The name with the first of these parts that it has replaced by its new name."""
    for old, new in names.items():
        found = re.search(rf"(^|\.){re.escape(old)}(?=\.|$)", name)
        if found:
            return name[: found.start()] + found[1] + new + name[found.end() :]
    return name
