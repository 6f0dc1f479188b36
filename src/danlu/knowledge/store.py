"""The patches beside a model: named, versioned, in order; each with its fact and what probes said of it.

Reading and adding them to weights is `models/patches.py`, since `danlu.load` needs no more. The index is written last, so a
patch is there whole or not at all.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save

from danlu import atomic
from danlu.exceptions import KnowledgeError
from danlu.knowledge.facts import Fact, fact_from, key_of, slug_of
from danlu.models.patches import INDEX, PREFIX, WEIGHTS, Factors, fingerprint, read_index, refuse_other_base

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Patch:
    """One change.

    Attributes:
        version: 1, 2, ...; never used again.
        name: of its folder.
        action: teach, update or forget.
        fact: what is answered since; for forget the description is what is said instead.
        active: false after a rollback.
        merged: whether it is in the model's weights already (an exported model).
        probes: see `teach.Lesson.as_dict`.
    """

    version: int
    name: str
    action: str
    fact: Fact
    created: str
    active: bool = True
    merged: bool = False
    probes: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.fact.key

    def as_dict(self) -> dict[str, Any]:
        return {f: v for f, v in asdict(self).items() if f != "fact"} | {"key": self.key, "fact": self.fact.as_dict()}


class Store:
    """The patches of one model.

    Args:
        folder: `MODEL.patches`; made with the first patch.
        model: how the user named the model.

    Raises:
        KnowledgeError: the index is damaged.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder
        self.model = model
        index = read_index(folder)
        self.base: dict[str, str] = dict(index["base"]) if index else {}
        self.patches: list[Patch] = [_patch_of(p, folder) for p in index["patches"]] if index else []

    @property
    def active(self) -> list[Patch]:
        return [p for p in self.patches if p.active]

    def current(self) -> dict[str, Patch]:
        """The last active patch of every key, in the order of the keys' first."""
        return {p.key: p for p in self.active}

    def known(self) -> list[Fact]:
        """The facts as the model should answer them now, forgotten ones with what it says instead."""
        return [p.fact for p in self.current().values()]

    def get(self, key: str) -> Patch:
        """The last active patch of a key.

        Raises:
            KnowledgeError: there is none, with the nearest key.
        """
        found = self.current().get(key_of(key))
        if found is None:
            near = difflib.get_close_matches(key_of(key), list(self.current()), n=1)
            listed = ", ".join(f"'{p.fact.keyword}'" for p in list(self.current().values())[:5]) or "none yet"
            hint = f"did you mean '{near[0]}'?" if near else f"facts: {listed}"
            raise KnowledgeError(f"'{self.model}' was taught no fact '{key}'", file=self.folder, hint=hint)
        return found

    def refuse_known(self, fact: Fact) -> None:
        """Raises KnowledgeError when a key is there already and was not forgotten."""
        found = self.current().get(fact.key)
        if found is not None and found.action != "forget":
            raise KnowledgeError(
                f"'{self.model}' knows '{found.fact.keyword}' already: {found.fact.description}",
                hint=f"--update '{found.fact.keyword}' replaces it",
            )

    def refuse_other_base(self, model: Any) -> None:
        """Raises KnowledgeError when the patches belong to another model (before patches are added), naming both."""
        if self.base:
            refuse_other_base({"base": self.base}, model, self.model, self.folder)

    def set_base(self, model: Any) -> None:
        """Notes which model the patches are for, before anything is added to its weights."""
        self.refuse_other_base(model)
        self.base = self.base or {"name": self.model, "fingerprint": fingerprint(model)}

    def add(self, action: str, fact: Fact, factors: dict[str, Factors], probes: dict[str, Any]) -> Patch:
        """Writes a patch and puts it last."""
        version = max((p.version for p in self.patches), default=0) + 1
        patch = Patch(version, f"v{version:04d}-{slug_of(fact.keyword)}", action, fact, _now(), probes=probes)
        write_factors(self.folder / patch.name, factors, base=self.base["name"])
        self.patches.append(patch)
        self.write()
        return patch

    def rollback(self, to: int | None = None) -> list[Patch]:
        """Makes the patches after version `to` inactive (None: the last active one); returns them.

        Raises:
            KnowledgeError: nothing to take back, no such version, or patches that are merged into the weights.
        """
        active = self.active
        if to is not None and to != 0 and to not in [p.version for p in active]:
            shown = ", ".join(str(p.version) for p in active) or "none"
            raise KnowledgeError(
                f"there is no active version {to}", file=self.folder, hint=f"active: {shown}; 0 takes all back"
            )
        gone = active[-1:] if to is None else [p for p in active if p.version > to]
        if not gone:
            raise KnowledgeError(f"'{self.model}' has no patch to take back", file=self.folder)
        if any(p.merged for p in gone):
            raise KnowledgeError(
                f"patch {gone[0].name} is merged into the weights of '{self.model}' and cannot be taken back",
                hint=f"roll it back in the model it was taught to ({self.base['name']}), or use danlu forget",
            )
        names = {p.name for p in gone}
        self.patches = [replace(p, active=False) if p.name in names else p for p in self.patches]
        self.write()
        return gone

    def write(self) -> None:
        document = {"schema": SCHEMA, "base": self.base, "patches": [p.as_dict() for p in self.patches]}
        atomic.write_json(self.folder / INDEX, document)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the patches meanwhile.

        Raises:
            KnowledgeError: somebody does.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = self.folder.with_name(f".{self.folder.name}.lock")
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise KnowledgeError(
                    f"another process is teaching '{self.model}'", file=self.folder, hint="wait for it, or stop it"
                ) from None
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)


def _patch_of(plain: dict[str, Any], folder: Path) -> Patch:
    try:
        values = {name: plain[name] for name in Patch.__dataclass_fields__ if name != "fact"}
        return Patch(**values, fact=fact_from(plain["fact"]))
    except (KeyError, TypeError) as error:
        raise KnowledgeError(f"the index of the patches is damaged: {error}", file=folder / INDEX) from error


def write_factors(folder: Path, factors: dict[str, Factors], *, base: str) -> None:
    """A LoRA adapter as PEFT writes one: scale 1, ranks as they are."""
    tensors = {}
    for name, change in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = change.a.cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = change.b.cpu().contiguous()
    ranks = {name: len(change.a) for name, change in sorted(factors.items())}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": max(ranks.values(), default=1),
        "lora_alpha": max(ranks.values(), default=1),
        "rank_pattern": {f"^{n}$": r for n, r in ranks.items()},
        "alpha_pattern": {f"^{n}$": r for n, r in ranks.items()},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    if folder.exists():  # left by a teaching that was stopped before the index knew of it
        shutil.rmtree(folder)
    atomic.write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    atomic.write_text(folder / "adapter_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")


def mark_merged(folder: Path, base: dict[str, str], patches: Sequence[Patch]) -> None:
    """Beside an exported model: what it was taught, as patches that are in its weights."""
    store = Store(folder, base["name"])
    store.base = base
    store.patches = [replace(p, merged=True) for p in patches]
    store.write()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
