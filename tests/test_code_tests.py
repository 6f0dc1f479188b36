"""Code that nobody has read: what passes, what does not, and what hostile answers cannot do."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from danlu.data.formats.registry import detect
from danlu.rewards import sandbox
from danlu.rewards.code_tests import code_in, fault, passes
from danlu.rewards.protocol import Episode, Unscored
from danlu.rewards.sandbox import Limits, Walls
from danlu.rewards.verifiers import Verifier
from danlu.types import Origin, Prompt

TIGHT = Limits(seconds=5.0, memory_mb=256)
DOUBLE = "def double(n):\n    return 2 * n\n"
TESTS = {"tests": ["assert double(4) == 8", "assert double(-1) == -2"]}


def arrangements() -> list[Walls]:
    """The strongest this machine permits, and the weakest: both must hold."""
    return [sandbox.walls(), Walls((), None, "the audit hook and limits alone")]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```py\nx = 1\n```\nbetter:\n```Python\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1", "x = 1"),
        ("```\nx = 1\n```", "```\nx = 1\n```"),
    ],
)
def test_where_the_code_is(answer: str, code: str) -> None:
    assert code_in(answer) == code


@pytest.mark.parametrize(
    ("code", "tests", "right"),
    [
        (DOUBLE, ["assert double(4) == 8"], True),
        (DOUBLE, ["assert double(4) == 9"], False),
        (DOUBLE, ["assert double(4) == 8", "assert double(4) == 9"], False),
        ("def double(n) return", ["assert double(4) == 8"], False),
        ("1 / 0", ["pass"], False),
        ("", ["assert double(4) == 8"], False),
        # Plain values of every kind go and come.
        ("def f(x):\n    return x", ["assert f({1: (2, [3.5, None], {4})}) == {1: (2, [3.5, None], {4})}"], True),
        (
            "def f(x):\n    return x",
            ["assert f(10 ** 5000) == 10 ** 5000", "assert f(b'a') == b'a' and f(1j) == 1j"],
            True,
        ),
        ("def f(x):\n    return (x,)", ["assert f(1) == [1]"], False),
        ("def f(x):\n    x.sort()", ["a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]"], True),
        ("def f(n):\n    yield from range(n)", ["assert list(f(3)) == [0, 1, 2]"], True),
        (
            "def f(n):\n    raise ValueError(n)",
            ["try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass"],
            True,
        ),
        (
            "from collections import Counter\ndef f(t):\n    return Counter(t)",
            ["assert f('aab') == {'a': 2, 'b': 1}"],
            True,
        ),
        ("class P:\n    def __init__(self, x):\n        self.x = x", ["p = P(3)\np.x += 1\nassert p.x == 4"], True),
        ("import math\ndef f(x):\n    return x", ["assert math.fabs(f(-1.0)) == 1"], True),
        ("def f(g):\n    return 1", ["assert f(lambda: 1) == 1"], False),  # a function cannot be handed over
        ("def sum(a, b):\n    return 6", ["assert sum(10, 15) == 6"], True),  # a task's function may be named like that
    ],
)
def test_what_passes(code: str, tests: list[str], right: bool) -> None:
    assert passes(code, {"tests": tests}, TIGHT) is right


HOSTILE = {
    "endless": "while True: pass",
    "asleep": "import time\ntime.sleep(60)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb by another door": "import _imp, importlib.machinery as m\n"
    "p = _imp.create_builtin(m.ModuleSpec('_posixsubprocess', None))\nimport os\nwhile True: os.fork()",
    "threads": "import threading\nfor _ in range(100000): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()",
    "memory": "x = [0] * 10 ** 10",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "ends well before the tests": "import os\nos._exit(0)",
    "says it is done": "import sys\nsys.exit(0)",
    "prints the pass": 'print(\'{"nonce": "passed"}\')\nimport os\nfor fd in range(3, 64):\n'
    "    try: os.write(fd, b'passed')\n    except OSError: pass\nos._exit(0)",
    "a network": "import socket\nsocket.create_connection(('1.1.1.1', 80), 3)",
    "another program": "import subprocess\nsubprocess.run(['true'], check=True)",
    "the shell": "import os\nassert os.system('true') == 0",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "kills its group": "import os\nos.killpg(0, 9)",
    "foreign functions": "import ctypes\nctypes.string_at(0)",
    "lifts its limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "equals everything": "class E:\n    def __eq__(self, o): return True\n    def __hash__(self): return 0\n"
    "def double(n): return E()",
    "an int that equals everything": "class E(int):\n    def __eq__(self, o): return True\n    def __hash__(self): return 0\n"
    "def double(n): return E(5)",
    "its own assert": "import builtins\nclass A(Exception):\n    pass\nbuiltins.AssertionError = A\ndef double(n): return 0",
    "modules": "import sys\nclass M:\n    def __getattr__(self, n): return lambda *a, **k: None\n"
    "for n in list(sys.modules): sys.modules[n] = M()\ndef double(n): return 0",
    "frames": "import sys\nf = sys._getframe()\nwhile f:\n    f.f_globals.clear()\n    f = f.f_back\ndef double(n): return 0",
    "garbage": "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'nonce' in o: print(o)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef double(n): return 0",
    "a flood of output": "import sys\nwhile True: sys.stdout.write('x' * 65536)",
    "a huge result": "def double(n): return 'x' * (1 << 26)",
    "recursion": "def double(n): return double(n)",
}


@pytest.mark.parametrize("weakest", [False, True], ids=["all walls", "last wall"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_score_nothing_and_leave_us_alive(name: str, weakest: bool) -> None:
    begun = time.monotonic()
    limits = Limits(seconds=2.0, memory_mb=256)
    code = f"{DOUBLE}\n{HOSTILE[name]}" if "def double" not in HOSTILE[name] else HOSTILE[name]
    assert not sandbox._passes(code, TESTS["tests"], limits, arrangements()[weakest])
    assert time.monotonic() - begun < 30
    assert passes(DOUBLE, TESTS, TIGHT), "and the next answer is judged as ever"


def test_it_is_the_limit_that_stops() -> None:
    """The same code, with more of what it lacked."""
    large = f"x = bytearray(300 << 20)\n{DOUBLE}"
    assert not passes(large, TESTS, Limits(seconds=10, memory_mb=256)) and passes(large, TESTS, Limits(10, 1024))
    late = f"import time\ntime.sleep(1)\n{DOUBLE}"
    assert not passes(late, TESTS, Limits(seconds=0.5)) and passes(late, TESTS, Limits(seconds=10))


@pytest.mark.parametrize("weakest", [False, True], ids=["all walls", "last wall"])
@pytest.mark.parametrize(
    "attack",
    [
        "open({path!r}, 'w').write('mine')",
        "import os\nos.close(os.open({path!r}, os.O_CREAT | os.O_WRONLY))",
        "import os\nos.symlink({folder!r}, 'there')\nopen('there/made', 'w').write('mine')",
        "import os\nos.remove({kept!r})",
        "import shutil\nshutil.rmtree({folder!r})",
        "import os\nos.rename({kept!r}, {path!r})",
        "import os\nos.truncate({kept!r}, 0)",
        "open({kept!r}).read()",
        "import os\nos.listdir({folder!r})",
        "import os\nos.chdir({folder!r})",
    ],
)
def test_files_of_others_are_out_of_reach(attack: str, weakest: bool, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("secret")
    tmp_path.chmod(0o777)
    code = DOUBLE + attack.format(path=str(tmp_path / "made"), kept=str(kept), folder=str(tmp_path))
    assert not sandbox._passes(code, TESTS["tests"], TIGHT, arrangements()[weakest])
    assert [p.name for p in tmp_path.iterdir()] == ["kept"] and kept.read_text() == "secret"


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_TEST_SECRET", "hush")
    told = "import os\ndef f():\n    return dict(os.environ)"
    assert passes(told, {"tests": ["assert 'DANLU_TEST_SECRET' not in f()", "assert len(f()) <= 2"]}, TIGHT)
    # Nor does another process's tell it.
    pid = os.getpid()
    for walls in arrangements():
        code = f"def f():\n    return open('/proc/{pid}/environ', 'rb').read()"
        assert not sandbox._passes(code, ["assert f()"], TIGHT, walls)


def test_nothing_is_left_behind() -> None:
    before = set(Path(sandbox.tempfile.gettempdir()).glob("danlu-code-*"))
    assert passes(DOUBLE + "open('a', 'w').write('x')\n", TESTS, TIGHT), "its own folder is its own"
    locked = DOUBLE + "import os\nos.mkdir('d')\nopen('d/a', 'w').close()\nos.chmod('d', 0)\n"
    assert passes(locked, TESTS, TIGHT)
    assert set(Path(sandbox.tempfile.gettempdir()).glob("danlu-code-*")) == before


def test_an_answer_that_runs_away_from_its_group_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a namespace nothing but its number is left of it when the time is over."""
    begun: list[int] = []
    frames = sandbox._frames

    def listen(data: bytes) -> list[dict[str, Any]]:
        found = frames(data)
        begun.extend(f["pid"] for f in found if "pid" in f)
        return found

    monkeypatch.setattr(sandbox, "_frames", listen)
    code = DOUBLE + "import os, time\nos.setsid()\ntime.sleep(3600)"
    assert not sandbox._passes(code, TESTS["tests"], Limits(seconds=1.0), arrangements()[1])
    assert begun
    limit = time.monotonic() + 10
    while _runs(begun[0]):
        assert time.monotonic() < limit
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")


def test_the_strongest_arrangement_is_used_and_said() -> None:
    said = sandbox.isolation()
    assert "limits on time, memory, files and processes" in said
    if os.geteuid() == 0:
        assert "another user" in said or not sandbox.shutil.which("setpriv"), said


def test_a_machine_without_a_sandbox_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Walls((sys.executable, "-c", "import sys; sys.exit('not permitted')"), None, "")
    with pytest.raises(Unscored, match="R-SANDBOX: the sandbox for code did not start: not permitted"):
        sandbox._passes(DOUBLE, TESTS["tests"], TIGHT, gone)
    monkeypatch.setattr(sandbox, "_arrangements", lambda: iter([gone]))
    sandbox.walls.cache_clear()
    try:
        with pytest.raises(Unscored, match="this machine cannot run code"):
            passes(DOUBLE, TESTS, TIGHT)
    finally:
        monkeypatch.undo()
        sandbox.walls.cache_clear()


# -- programs ------------------------------------------------------------------------------------------------------------

ADDER = "a, b = map(int, input().split())\nprint(a + b)"


@pytest.mark.parametrize(
    ("code", "inputs", "wanted", "right"),
    [
        (ADDER, ["1 2\n", "3 4"], ["3\n", "7"], True),
        (ADDER, ["1 2", "3 4"], ["3", "8"], False),
        (f"if __name__ == '__main__':\n    {ADDER.splitlines()[0]}\n    print(a + b)", ["1 2"], ["3"], True),
        ("import sys\nprint(len(sys.stdin.read()))", ["x" * 100_000], ["100000"], True),
        ("print('3  ')\nprint()", ["1 2"], ["3"], True),  # white space at the ends
        ("print('3')\nraise ValueError", ["1 2"], ["3"], False),
        ("print('3')\nimport sys\nsys.exit()", ["1 2"], ["3"], True),
        ("print('3')\nimport sys\nsys.exit(1)", ["1 2"], ["3"], False),
        ("import os\nos._exit(0)", ["1 2"], ["3"], False),
        ("while True: print('x' * 65536)", ["1 2"], ["3"], False),
        ("import time\ntime.sleep(60)", ["1 2"], ["3"], False),
        ("import os\nprint(open('/etc/passwd').read())", ["1 2"], ["3"], False),
    ],
)
def test_programs_that_read_and_print(code: str, inputs: list[str], wanted: list[str], right: bool) -> None:
    reference = {"tests": {"inputs": inputs, "outputs": wanted}}
    assert fault(reference) is None
    assert passes(code, reference, Limits(seconds=2.0, memory_mb=256)) is right


def test_functions_by_arguments_and_results() -> None:
    tests = {"fn_name": "f", "inputs": [[1, "a"], [2, "b"]], "outputs": ["a", "bb"]}
    assert passes("def f(n, t):\n    return n * t", {"tests": tests}, TIGHT)
    assert not passes("def f(n, t):\n    return t", {"tests": tests}, TIGHT)


# -- as a verifier ---------------------------------------------------------------------------------------------------------


def reference_of(row: dict[str, Any]) -> dict[str, Any]:
    entry = detect(row, "prompt")
    assert entry is not None
    (record,) = entry.parse(row, Origin("f", 1))
    assert isinstance(record, Prompt)
    return dict(record.reference)


def test_published_tasks() -> None:
    """HumanEval, MBPP and verl as their rows come."""
    human = {"prompt": "def twice(n):\n", "entry_point": "twice", "test": "def check(c):\n    assert c(4) == 8\n"}
    mbpp = {"text": "Double.", "code": "", "test_list": ["assert double(4) == 8"], "test_setup_code": ""}
    truth = {"ground_truth": '{"inputs": ["3"], "outputs": ["6"]}', "style": "rule"}
    verl = {"prompt": [{"role": "user", "content": "q"}], "reward_model": truth}
    right = ["def twice(n):\n    return 2 * n", DOUBLE, "print(2 * int(input()))"]
    references = [reference_of(row) for row in (human, mbpp, verl)]
    asked = [
        Episode((1,), (2,), True, (), f"Sure:\n```python\n{code}\n```", reference)
        for code in right
        for reference in references
    ]
    found = [s.value for s in Verifier(limits=TIGHT).score(asked)]
    assert found == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_a_test_that_is_no_python_is_the_reference_s_fault() -> None:
    asked = Episode((1,), (2,), True, (), DOUBLE, {"verifier": "tests", "tests": ["assert double("]})
    (found,) = Verifier(limits=TIGHT).score([asked])
    assert found.code == "R-VERIFIER" and "a test in the reference is no Python" in str(found.error)
