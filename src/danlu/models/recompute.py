"""Activation checkpointing (Chen et al. 2016): a layer keeps its input alone, and runs once more in the backward pass."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from danlu.exceptions import ModelError


def recompute_layers(module: nn.Module) -> None:
    """Turns it on for every transformer layer under a module, also where dropout is off (RL trains in evaluation mode).

    Raises:
        ModelError: the family's layers cannot be recomputed.
    """
    layers = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError("this model's layers cannot be recomputed", hint="activation_checkpointing: false")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._can_checkpoint_with_cache = (
            True  # the one cache of training is a prefix, which layers read and never write
        )
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        layer.training = True  # of the layer alone: transformers asks it, and what has dropout is inside
