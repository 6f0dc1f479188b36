"""THE chat seam: messages <-> token ids + loss weights, for any Jinja chat template.

The text is what the template renders, byte for byte. Training takes loss on every assistant turn and on its stop token, and
on nothing else. Where a turn's answer begins is found by rendering the prompt before it exactly as serving renders it, so
training and serving cannot differ. Text of users that looks like a control token is encoded as plain text.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from danlu.exceptions import TemplateError
from danlu.types import Message

SHIPPED = ("chatml", "plain")
# Stand-ins for contents that must not be parsed: private-use characters that no template looks at.
MARK_OPEN, MARK_CLOSE = "\ue000", "\ue001"


@dataclass(frozen=True, slots=True)
class Answer:
    """One assistant turn in `Encoded.ids`: half-open token range, and whether its last token is a stop token."""

    start: int
    end: int
    stops: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as the model sees it: equally long ids and loss weights, and where the answers are."""

    ids: list[int]
    loss_weights: list[float]
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class _Span:
    """A character range of the rendered text that is encoded on its own."""

    start: int
    end: int
    trained: bool = False
    answer: int = -1


def shipped_template(name: str) -> str:
    """The Jinja source of a template that danlu ships.

    Raises:
        TemplateError: no such name.
    """
    if name not in SHIPPED:
        raise TemplateError(f"no template is named '{name}'", hint=f"names: {', '.join(SHIPPED)}")
    return resources.files("danlu.text").joinpath(f"templates/{name}.jinja").read_text("utf-8")


class ChatTemplate:
    """A tokenizer together with its chat template.

    Args:
        tokenizer: a transformers tokenizer. Its own template wins; without one, `chatml` is used if the tokenizer knows the
            chatml tokens, `plain` ("Human: ... Assistant: ...") otherwise.
        name: a shipped template to use instead.
    """

    def __init__(self, tokenizer: Any, name: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        own = tokenizer.chat_template
        if name is None and own:
            self.source, self.name = (own if isinstance(own, str) else next(iter(own.values()))), "tokenizer"
        else:
            known = {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.get_vocab())
            self.name = name or ("chatml" if known else "plain")
            self.source = shipped_template(self.name)
            tokenizer.chat_template = self.source
        self._special = sorted(_special_tokens(tokenizer), key=len, reverse=True)
        self.stop_ids = self._find_stop_ids()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation; with `add_generation_prompt` up to where the assistant begins to speak.

        Raises:
            TemplateError: the template refuses these messages.
        """
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=add_generation_prompt, chat_template=self.source
            )
        except (
            Exception
        ) as error:  # Jinja templates raise whatever they like: all of it means "these messages do not fit"
            raise TemplateError(f"the chat template refuses these messages: {error}") from error
        return text

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a prompt, up to where the assistant begins to speak: the same ids that `encode` puts before the answer."""
        text = self.render(messages, add_generation_prompt=True)
        spans = self._answer_spans(messages, text)
        return self._encode_spans(messages, text, spans, generation=True).ids

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Ids, loss weights and answers of a whole conversation. The text after the last stop token is cut off.

        Raises:
            TemplateError: an answer cannot be told apart from its prompt in this template.
        """
        text = self.render(messages)
        spans = self._answer_spans(messages, text)
        if spans and messages[-1]["role"] == "assistant":
            text = text[: spans[-1].end]
        return self._encode_spans(messages, text, spans, generation=False)

    def encode_answer(self, prompt: Sequence[Message], answer: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of the answer (with its stop token) that follows it: the two nodes of a comparison."""
        encoded = self.encode([*prompt, *answer])
        ids = self.encode_prompt(prompt)
        if encoded.ids[: len(ids)] != ids:
            raise TemplateError("the prompt's ids are not a prefix of the conversation's ids in this template")
        return ids, encoded.ids[len(ids) :]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer: what stands before the first stop token, without other special tokens."""
        kept: list[int] = []
        for token in ids:
            if token in self.stop_ids:
                break
            kept.append(token)
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text

    def decode_message(self, ids: Sequence[int]) -> Message:
        """The assistant message that these sampled ids are."""
        return {"role": "assistant", "content": self.decode(ids)}

    # -- how answers are found ------------------------------------------------------------------------------------------

    def _answer_spans(self, messages: Sequence[Message], text: str) -> list[_Span]:
        spans: list[_Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True)
            if not text.startswith(prompt):
                raise TemplateError(
                    f"turn {index + 1}: the prompt as serving renders it does not begin the conversation as training renders it",
                    hint="choose a template with --template chatml, or fix the tokenizer's chat_template",
                )
            start = len(prompt)
            end = self._after_stop(text, self._content_end(messages, index, text, start))
            spans.append(_Span(start, end, message.get("train", True), len(spans)))
        return spans

    def _content_end(self, messages: Sequence[Message], index: int, text: str, start: int) -> int:
        """Where the content of an assistant turn ends in the rendered text.

        A stand-in is rendered in its place: searching for the content itself finds it too early when the template writes
        the same characters before it.
        """
        mark = f"{MARK_OPEN}{index}{MARK_CLOSE}"
        marked = [*messages[:index], {**messages[index], "content": mark}, *messages[index + 1 :]]
        at = self.render(marked).find(mark)  # type: ignore[arg-type]
        content = messages[index]["content"]
        for shown in (content, content.rstrip(), content.lstrip(), content.strip()):
            if at >= start and text.startswith(shown, at):
                return at + len(shown)
        at = text.find(content.strip(), start)  # the template looks into contents: the first place is all there is
        if at < 0:
            raise TemplateError(f"turn {index + 1}: the template does not render the answer's text")
        return at + len(content.strip())

    def _after_stop(self, text: str, end: int) -> int:
        """Where an answer ends: after the stop token that follows its content, if one does."""
        rest = text[end:].lstrip()
        gap = len(text) - end - len(rest)
        for token in self._special:
            if rest.startswith(token):
                return end + gap + len(token)
        return end

    def _encode_spans(self, messages: Sequence[Message], text: str, spans: list[_Span], *, generation: bool) -> Encoded:
        protected = self._protected(messages, text, generation=generation)
        ids: list[int] = []
        weights: list[float] = []
        answers: list[Answer] = []
        cursor = 0
        for span in [*spans, _Span(len(text), len(text))]:
            between = self._pieces(text, cursor, span.start, protected)
            ids += between
            weights += [0.0] * len(between)
            piece = self._pieces(text, span.start, span.end, protected)
            if piece:
                answers.append(Answer(len(ids), len(ids) + len(piece), piece[-1] in self.stop_ids))
            ids += piece
            weights += [float(span.trained)] * len(piece)
            cursor = span.end
        return Encoded(ids, weights, answers)

    def _pieces(self, text: str, start: int, end: int, protected: Sequence[tuple[int, int]]) -> list[int]:
        ids: list[int] = []
        cursor = start
        for low, high in protected:
            if start <= low < end:
                ids += self._ids(text[cursor:low], plain=False) + self._ids(text[low:high], plain=True)
                cursor = high
        return ids + self._ids(text[cursor:end], plain=False)

    def _ids(self, text: str, *, plain: bool) -> list[int]:
        if not text:
            return []
        # split_special_tokens is a switch on the shared tokenizer: two threads must not turn it at once.
        with self._lock:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        return ids

    def _protected(self, messages: Sequence[Message], text: str, *, generation: bool) -> list[tuple[int, int]]:
        """Character ranges of contents that hold the text of a control token."""
        risky = {i for i, m in enumerate(messages) if any(token in m["content"] for token in self._special)}
        if not risky:
            return []
        marked: list[Message] = [
            {"role": m["role"], "content": f"{MARK_OPEN}{i}{MARK_CLOSE}" if i in risky else m["content"]}
            for i, m in enumerate(messages)
        ]
        rendered = self.render(marked, add_generation_prompt=generation)
        for change in (str, str.strip, str.rstrip, str.lstrip):  # templates keep contents or trim them
            built, ranges = "", []
            rest = rendered
            for index in sorted(risky):
                mark = f"{MARK_OPEN}{index}{MARK_CLOSE}"
                if rest.count(mark) != 1:
                    raise TemplateError(
                        f"turn {index + 1} holds control tokens and the template does not render it exactly once"
                    )
                before, rest = rest.split(mark)
                shown = change(messages[index]["content"])
                ranges.append((len(built + before), len(built + before + shown)))
                built += before + shown
            if (built + rest).startswith(text):
                return ranges
        raise TemplateError(
            "a turn holds control tokens and the template changes its text", hint="remove them from the data"
        )

    def _find_stop_ids(self) -> frozenset[int]:
        """The stop token that the template puts after an answer, and the tokenizer's end-of-sequence token."""
        found = {self.tokenizer.eos_token_id} - {None}
        probe: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = self.render(probe)
        start = len(self.render(probe[:1], add_generation_prompt=True))
        at = text.find("b", start)
        end = self._after_stop(text, at + 1)
        if at >= 0 and end > at + 1:
            found.add(self.tokenizer.convert_tokens_to_ids(text[at + 1 : end].strip()))
        return frozenset(found)


def _special_tokens(tokenizer: Any) -> set[str]:
    added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    return {t for t in added | set(tokenizer.all_special_tokens) if t}
