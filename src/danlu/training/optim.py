"""The optimizers by name, and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from danlu.exceptions import SettingsError
from danlu.train_config import TrainSettings
from danlu.training.adamw8bit import AdamW8bit
from danlu.training.adamw_offload import AdamWOffload

BETAS = (0.9, 0.95)
EPS = 1e-8
SCALE = "rate_scale"  # of a parameter group


Learning = nn.Module | Mapping[str, nn.Parameter]
"""A module, or parameters by name."""


def adamw(module: Learning, learning_rate: float, weight_decay: float, rate_ratio: float = 1.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over the trainable parameters; decay on matrices only, betas (0.9, 0.95).

    Args:
        rate_ratio: of LoRA's B over all others (LoRA+, Hayou et al. 2024).
    """
    return torch.optim.AdamW(
        _groups(module, weight_decay, rate_ratio), lr=learning_rate, betas=BETAS, eps=EPS, fused=True
    )


def optimizer_of(module: Learning, learning_rate: float, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer that the settings name.

    Raises:
        SettingsError: one of danlu's own for parameters that are sharded over processes.
    """
    if settings.optimizer == "adamw":
        return adamw(module, learning_rate, settings.weight_decay, settings.lora.rate_ratio)
    if any(isinstance(p, DTensor) for p in _named(module).values()):
        raise SettingsError(
            f"{settings.optimizer} does not work on weights that are sharded over processes",
            field="optimizer",
            hint="optimizer: adamw; sharding divides its averages already",
        )
    kind = AdamW8bit if settings.optimizer == "adamw8bit" else AdamWOffload
    return kind(
        _groups(module, settings.weight_decay, settings.lora.rate_ratio), lr=learning_rate, betas=BETAS, eps=EPS
    )


def _named(module: Learning) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters() if isinstance(module, nn.Module) else module)


def _groups(module: Learning, weight_decay: float, rate_ratio: float) -> list[dict[str, Any]]:
    trained = {n: p for n, p in _named(module).items() if p.requires_grad}
    faster = {id(p) for n, p in trained.items() if rate_ratio != 1.0 and ".lora_B." in n}
    slow = [p for p in trained.values() if id(p) not in faster]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in slow if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in slow if p.dim() < 2], "weight_decay": 0.0},
        {"params": [p for p in trained.values() if id(p) in faster], "weight_decay": weight_decay, SCALE: rate_ratio},
    ]
    return [g for g in groups if g["params"]]


def rate_factor(step: int, total: int, settings: TrainSettings) -> float:
    """Share of the peak rate at a 0-based step: linear warm-up, then the schedule down to `min_rate`.

    Cosine and linear fall over all remaining steps. WSD (warm-up, stable, decay: Hu et al. 2024, MiniCPM, equation 1) holds
    the peak and falls in its last `decay` steps, by 1 - sqrt(progress) (Haegele et al. 2024).
    """
    warmup = _count(settings.warmup, total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    low = settings.min_rate if settings.min_rate is not None else 0.1 if settings.schedule == "cosine" else 0.0
    progress = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "linear":
        return low + (1 - low) * max(0.0, 1 - progress)
    if settings.schedule == "wsd":
        decay = _count(settings.decay, total)
        left = total - step
        return 1.0 if left > decay else low + (1 - low) * (1 - math.sqrt(1 - left / (decay + 1)))
    return 1.0


def _count(given: float, total: int) -> int:
    """A share of the steps (below 1) or a number of them."""
    return int(given) if given >= 1 else math.ceil(given * total)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of all parameter groups, those of LoRA's B a multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(SCALE, 1.0)
