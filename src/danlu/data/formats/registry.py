"""All formats, in the order in which rows are tried against them: the more particular shape comes first."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final, cast

from danlu.data.formats import (
    alpaca,
    alpaca_eval,
    bilingual,
    chatllama,
    code_tests,
    coig,
    column_pairs,
    danlu,
    dolly,
    flattened_dialogue,
    gsm8k,
    hh_rlhf,
    knowledge,
    labelled,
    marked_text,
    moss,
    multiple_choice,
    oasst,
    openai_functions,
    plain_text,
    poetry,
    preference_messages,
    preference_text,
    prompt_completion,
    question_answer,
    redpajama,
    refused,
    role_lists,
    scored_answers,
    seed_tasks,
    sharegpt,
    sharegpt_tools,
    shp,
    verl,
)
from danlu.data.formats.base import Format, Row
from danlu.data.kinds import serves
from danlu.exceptions import DataError
from danlu.types import RecordKind

REFUSED: Final = refused.FORMATS
"""Shapes that are known and cannot be read as they are: their error says why and what to do."""

FORMATS: Final[tuple[Format, ...]] = (
    *REFUSED,
    # conversations with tools, in the shapes that say so
    moss.FORMAT,
    moss.PLAIN,
    moss.PROMPT,
    sharegpt_tools.FORMAT,
    openai_functions.FORMAT,
    # answers that are compared, ranked or labelled
    preference_messages.OBJECTS,
    preference_messages.INSTRUCTION,
    preference_messages.QUESTION,
    preference_messages.MESSAGES,
    labelled.CONVERSATION,
    labelled.INSTRUCTION,
    labelled.TEXT,
    scored_answers.GPT4,
    scored_answers.ULTRAFEEDBACK,
    scored_answers.NECTAR,
    scored_answers.OUTPUTS,
    alpaca_eval.FORMAT,
    shp.FORMAT,
    oasst.FORMAT,
    chatllama.REWARD,
    # tasks whose answers can be checked
    verl.FORMAT,
    gsm8k.PROMPT,
    gsm8k.SOLUTION,
    multiple_choice.FORMAT,
    code_tests.HUMANEVAL,
    code_tests.MBPP,
    # danlu's own
    danlu.MESSAGES,
    danlu.COMPARISON,
    danlu.SCORED,
    danlu.UNPAIRED,
    prompt_completion.FORMAT,
    danlu.PROMPT,
    # questions and answers
    preference_text.FORMAT,
    hh_rlhf.FORMAT,
    role_lists.FORMAT,
    role_lists.ROUNDS,
    sharegpt.FORMAT,
    chatllama.ACTOR,
    chatllama.RLHF,
    flattened_dialogue.FORMAT,
    seed_tasks.FORMAT,
    dolly.FORMAT,
    coig.TRANSLATED,
    coig.EXAM,
    coig.ROUNDS,
    bilingual.CHINESE,
    bilingual.ENGLISH,
    alpaca.PROMPT,
    alpaca.FORMAT,
    question_answer.PROMPT,
    question_answer.FORMAT,
    column_pairs.ADGEN,
    column_pairs.CONTEXT,
    column_pairs.FIREFLY,
    column_pairs.QUERY,
    column_pairs.OPENORCA,
    column_pairs.QUESTIONS,
    # texts
    marked_text.INSTRUCTION,
    marked_text.GUANACO,
    knowledge.HUATUO,
    knowledge.CHATDOCTOR,
    poetry.FORMAT,
    redpajama.FORMAT,
    danlu.DOCUMENT,
    plain_text.FORMAT,
)


def detect(row: Row, kind: RecordKind | None = None) -> Format | None:
    """The first format that knows the row and can serve `kind` (if given), else the first that knows it, else None."""
    first: Format | None = None
    for entry in _candidates(tuple(row)):
        if entry.matches(row):
            if kind is None or serves(entry.holds, kind):
                return entry
            first = first or entry
    return first


@lru_cache(maxsize=256)
def _candidates(keys: tuple[str, ...]) -> tuple[Format, ...]:
    """The formats that a row with these keys can have.

    A format that says no without a look at a value says no to every row with these keys; most do, so that a large file is
    tried against few formats. The values here are never seen by a format that is left out.
    """
    found = []
    for entry in FORMATS:
        row = _Watched(dict.fromkeys(keys))
        try:
            matches = entry.matches(cast(Row, row))
        except (TypeError, AttributeError, ValueError):
            matches = True  # it looked at a value that is not there
        if matches or row.value_seen:
            found.append(entry)
    return tuple(found)


class _Watched(Mapping[str, Any]):
    """A row that knows whether one of its values was looked at. No dict: those can be read past their methods."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self.value_seen = False

    def __getitem__(self, key: str) -> Any:
        value = self._row[key]
        self.value_seen = True
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def by_name(name: str) -> Format:
    """The format of that name; `DataError` with the nearest name if there is none."""
    names = [entry.name for entry in FORMATS]
    if name in names:
        return FORMATS[names.index(name)]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    raise DataError(f"there is no format '{name}'", hint=f"{hint}Formats: {', '.join(names)}.")
