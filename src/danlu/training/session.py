"""What every training loop needs beside its maths: resume, logging, saving, bad steps, best weights, early stopping, Ctrl-C."""

from __future__ import annotations

import functools
import json
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import nn

from danlu.exceptions import Interrupted, TrainingError
from danlu.generation.seeds import mix_seed
from danlu.models.recompute import recompute_layers
from danlu.models.root import RootModel
from danlu.train_config import Best, TrainSettings
from danlu.training import checkpoint, distributed, memory
from danlu.training.monitor import Monitor
from danlu.training.noise import EmbeddingNoise
from danlu.training.optim import rate_factor
from danlu.training.progress import Bar
from danlu.training.rank_allocation import allocation_of
from danlu.training.sharding import own_part
from danlu.training.tracking import Tracker


class Session:
    """Use as a context manager around the loop; `steps()` yields the 0-based steps that are still to do.

    Attributes:
        extra: counters that the loop wants to find again after a resume; saved with every checkpoint.
        monitor: judges the updates of each step.
    """

    def __init__(
        self,
        settings: TrainSettings,
        label: str,
        *,
        total: int,
        module: nn.Module,
        optimizers: Mapping[str, torch.optim.Optimizer],
        states: Mapping[str, checkpoint.Stateful] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            total: steps of the whole stage.
            optimizers, states: what is saved with every checkpoint beside the module's trained weights, by name.
        """
        self.settings, self.label, self.total = settings, label, total
        self.module, self.optimizers = module, optimizers
        self.states: dict[str, checkpoint.Stateful] = {**optimizers, **(states or {})}
        self.ranks = allocation_of(module, total)
        if self.ranks is not None:
            self.states["ranks"] = self.ranks
            self.ranks.watch(optimizers)
        self.noise: EmbeddingNoise | None = None
        if settings.neftune_alpha > 0 and isinstance(module, RootModel):
            self.noise = EmbeddingNoise(module, settings.neftune_alpha, settings.seed, label)
        if settings.activation_checkpointing:
            recompute_layers(module)
        self.folder = Path(settings.out)
        self.checkpoints = self.folder / "checkpoints"
        self.extra: dict[str, Any] = dict(extra or {})
        self.start = 0
        newest = checkpoint.latest(self.checkpoints)
        if newest is not None:
            found = checkpoint.load(newest, module, self.states)
            self.start, self.extra = found.step, {**self.extra, **found.extra}
        self.monitor = Monitor(settings.defence, self.extra.get("monitor"))
        early, wanted = settings.early_stopping, settings.checkpoint_best
        self.best = wanted or (Best(monitor=early.monitor, mode=early.mode) if early is not None else None)
        self._before: dict[str, dict[str, Any]] = {}
        self._stop = False
        self._signals: dict[int, Any] = {}

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
        if error is not None and memory.out_of_memory(error) and not self.monitor.updates:
            self._save_before_the_step()

    def _save_before_the_step(self) -> None:
        """Memory ran out before the step changed anything: no step is lost, whatever is done about it."""
        begun = self.monitor.step
        if begun > self.start and distributed.world()[1] == 1:
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            for name, state in self._before.items():
                self.states[name].load_state_dict(state)
            self.save(begun)

    def _remember(self) -> None:
        """What stands before the step in things that may change before its first update, as a buffer does."""
        if distributed.world()[1] == 1:
            self._before = {n: s.state_dict() for n, s in self.states.items() if n not in self.optimizers}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step to end
        self._stop = True

    # -- steps ----------------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Steps still to do. Dropout draws of a step depend on (seed, step) only, so a resumed run repeats them.

        After several bad steps in a row the last checkpoint is loaded, and its steps come again without the bad ones.

        Raises:
            Interrupted: Ctrl-C; the state was saved.
            TrainingError: too many steps went bad.
        """
        step = self.start
        while step < self.total and not self.extra.get("stopped_early"):
            if step in self.monitor.skipped:
                self._write(step, {"skipped": float(len(self.monitor.skipped))})
                step += 1
                continue
            torch.manual_seed(mix_seed(self.settings.seed, step))
            self.monitor.begin_step(step)
            if self.ranks is not None:
                self.ranks.begin(step)
            if self.noise is not None:
                self.noise.begin_step(step)
            self._remember()
            yield step
            if step + 1 == self.total:
                self.damaged()
            suspect = self.monitor.end_step()
            self.extra["monitor"] = self.monitor.state
            if self.monitor.exhausted:
                raise self._gives_up()
            if suspect:
                step = self._roll_back()
                continue
            step += 1
            if distributed.anyone(self._stop):
                self.save(step)
                raise Interrupted(
                    f"interrupted; saved after step {step} of {self.total}", hint="run the same command again to go on"
                )
            if self._save_due(step) and not self.monitor.bad:
                self.save(step)

    def _save_due(self, done: int) -> bool:
        """Every `save_every` steps, and as soon as updates can be judged: there should be something to go back to."""
        defence = self.settings.defence
        early = defence.on and done == defence.window
        return (early or done % self.settings.save_every == 0) and done != self.total

    def rate_factor(self, step: int) -> float:
        """Share of the peak learning rate at a 0-based step: the schedule's, lowered for a while after a bad step."""
        return rate_factor(step, self.total, self.settings) * self.monitor.rate_share

    def judge(self, loss: float, name: str = "") -> Callable[[float], bool]:
        """For `apply`: whether an update with this loss and the gradient norm it is asked with is made.

        Args:
            name: of the trained role, if several learn.
        """
        return functools.partial(self.monitor.check, name, loss)

    def damaged(self) -> bool:
        """Whether the weights are no numbers any more; then the step is a bad one, and the last checkpoint is loaded after it.

        A loss tells it in the next step, but not before something is drawn from the weights, nor after the last step.
        """
        if self.settings.defence.on and not self.monitor.damaged:
            learn = (p for p in self.module.parameters() if p.requires_grad)
            if distributed.anyone(not all(bool(own_part(p).isfinite().all()) for p in learn)):
                self.monitor.give_up_weights()
        return self.monitor.damaged

    def cannot_draw(self, step: int) -> bool:
        """Whether a 0-based step that begins with answers of the policy ends before it, since its weights are no numbers."""
        if self.damaged():
            self.log(step, {}, tokens=0, note="")
        return self.monitor.damaged

    def _roll_back(self) -> int:
        """Loads the last checkpoint, or the one before it if no step after the last was any good; returns its step."""
        newest = checkpoint.latest(self.checkpoints)
        if newest is not None and self.monitor.goes_back_to(_step_of(newest)):
            distributed.wait_for_all()
            if distributed.is_main():
                shutil.rmtree(newest)
            distributed.wait_for_all()
            newest = checkpoint.latest(self.checkpoints)
        if newest is None:
            raise self._gives_up()
        found = checkpoint.load(newest, self.module, self.states)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.monitor.rolled_back(found.step, found.extra.get("monitor", {}))
        self.extra = {**found.extra, "monitor": self.monitor.state}
        if self.monitor.exhausted:
            raise self._gives_up()
        if self.tracker is not None:
            self.tracker.rewind(found.step)
        self.bar.done = found.step
        return found.step

    def _gives_up(self) -> TrainingError:
        rate = self.settings.learning_rate
        return TrainingError(
            f"{self.label}: training does not recover; what went wrong:\n{self.monitor.report()}",
            hint=f"lower learning_rate (now {rate:g}) or look at these steps' data; limits: the settings under defence; "
            f"checkpoints are kept in {self.checkpoints}",
        )

    # -- checkpoints ----------------------------------------------------------------------------------------------------

    def save(self, done: int) -> None:
        """A checkpoint after `done` steps.

        Raises:
            TrainingError: the disk is full; what was saved before is untouched.
        """
        try:
            checkpoint.save(self.checkpoints, done, self.module, self.states, self.extra)
        except Exception as error:
            if not memory.disk_full(error):
                raise
            self._prune()
            raise memory.disk_sentence(self.checkpoints) from error
        self._prune()

    def _prune(self) -> None:
        """Keeps the newest checkpoints, and the best weights that they or the current state speak of."""
        if not distributed.is_main():
            return
        checkpoint.prune(self.checkpoints, self.settings.keep_checkpoints)
        states = [json.loads(path.read_text("utf-8")) for path in self.checkpoints.glob("step-*/state.json")]
        self._prune_best([self.extra, *(state["extra"] for state in states)])

    def _prune_best(self, extras: Sequence[Mapping[str, Any]]) -> None:
        wanted = {_best_name(b["step"]) for extra in extras for b in extra.get("bests", [])}
        for folder in self.checkpoints.glob("best-*"):
            if folder.name not in wanted:
                shutil.rmtree(folder)

    # -- what is told ---------------------------------------------------------------------------------------------------

    def log(self, step: int, metrics: dict[str, float], *, tokens: int, note: str) -> None:
        """Metrics of a 0-based step: to the bar always, to the trackers every `log_every` steps and at the last one.

        Of a step that went bad, only what is a number is written, with the count of skipped steps.

        Raises:
            TrainingError: with `defence.on: false`, a metric is not a number any more.
        """
        bad = [k for k, v in metrics.items() if not math.isfinite(v)]
        if bad and not self.monitor.bad:
            raise TrainingError(
                f"{self.label}: {bad[0]} is {metrics[bad[0]]} at step {step + 1}",
                hint=f"lower learning_rate (now {self.settings.learning_rate}); the last checkpoint is kept in {self.checkpoints}",
            )
        if self.monitor.bad:
            self.bar.advance(tokens, f"skipped: {self.monitor.bad}")
            count = float(len(self.monitor.skipped | {step}))
            self._write(step, {k: v for k, v in metrics.items() if k not in bad} | {"skipped": count})
            return
        self.bar.advance(tokens, note)
        self.extra["last"] = metrics  # a resume after the last step reports them again
        done = step + 1
        if done % self.settings.log_every == 0 or done == self.total or step == 0:
            self._write(step, metrics)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log(step + 1, metrics)

    def note(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        """A line of a 0-based step for one of the files beside metrics.jsonl (`tracking.BESIDE`); step -1: before the first."""
        if self.tracker is not None:
            self.tracker.note(name, step + 1, row)

    def say(self, text: str) -> None:
        """A sentence for the user, above the bar."""
        self.bar.say(text)

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest: steps that were skipped and returns to a checkpoint, if there were any; AdaLoRA's ranks."""
        return {**self.monitor.facts(), **(self.ranks.facts() if self.ranks is not None else {})}

    # -- held-out metrics -----------------------------------------------------------------------------------------------

    def eval_due(self, step: int) -> bool:
        """Whether a held-out evaluation follows this 0-based step (the last step always)."""
        ends = step + 1 == self.total or bool(self.extra.get("stopped_early"))
        return ends or (step + 1) % self.settings.eval_every == 0

    def end_early(self) -> None:
        """No step follows the current one; the stage ends as it does after its last step."""
        self.extra["stopped_early"] = True

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the result of a held-out evaluation: logs it, keeps the best weights and stops early, if asked to.

        Raises:
            TrainingError: the monitored metric does not exist.
        """
        self._write(step, metrics)
        seen = {**self.extra.get("last", {}), **metrics}
        if self.best is not None:
            value = _value(seen, self.best.monitor, self.best.mode)
            row = {"value": value, "step": step + 1, "metrics": metrics}
            # Of equal values the earlier step is the better one.
            bests = sorted([*self.extra.get("bests", []), row], key=lambda b: (b["value"], b["step"]))[: self.best.keep]
            if row in bests and math.isfinite(value):
                self.extra["bests"] = bests
                checkpoint.save(self.checkpoints, step + 1, self.module, {}, {}, name=_best_name(step + 1))
        rule = self.settings.early_stopping
        if rule is not None:
            value = _value(seen, rule.monitor, rule.mode)
            better = value < self.extra.get("best_value", float("inf"))
            self.extra |= {"best_value": value, "worse": 0} if better else {"worse": self.extra.get("worse", 0) + 1}
            if self.extra["worse"] >= rule.patience:
                self.end_early()

    def restore_best(self) -> dict[str, float]:
        """Puts the best weights back if they were kept and are wanted; returns their held-out metrics, else nothing."""
        bests = self.extra.get("bests", [])
        if self.ranks is not None:
            self.ranks.finish()
        if distributed.is_main():
            self._prune_best([self.extra])
        if self.best is None or not self.best.restore or not bests:
            return {}
        checkpoint.load(self.checkpoints / _best_name(bests[0]["step"]), self.module, {})
        if self.ranks is not None:
            self.ranks.roles.mask_ranks()  # those weights may be from before the ranks fell
        found: dict[str, float] = bests[0]["metrics"]
        return found


def _best_name(step: int) -> str:
    return f"best-{step:08d}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _value(metrics: Mapping[str, float], name: str, mode: str) -> float:
    """A metric that is better when smaller.

    Raises:
        TrainingError: there is no such metric.
    """
    if name not in metrics:
        raise TrainingError(f"'{name}' is to be watched", hint=f"metrics here: {', '.join(sorted(metrics))}")
    return metrics[name] if mode == "min" else -metrics[name]
