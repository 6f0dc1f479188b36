"""What runs in a sandbox; started by `sandbox.py` as a program of its own, with the standard library alone.

A model's code runs in a child of this process, and the tests in this process. Between them go plain values and handles of
objects: a test never touches an object of the code's, so nothing in there can claim to be equal to what is expected. The code
has neither the pipe of the verdict nor the nonce that makes a verdict count; both come after it was forked off.

Frames are eight bytes of length and JSON. In: the job, then (with tests) the tests and the nonce. Out: `{"pid": ...}` of each
child, then `{"nonce": ...}` if all tests passed, `{"broken": reason}`, or `{"outputs": [...]}`.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NoReturn

LONGEST = 8 << 20
MOST_FILES = 256
# Names of builtins that a solution may have; the others are the tests' own, so that no `abs` of the code's says 0 to everything.
OVERRIDABLE = (
    "sum",
    "max",
    "min",
    "pow",
    "divmod",
    "next",
    "filter",
    "map",
    "zip",
    "range",
    "reversed",
    "bin",
    "oct",
    "hex",
)
Job = dict[str, Any]

# -- frames ---------------------------------------------------------------------------------------------------------------


def receive(fd: int) -> Any:
    """The next frame.

    Raises:
        EOFError: the other end is gone, or sends more than a frame may hold.
    """
    size = int.from_bytes(_exactly(fd, 8), "big")
    if size > LONGEST:
        raise EOFError
    return json.loads(_exactly(fd, size))


def send(fd: int, value: Any) -> None:
    """Writes a frame."""
    body = json.dumps(value).encode()
    data = memoryview(len(body).to_bytes(8, "big") + body)
    while data:
        data = data[os.write(fd, data) :]


def _exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 16))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# -- what a process may do ------------------------------------------------------------------------------------------------


def confine(job: Job, child: int = 0) -> None:
    """Limits of this process, for good: time, memory, files, no further process, and what the audit hook refuses.

    Args:
        child: the one process that it may end.
    """
    megabytes = job["memory_mb"] << 20
    seconds = int(job["seconds"]) + 1
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, megabytes),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    sys.addaudithook(_hook(os.path.realpath("."), child))


_REFUSED = (
    *("socket.", "subprocess.", "ctypes.", "pty.", "resource.", "syslog.", "signal.pthread_kill", "webbrowser."),
    *("os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill", "os.startfile", "os.putenv"),
    *("gc.get_objects", "gc.get_referrers", "gc.get_referents", "code.__new__"),
)
_MODULES = ("ctypes", "_ctypes", "_posixsubprocess", "multiprocessing", "_multiprocessing", "_socket", "socket")
_TOUCHES = (
    *("os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *("os.utime", "os.lockf", "os.setxattr", "os.removexattr", "os.chflags", "os.listxattr", "os.getxattr"),
)
_LOOKS = ("os.listdir", "os.scandir", "os.chdir", "os.fwalk", "os.walk")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _hook(folder: str, child: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Refuses what a pure function has no need of: the network, processes, and files outside the folder but the library's."""
    library = tuple(os.path.realpath(p) + os.sep for p in sys.path if p)
    realpath, fspath, isdir, fsdecode = os.path.realpath, os.fspath, os.path.isdir, os.fsdecode
    opened = [0]

    def inside(path: Any, *, reading: bool) -> bool:
        if path is None:
            return True
        if isinstance(path, int):
            return False
        real = realpath(fsdecode(fspath(path)))
        within = real == folder or real.startswith(folder + os.sep)
        return within or (reading and (real + os.sep).startswith(library))

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int):
                return
            writing = bool(flags & _WRITES) if isinstance(flags, int) else True
            opened[0] += writing
            if not inside(path, reading=not writing) or isdir(path) or opened[0] > MOST_FILES:
                raise PermissionError("the sandbox does not open this")
        elif event == "import":
            if args[0].partition(".")[0] in _MODULES:
                raise PermissionError("the sandbox does not import this")
        elif event == "object.__setattr__":
            if args[1] == "__code__":
                raise PermissionError("the sandbox does not change code")
        elif event.startswith(_REFUSED) and not (event == "os.kill" and args[0] == child):
            raise PermissionError("the sandbox does not do this")
        elif event in _TOUCHES:
            paths = args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
            if not all(inside(path, reading=False) for path in paths):
                raise PermissionError("the sandbox does not change this")
        elif event in _LOOKS and not inside(args[0], reading=True):
            raise PermissionError("the sandbox does not look there")

    return refuse


def _fork(job: Job, body: Callable[[], None], kept: tuple[int, ...], report: int) -> int:
    """A confined child that has no other open file than `kept` and nothing to say to the world; returns its id."""
    pid = os.fork()
    if pid:
        send(report, {"pid": pid})
        return pid
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in {0, 1, 2} - set(kept):
            os.dup2(null, fd)
        start = 3
        for fd in sorted(k for k in kept if k > 2):
            os.closerange(start, fd)
            start = fd + 1
        os.closerange(start, 1 << 16)
        confine(job)
        body()
        status = 0
    finally:
        os._exit(status)


# -- the code -------------------------------------------------------------------------------------------------------------


def _serve(job: Job, inbox: int, outbox: int) -> None:
    """Runs the code, tells its names, and then does what the tests ask of its objects."""
    scope: dict[str, Any] = {"__name__": "answer"}
    exec(compile(job["code"], "answer.py", "exec"), scope)
    shown = {name: value for name, value in scope.items() if not name.startswith("__")}
    objects = list(shown.values())
    names = [[n, v.__name__ if isinstance(v, ModuleType) else None] for n, v in shown.items()]
    send(outbox, names)
    while True:
        asked = receive(inbox)
        try:
            reply = _done(asked, objects)
        except BaseException as error:
            reply = {"error": [type(error).__name__, str(error)[:500]]}
        send(outbox, reply)


def _done(asked: dict[str, Any], objects: list[Any]) -> dict[str, Any]:
    target = objects[asked["on"]]
    given = [_opened(a, objects) for a in asked["args"]]
    named = {k: _opened(a, objects) for k, a in asked["named"].items()}
    found = _OPERATIONS[asked["do"]](target, *given, **named)
    # What a function did to the lists it was given is seen by the tests, as it would be without a wall between them.
    return {"value": _closed(found, objects), "args": [_closed(a, objects) for a in given]}


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *args, **named: target(*args, **named),
    "get": getattr,
    "set": setattr,
    "iter": iter,
    "next": next,
    "len": len,
    "text": str,
    "item": lambda target, key: target[key],
    "put": lambda target, key, value: target.__setitem__(key, value),
    "in": lambda target, key: key in target,
}


def _closed(value: Any, objects: list[Any]) -> Any:
    """A value of the code's as JSON: plain data as data (of subclasses, what they are made of), anything else as a handle."""
    if value is None or value is True or value is False:
        return value
    if type(value) is _Remote:
        return ["object", object.__getattribute__(value, "_index")]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["int", hex(int.__int__(value))]
    if isinstance(value, float):
        return ["float", float.__repr__(value)]
    if isinstance(value, complex):
        return ["complex", complex.__repr__(value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, dict):
        return ["dict", [[_closed(k, objects), _closed(v, objects)] for k, v in dict.items(value)]]
    for name, kind in _CONTAINERS.items():
        if isinstance(value, kind):
            return [name, [_closed(v, objects) for v in kind.__iter__(value)]]
    objects.append(value)
    return ["object", len(objects) - 1]


def _opened(value: Any, objects: list[Any] | None, wire: _Wire | None = None) -> Any:
    """A value from JSON; a handle is the object itself in the code's process, and a `_Remote` in the tests'."""
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "object":
        return objects[content] if objects is not None else _Remote(wire, content)
    if kind == "dict":
        return {_opened(k, objects, wire): _opened(v, objects, wire) for k, v in content}
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](_opened(v, objects, wire) for v in content)
    return _SCALARS[kind](content)


_CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_SCALARS: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "complex": complex,
    "bytes": bytes.fromhex,
}


# -- the tests ------------------------------------------------------------------------------------------------------------


class _Wire:
    """The tests' end of the two pipes to the code."""

    def __init__(self, inbox: int, outbox: int) -> None:
        self.inbox, self.outbox = inbox, outbox

    def ask(self, do: str, on: int, args: tuple[Any, ...] = (), named: dict[str, Any] | None = None) -> Any:
        """What an object of the code's says; lists, dicts and sets among the arguments become what the code made of them."""
        request = {"do": do, "on": on, "args": [_handed(a) for a in args]}
        send(self.outbox, request | {"named": {k: _handed(a) for k, a in (named or {}).items()}})
        reply = receive(self.inbox)
        if "error" in reply:
            name, text = reply["error"]
            kind: Any = getattr(builtins, str(name), None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                raise kind(str(text))
            raise RuntimeError(str(text))
        for given, after in zip(args, reply["args"], strict=True):
            _follow(given, _opened(after, None, self))
        return _opened(reply["value"], None, self)


def _handed(value: Any) -> Any:
    kept: list[Any] = []
    closed = _closed(value, kept)
    if kept:
        raise TypeError(f"a test handed over {type(kept[0]).__name__}, which is no plain value")
    return closed


def _follow(given: Any, after: Any) -> None:
    if type(given) is not type(after):
        return
    if isinstance(given, list):
        given[:] = after
    elif isinstance(given, (dict, set)):
        given.clear()
        given.update(after)


class _Remote:
    """An object of the code's, as the tests see it. It equals itself alone."""

    __slots__ = ("_index", "_wire")

    def __init__(self, wire: Any, index: int) -> None:
        object.__setattr__(self, "_wire", wire)
        object.__setattr__(self, "_index", index)

    def _ask(self, do: str, *args: Any, **named: Any) -> Any:
        return object.__getattribute__(self, "_wire").ask(do, object.__getattribute__(self, "_index"), args, named)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._ask("call", *args, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __iter__(self) -> Iterator[Any]:
        found = self._ask("iter")
        return found if isinstance(found, _Remote) else iter(found)

    def __next__(self) -> Any:
        return self._ask("next")

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return str(self._ask("text"))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("put", key, value)

    def __contains__(self, key: Any) -> bool:
        return self._ask("in", key) is True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Remote):
            return False
        return bool(object.__getattribute__(self, "_index") == object.__getattribute__(other, "_index"))

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_index"))


def _test(job: Job, report: int) -> None:
    asks, answers = os.pipe(), os.pipe()
    code = _fork(job, lambda: _serve(job, asks[0], answers[1]), (asks[0], answers[1]), report)
    os.close(asks[0])
    os.close(answers[1])
    secret = receive(0)
    try:
        programs = [compile(test, "tests", "exec") for test in secret["tests"]]
    except (SyntaxError, ValueError) as error:
        send(report, {"broken": str(error)})
        return
    confine(job, code)
    wire = _Wire(answers[0], asks[1])
    scope: dict[str, Any] = {"__name__": "tests"}
    for index, (name, module) in enumerate(receive(answers[0])):
        known = str(module or name)
        if known in sys.stdlib_module_names:
            scope[name] = __import__(known)  # the library's own, whatever the code calls by that name
        elif module is None and (name in OVERRIDABLE or not hasattr(builtins, name)):
            scope[name] = _Remote(wire, index)
    try:
        for program in programs:
            exec(program, dict(scope))
        send(report, {"nonce": secret["nonce"]})
    finally:
        os.kill(code, signal.SIGKILL)


# -- programs that read and print -------------------------------------------------------------------------------------------


def _printed(job: Job, text: str, report: int) -> str | None:
    """What the code prints as a program that reads `text`, or None if it ends with an error or prints too much."""
    out, into = os.pipe()
    source = os.open("stdin", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    data = memoryview(text.encode())
    while data:
        data = data[os.write(source, data) :]
    os.lseek(source, 0, os.SEEK_SET)

    def body() -> None:
        os.dup2(source, 0)
        os.dup2(into, 1)
        os.closerange(3, 1 << 16)
        try:
            exec(compile(job["code"], "answer.py", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        sys.stdout.flush()

    pid = _fork(job, body, (source, into), report)
    os.close(source)
    os.close(into)
    found = bytearray()
    while len(found) <= job["output"] and (part := os.read(out, 1 << 16)):
        found += part
    os.close(out)
    if len(found) > job["output"]:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return found.decode("utf-8", "replace") if status == 0 else None


def main() -> NoReturn:
    """Does one job; the exit status is 0 if it has been done, whatever came out."""
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    status = 1
    try:
        job = receive(0)
        if "inputs" in job:
            send(report, {"outputs": [_printed(job, text, report) for text in job["inputs"]]})
        else:
            _test(job, report)
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
