"""What every training loop needs beside its maths: resume, logging, saving, early stopping, Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import nn

from danlu.config import TrainSettings
from danlu.exceptions import Interrupted, TrainingError
from danlu.generation.sampling import mix_seed
from danlu.training import checkpoint, distributed
from danlu.training.progress import Bar
from danlu.training.tracking import Tracker


class Session:
    """Use as a context manager around the loop; `steps()` yields the 0-based steps that are still to do.

    Attributes:
        extra: counters that the loop wants to find again after a resume; saved with every checkpoint.
    """

    def __init__(
        self,
        settings: TrainSettings,
        label: str,
        *,
        total: int,
        module: nn.Module,
        optimizers: Mapping[str, torch.optim.Optimizer],
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings, self.label, self.total = settings, label, total
        self.module, self.optimizers = module, optimizers
        self.folder = Path(settings.out)
        self.checkpoints = self.folder / "checkpoints"
        self.extra: dict[str, Any] = dict(extra or {})
        self.start = 0
        newest = checkpoint.latest(self.checkpoints)
        if newest is not None:
            found = checkpoint.load(newest, module, optimizers)
            self.start, self.extra = found.step, {**self.extra, **found.extra}
        self._stop = False
        self._signals: dict[int, Any] = {}
        self._saved_at = self.start

    def __enter__(self) -> Self:
        self.tracker = (
            Tracker(self.folder, self.settings.report_to, name=self.label, start_step=self.start)
            if distributed.is_main()
            else None
        )
        self.bar = Bar(self.label, self.total, self.start, quiet=not distributed.is_main()).__enter__()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._signals[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._signals.items():
            signal.signal(number, before)
        self.bar.__exit__(kind, error, trace)
        if self.tracker is not None:
            self.tracker.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step to end
        self._stop = True

    def steps(self) -> Iterator[int]:
        """Steps still to do. Dropout draws of a step depend on (seed, step) only, so a resumed run repeats them."""
        for step in range(self.start, self.total):
            if self.extra.get("stopped_early"):
                return
            torch.manual_seed(mix_seed(self.settings.seed, step))
            yield step
            done = step + 1
            if self._stop:
                self.save(done)
                raise Interrupted(
                    f"interrupted; saved after step {done} of {self.total}", hint="run the same command again to go on"
                )
            if done % self.settings.save_every == 0 and done != self.total:
                self.save(done)

    def save(self, done: int) -> None:
        """A checkpoint after `done` steps."""
        if distributed.is_main():
            checkpoint.save(self.checkpoints, done, self.module, self.optimizers, self.extra)
            checkpoint.prune(self.checkpoints, self.settings.keep_checkpoints)
        self._saved_at = done

    def log(self, step: int, metrics: dict[str, float], *, tokens: int, note: str) -> None:
        """Metrics of a 0-based step: to the bar always, to the trackers every `log_every` steps and at the last one.

        Raises:
            TrainingError: the loss is not a number any more.
        """
        bad = [k for k, v in metrics.items() if v != v or abs(v) == float("inf")]
        if bad:
            raise TrainingError(
                f"{self.label}: {bad[0]} is {metrics[bad[0]]} at step {step + 1}",
                hint=f"lower learning_rate (now {self.settings.learning_rate}); the last checkpoint is kept in {self.checkpoints}",
            )
        self.bar.advance(tokens, note)
        self.extra["last"] = metrics  # a resume after the last step reports them again
        done = step + 1
        if self.tracker is not None and (done % self.settings.log_every == 0 or done == self.total or step == 0):
            self.tracker.log(done, metrics)

    def eval_due(self, step: int) -> bool:
        """Whether a held-out evaluation follows this 0-based step (the last step always)."""
        return (step + 1) % self.settings.eval_every == 0 or step + 1 == self.total

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the result of a held-out evaluation: logs it and, if asked to, stops when it gets no better.

        Raises:
            TrainingError: the monitored metric does not exist.
        """
        if self.tracker is not None:
            self.tracker.log(step + 1, metrics)
        rule = self.settings.early_stopping
        if rule is None:
            return
        if rule.monitor not in metrics:
            raise TrainingError(
                f"early_stopping watches '{rule.monitor}'", hint=f"metrics here: {', '.join(sorted(metrics))}"
            )
        value = metrics[rule.monitor] if rule.mode == "min" else -metrics[rule.monitor]
        if value < self.extra.get("best", float("inf")):
            self.extra |= {"best": value, "best_step": step + 1, "best_metrics": metrics, "worse": 0}
            if distributed.is_main():
                checkpoint.save(self.checkpoints, step + 1, self.module, {}, {}, name="best")
        else:
            self.extra["worse"] = self.extra.get("worse", 0) + 1
            self.extra["stopped_early"] = self.extra["worse"] >= rule.patience

    def restore_best(self) -> dict[str, float]:
        """Puts the best weights back when early stopping was on; returns their held-out metrics, else nothing."""
        best = self.checkpoints / "best"
        if self.settings.early_stopping is None or not best.is_dir():
            return {}
        checkpoint.load(best, self.module, {})
        found: dict[str, float] = self.extra.get("best_metrics", {})
        return found
