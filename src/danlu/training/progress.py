"""The live bar of a stage: steps, speed, time left and the number that matters; plain lines when output is piped."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_SECONDS = 10.0


class Bar:
    """Use as a context manager; call `advance` once per step."""

    def __init__(self, label: str, total: int, done: int = 0, *, quiet: bool = False) -> None:
        self.label, self.total, self.done = label, total, done
        self.quiet = quiet
        self.live: Progress | None = None
        self._begun = self._said = time.monotonic()
        self._tokens = 0
        self._started_at = done
        if sys.stderr.isatty() and not quiet:
            self.live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=False,
            )
            self._task = self.live.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """A line above the bar, or among the plain ones."""
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def advance(self, tokens: int, note: str) -> None:
        """One step done.

        Args:
            tokens: read in it; 0 where that is not what counts, and then no speed is told.
            note: such as "loss 2.31".
        """
        self.done += 1
        self._tokens += tokens
        now = time.monotonic()
        speed = self._tokens / max(now - self._begun, 1e-6)
        text = f"{speed:,.0f} tok/s  {note}" if self._tokens else note
        if self.live is not None:
            self.live.update(self._task, completed=self.done, note=text)
        elif not self.quiet and (now - self._said > PLAIN_EVERY_SECONDS or self.done == self.total):
            self._said = now
            left = (self.total - self.done) * (now - self._begun) / max(self.done - self._started_at, 1)
            print(f"{self.label}: {self.done}/{self.total}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)
