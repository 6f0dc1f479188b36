"""Shapes that are well known and cannot be read as they are: what they are, and what to do instead."""

from __future__ import annotations

from typing import Final

from danlu.data.formats import bilingual, hh_rlhf
from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import fault
from danlu.types import Origin, Record, RecordKind

_QUESTIONS: Final = frozenset({"prompt", "instruction", "question", "conversations", "messages", "input", "query"})
_PLACES: Final = frozenset({"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"})
# Below this it may be a row of a table of numbers.
_VOCABULARY: Final = 1000


def _refused(name: str, shape: str, holds: RecordKind, found: str, hint: str, code: str, example: Row) -> Format:
    def parse(row: Row, origin: Origin) -> list[Record]:
        raise fault(f"found {found}", origin, None, hint, code=code)

    return Format(name, shape, holds, _MATCHES[name], parse, f"{found[:1].upper()}{found[1:]}. {hint}", example)


def _is_index(row: Row) -> bool:
    return bool(row) and all(isinstance(value, dict) and not _PLACES.isdisjoint(value) for value in row.values())


def _is_vocabulary(row: Row) -> bool:
    return len(row) > _VOCABULARY and all(type(value) is int for value in row.values())


def _is_pair_of_texts(row: Row) -> bool:
    return (
        isinstance(row.get("chosen"), str)
        and isinstance(row.get("rejected"), str)
        and _QUESTIONS.isdisjoint(row)
        and not hh_rlhf.FORMAT.matches(row)
    )


_MATCHES: Final = {
    "oasst-messages": lambda row: {"message_id", "parent_id", "text", "role"} <= row.keys(),
    "responses-ranking": lambda row: "responses" in row and "ranking" in row and "scores" not in row,
    "preference-bare": _is_pair_of_texts,
    "dataset-index": _is_index,
    "vocabulary": _is_vocabulary,
}

FORMATS: Final[tuple[Format, ...]] = (
    bilingual.AMBIGUOUS,
    _refused(
        "oasst-messages",
        '{"message_id", "parent_id", "text", "role"}',
        "ranking",
        "a single message of a tree (OpenAssistant's flat files)",
        "Use the set's files of whole trees, one tree a row.",
        "not-data",
        {"message_id": "b", "parent_id": "a", "text": "Yes.", "role": "assistant"},
    ),
    _refused(
        "responses-ranking",
        '{"prompt", "responses": [...], "ranking": [...]}',
        "ranking",
        "a `ranking`, which may hold the rank of each answer or the answers' numbers in order",
        "Write `ranks` (1 is best, one for each answer) or `scores` (higher is better) instead.",
        "ambiguous",
        {"prompt": "Is 7 prime?", "responses": ["No.", "Yes."], "ranking": [2, 1]},
    ),
    _refused(
        "preference-bare",
        '{"chosen": "...", "rejected": "..."}',
        "comparison",
        "two texts without a prompt that are no dialogues: where the question ends nobody can tell",
        "Add the question as `prompt` (format preference-text), or write both as `Human: ... Assistant: ...` (hh-rlhf).",
        "ambiguous",
        {"chosen": "Is 7 prime? Yes.", "rejected": "Is 7 prime? No."},
    ),
    _refused(
        "dataset-index",
        '{"NAME": {"file_name" or "hf_hub_url": "...", ...}, ...}',
        "conversation",
        "LLaMA-Factory's list of data sets (dataset_info.json), no data",
        "Read the sets that it lists with danlu data import.",
        "not-data",
        {"mine": {"file_name": "mine.json", "formatting": "sharegpt"}},
    ),
    _refused(
        "vocabulary",
        '{"TOKEN": ID, ...}',
        "document",
        "a tokenizer's vocabulary, no data",
        "Leave the file out of the data, or name the files that hold rows.",
        "not-data",
        {f"token {i}": i for i in range(_VOCABULARY + 1)},
    ),
)
