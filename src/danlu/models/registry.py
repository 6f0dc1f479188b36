"""Families that transformers lacks, by what their config.json says."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """A family of models that danlu brings itself.

    Attributes:
        name: as users know it.
        says: whether a config.json (as a dict) is of it.
        load: folder, dtype, whether a one-number head is wanted -> model.
        tokenizer: folder -> tokenizer, or None for transformers' own.
    """

    name: str
    says: Callable[[Mapping[str, Any]], bool]
    load: Callable[[Path, torch.dtype, bool], Any]
    tokenizer: Callable[[Path], Any] | None = None


MODULES = (
    "danlu.models.chatglm",
    "danlu.models.chatglm2",
    "danlu.models.glm",
    "danlu.models.glm130b",
    "danlu.models.unilm",
    "danlu.models.moss",
    "danlu.models.cpm",
)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family that a config.json is of; None: transformers' own, or nobody's."""
    return next((family for family in families() if family.says(config)), None)


def families() -> list[Family]:
    """All of them, in the order in which they are asked."""
    found: list[Family] = [
        importlib.import_module(module).FAMILY for module in MODULES if importlib.util.find_spec(module) is not None
    ]
    return found
