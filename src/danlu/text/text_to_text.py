"""The chat seam of encoder-decoders (T5, BART, CPM-2): what was said is the source, the answer is the target.

Both are texts of their own, with what the tokenizer puts around a text: T5's `</s>` behind it, BART's `<s>` before it, too. The
source is rendered by a chat template, by default the turns as plain lines (`text2text`), which for one question is the question
itself, as these models were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from danlu.text.chat_template import Answer, ChatTemplate, Encoded
from danlu.text.tool_text import Tools
from danlu.types import Message

NAME = "text2text"


@dataclass(frozen=True, slots=True)
class Pair:
    """What an encoder-decoder reads and writes: both ids end as the tokenizer ends a text; the whole target is trained."""

    source_ids: list[int]
    target_ids: list[int]

    @property
    def tokens(self) -> int:
        """Of both sides."""
        return len(self.source_ids) + len(self.target_ids)


class TextToText(ChatTemplate):
    """See `ChatTemplate`; here an answer is encoded by itself, and `encode` puts it behind its source."""

    def __init__(self, tokenizer: Any, name: str | None = None) -> None:
        super().__init__(tokenizer, name or (None if tokenizer.chat_template else NAME))

    def encode_prompt(self, messages: Sequence[Message], *, tools: Tools = ()) -> list[int]:
        """Ids of the source."""
        text = self.render(messages, tools=tools, add_generation_prompt=True).rstrip("\n")
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def target_ids(self, text: str) -> list[int]:
        """Ids of an answer, ended by a stop token."""
        ids: list[int] = self.tokenizer(text_target=text)["input_ids"]
        stop = self.tokenizer.eos_token_id
        return ids if stop is None or (ids and ids[-1] in self.stop_ids) else [*ids, stop]

    def pairs(self, messages: Sequence[Message], *, tools: Tools = ()) -> list[Pair]:
        """One for each answer that is trained, with all that was said before it as its source."""
        answers = [n for n, m in enumerate(messages) if n and m["role"] == "assistant" and m.get("train", True)]
        return [
            Pair(self.encode_prompt(messages[:n], tools=tools), self.target_ids(messages[n]["content"]))
            for n in answers
        ]

    def encode(self, messages: Sequence[Message], *, tools: Tools = ()) -> Encoded:
        """Source and target of the last answer, one behind the other, loss on the target."""
        last = max((n for n, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
        source = self.encode_prompt(messages[:last], tools=tools)
        if last == len(messages):
            return Encoded(source, [0.0] * len(source), [])
        target = self.target_ids(messages[last]["content"])
        ids = [*source, *target]
        answer = Answer(len(source), len(ids), ids[-1] in self.stop_ids)
        return Encoded(ids, [0.0] * len(source) + [1.0] * len(target), [answer])

    def encode_many(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools] | None = None
    ) -> list[Encoded]:
        """`encode` of each."""
        offered = tools if tools is not None else [()] * len(conversations)
        return [self.encode(m, tools=t) for m, t in zip(conversations, offered, strict=True)]

    def decode(self, ids: Sequence[int], *, final: bool = True) -> str:
        """The text of an answer, finished or not, without special tokens and the space around it."""
        text: str = self.tokenizer.decode(self._before_stop(ids), skip_special_tokens=True)
        return text.strip()

    def decode_message(self, ids: Sequence[int]) -> Message:
        """The assistant message; these formats have no place for thoughts or calls."""
        return {"role": "assistant", "content": self.decode(ids)}


def seam_of(tokenizer: Any, name: str | None = None, *, encoder_decoder: bool) -> ChatTemplate:
    """The chat seam for a model of this kind."""
    return TextToText(tokenizer, name) if encoder_decoder else ChatTemplate(tokenizer, name)
