"""danlu's own formats (design.md, section 9), one shape per kind of record and one for scored answers.

They are checked strictly: whatever is missing, empty or of the wrong type is an error with its place.
"""

from __future__ import annotations

from typing import Any, Final

from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.fields import fault, filled_list, filled_text, finite, wrong_type
from danlu.data.formats.turns import (
    assistant,
    comparison_records,
    conversation_records,
    own_answer,
    own_prompt,
    user,
)
from danlu.types import Document, Message, Origin, Prompt, Record, RecordKind

# Keys that give a prompt or a conversation another meaning (a bad answer, a verifier's task, tools that must be
# shown to the model): such rows belong to other formats, and reading them here would lose that silently.
_NOT_IMITATED: Final = frozenset({"label", "kto_tag", "chosen", "rejected"})
_NOT_JUST_A_PROMPT: Final = frozenset({"responses", "response", "completion", "reward_model", *_NOT_IMITATED})


def _is_messages(row: Row) -> bool:
    return "messages" in row and not row.get("tools") and _NOT_IMITATED.isdisjoint(row)


def _parse_messages(row: Row, kind: RecordKind, origin: Origin) -> list[Record]:
    return conversation_records(own_answer(row, "messages", origin), kind, origin)


def _is_comparison(row: Row) -> bool:
    # Text prompts are `preference_text`; anything else here is ours, if only to say what is wrong with it.
    return "prompt" in row and not isinstance(row["prompt"], str) and ("chosen" in row or "rejected" in row)


def _parse_comparison(row: Row, kind: RecordKind, origin: Origin) -> list[Record]:
    prompt = own_prompt(row, "prompt", origin)
    chosen, rejected = own_answer(row, "chosen", origin), own_answer(row, "rejected", origin)
    margin = 0.0 if row.get("margin") is None else finite(row["margin"], origin, "margin")
    if margin < 0:
        raise fault(f"found {margin:g}, expected at least 0", origin, "margin")
    return comparison_records(prompt, chosen, rejected, kind, origin, margin)


def _is_scored(row: Row) -> bool:
    return "prompt" in row and "responses" in row and "ranks" not in row


def _parse_scored(row: Row, kind: RecordKind, origin: Origin) -> list[Record]:
    """The best against the worst answer. The margin stays 0: what a score point is worth is not ours to guess."""
    if isinstance(row.get("prompt"), str):
        prompt = [user(filled_text(row, "prompt", origin))]
    else:
        prompt = own_prompt(row, "prompt", origin)
    items = filled_list(row, "responses", origin)
    responses = [_response(item, f"responses[{i}]", origin) for i, item in enumerate(items)]
    scores = [finite(s, origin, f"scores[{i}]") for i, s in enumerate(filled_list(row, "scores", origin))]
    if len(scores) != len(responses):
        raise fault(f"found {len(scores)} scores for {len(responses)} responses", origin, "scores")
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if kind == "comparison" and scores[best] == scores[worst]:
        raise RowDropped("all scores equal")
    return comparison_records(prompt, responses[best], responses[worst], kind, origin)


def _response(item: Any, field: str, origin: Origin) -> list[Message]:
    if isinstance(item, str):
        return [assistant(filled_text({field: item}, field, origin))]
    if not isinstance(item, list):
        raise wrong_type(item, "text or a list of messages", origin, field)
    return own_answer({field: item}, field, origin)


def _is_prompt(row: Row) -> bool:
    # An object under this key is the root of a tree (OpenAssistant), no message list that went wrong.
    return "prompt" in row and not isinstance(row["prompt"], (str, dict)) and _NOT_JUST_A_PROMPT.isdisjoint(row)


def _parse_prompt(row: Row, kind: RecordKind, origin: Origin) -> list[Record]:
    reference = {} if row.get("reference") is None else row["reference"]
    if not isinstance(reference, dict):
        raise wrong_type(reference, "an object", origin, "reference")
    return [Prompt(own_prompt(row, "prompt", origin), reference, origin)]


def _parse_document(row: Row, kind: RecordKind, origin: Origin) -> list[Record]:
    return [Document(filled_text(row, "text", origin), origin)]


MESSAGES = Format("messages", '{"messages": [...]}', "conversation", _is_messages, _parse_messages)
COMPARISON = Format(
    "comparison",
    '{"prompt": [...], "chosen": [...], "rejected": [...]}',
    "comparison",
    _is_comparison,
    _parse_comparison,
)
SCORED = Format(
    "scored", '{"prompt": [...], "responses": [...], "scores": [...]}', "comparison", _is_scored, _parse_scored
)
PROMPT = Format("prompt", '{"prompt": [...]}', "prompt", _is_prompt, _parse_prompt)
DOCUMENT = Format("document", '{"text": "..."}', "document", lambda row: "text" in row, _parse_document)
