"""Rows of knowledge about diseases: HuaTuo's, keyed by 中心词, and ChatDoctor's csv. Each is one short document."""

from __future__ import annotations

import ast
from typing import Any, Final

from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.fields import wrong_type
from danlu.types import Document, Origin, Record

# How tables name a column that only numbers the rows.
_INDEX: Final = frozenset({"", "0", "Unnamed: 0", "idx", "index", "id"})


def _items(value: Any, origin: Origin, field: str) -> list[str]:
    """What a cell lists; csv cells write a list as Python does."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value.strip()]
    if value is None:
        return []
    if isinstance(value, list):
        return [str(item).strip() for item in value if str(item).strip()]
    if isinstance(value, (str, int, float)):
        return [str(value).strip()] if str(value).strip() else []
    raise wrong_type(value, "text or a list of texts", origin, field)


def _document(row: Row, origin: Origin, colon: str, comma: str) -> list[Record]:
    lines: list[str] = []
    for field, value in row.items():
        if field not in _INDEX and (items := _items(value, origin, field)):
            lines.append(f"{field}{colon}{comma.join(items)}")
    if len(lines) < 2:
        raise RowDropped("a name and nothing about it")
    return [Document("\n".join(lines), origin)]


HUATUO = Format(
    "huatuo-knowledge",
    '{"中心词": "...", "相关症状": [...], ...}',
    "document",
    lambda row: "中心词" in row,
    lambda row, origin: _document(row, origin, "：", "、"),
    "HuaTuo's medical knowledge, one subject (中心词) a row with lists of what belongs to it. A row becomes a short text of "
    "`name：item、item` lines, for pre-training or as the source of questions.",
    {"中心词": "感冒", "相关症状": ["咳嗽", "发热"], "所属科室": ["内科"]},
)
CHATDOCTOR = Format(
    "disease-table",
    "a table with the columns disease, Symptom, ...",
    "document",
    lambda row: "disease" in row and "Symptom" in row,
    lambda row, origin: _document(row, origin, ": ", ", "),
    "ChatDoctor's table of diseases. A row becomes a short text of `column: item, item` lines, for pre-training or as the "
    "source of questions.",
    {"idx": "0", "disease": "Common cold", "Symptom": "['Cough', 'Fever']", "commonMedications": "['Rest']"},
)
