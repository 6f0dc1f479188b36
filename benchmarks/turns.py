"""Child processes that take turns: each loads, warms up and then waits, and only one side works at a time."""

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

from danlu.training.launch import free_port, threads_each, told_to_rank

REPOSITORY = Path(__file__).parents[1]


class SideFailed(RuntimeError):
    """A child ended without the report it owed; the message ends with what it printed last."""


class Side:
    """One side: a child, or several that are ranks of one process group and work at the same time.

    Args:
        name: for messages.
        command: its program; a job's file and a descriptor for reports are added.
        job: what it is told.
        folder: for its job, its logs and its cache files.
        processes: how many ranks.
    """

    def __init__(
        self, name: str, command: Sequence[str], job: Mapping[str, Any], folder: Path, processes: int = 1
    ) -> None:
        self.name, self.command, self.processes = name, list(command), processes
        self.precision = ""
        file, port = _job_file(job, folder), free_port() if processes > 1 else 0
        self._children = [
            _Child([*command, str(file)], folder, rank, ranks(rank, processes, port)) for rank in range(processes)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the children; a second time nothing happens."""
        for child in self._children:
            child.end()

    def again(self, name: str, job: Mapping[str, Any], folder: Path) -> None:
        """Gives a side that has ended its job another one; what it prints stays in its first folder."""
        self.name = name
        self._say(str(_job_file(job, folder)))

    def next(self, key: str) -> dict[str, Any]:
        """The next report, which must hold `key`: that of rank 0, with the tokens and peaks of all and the longest time.

        Raises:
            SideFailed: a child ended, or said something else.
        """
        reports = []
        for child in self._children:
            report = child.hear()
            if key not in report:
                raise SideFailed(f"{self.name}: no '{key}' but {report or 'an end'}; it printed:\n{child.printed()}")
            reports.append(report)
        found = dict(reports[0])
        found |= {k: sum(r[k] for r in reports) for k in ("tokens", "peak") if k in found}
        found |= {k: max(r[k] for r in reports) for k in ("seconds",) if k in found}
        return found

    def _turn(self, key: str) -> dict[str, Any]:
        self.next("ready")
        self._say("go")
        return self.next(key)

    def _say(self, line: str) -> None:
        for child in self._children:
            if not child.say(line):
                raise SideFailed(f"{self.name}: it has ended; it printed:\n{child.printed()}")

    def check(self) -> list[float]:
        """Lets it take the first steps; their losses. From then on it has a `precision`."""
        report = self._turn("losses")
        self.precision = report["precision"]
        losses: list[float] = report["losses"]
        return losses

    def go(self) -> dict[str, Any]:
        """Lets it work for one window."""
        return self._turn("seconds")


class _Child:
    def __init__(self, command: Sequence[str], folder: Path, rank: int, variables: Mapping[str, str]) -> None:
        self._file = folder / ("log.txt" if rank == 0 else f"log-{rank}.txt")
        self._log = self._file.open("w")
        reads, writes = os.pipe()
        self._process = subprocess.Popen(
            [*command, str(writes)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(writes,),
            cwd=REPOSITORY,
            env={**environment(folder), **variables},
            text=True,
        )
        os.close(writes)
        self._reports = os.fdopen(reads)

    def hear(self) -> dict[str, Any]:
        """Its next report; empty when it has ended."""
        line = self._reports.readline()
        report: dict[str, Any] = json.loads(line) if line else {}
        return report

    def say(self, line: str) -> bool:
        """Whether there was still somebody to hear it."""
        assert self._process.stdin is not None, "opened as a pipe"
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def printed(self) -> str:
        return self._file.read_text("utf-8", "replace")[-2000:]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None, "opened as a pipe"
        with suppress(BrokenPipeError):  # what it was told last and never read
            self._process.stdin.close()
        self._reports.close()
        self._log.close()


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

    def start(
        self, name: str, command: Sequence[str], job: Mapping[str, Any], folder: Path, processes: int = 1
    ) -> Side:
        """A new side with this job, or one of the same command that has ended its own."""
        for side in self._idle:
            if side.command == list(command) and side.processes == processes:
                self._idle.remove(side)
                side.again(name, job, folder)
                return side
        return self._stack.enter_context(Side(name, command, job, folder, processes))

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


def ranks(rank: int, processes: int, port: int) -> dict[str, str]:
    """What a rank is told, transformers' peers too; nothing where a process is alone."""
    if processes == 1:
        return {}
    return told_to_rank(rank, processes, port, threads_each(processes)) | {"ACCELERATE_USE_CPU": "true"}


def take_turns(sides: Sequence[Side], windows: int) -> list[list[dict[str, Any]]]:
    """Every side's reports: A B C A B C ..., `windows` of each."""
    found: list[list[dict[str, Any]]] = [[] for _ in sides]
    for turn in range(windows):
        for reports, side in zip(found, sides, strict=True):
            reports.append(side.go())
            print(f"  turn {turn + 1}: {side.name} {reports[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    return found
