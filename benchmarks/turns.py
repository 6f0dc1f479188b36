"""Child processes that take turns: each loads, warms up and then waits, and only one of them works at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

REPOSITORY = Path(__file__).parents[1]


class SideFailed(RuntimeError):
    """A child ended without the report it owed; the message ends with what it printed last."""


class Side:
    """One child.

    Args:
        name: for messages.
        command: its program; a job's file and a descriptor for reports are added.
        job: what it is told.
        folder: for its job, its log and its cache files.
    """

    def __init__(self, name: str, command: Sequence[str], job: Mapping[str, Any], folder: Path) -> None:
        self.name, self.command, self.folder = name, list(command), folder
        file = _job_file(job, folder)
        self._log = (folder / "log.txt").open("w")
        reads, writes = os.pipe()
        self._child = subprocess.Popen(
            [*command, str(file), str(writes)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(writes,),
            cwd=REPOSITORY,
            env=environment(folder),
            text=True,
        )
        os.close(writes)
        self._reports = os.fdopen(reads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the child; a second time nothing happens."""
        self._child.kill()
        self._child.wait()
        assert self._child.stdin is not None, "opened as a pipe"
        with suppress(BrokenPipeError):  # what it was told last and never read
            self._child.stdin.close()
        self._reports.close()
        self._log.close()

    def again(self, name: str, job: Mapping[str, Any], folder: Path) -> None:
        """Gives a child that has ended its job another one; what it prints stays in its first folder."""
        self.name = name
        self._say(str(_job_file(job, folder)))

    def next(self, key: str) -> dict[str, Any]:
        """The next report, which must hold `key`.

        Raises:
            SideFailed: the child ended, or said something else.
        """
        line = self._reports.readline()
        report: dict[str, Any] = json.loads(line) if line else {}
        if key not in report:
            raise SideFailed(f"{self.name}: no '{key}' but {report or 'an end'}; it printed:\n{self._printed()}")
        return report

    def _printed(self) -> str:
        return (self.folder / "log.txt").read_text("utf-8", "replace")[-2000:]

    def _turn(self, key: str) -> dict[str, Any]:
        self.next("ready")
        self._say("go")
        return self.next(key)

    def _say(self, line: str) -> None:
        assert self._child.stdin is not None, "opened as a pipe"
        try:
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise SideFailed(f"{self.name}: it has ended; it printed:\n{self._printed()}") from None

    def check(self) -> list[float]:
        """Lets it take the first steps; their losses."""
        losses: list[float] = self._turn("losses")["losses"]
        return losses

    def go(self) -> dict[str, Any]:
        """Lets it work for one window."""
        return self._turn("seconds")


def _job_file(job: Mapping[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True)
    file = folder / "job.json"
    file.write_text(json.dumps({**job, "folder": str(folder)}), "utf-8")
    return file


class Sides:
    """The children of a benchmark. Ended ones are kept for the next work if `keep`: that saves their imports."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._stack = ExitStack()
        self._idle: list[Side] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def start(self, name: str, command: Sequence[str], job: Mapping[str, Any], folder: Path) -> Side:
        """A new child with this job, or one of the same command that has ended its own."""
        for side in self._idle:
            if side.command == list(command):
                self._idle.remove(side)
                side.again(name, job, folder)
                return side
        return self._stack.enter_context(Side(name, command, job, folder))

    def ended(self, sides: Sequence[Side], others: Sequence[Side]) -> None:
        """`sides` have ended their jobs; `others` wait in the middle of theirs and are stopped."""
        stopped = others if self._keep else [*sides, *others]
        for side in stopped:
            side.__exit__(None, None, None)
        if self._keep:
            self._idle += sides


def environment(folder: Path) -> dict[str, str]:
    """Nothing is fetched, nothing is reported anywhere, and caches stay in the child's own folder."""
    source = [str(REPOSITORY / "src"), str(REPOSITORY)]
    own = {
        "PYTHONPATH": os.pathsep.join(source),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "DANLU_CACHE": str(folder / "tokens"),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "WANDB_DISABLED": "true",
    }
    return {**os.environ, **own}


def take_turns(sides: Sequence[Side], windows: int) -> list[list[dict[str, Any]]]:
    """Every side's reports: A B C A B C ..., `windows` of each."""
    found: list[list[dict[str, Any]]] = [[] for _ in sides]
    for turn in range(windows):
        for reports, side in zip(found, sides, strict=True):
            reports.append(side.go())
            print(f"  turn {turn + 1}: {side.name} {reports[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    return found
