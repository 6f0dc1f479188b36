"""Unpaired labels (KTO): one answer and whether somebody liked it, in TRL's, ShareGPT's and Alpaca's shapes."""

from __future__ import annotations

from danlu.data.formats.alpaca import question_of as alpaca_question
from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.cells import truth
from danlu.data.formats.fields import optional_text, text
from danlu.data.formats.role_lists import field_of, turns_of
from danlu.data.formats.turns import assistant, history_turns, published_question, published_turns, user
from danlu.types import Message, Origin, Record, Unpaired


def _is_labelled(row: Row) -> bool:
    # A label of another type is somebody's class name.
    return "kto_tag" in row or isinstance(row.get("label"), (bool, int, str))


def _label(row: Row, origin: Origin) -> bool:
    return truth(row, "kto_tag" if "kto_tag" in row else "label", origin)


def _answer_field(row: Row) -> str:
    return "response" if "response" in row and "completion" not in row else "completion"


def _is_text(row: Row) -> bool:
    return isinstance(row.get("prompt"), str) and _is_labelled(row) and ("completion" in row or "response" in row)


def _parse_text(row: Row, origin: Origin) -> list[Record]:
    system = optional_text(row, "system", origin)
    head: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    prompt = [*head, *history_turns(row, origin), user(text(row, "prompt", origin))]
    answer = assistant(text(row, _answer_field(row), origin))
    return [Unpaired(published_question(prompt), [answer], _label(row, origin), origin)]


def _is_conversation(row: Row) -> bool:
    return ("messages" in row or "conversations" in row) and _is_labelled(row)


def _parse_conversation(row: Row, origin: Origin) -> list[Record]:
    label = _label(row, origin)
    turns = published_turns(turns_of(row, field_of(row), origin))
    if turns[-1]["role"] != "assistant":
        raise RowDropped("does not end with an assistant turn")
    return [Unpaired(published_question(turns[:-1]), turns[-1:], label, origin)]


def _is_instruction(row: Row) -> bool:
    return "instruction" in row and "output" in row and ("kto_tag" in row or isinstance(row.get("label"), bool))


def _parse_instruction(row: Row, origin: Origin) -> list[Record]:
    prompt = published_question(alpaca_question(row, origin))
    return [Unpaired(prompt, [assistant(text(row, "output", origin))], _label(row, origin), origin)]


TEXT = Format(
    "unpaired-text",
    '{"prompt": "...", "completion": "...", "label": true}',
    "unpaired",
    _is_text,
    _parse_text,
    "TRL's unpaired preferences (KTO) as text.",
    {"prompt": "Is 9 prime?", "completion": "Yes.", "label": False},
)
CONVERSATION = Format(
    "unpaired-conversation",
    '{"messages" or "conversations": [...], "label" or "kto_tag": true}',
    "unpaired",
    _is_conversation,
    _parse_conversation,
    "LLaMA-Factory's unpaired preferences: a conversation whose last answer somebody liked or did not.",
    {
        "messages": [{"role": "user", "content": "Is 9 prime?"}, {"role": "assistant", "content": "No."}],
        "label": True,
    },
)
INSTRUCTION = Format(
    "unpaired-alpaca",
    '{"instruction", "input", "output", "kto_tag": true}',
    "unpaired",
    _is_instruction,
    _parse_instruction,
    "LLaMA-Factory's unpaired preferences in Alpaca's shape.",
    {"instruction": "Is it prime?", "input": "9", "output": "No.", "kto_tag": True},
)
