"""Weights that are split over the ranks: FSDP2, which is torch's `fully_shard`, layer by layer and the rest with the root.

Gradients arrive split, too, summed over the ranks in the backward pass; AdamW works on each rank's own part. With `fsdp2` (ZeRO-3:
Rajbhandari et al. 2020) a layer lets go of the others' parts after each pass; with `zero2` it keeps them from its forward to its
backward pass, which saves a message and costs the weights' memory. Between steps each rank holds its part only. Whatever leaves
training (checkpoints, model folders, the engine's copy) is made of whole tensors, so that any number of processes and any
strategy reads it. Without sharding every function is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from danlu.models.root import RoleName
from danlu.train_config import TrainSettings
from danlu.training import distributed
from danlu.training.compute import Compute
from danlu.tree import Node, TreeBatch

Item = TypeVar("Item")
Result = TypeVar("Result")
Root = TypeVar("Root", bound=nn.Module)
NOTHING = TreeBatch.of([Node([0], [0.0])])


def shard(root: Root, settings: TrainSettings, compute: Compute) -> Root:
    """The root as the settings' strategy wants it; call it before the optimizer is made.

    With bf16, layers gather their weights in bf16; parts of weights, gradients and optimizer states stay fp32.
    """
    if not splits(settings):
        return root
    mesh = init_device_mesh(compute.device, (distributed.world()[1],))
    precise = compute.dtype == "float32"
    policy = MixedPrecisionPolicy() if precise else MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    layers = [m for m in root.modules() if isinstance(m, GradientCheckpointingLayer)]
    let_go = settings.strategy == "fsdp2"
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=let_go)
    # Without a backward pass after it, a forward pass ends in `_let_go`: between steps every parameter is a shard.
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=let_go)
    for module in (root, *layers):
        assert isinstance(module, FSDPModule), "made so above"
        module.set_gradient_divide_factor(1.0)  # losses are divided by global denominators already
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other kind
    return root


def splits(settings: TrainSettings) -> bool:
    """Whether the settings split weights, and there is somebody to share them with."""
    return settings.strategy != "ddp" and distributed.world()[1] > 1


def is_sharded(root: nn.Module) -> bool:
    """Whether its parameters are split over the ranks."""
    return isinstance(root, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be a shard, gathered; all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_of(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Named tensors, gathered one after the other."""
    for name, tensor in named:
        yield name, whole(tensor.detach())


def whole_on_main(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Named tensors by name; shards are gathered, one after the other, and kept by rank 0 alone, in the CPU's memory."""
    found = {}
    for name, tensor in named:
        full = whole(tensor.detach())
        if not isinstance(tensor, DTensor):
            found[name] = full
        elif distributed.is_main():
            found[name] = full.cpu()
    return found


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, to be changed in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """What a rank holds of a whole tensor when it holds `like` of another one of the same shape; no messages are sent."""
    if not isinstance(like, DTensor):
        return full
    device = like.device
    return distribute_tensor(full.to(device), like.device_mesh, like.placements, src_data_rank=None)


# -- ranks that share weights do as many forward passes ------------------------------------------------------------------


def missing_rounds(root: nn.Module, rounds: int) -> int:
    """How many rounds of forward passes this rank has to add to its own to do as many as every other.

    Sharded weights are gathered by all ranks together, so all must ask before any begins.
    """
    return distributed.most(rounds) - rounds if is_sharded(root) else 0


def pass_nothing(
    root: nn.Module, roles: Sequence[RoleName], rounds: int, compute: Compute, *, backward: bool = False
) -> None:
    """Rounds of forward passes over nothing.

    Args:
        roles: of the passes of a round, in order.
        backward: whether others have a backward pass then; these add zeros.
    """
    for _ in range(rounds):
        for role in roles:
            with torch.set_grad_enabled(backward), compute.autocast():
                zero = root(NOTHING.to(compute.device), role, _nothing)
            if backward:
                zero.backward()


def _let_go(root: Any) -> None:
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _nothing(out: Any) -> Tensor:
    return 0.0 * torch.stack([t.float().sum() for t in (out.hidden_TD, *out.linear.parameters())]).sum()


@torch.no_grad()
def share_forwards(
    root: nn.Module,
    roles: Sequence[RoleName],
    items: Sequence[Item],
    work: Callable[[Item], Result],
    compute: Compute,
) -> list[Result]:
    """`[work(i) for i in items]` without gradients, each rank at work on its own; everybody gets all results.

    Args:
        roles: whose forward passes `work` does, one each, in this order.
    """

    def paced(part: Sequence[Item]) -> list[Result]:
        missing = missing_rounds(root, len(part))
        found = [work(item) for item in part]
        pass_nothing(root, roles, missing, compute)
        _let_go(root)
        return found

    return distributed.share(items, paced)
