"""Where a run keeps its stages, and what `runs/NAME` and `runs/NAME:STAGE` mean as a model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.config import POLICY_KINDS
from danlu.exceptions import KnowledgeError, RunError
from danlu.models.patches import SUFFIX, active_names, read_index
from danlu.models.places import is_adapter, resolve

ROOT_VARIABLE = "DANLU_RUNS"
RECIPE = "recipe.yaml"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class StageFolder:
    """A stage of a run on disk."""

    index: int
    name: str
    folder: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.manifest.get("kind", ""))

    @property
    def finished(self) -> bool:
        return self.manifest.get("status") == "done"

    @property
    def model(self) -> Path | None:
        """The model folder the stage left, if it is there."""
        folder = self.folder / "model"
        return folder if any((folder / n).is_file() for n in ("config.json", "adapter_config.json")) else None


def runs_root() -> Path:
    """Where runs are kept: $DANLU_RUNS, or ./runs."""
    return Path(os.environ.get(ROOT_VARIABLE, "runs"))


def is_run(folder: Path) -> bool:
    """Whether a folder is a run."""
    return (folder / RECIPE).is_file()


def stages_of(run: Path) -> list[StageFolder]:
    """The stages of a run in order, finished or not."""
    found = []
    for folder in sorted(run.glob("[0-9][0-9]-*")):
        number, _, name = folder.name.partition("-")
        path = folder / MANIFEST
        manifest = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        found.append(StageFolder(int(number), name, folder, manifest))
    return found


def resolve_model(text: str) -> str:
    """A model folder (or hub id) for what the user gave.

    `runs/NAME` is the run's last finished policy (the stage before quantize); `runs/NAME:STAGE` a stage by name.

    Raises:
        RunError: the run has no such stage, or none that is finished.
    """
    head, colon, stage = text.rpartition(":")
    if colon and is_run(Path(head)):
        stages = {s.name: s for s in stages_of(Path(head))}
        if stage not in stages:
            raise RunError(
                f"this run has no stage '{stage}'", file=head, hint=f"stages: {', '.join(stages) or 'none yet'}"
            )
        model = stages[stage].model
        if model is None or not stages[stage].finished:
            raise RunError(f"stage '{stage}' has no finished model", file=head, hint=f"danlu run {Path(head) / RECIPE}")
        return str(model)
    run = Path(text)
    if not is_run(run):
        return text
    policy = last_policy(run)
    if policy is None:
        raise RunError("this run has no finished policy yet", file=run, hint=f"danlu run {run / RECIPE}")
    return str(policy)


def last_policy(run: Path) -> Path | None:
    """The model of a run's last finished policy, if it has one."""
    done = [s.model for s in stages_of(run) if s.kind in POLICY_KINDS and s.finished and s.model is not None]
    return done[-1] if done else None


def patches_folder(folder: str, *, local: bool) -> Path:
    """Where the patches of a model are kept: beside its folder, for a hub id under the runs.

    Args:
        folder: as `models.places.resolve` gives it.
    """
    if local:
        path = Path(folder).resolve()
        return path.with_name(path.name + SUFFIX)
    return runs_root() / SUFFIX.lstrip(".") / (folder.replace("/", "--") + SUFFIX)


def refuse_patches(model: str, stage: str) -> None:
    """What starts from a model's weights alone does not start from one whose facts are in patches beside it.

    Args:
        model: as the user named it; "" for none.

    Raises:
        KnowledgeError: it has active patches, all named, with the command that puts them into weights.
    """
    place = resolve_model(model) if model else ""
    if not place or (Path(place).is_dir() and not (Path(place) / "config.json").is_file()):
        return  # none, a tokenizer alone, or an adapter: patches belong to whole models
    name, local = resolve(place)
    if local and is_adapter(name):
        return
    folder = patches_folder(name, local=local)
    taught = active_names(read_index(folder))
    if taught:
        raise KnowledgeError(
            f"'{model}' was taught facts that are not in its weights ({', '.join(taught)}), and {stage} would lose them",
            file=folder,
            hint=f"danlu facts export {model} --out FOLDER writes the model with them; start from FOLDER",
        )
