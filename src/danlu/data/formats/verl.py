"""verl's rows for RL: a prompt and, in `reward_model`, the truth that a rule compares with."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any, Final

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import filled_text, present, wrong_type
from danlu.data.formats.turns import own_prompt, user
from danlu.types import Origin, Prompt, Record

_NUMBER: Final = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+")
_LETTER: Final = re.compile(r"[A-J]")


def _reference(truth: Any, model: Row, row: Row) -> dict[str, Any]:
    """What a verifier needs; which one it is follows from the truth, and is left open where that does not tell."""
    if isinstance(truth, str) and truth.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):
            truth = json.loads(truth)
    reference: dict[str, Any] = {}
    if isinstance(truth, dict) and {"inputs", "outputs"} <= truth.keys():
        reference = {"verifier": "tests", "tests": truth}
    elif isinstance(truth, (int, float)) and not isinstance(truth, bool):
        reference = {"verifier": "number", "answer": str(truth)}
    elif isinstance(truth, str) and _NUMBER.fullmatch(truth.strip()):
        reference = {"verifier": "number", "answer": truth.strip().replace(",", "")}
    elif isinstance(truth, str) and _LETTER.fullmatch(truth.strip()):
        reference = {"verifier": "choice", "answer": truth.strip()}
    elif truth not in (None, ""):
        reference = {"answer": truth}
    named = {"style": model.get("style"), "data_source": row.get("data_source"), "ability": row.get("ability")}
    return {**reference, **{key: value for key, value in named.items() if isinstance(value, str) and value}}


def _parse(row: Row, origin: Origin) -> list[Record]:
    if isinstance(row.get("prompt"), str):
        prompt = [user(filled_text(row, "prompt", origin))]
    else:
        prompt = own_prompt(row, "prompt", origin)
    model = present(row, "reward_model", origin)
    if not isinstance(model, dict):
        raise wrong_type(model, "an object with 'style' and 'ground_truth'", origin, "reward_model")
    return [Prompt(prompt, _reference(model.get("ground_truth"), model, row), origin)]


FORMAT = Format(
    "verl",
    '{"data_source", "prompt": [...], "ability", "reward_model": {"style", "ground_truth"}}',
    "prompt",
    lambda row: "prompt" in row and "reward_model" in row,
    _parse,
    "verl's parquet files. A ground truth that is a number, a single letter or a set of inputs and outputs gives the "
    "reference `verifier` number, choice or tests; any other is `answer` alone.",
    {
        "data_source": "own/sums",
        "prompt": [{"role": "user", "content": "What is 6 times 7?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "42"},
        "extra_info": {"index": 0},
    },
)
