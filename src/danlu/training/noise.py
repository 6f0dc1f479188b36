"""NEFTune (Jain et al. 2023): while a model trains, uniform noise in [-1, 1] * alpha / sqrt(L D) is added to its embeddings.

L is the length of the text that a token belongs to, D the model's width. The noise is a function of seed, stage, step and the
micro-batch's number; in evaluation there is none.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from danlu.generation.seeds import mix_seed
from danlu.models.root import RootModel
from danlu.training import distributed
from danlu.tree import TreeBatch


class EmbeddingNoise:
    """A hook on the input embeddings of every trained model under a root.

    Args:
        alpha: > 0.
        stage: its name takes part in the seed.
    """

    def __init__(self, root: RootModel, alpha: float, seed: int, stage: str) -> None:
        self.alpha, self.seed, self.code = alpha, seed, zlib.crc32(stage.encode())
        self.step = self.number = 0
        self._tree: TreeBatch | None = None
        root.register_forward_pre_hook(self._begin_forward)
        models = getattr(root.trunks, "models", None)
        bases: Any = models.values() if isinstance(models, nn.ModuleDict) else [root.trunks.base]
        for model in bases:
            model.get_input_embeddings().register_forward_hook(self._add)

    def begin_step(self, step: int) -> None:
        """Before the micro-batches of a 0-based step."""
        self.step, self.number = step, 0

    def _begin_forward(self, root: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._tree = arguments[0]

    def _add(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
        if not module.training or not torch.is_grad_enabled() or self._tree is None:
            return None
        rank, ranks = distributed.world()
        draw = torch.Generator().manual_seed(mix_seed(self.seed, self.code, self.step, self.number * ranks + rank))
        self.number += 1
        noise = torch.rand(output.shape, generator=draw).mul_(2).sub_(1)
        # On the fast path all tokens stand in one row, on the padded one every text has its own.
        flat = output.shape[:2] == (1, self._tree.tokens)
        lengths = lengths_of(self._tree) if flat else torch.full(output.shape[:2], float(output.shape[1]))
        scale = self.alpha / (lengths * output.shape[-1]).sqrt()
        return output + (noise * scale.view(*output.shape[:2], 1)).to(output.device, output.dtype)


def lengths_of(tree: TreeBatch) -> Tensor:
    """For each token the length of the longest path that it is on, `[T]`."""
    starts, ends, parents = (x.tolist() for x in (tree.node_start_N, tree.node_end_N, tree.node_parent_N))
    before = [0] * len(starts)
    for node, parent in enumerate(parents):
        before[node] = 0 if parent < 0 else before[parent] + ends[parent] - starts[parent]
    longest = [before[n] + ends[n] - starts[n] for n in range(len(starts))]
    for node in reversed(range(len(starts))):
        if parents[node] >= 0:
            longest[parents[node]] = max(longest[parents[node]], longest[node])
    lengths = torch.empty(tree.tokens)
    for node, length in enumerate(longest):
        lengths[starts[node] : ends[node]] = length
    return lengths
