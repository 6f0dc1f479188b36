"""Token trees on a padded batch, for families whose attention takes no plan (BLOOM, CodeGen, GPT-J, ...).

Every path from a root to a leaf becomes a row, so a shared prompt is computed once per branch. Same results, more work.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from danlu.tree import TreeBatch


def run_trunk(trunk: nn.Module, tree: TreeBatch) -> Tensor:
    """Hidden states `[T, D]`; rows are padded on the right, so that positions are those of the tree."""
    paths = [tree.token_index(tree.path(leaf)) for leaf in tree.leaves()]
    longest = max(p.numel() for p in paths)
    device = tree.input_ids_T.device
    index = torch.zeros(len(paths), longest, dtype=torch.int64)
    mask = torch.zeros(len(paths), longest, dtype=torch.int64)
    # Where token t of the tree stands in the padded rows; a shared ancestor is read from its first row.
    place = torch.full((tree.tokens,), -1, dtype=torch.int64)
    for row, path in enumerate(paths):
        length = path.numel()
        index[row, :length] = path
        mask[row, :length] = 1
        new = place[path] < 0
        place[path[new]] = row * longest + torch.arange(length)[new]
    index, mask, place = index.to(device), mask.to(device), place.to(device)
    arguments = {"input_ids": tree.input_ids_T[index] * mask, "attention_mask": mask, "use_cache": False}
    # Some families (GLM) make positions of the ids themselves, and their prompts see what follows.
    derived = getattr(trunk, "derives_positions", False)
    if not derived and "position_ids" in inspect.signature(trunk.forward).parameters:
        arguments["position_ids"] = tree.position_ids_T[index] * mask
    hidden: Tensor = trunk(**arguments).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, place)
