"""Anthropic HH-RLHF: two whole dialogues as text, "\\n\\nHuman: ...\\n\\nAssistant: ...", that share their beginning.

The prompt is the longest common beginning after which both dialogues go on with an assistant turn; what follows is the
answer, in a few rows of the set with further turns in it. Doubled roles are merged.
"""

from __future__ import annotations

import re
from typing import Final

from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.fields import fault, margin_of, text
from danlu.data.formats.turns import assistant, published_question, published_turns, user
from danlu.types import Comparison, Message, Origin, Record

SPEAKER: Final = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def split_turns(dialogue: str, speaker: re.Pattern[str]) -> list[Message]:
    """The turns of a dialogue, without the white space around them, from the first speaker on."""
    parts = speaker.split(dialogue)
    return [
        user(content.strip()) if who == "Human" else assistant(content.strip())
        for who, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _is_dialogue(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(("Human:", "Assistant:"))


def _matches(row: Row) -> bool:
    return "prompt" not in row and (_is_dialogue(row.get("chosen")) or _is_dialogue(row.get("rejected")))


def _turns(row: Row, field: str, origin: Origin) -> list[Message]:
    dialogue = text(row, field, origin)
    if not _is_dialogue(dialogue):
        raise fault(
            f"found text that starts with {dialogue[:20]!r}, expected a dialogue that starts with 'Human:'",
            origin,
            field,
        )
    turns = published_turns(split_turns(dialogue, SPEAKER))
    if turns[-1]["role"] != "assistant":
        raise RowDropped("does not end with an assistant turn")
    return turns


def _parse(row: Row, origin: Origin) -> list[Record]:
    chosen, rejected = _turns(row, "chosen", origin), _turns(row, "rejected", origin)
    shortest = min(len(chosen), len(rejected))
    common = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    # Turns alternate, so stepping back from a differing user turn reaches the assistant turn before it.
    cut = min(common, shortest - 1)
    while cut and not chosen[cut]["role"] == rejected[cut]["role"] == "assistant":
        cut -= 1
    if cut == 0:
        raise RowDropped("no common prompt")
    prompt = published_question(chosen[:cut])
    return [Comparison(prompt, chosen[cut:], rejected[cut:], margin_of(row, origin), origin)]


FORMAT = Format(
    "hh-rlhf",
    '{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "..."}',
    "comparison",
    _matches,
    _parse,
    "Anthropic's helpful and harmless comparisons: two whole dialogues as text. The prompt is their longest common beginning "
    "before an assistant turn. Equal pairs, empty answers and empty turns are dropped and counted.",
    {
        "chosen": "\n\nHuman: Is it raining?\n\nAssistant: I cannot see outside.",
        "rejected": "\n\nHuman: Is it raining?\n\nAssistant: Yes.",
    },
)
