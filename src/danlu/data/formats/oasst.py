"""OpenAssistant's message trees: every question in a tree, with its ranked replies."""

from __future__ import annotations

from typing import Any, Final

from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.cells import optional_number
from danlu.data.formats.fields import fault, present, text, wrong_type
from danlu.types import Message, Origin, Ranking, Record, Role

_ROLES: Final[dict[str, Role]] = {"prompter": "user", "assistant": "assistant", "user": "user"}


def _node(value: Any, field: str, origin: Origin) -> tuple[Message, list[Any]]:
    """A message of the tree, and the replies to it that were not taken out."""
    if not isinstance(value, dict):
        raise wrong_type(value, "an object with 'text', 'role' and 'replies'", origin, field)
    role = text(value, "role", origin, f"{field}.")
    if role not in _ROLES:
        raise fault(f"found '{role[:40]}', expected prompter or assistant", origin, f"{field}.role")
    replies = value.get("replies") or []
    if not isinstance(replies, list):
        raise wrong_type(replies, "a list of messages", origin, f"{field}.replies")
    return {"role": _ROLES[role], "content": text(value, "text", origin, f"{field}.")}, replies


def _is_removed(value: Any) -> bool:
    return isinstance(value, dict) and (value.get("deleted") is True or value.get("review_result") is False)


def _rankings(prompt: list[Message], replies: list[tuple[Message, float | None]], origin: Origin) -> list[Record]:
    """The ranked replies together; if none is ranked, each for itself, since nobody said which is better."""
    ranked = [(message, rank) for message, rank in replies if rank is not None]
    if ranked:
        return [Ranking(prompt, [[message] for message, _ in ranked], [-rank - 1 for _, rank in ranked], origin)]
    return [Ranking(prompt, [[message]], [0.0], origin) for message, _ in replies]


def _parse(row: Row, origin: Origin) -> list[Record]:
    records: list[Record] = []
    # A stack rather than recursion: a tree may be deeper than Python's limit.
    waiting: list[tuple[Any, str, list[Message]]] = [(present(row, "prompt", origin), "prompt", [])]
    while waiting:
        value, field, before = waiting.pop()
        message, replies = _node(value, field, origin)
        if _is_removed(value) or not message["content"].strip():
            continue
        # Only the reply itself is learned: the path to it may run through replies that ranked low.
        seen: Message = {**message, "train": False} if message["role"] == "assistant" else message
        path = [*before, seen]
        below = [(reply, f"{field}.replies[{i}]") for i, reply in enumerate(replies)]
        if message["role"] == "user":
            answers = [
                (_node(reply, inside, origin)[0], optional_number(reply, "rank", origin, f"{inside}."))
                for reply, inside in below
                if not _is_removed(reply)
            ]
            answers = [(answer, rank) for answer, rank in answers if answer["role"] == "assistant"]
            records += _rankings(path, answers, origin)
        waiting += [(reply, inside, path) for reply, inside in reversed(below)]
    if not records:
        raise RowDropped("a tree without replies")
    return records


FORMAT = Format(
    "oasst-tree",
    '{"message_tree_id", "prompt": {"text", "role": "prompter", "replies": [{"text", "rank", ...}, ...]}}',
    "ranking",
    lambda row: isinstance(row.get("prompt"), dict) and "role" in row["prompt"],
    _parse,
    "OpenAssistant's message trees (one a row). Every question with replies is a ranking: rank 0 is best. Where nobody "
    "ranked, each reply stands alone, which is a conversation but no comparison. Deleted messages, those that failed "
    "review, and all below them are left out; answers on the way to a question are shown and not trained.",
    {
        "message_tree_id": "1",
        "tree_state": "ready_for_export",
        "prompt": {
            "text": "Is 7 prime?",
            "role": "prompter",
            "replies": [
                {"text": "No.", "role": "assistant", "rank": 1, "replies": []},
                {"text": "Yes.", "role": "assistant", "rank": 0, "replies": []},
            ],
        },
    },
)
