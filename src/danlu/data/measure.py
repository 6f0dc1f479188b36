"""Lengths of records in tokens, many at a time: what `danlu data check --model` counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from danlu.data.contents import dialogues
from danlu.text.chat_template import ChatTemplate
from danlu.types import Conversation, Document, Prompt, Record


class TokenLengths:
    """Lengths as training sees them: with the template's own tokens, and with the longest answer of each record.

    Args:
        template: the chat template with its tokenizer.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def __call__(self, records: Sequence[Record]) -> list[int]:
        """One length per record.

        Raises:
            TemplateError: the template refuses one of them.
        """
        rendered: list[str] = []
        owners: list[int] = []
        for place, record in enumerate(records):
            if isinstance(record, Document):
                rendered.append(record.text)
                owners.append(place)
                continue
            for turns in dialogues(record):
                rendered.append(self._render(record, turns))
                owners.append(place)
        lengths = [0] * len(records)
        for place, found in zip(owners, self._template.text_ids(rendered), strict=True):
            # A document gets a token before and one after it.
            extra = 2 if isinstance(records[place], Document) else 0
            lengths[place] = max(lengths[place], len(found) + extra)
        return lengths

    def _render(self, record: Record, turns: Sequence[Any]) -> str:
        tools = record.tools if isinstance(record, Conversation) else ()
        return self._template.render(turns, tools=tools, add_generation_prompt=isinstance(record, Prompt))
