"""Recorded inputs and outputs of original implementations: folders of tiny checkpoints beside the repository."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

LOGITS = 1e-4  # absolute, as the recordings' README says


def original(name: str) -> Path:
    """`shared/fixtures/NAME` ($DANLU_SHARED/fixtures/NAME)."""
    folder = Path(os.environ.get("DANLU_SHARED", Path(__file__).parents[2] / "shared")) / "fixtures" / name
    if not folder.is_dir():
        pytest.skip(f"PARITY NOT TESTED: {folder} is missing; set DANLU_SHARED to the folder that holds fixtures/")
    return folder


@dataclass(frozen=True)
class Recorded:
    """A folder, its tensors by `<case>.<field>`, and what its cases.json says."""

    folder: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]


def recorded(name: str) -> Recorded:
    folder = original(name)
    return Recorded(
        folder, load_file(folder / "cases.safetensors"), json.loads((folder / "cases.json").read_text("utf-8"))
    )


def assert_close(found: Tensor, expected: Tensor, where: Tensor | None = None, within: float = LOGITS) -> None:
    """No entry is further from the recorded one than `within`; only rows of `where` count."""
    assert found.shape == expected.shape
    if where is not None:
        found, expected = found[where], expected[where]
    error = float((found.detach() - expected).abs().max())
    assert error <= within, f"off by {error:.3g}"


def assert_gradient(gradient: Tensor, norm_and_sum: list[float], name: str) -> None:
    """The gradient of a parameter has the recorded L2 norm, and its entries the recorded sum."""
    norm, total = norm_and_sum
    assert abs(float(gradient.norm()) - norm) <= 1e-4 * max(norm, 1e-2), name
    assert abs(float(gradient.sum()) - total) <= 1e-4 * max(1.0, norm * gradient.numel() ** 0.5), name


def ones(ids: Tensor) -> Tensor:
    return torch.ones_like(ids)
