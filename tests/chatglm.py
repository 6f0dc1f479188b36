"""Recorded cases of ChatGLM's original code, and what the tests of its generations share."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from danlu.models.load import load_model
from danlu.text.tokenizer import load_tokenizer

FIRST = ("chatglm_v1", "chatglm_v1_pos1d", "chatglm_v1_ptuning", "chatglm_v1_int8", "chatglm_v1_int4")
LATER = ("chatglm2", "chatglm3", "chatglm2_ptuning", "chatglm2_int8", "chatglm2_int4")
FLOAT = tuple(name for name in FIRST + LATER if "int" not in name)


@dataclass(frozen=True)
class Case:
    """One recorded forward pass: `given` are the model's arguments, `found` what came of them."""

    given: Mapping[str, Tensor]
    found: Mapping[str, Tensor]


@dataclass(frozen=True)
class Recorded:
    """A fixture folder: its tensors by `case.field`, and its texts."""

    folder: Path
    tensors: Mapping[str, Tensor]
    texts: Mapping[str, Any]

    @property
    def cases(self) -> dict[str, Case]:
        """Forward passes by name."""
        found: dict[str, Case] = {}
        for name in sorted({key.partition(".")[0] for key in self.tensors}):
            fields = {k.partition(".")[2]: t for k, t in self.tensors.items() if k.partition(".")[0] == name}
            if "logits" in fields:
                arguments = ("input_ids", "attention_mask", "position_ids", "labels")
                given = {key: fields[key] for key in arguments if key in fields}
                found[name] = Case(given, {k: t for k, t in fields.items() if k not in arguments})
        return found


@functools.cache
def recorded(name: str) -> Recorded:
    shared = Path(os.environ.get("DANLU_SHARED", Path(__file__).parents[2] / "shared"))
    folder = shared / "fixtures" / name
    if not folder.is_dir():
        pytest.skip(
            f"RECORDED {name} NOT TESTED: {folder} is missing; set DANLU_SHARED to the folder that holds fixtures/"
        )
    texts = json.loads((folder / "cases.json").read_text("utf-8")) if (folder / "cases.json").is_file() else {}
    return Recorded(folder, load_file(folder / "cases.safetensors"), texts)


@functools.cache
def model(name: str) -> Any:
    """Shared between tests, which do not change it."""
    return load_model(recorded(name).folder).eval()


@functools.cache
def tokenizer(name: str) -> Any:
    return load_tokenizer(recorded(name).folder)


def real_tokens(given: Mapping[str, Tensor], pad: int) -> Tensor:
    """Where tokens are that are no padding by the mask."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return mask.bool() if mask.dim() == 2 else ids != pad
