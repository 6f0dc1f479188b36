"""The child's end of `benchmarks/turns.py`: it waits for its turn before every window and reports it. Standard library only."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Meter:
    """One per child. Reports are JSON lines on the file descriptor that the parent opened; turns are lines on stdin."""

    def __init__(self, descriptor: int) -> None:
        self._out = os.fdopen(descriptor, "w")
        self._begun = self._begun_cpu = 0.0

    def say(self, **facts: Any) -> None:
        """One report."""
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()

    def checked(self, losses: Sequence[float], precision: str) -> None:
        """The losses of the first steps, on rows that both sides take in equal steps, and what they were computed in."""
        self.say(losses=list(losses), precision=precision)

    def wait(self) -> None:
        """Waits for the parent's word, then starts the clock. The parent's end of the pipe closed: there is no more to do."""
        self.say(ready=True)
        if not sys.stdin.readline():
            sys.exit(0)
        self._begun, self._begun_cpu = time.perf_counter(), time.process_time()

    def report(self, **facts: Any) -> None:
        """Ends the window that `wait` began."""
        cpu = time.process_time() - self._begun_cpu
        self.say(seconds=time.perf_counter() - self._begun, cpu=cpu, **facts)

    def end(self) -> None:
        """The last report: the most memory this process ever had, in bytes."""
        self.say(peak=_peak())


def precision(weights: object, mixed: bool = False) -> str:
    """`fp32`, `bf16`, or `mixed bf16` (fp32 weights, products in bf16), of the weights' dtype and whether autocast is on."""
    short = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}[str(weights)]
    return "mixed bf16" if mixed and short == "fp32" else short


def _peak() -> int:
    """Bytes. Linux has it in /proc; what `getrusage` says there a child inherits from its parent."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(work: Callable[[dict[str, Any], Meter], None]) -> None:
    """A child's `main`: arguments are a job's file and the descriptor for reports. Files of further jobs are lines on stdin."""
    file, meter = sys.argv[1], Meter(int(sys.argv[2]))
    while file:
        work(json.loads(Path(file).read_text("utf-8")), meter)
        meter.end()
        file = sys.stdin.readline().strip()
