"""Several processes of this machine that train together, started by the process that the user started.

The parent takes no part in the work: it hands out tasks, watches, and says what went wrong. Its children are plain ones that
read pickles from a pipe, as in `data/token_workers.py`; they stay for the next stage, since importing torch takes seconds.
Rank 0 shows the bar and writes; what the others print is kept back.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, TypeVar

from danlu.data.token_workers import cores
from danlu.exceptions import Interrupted, PeerLost, TrainingError

Argument = TypeVar("Argument")
Result = TypeVar("Result")
# (rank, (whether it worked, result or error)); None in place of an answer when the process has ended
_Heard = SimpleQueue[tuple[int, tuple[bool, Any] | None]]
_COMMAND = "from danlu.training.launch import main; main()"
MOST_AUTOMATIC = 4
# After the first sign of trouble the others get so long to say what they know, and at the end to leave by themselves.
GRACE_SECONDS = 5.0
# fp32 weights, gradients and AdamW's two averages: bytes per parameter of a process that trains it.
BYTES_PER_PARAMETER = 16


def physical_cores() -> int:
    """Processor cores this process may use; two threads of one core count once."""
    siblings = set()
    for cpu in sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ():
        with suppress(OSError):
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
    return len(siblings) or cores()


def resolve_count(wanted: int | Literal["auto"], parameters: int = 0) -> int:
    """How many processes a stage gets.

    Args:
        wanted: the setting. "auto": one for each GPU; on a CPU one for each physical core, at most four, and no more than a half
            of the memory has room for.
        parameters: that each process trains.
    """
    if wanted != "auto":
        return wanted
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    room = memory // 2 // max(1, parameters * BYTES_PER_PARAMETER)
    return max(1, min(physical_cores(), MOST_AUTOMATIC, room))


# -- the parent ----------------------------------------------------------------------------------------------------------


class Crew:
    """N children that are one process group. Use as a context manager; the children end with it."""

    def __init__(self, size: int) -> None:
        self.size = size
        port, threads = free_port(), threads_each(size)
        self._heard: _Heard = SimpleQueue()
        self._ranks = [_Rank(rank, size, port, threads, self._heard) for rank in range(size)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets the children go; who is still there after a moment is ended."""
        for rank in self._ranks:
            rank.dismiss()
        end = time.monotonic() + GRACE_SECONDS
        for rank in self._ranks:
            rank.end(max(0.0, end - time.monotonic()))

    def run(self, function: Callable[[Argument], Result], argument: Argument) -> list[Result]:
        """`function(argument)` in every rank; its results by rank. After an error the crew cannot be used again.

        Args:
            function: one that can be imported by its name.

        Raises:
            Exception: what a rank raised first, rather than what that did to the others.
            TrainingError: a rank was killed.
            KeyboardInterrupt: Ctrl-C, and no rank had anything to save.
        """
        payload = pickle.dumps(pickle.dumps((function, argument), pickle.HIGHEST_PROTOCOL))
        for rank in self._ranks:
            rank.send(payload)
        results: dict[int, Result] = {}
        errors: dict[int, BaseException] = {}
        interrupted, deadline = False, float("inf")
        while len(results) + len(errors) < self.size and time.monotonic() < deadline:
            try:
                number, answer = self._heard.get(timeout=0.2)
            except Empty:
                continue
            except KeyboardInterrupt:
                interrupted = True
                for rank in self._ranks:
                    rank.interrupt()
                continue
            if number in errors:
                continue  # it has said why it ends
            if answer is not None and answer[0]:
                results[number] = answer[1]
            else:
                errors[number] = answer[1] if answer is not None else self._ranks[number].obituary(self.size)
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not errors:
            return [results[rank] for rank in range(self.size)]
        for rank in self._ranks:
            rank.end(0.0)
        if interrupted:
            saved = [e for e in errors.values() if isinstance(e, Interrupted)]
            raise saved[0] if saved else KeyboardInterrupt
        raise min(errors.values(), key=_is_consequence)


def _is_consequence(error: BaseException) -> int:
    """0 for a rank's own error, 1 for one that was killed, 2 for what the end of another rank did to it."""
    return 2 if isinstance(error, PeerLost) else 1 if isinstance(error, _Died) else 0


class _Died(TrainingError):
    pass


class _Rank:
    def __init__(self, rank: int, size: int, port: int, threads: int, heard: _Heard) -> None:
        environment = told_to_rank(rank, size, port, threads)
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(p).absolute()) for p in sys.path)
        self.rank = rank
        # What rank 1 and up print would be said twice; kept for the case that one of them dies.
        self._said = tempfile.TemporaryFile() if rank else None  # noqa: SIM115 (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=os.environ | environment,
            start_new_session=True,  # Ctrl-C reaches the parent, which passes it on once
        )
        self._listener = threading.Thread(target=self._listen, args=(heard,), daemon=True)
        self._listener.start()

    def _listen(self, heard: _Heard) -> None:
        assert self._process.stdout is not None, "a pipe was asked for"
        with self._process.stdout as answers:
            while True:
                try:
                    answer = pickle.load(answers)
                except (EOFError, pickle.UnpicklingError, OSError):
                    heard.put((self.rank, None))
                    return
                heard.put((self.rank, answer))

    def send(self, payload: bytes) -> None:
        assert self._process.stdin is not None, "a pipe was asked for"
        with suppress(BrokenPipeError):  # it has died: `_listen` says so
            self._process.stdin.write(payload)
            self._process.stdin.flush()

    def interrupt(self) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def dismiss(self) -> None:
        assert self._process.stdin is not None, "a pipe was asked for"
        with suppress(OSError):
            self._process.stdin.close()

    def end(self, seconds: float) -> None:
        """Waits so long for the process to end, then ends it."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()
        if self._said is not None:
            self._said.close()

    def obituary(self, size: int) -> TrainingError:
        """How a process ended that did not say so itself."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        status = self._process.returncode
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            hint = "if nobody did that, memory ran out: lower micro_tokens or processes; "
            hint = hint if status == -signal.SIGKILL else ""
        else:
            how, hint = f"ended with status {status}", ""
        said = self._last_words()
        return _Died(
            f"rank {self.rank} of {size} {how}{said}",
            hint=f"{hint}run the same command again to go on from the last checkpoint",
        )

    def _last_words(self) -> str:
        if self._said is None:
            return ""
        self._said.seek(0)
        lines = [line for line in self._said.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return f"; its last words: {lines[-1].strip()}" if lines else ""


def threads_each(size: int) -> int:
    """Threads of each of so many processes that share this machine."""
    return max(1, int(os.environ.get("OMP_NUM_THREADS") or physical_cores()) // size)


def told_to_rank(rank: int, size: int, port: int, threads: int) -> dict[str, str]:
    """The variables by which a process of this machine knows its place among others, as torchrun names them."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    numbers |= {"MASTER_PORT": port, "OMP_NUM_THREADS": threads}
    found = {"MASTER_ADDR": "127.0.0.1"} | {k: str(v) for k, v in numbers.items()}
    return found | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- a child -------------------------------------------------------------------------------------------------------------


def main() -> None:
    """A child: runs the functions it is sent until there are no more. When the parent is gone in the middle, so is the child."""
    early = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: early.set())
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    tasks: SimpleQueue[bytes | None] = SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, tasks, busy), daemon=True).start()
    while (task := tasks.get()) is not None:
        answer = _answer(task, early, answers)
        busy.clear()
        _send(answer, answers)
        if not answer[0]:
            break
    os._exit(0)  # a process group that has lost a member cannot be left in order


def _receive(stream: BinaryIO, tasks: SimpleQueue[bytes | None], busy: threading.Event) -> None:
    with suppress(EOFError):
        while True:
            task = pickle.load(stream)
            busy.set()
            tasks.put(task)
    if busy.is_set():
        os._exit(1)
    tasks.put(None)


def _send(answer: tuple[bool, Any], answers: BinaryIO) -> None:
    with suppress(BrokenPipeError):
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


def _answer(task: bytes, early: threading.Event, answers: BinaryIO) -> tuple[bool, Any]:
    """(True, result) or (False, error). Ctrl-C and SIGTERM are heard while the task is at work, and remembered before."""
    wait = signal.getsignal(signal.SIGINT)

    def end(error: PeerLost) -> None:
        _send((False, error), answers)
        os._exit(1)

    try:
        from danlu.training import distributed

        function, argument = pickle.loads(task)
        distributed.start(end)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        if early.is_set():
            raise KeyboardInterrupt
        with distributed.naming_the_lost():
            return True, function(argument)
    except BaseException as error:
        return False, _portable(error)
    finally:
        signal.signal(signal.SIGINT, wait)


def _portable(error: BaseException) -> BaseException:
    """An error that the parent can read."""
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted", hint="run the same command again to go on")
    if os.environ.get("DANLU_DEBUG"):
        traceback.print_exception(error)
    try:
        found: BaseException = pickle.loads(pickle.dumps(error))
    except Exception:  # an error whose constructor wants more than its text
        return RuntimeError(f"{type(error).__name__}: {error}")
    return found
