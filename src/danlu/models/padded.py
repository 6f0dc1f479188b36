"""Token trees on a padded batch, for families whose attention takes no plan (GPT-Neo, GLM, ...).

Every path from a root to a leaf becomes a row, so a shared prompt is computed once per branch. Same results, more work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from danlu.models.attention import VirtualRoot
from danlu.models.virtual_root import RootCache, derives_positions, left_out, takes_positions
from danlu.tree import TreeBatch


def run_trunk(trunk: nn.Module, tree: TreeBatch, root: VirtualRoot | None = None) -> Tensor:
    """Hidden states `[T, D]`; rows are padded on the right, so that positions are those of the tree.

    Args:
        root: what every row has before it, as transformers' cache.

    Raises:
        ModelError: a layer does not read the root.
    """
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
    arguments: dict[str, Any] = {"input_ids": tree.input_ids_T[index] * mask, "attention_mask": mask}
    # Some families (ChatGLM-6B) make positions of the ids themselves, and their prompts see what follows.
    derived = derives_positions(trunk)
    positions = tree.position_ids_T[index]
    if root is not None:
        positions = positions + root.offset
        arguments["past_key_values"] = RootCache(root, len(paths))
        if not derived:
            arguments["attention_mask"] = torch.cat([mask.new_ones(len(paths), root.tokens), mask], dim=1)
    if not derived and takes_positions(trunk):
        arguments["position_ids"] = positions * mask
    with left_out(trunk, root.tokens if root is not None and derived else 0):
        hidden: Tensor = trunk(use_cache=False, **arguments).last_hidden_state
    if root is not None:
        arguments["past_key_values"].require_read(trunk)
    return hidden.flatten(0, 1).index_select(0, place)
