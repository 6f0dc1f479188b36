"""Alpaca in two languages in one row. Which one is meant only the user knows; `--as` says it."""

from __future__ import annotations

from danlu.data.formats import alpaca
from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import fault
from danlu.data.formats.renamed import parse_renamed
from danlu.types import Origin, Record


def _is_bilingual(row: Row) -> bool:
    return "zh_instruction" in row and "en_instruction" in row


def _refuse(row: Row, origin: Origin) -> list[Record]:
    raise fault(
        "found one task in Chinese and in English: which of them is meant?",
        origin,
        None,
        "Say --as alpaca-zh for the Chinese, --as alpaca-en for the English conversations.",
        code="ambiguous",
    )


def _in(language: str) -> Format:
    columns = {field: f"{language}_{field}" for field in ("instruction", "input", "output")}
    renamed = parse_renamed(alpaca.FORMAT, columns)

    def parse(row: Row, origin: Origin) -> list[Record]:
        # A folder may hold the plain files beside the bilingual ones.
        return renamed(row, origin) if columns["instruction"] in row else alpaca.FORMAT.parse(row, origin)

    name = {"zh": "Chinese", "en": "English"}[language]
    return Format(
        f"alpaca-{language}",
        f'{{"{language}_instruction", "{language}_input", "{language}_output"}}',
        "conversation",
        lambda row: columns["instruction"] in row and not _is_bilingual(row),
        parse,
        f"The {name} half of rows that hold a task in Chinese and in English, chosen with `--as alpaca-{language}`.",
        {columns["instruction"]: "1+1", columns["input"]: "", columns["output"]: "2"},
    )


AMBIGUOUS = Format(
    "alpaca-bilingual",
    '{"en_instruction", "en_input", "en_output", "zh_instruction", "zh_input", "zh_output"}',
    "conversation",
    _is_bilingual,
    _refuse,
    "Rows of alpaca-chinese-dataset with a task and its translation. Reading both would train everything twice, so danlu "
    "asks which is meant: `--as alpaca-zh` or `--as alpaca-en`.",
    {
        "en_instruction": "Add.",
        "en_input": "2, 3",
        "en_output": "5",
        "zh_instruction": "求和。",
        "zh_input": "2、3",
        "zh_output": "5",
    },
)
CHINESE = _in("zh")
ENGLISH = _in("en")
