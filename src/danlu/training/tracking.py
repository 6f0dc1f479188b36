"""Where metrics and notes go: metrics.jsonl always, others beside it, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from danlu import atomic
from danlu.exceptions import SettingsError

BESIDE = ("samples.jsonl", "health.jsonl")  # files of one line now and then, each with its step


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text("utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Tracker:
    """Writes one line per logged step. A resumed stage drops the lines after its checkpoint, so no step appears twice."""

    def __init__(self, folder: Path, report_to: Sequence[str], *, name: str, start_step: int) -> None:
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self._file = self._reopened(start_step)
        self._board: Any = None
        self._wandb: Any = None
        if "tensorboard" in report_to:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise SettingsError(
                    "tensorboard is not installed", field="report_to", hint="pip install danlu[tracking]"
                ) from None
            self._board = SummaryWriter(str(folder / "tb"), purge_step=start_step + 1 if start_step else None)
        if "wandb" in report_to:
            try:
                import wandb
            except ImportError:
                raise SettingsError(
                    "wandb is not installed", field="report_to", hint="pip install danlu[tracking]"
                ) from None
            self._wandb = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "danlu"),
                name=name,
                id=name.replace("/", "-"),
                resume="allow",
                dir=str(folder),
            )

    def _reopened(self, step: int) -> TextIO:
        for path in (self.path, *(self.folder / name for name in BESIDE)):
            if path == self.path or path.is_file():
                kept = [r for r in read_metrics(path) if r.get("step", 0) <= step] if step else []
                # Whole or not at all: a second kill at this very moment must not cost the lines of the first run.
                atomic.write_jsonl(path, kept)
        return self.path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Drops the lines after a 1-based step, which will come again."""
        self._file.close()
        self._file = self._reopened(step)

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def note(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        """A line of a 1-based step (0: before the first) for one of the files `BESIDE`."""
        assert name in BESIDE, name
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of a 1-based step."""
        self._write({"step": step, **metrics})
        if self._board is not None:
            for key, value in metrics.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
