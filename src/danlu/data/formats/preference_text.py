"""Preference pairs as text: `{"prompt": str, "chosen": str, "rejected": str}`.

DeepSpeed-Chat writes the prompt as a dialogue, "Human: ... Assistant:". A prompt of exactly that form is split into
turns.
"""

from __future__ import annotations

import re
from typing import Final

from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.fields import margin_of, optional_text, text
from danlu.data.formats.hh_rlhf import SPEAKER, split_turns
from danlu.data.formats.turns import assistant, history_turns, published_question, published_turns, user
from danlu.types import Comparison, Message, Origin, Record

_DIALOGUE: Final = re.compile(r"\s*Human:")
# DeepSpeed-Chat separates turns like HH-RLHF, or by other white space where a set has single rounds only.
_LOOSE_SPEAKER: Final = re.compile(r"(?:\A|(?<=\s))(Human|Assistant):")


def _matches(row: Row) -> bool:
    return isinstance(row.get("prompt"), str) and ("chosen" in row or "rejected" in row)


def question_of(prompt: str) -> list[Message]:
    """The turns of a prompt; it is one user turn unless it is exactly a dialogue that waits for its answer."""
    ending = prompt.rstrip()
    if not (_DIALOGUE.match(prompt) and ending.endswith("Assistant:")):
        return [user(prompt)]
    *turns, cue = split_turns(prompt, SPEAKER if ending.endswith("\n\nAssistant:") else _LOOSE_SPEAKER)
    # The last "Assistant:" is the place of the answer, no turn of its own.
    if cue["role"] != "assistant":
        return [user(prompt)]
    if turns[-1]["role"] == "assistant":
        raise RowDropped("prompt ends with an assistant turn")
    return published_turns(turns)


def _parse(row: Row, origin: Origin) -> list[Record]:
    system = optional_text(row, "system", origin)
    head: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    prompt = published_question([*head, *history_turns(row, origin), *question_of(text(row, "prompt", origin))])
    chosen, rejected = text(row, "chosen", origin), text(row, "rejected", origin)
    return [Comparison(prompt, [assistant(chosen)], [assistant(rejected)], margin_of(row, origin), origin)]


FORMAT = Format(
    "preference-text",
    '{"prompt": "...", "chosen": "...", "rejected": "..."}',
    "comparison",
    _matches,
    _parse,
    "A question with a better and a worse answer as text, as TRL, OpenRLHF and DeepSpeed-Chat have it. A prompt of exactly the "
    "form `Human: ... Assistant:` (DeepSpeed-Chat) is split into turns; a `margin` is kept.",
    {"prompt": "Human: Is 7 prime? Assistant:", "chosen": " Yes.", "rejected": " No."},
)
