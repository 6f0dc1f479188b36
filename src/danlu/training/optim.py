"""AdamW and the learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from danlu.config import TrainSettings


def adamw(module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over the trainable parameters; decay on matrices only, betas (0.9, 0.95)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True
    )


def rate_factor(step: int, total: int, settings: TrainSettings) -> float:
    """Share of the peak rate at a 0-based step: linear warm-up, then cosine to 10%, linear to 0, or constant."""
    warmup = settings.warmup if settings.warmup >= 1 else math.ceil(settings.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "cosine":
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "linear":
        return max(0.0, 1 - progress)
    return 1.0


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One rate for all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
