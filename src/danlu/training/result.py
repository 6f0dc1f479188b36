"""What a training stage leaves: an ordinary transformers folder, whatever the weights were split over or added to; and the adapter.

An adapter goes to `adapter` beside `model`. What cannot be merged (a quantised base, a prefix) is the model folder itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from danlu.models.adapter_files import SCORE, save_adapter
from danlu.models.heads import head_of
from danlu.models.load import load_model, save_model
from danlu.models.prefix import PrefixRoles
from danlu.models.roles import SCALAR_ROLES, AdapterRoles
from danlu.models.root import RoleName
from danlu.training import distributed
from danlu.training.peak import hand_back
from danlu.training.setup import ROUNDED, SOURCE
from danlu.training.sharding import whole, whole_of, whole_on_main


def save_result(
    model: Any, tokenizer: Any, folder: Path, roles: nn.Module | None = None, role: RoleName = "policy"
) -> None:
    """Writes a trained model; rank 0 writes, all ranks take part.

    Args:
        model: the transformers model.
        roles, role: whose adapter is merged into it, if it has one.
    """
    if is_shared(roles):
        _save_adapted(model, tokenizer, folder, roles, role)
        return
    state = whole_state(model)
    if distributed.is_main():
        save_model(model if state is not None else model.to("cpu"), tokenizer, folder, state)
    distributed.wait_for_all()


def is_shared(roles: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether roles are adapters on one base."""
    return isinstance(roles, AdapterRoles | PrefixRoles)


def adapter_folder(folder: Path) -> Path:
    """Where the adapter of a model folder goes: `adapter` for `model`, `ema-adapter` for `ema`."""
    return folder.with_name("adapter" if folder.name == "model" else f"{folder.name}-adapter")


def save_role(
    roles: nn.Module, role: RoleName, tokenizer: Any, folders: Sequence[Path], config: Mapping[str, Any] | None = None
) -> None:
    """Writes a role's adapter into each of the folders; rank 0 writes, all ranks take part."""
    weights = None
    if isinstance(roles, AdapterRoles):
        scalar = {SCORE: roles.head(role).weight} if role in SCALAR_ROLES else {}
        weights = whole_on_main({**roles.weights(role), **scalar}.items())
    if distributed.is_main():
        for folder in folders:
            save_adapter(roles, role, folder, tokenizer, weights, config)
    distributed.wait_for_all()


def _save_adapted(model: Any, tokenizer: Any, folder: Path, roles: nn.Module, role: RoleName) -> None:
    merges = isinstance(roles, AdapterRoles) and roles.mergeable
    if isinstance(roles, AdapterRoles):
        roles.mask_ranks()
    save_role(roles, role, tokenizer, [adapter_folder(folder), *([] if merges else [folder])])
    if isinstance(roles, AdapterRoles) and merges:
        if hasattr(roles.base, SOURCE):
            merged = merged_model(roles, role)
            merged.generation_config = model.generation_config
            save_result(merged, tokenizer, folder)
        else:  # made in memory: there is no folder to begin with
            state = whole_on_main(roles.merged(role).items())
            if distributed.is_main():
                save_model(model, tokenizer, folder, state)
    distributed.wait_for_all()


@torch.no_grad()
def merged_model(roles: AdapterRoles, role: RoleName) -> Any:
    """The base, read again from its folder, with the role's adapter in it; with the scalar head of a role that has one."""
    scalar = role in SCALAR_ROLES
    hand_back()
    model = load_model(getattr(roles.base, SOURCE), scalar=scalar)
    own = dict(model.named_parameters())
    exact = own if getattr(roles.base, ROUNDED, False) else {}
    for name, value in whole_of(roles.merging(role, exact)):
        if name in own:
            own[name].copy_(value)
    if scalar:
        head_of(model).get_parameter("weight").copy_(whole(roles.head(role).weight))
    return model


def whole_state(model: Any) -> dict[str, Tensor] | None:
    """Weights of the model gathered (on rank 0); None when they are the model's own as it is."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    kept = model.state_dict().keys()
    named = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in kept}
    return whole_on_main(named.items())
