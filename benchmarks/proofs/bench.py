"""What every proof uses: verdicts, training runs in processes of their own, what they logged, the models of the town."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Verdict:
    """What a proof came to.

    Args:
        proof: number and name, such as "1 optimum: ppo".
        value: what is held against the goal; None: it could not be measured.
        goal: in words, with its number.
        details: whatever else was seen; plain values.
    """

    proof: str
    value: float | None
    goal: str
    holds: bool
    seeds: list[int]
    details: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        told = asdict(self)
        return told | told.pop("details")


@dataclass(frozen=True)
class Job:
    """One training run: a kind of stage and its settings; `out` is among them."""

    kind: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """What a training run left: its model, the rows of metrics.jsonl, its last metrics and facts, and how long it took."""

    model: Path
    rows: list[dict[str, Any]]
    metrics: dict[str, float]
    facts: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Bench:
    """Where and how the proofs run.

    Args:
        folder: empty; proofs work in subfolders of it.
        quick: fewer seeds and steps, with goals of their own.
        data_root: holds `hh-rlhf` and what recipes/hh-assistant.yaml reads.
        workers: processes that train at the same time, or one job whose settings want more of them; 0: this one trains.
        town, hh: finished runs of recipes/quickstart.yaml (to its reward stage) and of recipes/hh-assistant.yaml (to its sft
            stage) to take models from; None: they are made.
        images: where plots go.
    """

    folder: Path
    quick: bool = False
    data_root: Path = Path("data")
    workers: int = 2
    town: Path | None = None
    hh: Path | None = None
    images: Path | None = None
    begun: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """A line of progress with the seconds since the start."""
        print(f"[{time.monotonic() - self.begun:5.0f} s] {text}", file=sys.stderr, flush=True)

    def seeds(self, full: int, quick: int) -> list[int]:
        """0, 1, 2, ...: as many as the run is to have."""
        return list(range(quick if self.quick else full))

    def place(self, name: str) -> Path:
        """A new folder."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder

    def train(self, jobs: Mapping[str, Job]) -> dict[str, Trained]:
        """Trains all of them, so many at a time that there are `workers` processes; an error of one ends the proof."""
        if not self.workers:
            return {name: run(job) for name, job in jobs.items()}
        found: dict[str, Trained] = {}
        # A child begins with its own imports: what one run leaves in memory is not there for the next proof.
        at_once = max(1, self.workers // max((job.settings.get("processes", 1) for job in jobs.values()), default=1))
        with ProcessPoolExecutor(at_once, get_context("spawn"), _own_log, (str(self.folder / "training.log"),)) as pool:
            waiting = {name: pool.submit(run, job) for name, job in jobs.items()}
            for name, future in waiting.items():
                found[name] = future.result()
                self.say(f"  {name}: {found[name].seconds:.0f} s of training")
        return found


def _own_log(path: str) -> None:
    """A worker has one thread, and its bars go to a file."""
    import torch

    torch.set_num_threads(1)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)


def run(job: Job) -> Trained:
    """One stage as `danlu run` runs it; a gate that does not hold stops nothing."""
    from danlu.config import KINDS
    from danlu.parsing import parse
    from danlu.pipeline.ranks import Runner
    from danlu.trainers.judges import following

    settings = following(parse(KINDS[job.kind], job.settings))
    out = Path(settings.out)
    begun = time.monotonic()
    with Runner() as runner:
        outcome = runner.run(job.kind, settings)
    seconds = time.monotonic() - begun
    return Trained(out / "model", rows_of(out), outcome.metrics, outcome.facts, seconds)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of a stage's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def recipe_run(
    bench: Bench, recipe: str, name: str, until: str, changes: Sequence[str] = (), root: Path | None = None
) -> Path:
    """`danlu run RECIPE --until STAGE` as people call it; a finished run of the same settings is not run again.

    Args:
        changes: `key=value`, as `--set` takes them.
        root: the folder of runs; None: the one that `danlu run` has.
    """
    from danlu.training.runs import ROOT_VARIABLE, runs_root

    root = (root or runs_root()).resolve()
    command = [sys.executable, "-m", "danlu", "run", str(REPOSITORY / "recipes" / recipe), "--until", until]
    command += ["--name", name, "--processes", str(max(1, bench.workers))]
    for change in changes:
        command += ["--set", change]
    bench.say(f"  {' '.join(command[1:])}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])}
    subprocess.run([*command, "--force"], check=True, env=environment | {ROOT_VARIABLE: str(root)}, stdout=sys.stderr)
    return root / name


# What quick proofs leave out of the quickstart: they have models that know less of the town.
QUICK_TOWN = (
    "pretrain.epochs=1.5",
    "sft.epochs=2",
    "reward.max_records=8000",
    "reward.collect.count=400",
    "reward.eval_every=1000",
)


def town_of(bench: Bench) -> Town:
    """The run whose models proofs 2, 3 and 6 start from; made once."""
    name = "learning-town-quick" if bench.quick else "learning-town"
    found = bench.town or recipe_run(bench, "quickstart.yaml", name, "reward", QUICK_TOWN if bench.quick else ())
    return Town(found)


@dataclass(frozen=True)
class Town:
    """Files of a run of recipes/quickstart.yaml."""

    run: Path

    def model(self, stage: str) -> str:
        """A stage's model folder."""
        from danlu.training.runs import stages_of

        return str(next(s.folder for s in stages_of(self.run) if s.name == stage) / "model")

    def file(self, name: str) -> str:
        """A file of the town; `collected`: the comparisons of the policy's own answers."""
        if name == "collected":
            return str(Path(self.model("reward")).parent / "collected.jsonl")
        return str(self.run / "town" / f"{name}.jsonl")

    def settings(self, stage: str) -> dict[str, Any]:
        """What the recipe says of a stage, without its data and models."""
        from danlu.pipeline.recipe import load_recipe

        stages = {s.name: s.settings for s in load_recipe(REPOSITORY / "recipes" / "quickstart.yaml").stages}
        given = stages[stage].model_dump(exclude_unset=True)
        return {k: v for k, v in given.items() if k not in ("data", "model", "reward_model", "out", "processes")}
