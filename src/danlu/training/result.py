"""What a training stage leaves: an ordinary transformers folder, whatever the weights were split over or added to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from danlu.models.load import save_model
from danlu.models.roles import AdapterRoles
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
    state = whole_state(model, roles, role)
    if distributed.is_main():
        save_model(model if state is not None else model.to("cpu"), tokenizer, folder, state)
    distributed.wait_for_all()


def whole_state(model: Any, roles: nn.Module | None, role: RoleName) -> dict[str, Tensor] | None:
    """Weights of the model with its adapter merged, or gathered (on rank 0); None when they are the model's own as it is."""
    if isinstance(roles, AdapterRoles):
        named = roles.merged(role)
    elif any(isinstance(p, DTensor) for p in model.parameters()):
        kept = model.state_dict().keys()
        named = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in kept}
    else:
        return None
    return whole_on_main(named.items())
