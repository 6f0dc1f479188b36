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
    """name: as users know it; says: whether a config.json (as a dict) is of it; load: folder, dtype, scalar head -> model;
    tokenizer: folder -> tokenizer, or None for transformers' own."""

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
    """The first family whose configurations look like this one, or None: transformers' own."""
    for name in MODULES:
        if importlib.util.find_spec(name) is None:
            continue
        family: Family = importlib.import_module(name).FAMILY
        if family.says(config):
            return family
    return None
