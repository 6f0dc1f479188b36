"""What a training stage leaves: an ordinary transformers folder, whatever the weights were split over or added to; and the adapter.

An adapter goes to `adapter` beside `model`. What cannot be merged (a quantised base, a prefix) is the model folder itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from danlu.models.adapter_files import SCORE, save_adapter
from danlu.models.load import save_model
from danlu.models.prefix import PrefixRoles
from danlu.models.roles import SCALAR_ROLES, AdapterRoles
from danlu.models.root import RoleName
from danlu.training import distributed
from danlu.training.sharding import whole_on_main


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
        named = roles.merged(role)
        state = whole_on_main(named.items())
        if distributed.is_main():
            save_model(model, tokenizer, folder, state)
    distributed.wait_for_all()


def whole_state(model: Any) -> dict[str, Tensor] | None:
    """Weights of the model gathered (on rank 0); None when they are the model's own as it is."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    kept = model.state_dict().keys()
    named = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in kept}
    return whole_on_main(named.items())
