"""danlu's own formats (design.md, section 9), one shape per kind of record.

They are checked strictly: whatever is missing, empty or of the wrong type is an error with its place.
"""

from __future__ import annotations

from typing import Any, Final

from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import fault, filled_list, filled_text, finite, margin_of, present, wrong_type
from danlu.data.formats.turns import assistant, own_answer, own_prompt, tools_of, user
from danlu.types import Comparison, Conversation, Document, Message, Origin, Prompt, Ranking, Record, Unpaired

# Keys that give a prompt or a conversation another meaning (a bad answer, a verifier's task): such rows belong to
# other formats, and reading them here would lose that silently.
_NOT_IMITATED: Final = frozenset({"label", "kto_tag", "chosen", "rejected"})
_NOT_JUST_A_PROMPT: Final = frozenset({"responses", "response", "completion", "reward_model", *_NOT_IMITATED})


def _is_messages(row: Row) -> bool:
    return "messages" in row and _NOT_IMITATED.isdisjoint(row)


def _parse_messages(row: Row, origin: Origin) -> list[Record]:
    return [Conversation(own_answer(row, "messages", origin), origin, tools_of(row, origin))]


def _is_comparison(row: Row) -> bool:
    # Text prompts are `preference_text`; anything else here is ours, if only to say what is wrong with it.
    return "prompt" in row and not isinstance(row["prompt"], str) and ("chosen" in row or "rejected" in row)


def _no_tools(row: Row, origin: Origin) -> None:
    if row.get("tools"):
        raise fault("only conversations can have tools", origin, "tools", "Remove them, or give a conversation.")


def _parse_comparison(row: Row, origin: Origin) -> list[Record]:
    _no_tools(row, origin)
    prompt = own_prompt(row, "prompt", origin)
    chosen, rejected = own_answer(row, "chosen", origin), own_answer(row, "rejected", origin)
    return [Comparison(prompt, chosen, rejected, margin_of(row, origin), origin)]


def _is_scored(row: Row) -> bool:
    return "prompt" in row and "responses" in row


def _parse_scored(row: Row, origin: Origin) -> list[Record]:
    _no_tools(row, origin)
    if isinstance(row.get("prompt"), str):
        prompt = [user(filled_text(row, "prompt", origin))]
    else:
        prompt = own_prompt(row, "prompt", origin)
    items = filled_list(row, "responses", origin)
    responses = [_response(item, f"responses[{i}]", origin) for i, item in enumerate(items)]
    field = "ranks" if "ranks" in row and "scores" not in row else "scores"
    numbers = [finite(s, origin, f"{field}[{i}]") for i, s in enumerate(filled_list(row, field, origin))]
    if len(numbers) != len(responses):
        raise fault(f"found {len(numbers)} {field} for {len(responses)} responses", origin, field)
    return [Ranking(prompt, responses, [-n for n in numbers] if field == "ranks" else numbers, origin)]


def _response(item: Any, field: str, origin: Origin) -> list[Message]:
    if isinstance(item, str):
        return [assistant(filled_text({field: item}, field, origin))]
    if not isinstance(item, list):
        raise wrong_type(item, "text or a list of messages", origin, field)
    return own_answer({field: item}, field, origin)


def _is_unpaired(row: Row) -> bool:
    return "label" in row and "completion" in row and isinstance(row.get("prompt"), list)


def _parse_unpaired(row: Row, origin: Origin) -> list[Record]:
    _no_tools(row, origin)
    label = present(row, "label", origin)
    if not isinstance(label, bool):
        raise wrong_type(label, "true or false", origin, "label")
    return [Unpaired(own_prompt(row, "prompt", origin), own_answer(row, "completion", origin), label, origin)]


def _is_prompt(row: Row) -> bool:
    # An object under this key is the root of a tree (OpenAssistant), no message list that went wrong.
    return "prompt" in row and not isinstance(row["prompt"], (str, dict)) and _NOT_JUST_A_PROMPT.isdisjoint(row)


def _parse_prompt(row: Row, origin: Origin) -> list[Record]:
    _no_tools(row, origin)
    reference = {} if row.get("reference") is None else row["reference"]
    if not isinstance(reference, dict):
        raise wrong_type(reference, "an object", origin, "reference")
    return [Prompt(own_prompt(row, "prompt", origin), reference, origin)]


def _parse_document(row: Row, origin: Origin) -> list[Record]:
    return [Document(filled_text(row, "text", origin), origin)]


_QUESTION: Final[Message] = user("How many legs has a spider?")

MESSAGES = Format(
    "messages",
    '{"messages": [...]}',
    "conversation",
    _is_messages,
    _parse_messages,
    "danlu's own conversations, which are OpenAI's messages: `role`, `content`, for the assistant `tool_calls`, "
    "`reasoning_content` and `train: false`, for tools `tool_call_id` and `name`; the row may have `tools`.",
    {"messages": [_QUESTION, assistant("Eight.")]},
)
COMPARISON = Format(
    "comparison",
    '{"prompt": [...], "chosen": [...], "rejected": [...]}',
    "comparison",
    _is_comparison,
    _parse_comparison,
    "danlu's own comparisons: three lists of messages, and a `margin` if one is known. TRL's conversational preferences "
    "are the same.",
    {"prompt": [_QUESTION], "chosen": [assistant("Eight.")], "rejected": [assistant("Six.")]},
)
SCORED = Format(
    "scored",
    '{"prompt": [...], "responses": [...], "scores": [...]}',
    "ranking",
    _is_scored,
    _parse_scored,
    "Several answers to one prompt, as text or messages, with `scores` (higher is better) or `ranks` (1 is best).",
    {"prompt": "How many legs has a spider?", "responses": ["Eight.", "Six."], "scores": [4.5, 0]},
)
UNPAIRED = Format(
    "unpaired",
    '{"prompt": [...], "completion": [...], "label": true}',
    "unpaired",
    _is_unpaired,
    _parse_unpaired,
    "danlu's own labelled answers: one answer to a prompt, and whether somebody liked it.",
    {"prompt": [_QUESTION], "completion": [assistant("Six.")], "label": False},
)
PROMPT = Format(
    "prompt",
    '{"prompt": [...]}',
    "prompt",
    _is_prompt,
    _parse_prompt,
    "danlu's own prompts: messages that wait for an answer, and in `reference` what a verifier needs to judge one.",
    {"prompt": [user("What is 2 + 3?")], "reference": {"answer": "5"}},
)
DOCUMENT = Format(
    "document",
    '{"text": "..."}',
    "document",
    lambda row: "text" in row,
    _parse_document,
    "Text for pre-training, one document a row; other keys, such as RedPajama's `meta`, are left out.",
    {"text": "Once upon a time there was a fox."},
)
