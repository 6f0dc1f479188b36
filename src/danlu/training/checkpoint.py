"""Checkpoints: everything that a training stage needs to go on exactly where it was.

A checkpoint is a folder `step-00000200` with `weights.safetensors` (trained parameters, fp32 master weights), one
`<name>.pt` per optimizer (read with weights_only), and `state.json` (schema version, step, counters). There is no random
state to save: randomness is a function of (seed, stage, step, sample).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from danlu.exceptions import CheckpointError

SCHEMA = 1


@dataclass(frozen=True)
class Checkpoint:
    """Where a stage stands: `step` optimizer steps are done; `extra` holds what else it counts."""

    step: int
    extra: dict[str, Any]
    folder: Path


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    extra: Mapping[str, Any],
    *,
    name: str = "",
) -> Path:
    """Writes a checkpoint under a temporary name, then renames it.

    Args:
        folder: the stage's `checkpoints` folder.
        name: default `step-<step>`.
    """
    target = folder / (name or f"step-{step:08d}")
    temporary = folder / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {n: p.detach().contiguous() for n, p in module.named_parameters() if p.requires_grad}
    save_file(weights, temporary / "weights.safetensors")
    for key, optimizer in optimizers.items():
        torch.save(optimizer.state_dict(), temporary / f"{key}.pt")
    state = {"schema": SCHEMA, "step": step, "optimizers": sorted(optimizers), "extra": dict(extra)}
    (temporary / "state.json").write_text(json.dumps(state, ensure_ascii=False), "utf-8")
    aside = folder / f".{target.name}.old.partial"
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)  # a kill between the two renames leaves both, and `prune` clears up later
    temporary.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
    return target


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a stage, or None."""
    found = sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())
    return found[-1] if found else None


def load(path: Path, module: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> Checkpoint:
    """Reads a checkpoint into a module and its optimizers.

    Raises:
        CheckpointError: newer schema, damaged files, or the parameters of another model.
    """
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"state.json cannot be read: {error}", file=path, hint="delete this checkpoint folder"
        ) from error
    kinds = {"schema": int, "step": int, "extra": dict}
    if not isinstance(state, dict) or any(not isinstance(state.get(k), t) for k, t in kinds.items()):
        raise CheckpointError("state.json is not that of a checkpoint", file=path, hint="delete this checkpoint folder")
    if state["schema"] > SCHEMA:
        raise CheckpointError(
            f"the checkpoint has schema {state['schema']}, this danlu knows up to {SCHEMA}",
            file=path,
            hint="update danlu",
        )
    try:
        weights = load_file(path / "weights.safetensors")
        saved = {k: torch.load(path / f"{k}.pt", weights_only=True) for k in optimizers}
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        raise CheckpointError(
            f"damaged: {error}", file=path, hint="delete this checkpoint folder and run again"
        ) from error
    own = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())[0]
        raise CheckpointError(
            f"parameter {odd} is on one side only", file=path, hint="the checkpoint is of another model or adapter"
        )
    for name, parameter in own.items():
        if parameter.shape != weights[name].shape:
            raise CheckpointError(
                f"parameter {name} has shape {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}", file=path
            )
    for key, optimizer in optimizers.items():
        try:
            optimizer.load_state_dict(saved[key])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"optimizer '{key}' is that of another model: {error}", file=path) from error
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    return Checkpoint(state["step"], state["extra"], path)


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` numbered checkpoints, and leftovers of interrupted saves."""
    found = sorted(p for p in folder.glob("step-*") if p.is_dir())
    whole = [p for p in found if (p / "state.json").is_file()]
    for old in found:
        if old not in whole[-keep:]:
            shutil.rmtree(old)
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
