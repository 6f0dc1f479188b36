"""Preference pairs as text: `{"prompt": str, "chosen": str, "rejected": str}`.

DeepSpeed-Chat writes the prompt as a dialogue, "Human: ... Assistant:". A prompt of exactly that form is split into
turns.
"""

from __future__ import annotations

import re
from typing import Final

from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.fields import text
from danlu.data.formats.hh_rlhf import SPEAKER, split_turns
from danlu.data.formats.turns import assistant, comparison_records, published_question, published_turns, user
from danlu.types import Message, Origin, Record, RecordKind

_DIALOGUE: Final = re.compile(r"\s*Human:")
# DeepSpeed-Chat separates turns like HH-RLHF, or by other white space where a set has single rounds only.
_LOOSE_SPEAKER: Final = re.compile(r"(?:\A|(?<=\s))(Human|Assistant):")


def _matches(row: Row) -> bool:
    return isinstance(row.get("prompt"), str) and ("chosen" in row or "rejected" in row)


def _question(prompt: str) -> list[Message]:
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


def _parse(row: Row, kind: RecordKind, origin: Origin) -> list[Record]:
    prompt = published_question(_question(text(row, "prompt", origin)))
    chosen, rejected = text(row, "chosen", origin), text(row, "rejected", origin)
    return comparison_records(prompt, [assistant(chosen)], [assistant(rejected)], kind, origin)


FORMAT = Format(
    "preference-text", '{"prompt": "...", "chosen": "...", "rejected": "..."}', "comparison", _matches, _parse
)
