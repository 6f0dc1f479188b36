"""Programming tasks with unit tests: HumanEval and MBPP."""

from __future__ import annotations

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import filled_list, text, wrong_type
from danlu.data.formats.turns import published_question, user
from danlu.types import Origin, Prompt, Record


def _parse_humaneval(row: Row, origin: Origin) -> list[Record]:
    name, test = text(row, "entry_point", origin), text(row, "test", origin)
    question = published_question([user(text(row, "prompt", origin))])
    return [Prompt(question, {"verifier": "tests", "tests": [f"{test}\n\ncheck({name})\n"]}, origin)]


def _parse_mbpp(row: Row, origin: Origin) -> list[Record]:
    task = text(row, "text" if "text" in row else "prompt", origin)
    tests = filled_list(row, "test_list", origin)
    for i, test in enumerate(tests):
        if not isinstance(test, str):
            raise wrong_type(test, "text", origin, f"test_list[{i}]")
    before = row.get("test_setup_code") or row.get("test_imports") or ""
    setup = "\n".join(map(str, before)) if isinstance(before, list) else str(before)
    reference = {"verifier": "tests", "tests": [f"{setup}\n{test}" if setup else test for test in tests]}
    # Without a test in sight nobody could know the function's name.
    question = published_question([user(f"{task}\n\n{tests[0]}")])
    return [Prompt(question, reference, origin)]


HUMANEVAL = Format(
    "humaneval",
    '{"prompt", "entry_point", "test"}',
    "prompt",
    lambda row: "prompt" in row and "entry_point" in row and "test" in row,
    _parse_humaneval,
    'HumanEval\'s functions to complete; the reference is `{"verifier": "tests", "tests": [...]}`.',
    {
        "task_id": "own/1",
        "prompt": 'def twice(n):\n    """Twice n."""\n',
        "entry_point": "twice",
        "canonical_solution": "    return 2 * n\n",
        "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    },
)
MBPP = Format(
    "mbpp",
    '{"text", "code", "test_list": [...]}',
    "prompt",
    lambda row: "test_list" in row and ("text" in row or "prompt" in row),
    _parse_mbpp,
    "MBPP's programming tasks; the first test stands below the task, since it names the function, and all are the reference.",
    {"text": "Write a function that doubles a number.", "code": "...", "test_list": ["assert twice(4) == 8"]},
)
