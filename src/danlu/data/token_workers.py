"""A function over parts of a long list, in processes of their own: results in order, equal to those of one process.

The processes are plain children that read pickles from a pipe, not `multiprocessing`'s: that would run the user's own script
again in every child, or fork a process in which torch has threads. What a child cannot do (it died, or the function raised
an error) the parent does itself; so errors, too, are those of one process.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")
_COMMAND = "from danlu.data.token_workers import main; main()"
_FAILED = object()
# One child is one thread: the parts are what runs at the same time. A child has no business on a GPU.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parts(function: Callable[[Part], Result], parts: Iterable[Part], processes: int) -> Iterator[Result]:
    """`map(function, parts)` in this process (`processes` below 2) or in others.

    Args:
        function: what can be pickled goes to the children; with anything else this process does all of it.
        parts: taken a few ahead of the results, so that a long list need not be in memory.
    """
    payload = _pickled(function) if processes > 1 else None
    if payload is None:
        yield from map(function, parts)
        return
    with ExitStack() as stack:
        children = [_Child(payload) for _ in range(processes)]
        # At the end, last first: children end, so that threads that wait for one go on; threads end; pipes are closed.
        for child in children:
            stack.callback(child.close)
        pool = stack.enter_context(ThreadPoolExecutor(processes))
        for child in children:
            stack.callback(child.end)
        idle: SimpleQueue[_Child] = SimpleQueue()
        for child in children:
            idle.put(child)

        def ask(part: Part) -> Any:
            child = idle.get()
            try:
                return child.ask(part)
            finally:
                idle.put(child)

        waiting: deque[tuple[Part, Future[Any]]] = deque()
        try:
            for part in parts:
                waiting.append((part, pool.submit(ask, part)))
                if len(waiting) >= 2 * processes:
                    yield _answer(function, *waiting.popleft())
            while waiting:
                yield _answer(function, *waiting.popleft())
        finally:
            for _, future in waiting:
                future.cancel()


def _answer(function: Callable[[Part], Result], part: Part, future: Future[Any]) -> Result:
    found = future.result()
    return function(part) if found is _FAILED else found


class _Child:
    def __init__(self, payload: bytes) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in sys.path)},
        )
        self._payload: bytes | None = payload

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not sent need not be
                stream.close()  # type: ignore[union-attr]

    def ask(self, part: Any) -> Any:
        """The function's result for a part, or `_FAILED`."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None, "pipes were asked for"
        try:
            if self._payload is not None:
                stdin.write(self._payload)
                self._payload = None
            pickle.dump(part, stdin, pickle.HIGHEST_PROTOCOL)
            stdin.flush()
            worked, result = pickle.load(stdout)
        except (OSError, EOFError, pickle.PickleError):
            return _FAILED
        return result if worked else _FAILED


def main() -> None:
    """A child: reads the function, then parts until there are no more; writes for each whether it worked and the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its children
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    serve(sys.stdin.buffer, answers)


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """See `main`."""
    function = pickle.load(questions)
    while True:
        try:
            part = pickle.load(questions)
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, function(part)), pickle.HIGHEST_PROTOCOL)
        except Exception:  # whatever it is: the parent meets it again
            answer = pickle.dumps((False, None))
        answers.write(answer)
        answers.flush()


def _pickled(function: Any) -> bytes | None:
    try:
        return pickle.dumps(function, pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, TypeError, AttributeError):
        return None
