"""Preference pairs as message lists of published sets: with or without a prompt, mixed with text, or as objects.

Where both answers are whole conversations, the prompt is their longest common beginning before an assistant turn.
"""

from __future__ import annotations

from typing import Any, Final

from danlu.data.formats.alpaca import question_of as alpaca_question
from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.fields import filled_list, margin_of, optional_text, present, text, wrong_type
from danlu.data.formats.renamed import parse_renamed
from danlu.data.formats.role_lists import field_of, published_turn, turns_of
from danlu.data.formats.turns import assistant, published_question, published_turns, user
from danlu.types import Comparison, Message, Origin, Record

_QUESTION: Final = {"role": "user", "content": "Is 7 prime?"}


def _matches(row: Row) -> bool:
    if "conversations" in row or "instruction" in row:
        return False
    answers = [type(row[key]) for key in ("chosen", "rejected") if key in row]
    if list not in answers:
        # Two texts after a list of messages are no format of danlu's own either.
        return bool(answers) and isinstance(row.get("prompt"), list) and answers == [str, str]
    # Three lists are danlu's own comparison.
    return not isinstance(row.get("prompt"), list) or str in answers


def split_at_common(chosen: list[Message], rejected: list[Message]) -> int:
    """How many turns the two share before an assistant turn of each; 0 if there is no such place."""
    shortest = min(len(chosen), len(rejected))
    common = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    cut = min(common, shortest - 1)
    while cut > 0 and not chosen[cut]["role"] == rejected[cut]["role"] == "assistant":
        cut -= 1
    return cut


def _turns(row: Row, field: str, origin: Origin) -> list[Message]:
    value = present(row, field, origin)
    if isinstance(value, str):
        return [assistant(value)]
    turns = [published_turn(item, f"{field}[{i}]", origin) for i, item in enumerate(filled_list(row, field, origin))]
    if turns[-1]["role"] != "assistant":
        raise RowDropped("does not end with an assistant turn")
    return turns


def _prompt(row: Row, origin: Origin) -> list[Message]:
    value = row.get("prompt")
    if isinstance(value, list):
        return [published_turn(item, f"prompt[{i}]", origin) for i, item in enumerate(value)]
    system, question = optional_text(row, "system", origin), optional_text(row, "prompt", origin)
    head: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    return [*head, *([user(question)] if question.strip() else [])]


def _parse(row: Row, origin: Origin) -> list[Record]:
    chosen, rejected = _turns(row, "chosen", origin), _turns(row, "rejected", origin)
    prompt = _prompt(row, origin)
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
        # Whole conversations, which repeat the prompt.
        chosen, rejected = published_turns(chosen), published_turns(rejected)
        cut = split_at_common(chosen, rejected)
        if cut == 0:
            raise RowDropped("no common prompt")
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    elif prompt and prompt[-1]["role"] == "assistant":
        raise RowDropped("prompt ends with an assistant turn")
    question = published_question(published_turns(prompt))
    return [Comparison(question, chosen, rejected, margin_of(row, origin), origin)]


def _object(row: Row, field: str, origin: Origin) -> list[Message]:
    value: Any = present(row, field, origin)
    if isinstance(value, str):
        return [assistant(value)]
    answer = published_turn(value, field, origin)
    if answer["role"] != "assistant":
        raise wrong_type(value, "an answer of the assistant", origin, field)
    return [answer]


def _parse_objects(row: Row, origin: Origin) -> list[Record]:
    prompt = published_turns(turns_of(row, field_of(row), origin))
    if prompt[-1]["role"] == "assistant":
        raise RowDropped("prompt ends with an assistant turn")
    answers = _object(row, "chosen", origin), _object(row, "rejected", origin)
    return [Comparison(published_question(prompt), *answers, margin_of(row, origin), origin)]


def _parse_instruction(row: Row, origin: Origin) -> list[Record]:
    prompt = published_question(alpaca_question(row, origin))
    chosen, rejected = text(row, "chosen", origin), text(row, "rejected", origin)
    return [Comparison(prompt, [assistant(chosen)], [assistant(rejected)], margin_of(row, origin), origin)]


def _has_pair(row: Row) -> bool:
    return "chosen" in row or "rejected" in row


MESSAGES = Format(
    "preference-messages",
    '{"chosen": [messages], "rejected": [messages]}, perhaps with "prompt"',
    "comparison",
    _matches,
    _parse,
    "TRL's and OpenRLHF's conversational preferences without a prompt (then both are whole conversations), with a prompt as "
    "text (UltraFeedback's binarised form), or with messages for the prompt and text for the answers.",
    {
        "chosen": [_QUESTION, {"role": "assistant", "content": "Yes."}],
        "rejected": [_QUESTION, {"role": "assistant", "content": "No."}],
    },
)
QUESTION = Format(
    "preference-question",
    '{"system", "question", "chosen", "rejected"}',
    "comparison",
    lambda row: "question" in row and _has_pair(row) and "prompt" not in row,
    parse_renamed(
        MESSAGES, {**{name: name for name in ("system", "chosen", "rejected", "margin")}, "prompt": "question"}
    ),
    "Preferences with the question under that name and a system text, as the Orca pairs have them.",
    {"system": "Be brief.", "question": "Is 7 prime?", "chosen": "Yes.", "rejected": "No."},
)
OBJECTS = Format(
    "sharegpt-preference",
    '{"conversations": [...], "chosen": {"from", "value"}, "rejected": {...}}',
    "comparison",
    lambda row: ("conversations" in row or "messages" in row) and _has_pair(row) and "prompt" not in row,
    _parse_objects,
    "LLaMA-Factory's preferences in ShareGPT's shape: a conversation that ends with the user, and two answers to it.",
    {
        "conversations": [{"from": "human", "value": "Is 7 prime?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    },
)
INSTRUCTION = Format(
    "alpaca-preference",
    '{"instruction", "input", "chosen", "rejected"}',
    "comparison",
    lambda row: "instruction" in row and _has_pair(row),
    _parse_instruction,
    "LLaMA-Factory's preferences in Alpaca's shape, with `system` and `history` if the row has them.",
    {"instruction": "Is it prime?", "input": "7", "chosen": "Yes.", "rejected": "No."},
)
