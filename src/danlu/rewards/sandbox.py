"""Runs code that nobody has read: in processes of its own, with no network, no rights, little time and little memory.

Three walls, of which this machine may permit only some; `isolation` says which:

- Namespaces (`unshare`): no network, and no process but its own. They end with the first process in them, whatever the code did.
- Another user (`setpriv`, where danlu runs as root): no rights on files or processes of anybody.
- In the process itself (`sandbox_child.py`): limits on time, memory, files and processes, and an audit hook that refuses
  sockets, further processes, and files outside an empty folder but Python's own library.

The environment is empty. This is made to keep a model that learns from harm and from easy cheats; it is no virtual machine.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from danlu.rewards import sandbox_child
from danlu.rewards.protocol import Unscored

_NAMESPACES: Final = ("--net", "--pid", "--fork", "--kill-child")
_NOBODY: Final = 65534
# With its own library, and not with that of another Python which is found where its own cannot be read.
_PROBE: Final = (
    "import os, decimal\ndef where():\n    return os.path.realpath(os.__file__)",
    f"assert where() == {os.path.realpath(os.__file__)!r}",
)
_STARTING: Final = 10.0


@dataclass(frozen=True)
class Limits:
    """What an answer's code may use.

    Args:
        seconds: of the wall clock, for the code and all its tests; of the processor, for each process.
        memory_mb: of address space, for each of the two processes.
        output: bytes that a program may print.
    """

    seconds: float = 10.0
    memory_mb: int = 512
    output: int = 1 << 20


@dataclass(frozen=True)
class Walls:
    """How a sandbox is started here.

    Args:
        command: what stands before the command line of Python.
        user: who the files in its folder belong to; None: whoever danlu runs as.
        what: for people.
    """

    command: tuple[str, ...]
    user: int | None
    what: str


def passes(code: str, tests: Sequence[str], limits: Limits) -> bool:
    """Whether code runs without an error, and all test programs with its names in scope after it.

    Raises:
        Unscored: no sandbox can be started on this machine, or a test is no Python.
    """
    return _passes(code, tests, limits, walls())


def outputs(code: str, inputs: Sequence[str], limits: Limits) -> list[str | None]:
    """What code prints as a program for each input; None where it ends with an error, prints too much or takes too long.

    Raises:
        Unscored: no sandbox can be started on this machine.
    """
    frames = _run(_job(limits) | {"code": code, "inputs": list(inputs)}, [], limits, walls())
    found = next((f["outputs"] for f in frames if "outputs" in f), None)
    return list(found) if found is not None else [None] * len(inputs)


def isolation() -> str:
    """Which walls this machine permits, in a sentence.

    Raises:
        Unscored: none, not even a process with limits.
    """
    return walls().what


@functools.cache
def walls() -> Walls:
    """The strongest arrangement in which a harmless answer passes its test; found out by trying, once a process.

    Raises:
        Unscored: there is none.
    """
    limits = Limits(seconds=_STARTING)
    for arrangement in _arrangements():
        with suppress(Unscored):
            if _passes(_PROBE[0], [_PROBE[1]], limits, arrangement):
                return arrangement
    raise Unscored(
        "R-SANDBOX", "this machine cannot run code in a process with limits, which the verifier 'tests' needs"
    )


def _arrangements() -> Iterator[Walls]:
    unshare, setpriv = shutil.which("unshare"), shutil.which("setpriv")
    root = os.geteuid() == 0
    users: list[tuple[tuple[str, ...], int | None, str]] = []
    if root and setpriv:
        user = 1_000_000_000 + secrets.randbelow(1_000_000_000)
        drop = (setpriv, f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs")
        none = ("--inh-caps=-all", "--bounding-set=-all")
        # Python may stand in a folder that only root can read, and then so must the code.
        reads = tuple(f"--{which}=-all,+dac_read_search" for which in ("inh-caps", "ambient-caps", "bounding-set"))
        users += [
            ((*drop, *none), user, "as another user"),
            ((*drop, *reads), user, "as another user that may read all files"),
        ]
    users.append(((), None, "as the same user"))
    own = () if root else ("--user", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}")
    apart = [((unshare, *own, *_NAMESPACES), "without network, apart from other processes")] if unshare else []
    for names, where in [*apart, ((), "sockets and processes refused by Python's audit hook alone")]:
        for before, owner, who in users:
            yield Walls((*names, *before), owner, f"{where}, {who}, with limits on time, memory, files and processes")


def _passes(code: str, tests: Sequence[str], limits: Limits, arrangement: Walls) -> bool:
    nonce = secrets.token_hex(16)
    frames = _run(_job(limits) | {"code": code}, [{"tests": list(tests), "nonce": nonce}], limits, arrangement)
    broken = [f["broken"] for f in frames if "broken" in f]
    if broken:
        raise Unscored("R-VERIFIER", f"a test in the reference is no Python: {broken[0]}")
    return any(f.get("nonce") == nonce for f in frames)


def _job(limits: Limits) -> dict[str, Any]:
    return {"seconds": limits.seconds, "memory_mb": limits.memory_mb, "output": limits.output}


def _run(
    job: dict[str, Any], more: Sequence[dict[str, Any]], limits: Limits, arrangement: Walls
) -> list[dict[str, Any]]:
    """The frames that a sandbox answered with; after the time limit what had come until then.

    Raises:
        Unscored: it did not start.
    """
    python = [sys.executable, "-I", "-S", "-X", "utf8", str(Path(sandbox_child.__file__).resolve())]
    sent = b"".join(map(_frame, [job, *more]))
    with _folder(arrangement.user) as folder:
        process = subprocess.Popen(
            [*arrangement.command, *python],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            said, complaint = process.communicate(sent, timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            _kill(process.pid, os.killpg)
            said, complaint = process.communicate()
            if not arrangement.command:  # without a namespace of their own, the last child may have left the group
                for number in [f["pid"] for f in _frames(said) if "pid" in f][-1:]:
                    _kill(number, os.kill)
    frames = _frames(said)
    if not frames:
        why = complaint.decode("utf-8", "replace").strip() or f"exit status {process.returncode}"
        raise Unscored("R-SANDBOX", f"the sandbox for code did not start: {why.splitlines()[-1]}")
    return frames


def _kill(number: int, how: Callable[[int, int], None]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # it has ended, and its number is free or somebody else's
        how(number, signal.SIGKILL)


def _frame(value: dict[str, Any]) -> bytes:
    body = json.dumps(value).encode()
    return len(body).to_bytes(8, "big") + body


def _frames(data: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while len(data) >= 8:
        size = int.from_bytes(data[:8], "big")
        if len(data) < 8 + size:
            break
        found.append(json.loads(data[8 : 8 + size]))
        data = data[8 + size :]
    return found


@contextmanager
def _folder(user: int | None) -> Iterator[Path]:
    """An empty folder that is gone at the end, whatever was made of it."""
    path = Path(tempfile.mkdtemp(prefix="danlu-code-"))
    try:
        if user is not None:
            os.chown(path, user, user)
        yield path
    finally:
        shutil.rmtree(path, onerror=_once_more)


def _once_more(remove: Callable[..., Any], path: str, _: Any) -> None:
    """Code may have taken the rights on its own folders away, from itself too."""
    for place in (Path(path).parent, Path(path)):
        if not place.is_symlink():
            with suppress(OSError):
                place.chmod(0o700)
    remove(path)
