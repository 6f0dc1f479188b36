"""A whole chain that is killed again and again, at any moment, ends as if nothing had happened."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

RUNS, KILLS = 30, 3
STAGES = ("tokenizer", "pretrain", "sft", "dpo", "reward", "ppo", "grpo")
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def _child(arguments: list[str], root: str, change: int, delay: float, log: str) -> None:
    """`danlu ARGUMENTS`, killed before the change-th change to a file under `root`, or `delay` seconds after it; 0: not at all.

    Then writes how many changes there were. Moments are counted in changes, since seconds are others on a busy machine.
    """
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        reading = event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+"))
        if event in CHANGES and not reading and str(args[0]).startswith(root):
            count += 1
            if count == change and delay:
                timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()
            elif count == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        tiny._in_child(arguments, log, {"DANLU_RUNS": root})
    finally:
        if not change:
            Path(f"{log}.changes").write_text(str(count))


def go(recipe: Path, runs: Path, log: Path, *, change: int = 0, delay: float = 0.0) -> int:
    """Exit status of `danlu run`, negative if killed."""
    arguments = ["run", str(recipe), "--force"]
    child = tiny._server().Process(target=_child, args=(arguments, str(runs), change, delay, str(log)), daemon=True)
    child.start()
    child.join(600)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode


def recipe(folder: Path) -> Path:
    """The tiny recipe up to PPO, with DPO and GRPO, and with steps enough for kills between checkpoints."""
    often = {"save_every": 2, "eval_every": 3, "keep_checkpoints": 1}
    best = {"checkpoint_best": {"monitor": "eval_loss", "keep": 2}}
    changes = {
        "pretrain": {"max_steps": 9, **often, **best},
        "sft": {"max_steps": 15, **often, **best},
        "reward": {"max_steps": 7, **often},
        "ppo": {"max_steps": 5, **often},
    }
    path = tiny.recipe(folder, "chaos", **changes)
    content = yaml.safe_load(path.read_text("utf-8"))
    stages = {stage["kind"]: stage for stage in content["stages"]}
    same = ("dtype", "max_length", "tokens_per_step", "micro_tokens", "log_every", "learning_rate")
    stages["dpo"] = {k: stages["reward"][k] for k in ("data", "eval_data")} | {k: stages["sft"][k] for k in same}
    stages["dpo"] |= {"kind": "dpo", "max_steps": 7, **often}
    stages["grpo"] = stages["ppo"] | {"kind": "grpo", "grpo": {"group_size": 4}, "max_steps": 4}
    content["stages"] = [stages[kind] for kind in STAGES]
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path


def outcome(run: Path) -> dict[str, Any]:
    """Every model's weights, every stage's metrics, and the lines of every metrics.jsonl."""
    found: dict[str, Any] = {}
    for number, stage in enumerate(STAGES, start=1):
        folder = run / f"{number:02d}-{stage}"
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        assert manifest["status"] == "done"
        file = folder / "model" / ("tokenizer.json" if stage == "tokenizer" else "model.safetensors")
        lines = folder / "metrics.jsonl"
        told = lines.read_text("utf-8") if lines.is_file() else ""
        found[stage] = (file.read_bytes(), manifest["metrics"], manifest["gates"], told)
    return found


@functools.cache
def whole() -> tuple[Path, dict[str, Any], int]:
    """(recipe, outcome, changes to files) of a run that nobody disturbs."""
    folder = tiny.home() / "chaos"
    folder.mkdir()
    path = recipe(folder)
    log = folder / "log"
    assert go(path, folder / "runs", log) == 0, log.read_text("utf-8")
    return path, outcome(folder / "runs" / "chaos"), int(Path(f"{log}.changes").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)  # seven stages, begun up to four times
@pytest.mark.parametrize("trial", range(RUNS))
def test_killed_at_random(trial: int, tmp_path: Path) -> None:
    path, expected, left = whole()
    rng = random.Random(f"chaos/{trial}")
    log = tmp_path / "log"
    for number in range(KILLS):
        change = rng.randint(1, left)
        # The first falls on a change for certain; others may come when all is done.
        delay = rng.uniform(0.0, 1.0) if number and rng.random() < 0.4 else 0.0
        status = go(path, tmp_path / "runs", log, change=change, delay=delay)
        assert status == -signal.SIGKILL or (number and status == 0), log.read_text("utf-8")
        left = max(1, left - change)
    assert go(path, tmp_path / "runs", log) == 0, log.read_text("utf-8")
    assert outcome(tmp_path / "runs" / "chaos") == expected
