"""Patches: small low-rank changes of a model, kept beside it in order and added to its weights when it is loaded.

    MODEL.patches/index.json                 the base they belong to, and all versions in order
    MODEL.patches/v0001-KEY/                 adapter_model.safetensors and adapter_config.json, which PEFT opens, too

`knowledge/store.py` writes them. A patch was trained on top of those before it, so they are added in order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from danlu.exceptions import KnowledgeError
from danlu.models.fingerprint import UNPATCHED, digest_of, fingerprint_of, sample

SUFFIX = ".patches"
INDEX = "index.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Factors:
    """A change of one weight `[out, in]`: `b @ a` with `a` `[r, in]` and `b` `[out, r]`, fp32."""

    a: Tensor
    b: Tensor


def fingerprint(model: Any) -> str:
    """Of all weights of a model, the head's too; see `models/fingerprint.py`."""
    return digest_of({name: sample(weight) for name, weight in model.named_parameters()})


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder of patches; None if there is none.

    Raises:
        KnowledgeError: it is damaged, or of a newer danlu.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index: dict[str, Any] = json.loads(path.read_text("utf-8"))
        schema = index["schema"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise KnowledgeError(
            "the index of the patches is damaged", file=path, hint="--no-patches loads the model without them"
        ) from error
    if schema != 1:
        raise KnowledgeError(f"the patches have schema {schema}, this danlu knows 1", file=path, hint="update danlu")
    return index


def active_names(index: Mapping[str, Any] | None) -> list[str]:
    """The names of the patches that a model answers with and that are not in its weights, in order."""
    return [str(p["name"]) for p in index["patches"] if p["active"] and not p["merged"]] if index else []


def refuse_other_base(index: Mapping[str, Any], model: Any, name: str, folder: Path) -> None:
    """Raises KnowledgeError when patches were made for another model, naming both."""
    base, found = index["base"], fingerprint(model)
    if base["fingerprint"] != found:
        raise KnowledgeError(
            f"these patches were made for '{base['name']}' ({base['fingerprint']}), this model is '{name}' ({found})",
            file=folder,
            hint="--no-patches loads the model without them; if it was trained anew, delete the folder and teach again",
        )


def apply_patches(model: Any, folder: Path, name: str) -> list[str]:
    """Adds the active patches of a folder to a model's weights, in place; returns their names, [] without any.

    Raises:
        KnowledgeError: they are damaged or belong to another base.
    """
    index = read_index(folder)
    active = active_names(index)
    if index is None or not active:
        return []
    refuse_other_base(index, model, name, folder)
    setattr(model, UNPATCHED, fingerprint_of(model))  # adapters of this model are still adapters of it
    for patch in active:
        add_factors(model, read_factors(folder / patch))
    return active


def read_factors(folder: Path) -> dict[str, Factors]:
    """The factors of a patch by the name of the module they change.

    Raises:
        KnowledgeError: the file is missing or damaged.
    """
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
        names = [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
        return {
            n.removeprefix(PREFIX): Factors(tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"]) for n in names
        }
    except (OSError, SafetensorError, KeyError) as error:
        raise KnowledgeError(
            f"the patch cannot be read: {str(error).splitlines()[0]}",
            file=path,
            hint="--no-patches loads the model without it; danlu facts rollback takes it away",
        ) from error


def add_factors(model: Any, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Adds changes to the weights of a model in place; returns the weights as they were, for `restore`.

    Raises:
        KnowledgeError: a module is missing or has another shape.
    """
    modules = dict(model.named_modules())
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, change in factors.items():
            module = modules.get(name)
            weight = getattr(module, "weight", None)
            shape = (change.b.shape[0], change.a.shape[1])
            transposed = isinstance(module, Conv1D)
            if weight is None or tuple(weight.T.shape if transposed else weight.shape) != shape:
                raise KnowledgeError(
                    f"a patch changes '{name}' of shape {shape}, which this model has not",
                    hint="the patch belongs to another model",
                )
            before[name] = weight.detach().clone()
            delta = change.b.float() @ change.a.float()
            delta = (delta.T if transposed else delta).to(weight.device)
            weight.copy_((weight.float() + delta).to(weight.dtype))
    return before


def restore(model: Any, before: Mapping[str, Tensor]) -> None:
    """Puts weights back that `add_factors` returned."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, weight in before.items():
            modules[name].weight.copy_(weight)
