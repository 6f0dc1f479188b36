"""PEFT's adapter on a model that is taught, as a plain product of factors afterwards, and the model without it."""

from __future__ import annotations

from typing import Any, Final

import torch

from danlu.exceptions import SettingsError
from danlu.knowledge_config import TeachSettings
from danlu.models.adapters import adapter_roles
from danlu.models.patches import Factors
from danlu.models.roles import AdapterRoles
from danlu.train_config import AdaLora, Lora, TrainSettings

ROLE: Final = "policy"
FEWEST = 10  # steps in which ranks can fall


def adapted(model: Any, settings: TeachSettings, seed: int) -> AdapterRoles:
    """A model with a fresh adapter of `settings.adapter` that learns; everything else is frozen.

    Args:
        model: a causal language model; it is changed in place until `AdapterRoles.unload`.
        seed: of the adapter's first weights.

    Raises:
        ModelError: no module of the model fits `settings.target`.
        SettingsError: AdaLoRA has too few steps.
    """
    if settings.adapter == "adalora" and settings.max_steps < FEWEST:
        raise SettingsError(
            f"AdaLoRA needs at least {FEWEST} steps to prune", field="max_steps", hint="raise it, or take adapter: lora"
        )
    initial = settings.rank + settings.rank // 2 + 1
    adalora = settings.adapter == "adalora"
    lora = Lora(
        r=settings.rank,
        # Both are scaled by alpha / rank; AdaLoRA divides by the rank that it begins with.
        alpha=settings.alpha * (initial / settings.rank if adalora else 1.0),
        dropout=settings.dropout,
        target=settings.target,
    )
    kind = "adalora" if adalora else "lora"
    train = TrainSettings(adapter=kind, lora=lora, adalora=AdaLora(initial_r=initial, target_r=settings.rank))
    roles = adapter_roles(model, [ROLE], train, seed=seed, updates=settings.max_steps)
    assert isinstance(roles, AdapterRoles), "neither kind is a prefix"
    roles.trunk(ROLE)
    return roles


@torch.no_grad()
def factors_of(roles: AdapterRoles) -> dict[str, Factors]:
    """The change as plain products, scale included; ranks that were pruned, and modules without any left, are not in it."""
    found = {}
    for name, module in roles.base.named_modules():
        if ROLE not in getattr(module, "lora_A", {}):
            continue
        a, b = module.lora_A[ROLE], module.lora_B[ROLE]
        if roles.peft_type == "ADALORA":
            scale = module.scaling[ROLE] / (module.ranknum[ROLE] + 1e-5)
            a, b = a * module.lora_E[ROLE], b * scale
        else:
            a, b = a.weight, b.weight * module.scaling[ROLE]
        kept = (a.abs().sum(1) > 0) & (b.abs().sum(0) > 0)
        if kept.any():
            found[name] = Factors(a[kept].detach().clone(), b[:, kept].detach().clone())
    return found
