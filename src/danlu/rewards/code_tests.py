"""Code answers: whether the code in an answer passes its prompt's tests, each in a sandbox (`sandbox.py`).

A reference's `tests` is a list of Python programs that run without an error if the code is right, or, as verl has it,
`{"inputs": [...], "outputs": [...]}`: what the code reads and prints as a program, or with `fn_name` the arguments of that
function and what it returns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from danlu.rewards import sandbox
from danlu.rewards.sandbox import Limits

_FENCE: Final = re.compile(r"```(?:python|py)[\w.]*[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def code_in(answer: str) -> str:
    """The last Python block of an answer (an open one runs to its end), or all of it."""
    found = _FENCE.findall(answer)
    return str(found[-1]) if found else answer


def fault(reference: Mapping[str, Any]) -> str | None:
    """Why the tests of a reference cannot be used, in a sentence, or None."""
    tests = reference["tests"]
    if isinstance(tests, Mapping):
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
            return "its tests have no lists of inputs and outputs"
        if len(inputs) != len(outputs):
            return f"its tests have {len(inputs)} inputs and {len(outputs)} outputs"
        if tests.get("fn_name"):
            if not str(tests["fn_name"]).isidentifier():
                return f"found the function name {tests['fn_name']!r}"
            wrong = [i for i in inputs if not isinstance(i, list)]
            return f"found the input {wrong[0]!r}, expected a list of arguments" if wrong else None
        return (
            None if all(isinstance(t, str) for t in [*inputs, *outputs]) else "its inputs and outputs are not all text"
        )
    if not isinstance(tests, list) or not tests:
        return "its tests are no list of programs"
    wrong = [t for t in tests if not isinstance(t, str)]
    return f"found the test {wrong[0]!r}, expected text" if wrong else None


def passes(answer: str, reference: Mapping[str, Any], limits: Limits | None = None) -> bool:
    """Whether an answer's code passes all tests within the limits.

    Args:
        reference: one without a `fault`.

    Raises:
        Unscored: this machine cannot run the sandbox, or a test is no Python.
    """
    code, tests, limits = code_in(answer), reference["tests"], limits or Limits()
    if isinstance(tests, list):
        return sandbox.passes(code, tests, limits)
    if tests.get("fn_name"):
        calls = zip(tests["inputs"], tests["outputs"], strict=True)
        name = str(tests["fn_name"])
        return sandbox.passes(code, [f"assert {name}(*{given!r}) == {wanted!r}" for given, wanted in calls], limits)
    printed = sandbox.outputs(code, tests["inputs"], limits)
    return all(
        found is not None and _lines(found) == _lines(wanted)
        for found, wanted in zip(printed, tests["outputs"], strict=True)
    )


def _lines(text: str) -> list[str]:
    """Without white space at the ends of lines and of the text."""
    return [line.rstrip() for line in text.strip().splitlines()]
