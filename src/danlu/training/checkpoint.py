"""Checkpoints: everything that a training stage needs to go on exactly where it was, with any number of processes.

A checkpoint is a folder `step-00000200` with `weights.safetensors` (trained parameters, fp32 master weights), one
`<name>.pt` (read with weights_only) per optimizer and whatever else has a state, and `state.json` (schema version, step,
counters). There is no random state to save: randomness is a function of (seed, stage, step, sample). Tensors are whole,
however they are split over the ranks (`training/sharding.py`): saving gathers them, one after the other, and loading takes
each rank's part.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from danlu.exceptions import CheckpointError
from danlu.training import distributed
from danlu.training.sharding import is_sharded, part_of, whole_on_main

SCHEMA = 1


class Stateful(Protocol):
    """What a checkpoint keeps beside the weights: an optimizer, an average, a buffer, a controller."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, texts and containers of these. All ranks ask, rank 0 writes: what is split over ranks is gathered
        here (that of optimizers is gathered by the checkpoint).
        """
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Takes such a state, the same on every rank.

        Raises:
            KeyError, ValueError: the state is that of something else.
        """
        ...


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
    states: Mapping[str, Stateful],
    extra: Mapping[str, Any],
    *,
    name: str = "",
) -> Path:
    """Writes a checkpoint under a temporary name, then renames it. All ranks take part, rank 0 writes, and then all go on.

    Args:
        folder: the stage's `checkpoints` folder.
        name: default `step-<step>`.
    """
    target = folder / (name or f"step-{step:08d}")
    weights = whole_on_main((n, p) for n, p in module.named_parameters() if p.requires_grad)
    saved = {key: _whole_state(thing) for key, thing in states.items()}
    try:
        if distributed.is_main():
            _write(target, step, weights, saved, extra)
    finally:
        distributed.wait_for_all()
    return target


def _whole_state(thing: Stateful) -> dict[str, Any]:
    state = thing.state_dict()
    if not isinstance(thing, torch.optim.Optimizer):
        return state
    found = {}
    for index, values in state["state"].items():
        tensors = whole_on_main((k, v) for k, v in values.items() if isinstance(v, Tensor))
        found[index] = {k: tensors.get(k, v) for k, v in values.items()}
    return {**state, "state": found}


def _write(
    target: Path, step: int, weights: Mapping[str, Tensor], states: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    folder = target.parent
    temporary = folder / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({n: w.contiguous() for n, w in weights.items()}, temporary / "weights.safetensors")
    for key, kept in states.items():
        torch.save(kept, temporary / f"{key}.pt")
    state = {"schema": SCHEMA, "step": step, "optimizers": sorted(states), "extra": dict(extra)}
    (temporary / "state.json").write_text(json.dumps(state, ensure_ascii=False), "utf-8")
    aside = folder / f".{target.name}.old.partial"
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)  # a kill between the two renames leaves both, and `prune` clears up later
    temporary.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a stage, or None."""
    found = sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())
    return found[-1] if found else None


def load(path: Path, module: nn.Module, states: Mapping[str, Stateful]) -> Checkpoint:
    """Reads a checkpoint into a module, its optimizers and what else has a state.

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
    lazy = is_sharded(module)  # then each rank needs but a part of what the file holds
    try:
        weights = load_file(path / "weights.safetensors")
        saved = {k: torch.load(path / f"{k}.pt", weights_only=True, mmap=lazy) for k in states}
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
    for key, thing in states.items():
        try:
            thing.load_state_dict(_own_state(saved[key], thing))
        except (ValueError, KeyError) as error:
            what = "optimizer" if isinstance(thing, torch.optim.Optimizer) else "state"
            raise CheckpointError(f"{what} '{key}' is that of another model: {error}", file=path) from error
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(part_of(weights[name], parameter))
    return Checkpoint(state["step"], state["extra"], path)


def _own_state(state: dict[str, Any], thing: Stateful) -> dict[str, Any]:
    """A whole optimizer state with this rank's parts of the tensors that parameters have one number each in."""
    if not isinstance(thing, torch.optim.Optimizer):
        return state
    parameters = [p for group in thing.param_groups for p in group["params"]]
    own = {
        index: {
            k: part_of(v, parameters[index]) if isinstance(v, Tensor) and v.shape == parameters[index].shape else v
            for k, v in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": own}


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` numbered checkpoints, and leftovers of interrupted saves."""
    found = sorted(p for p in folder.glob("step-*") if p.is_dir())
    whole = [p for p in found if (p / "state.json").is_file()]
    for old in found:
        if old not in whole[-keep:]:
            shutil.rmtree(old)
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
