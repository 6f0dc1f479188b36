"""LLaMA-Factory's SFT, reward and DPO stages as a side of `benchmarks/core.py`; runs in its own environment, without danlu.

Its own entry point `run_exp` is called, with the rows as a data set that is tokenised already.
"""

from __future__ import annotations

import importlib.machinery
import json
import shutil
import sys
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

# It imports torchaudio, which text does not need and a CPU build need not have.
_AUDIO = types.ModuleType("torchaudio")
_AUDIO.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules.setdefault("torchaudio", _AUDIO)

from datasets import Dataset, DatasetDict  # noqa: E402
from llamafactory.data.processor.processor_utils import greedy_knapsack  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from benchmarks.peers.meter import Meter, precision, run  # noqa: E402

CHECK_STEPS = 3
STAGES = {"sft": "sft", "reward": "rm", "dpo": "dpo"}


class Trained(Exception):
    """Training is over; what would follow is saving, which it cannot do for a reward model with a tied head."""


class Ending(TrainerCallback):
    """Leaves `run_exp` when training ends."""

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        raise Trained


class Losses(Ending):
    """Keeps the losses that the trainer logs, and in what it computes them."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.precision = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.precision = precision(next(model.parameters()).dtype, args.bf16)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


class Epochs(Ending):
    """Every epoch is one window."""

    def __init__(self, meter: Meter, tokens: int) -> None:
        self.meter, self.tokens, self.first = meter, tokens, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first = state.global_step
        self.meter.wait()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.report(tokens=self.tokens, steps=state.global_step - self.first)


def work(job: dict[str, Any], meter: Meter) -> None:
    """The check's steps, then one window for each epoch over the timed rows."""
    rows = len(json.loads(Path(job["check"] + ".ids.json").read_text("utf-8")))
    if "packed" in job["settings"]:
        rows = len(_data(job, job["check"]))
    size = job["settings"].get("per_device_train_batch_size", 8)
    whole = {"max_steps": CHECK_STEPS, "gradient_accumulation_steps": max(1, rows // size)}
    losses = Losses()
    meter.wait()
    with suppress(Trained):
        run_exp(_options(job, "check", job["check"], job["check_rate"], **whole), callbacks=[losses])
    meter.checked(losses.losses, losses.precision)
    windows = Epochs(meter, job["tokens"])
    options = _options(job, "timed", job["rows"], job["rate"], num_train_epochs=job["windows"])
    with suppress(Trained):
        run_exp(options, callbacks=[windows])


def _options(job: dict[str, Any], out: str, file: str, rate: float, **changes: Any) -> dict[str, Any]:
    """The same optimizer and schedule as danlu's; all that decides speed is in `job["settings"]`."""
    folder = Path(job["folder"])
    data = folder / f"{out}-rows"
    DatasetDict({"train": _data(job, file)}).save_to_disk(data)
    model = Path(job["model"])
    if job["work"] == "reward":
        # It puts what it saves beside the model's own value head: give it a copy.
        model = folder / "model"
        shutil.copytree(job["value_head"], model, dirs_exist_ok=True)
    common = {"stage": STAGES[job["work"]], "do_train": True, "finetuning_type": "full", "template": "empty"}
    common |= {"model_name_or_path": str(model), "dataset": "given", "tokenized_path": str(data)}
    common |= {"output_dir": str(folder / out), "overwrite_output_dir": True, "report_to": "none", "seed": 0}
    common |= {"learning_rate": rate, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    common |= {"adam_beta2": 0.95, "max_grad_norm": 1.0, "logging_steps": 1, "save_strategy": "no"}
    common |= {"cutoff_len": job["max_length"], "use_cpu": not torch.cuda.is_available()}
    if job["work"] == "dpo":
        common |= {"pref_loss": "sigmoid", "pref_beta": 0.1}
    return {**common, **{k: v for k, v in job["settings"].items() if k != "packed"}, **changes}


def _data(job: dict[str, Any], file: str) -> Dataset:
    rows = json.loads(Path(f"{file}.ids.json").read_text("utf-8"))
    if "packed" in job["settings"]:
        return Dataset.from_list(_packed(rows, job["settings"]["packed"]))
    if job["work"] == "sft":
        return Dataset.from_list([{**r, "attention_mask": [1] * len(r["input_ids"])} for r in rows])
    return Dataset.from_list([_pair(r) for r in rows])


def _packed(rows: list[dict[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    """As its packed processor does it, but filled up to a multiple of eight only: the mask counts the rows of a pack."""
    lengths = [len(r["input_ids"]) for r in rows]
    waiting: dict[int, list[dict[str, list[int]]]] = {}
    for n, row in zip(lengths, rows, strict=True):
        waiting.setdefault(n, []).append(row)
    found = []
    for pack in greedy_knapsack(lengths, length):
        whole: dict[str, list[int]] = {k: [] for k in ("input_ids", "labels", "attention_mask", "position_ids")}
        for number, n in enumerate(pack, 1):
            row = waiting[n].pop()
            parts = (row["input_ids"], row["labels"], [number] * n, list(range(n)))
            for key, part in zip(whole, parts, strict=True):
                whole[key] += part
        for key, ids in whole.items():
            ids += [-100 if key == "labels" else 0] * (-len(ids) % 8)
        found.append(whole)
    return found


def _pair(row: dict[str, list[int]]) -> dict[str, Any]:
    found: dict[str, Any] = {"images": None, "videos": None, "audios": None}  # its collator asks for them
    for name in ("chosen", "rejected"):
        ids = row["prompt"] + row[name]
        found[f"{name}_input_ids"] = ids
        found[f"{name}_attention_mask"] = [1] * len(ids)
        found[f"{name}_labels"] = [-100] * len(row["prompt"]) + row[name]
    longest = max(len(row["chosen"]), len(row["rejected"]))
    return {**found, "length": len(row["prompt"]) + longest}  # for grouping by length


if __name__ == "__main__":
    run(work)
