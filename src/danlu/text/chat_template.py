"""THE chat seam: messages <-> token ids + loss weights, for any Jinja chat template.

The text is what the template renders, byte for byte. Training takes loss on every assistant turn (its thoughts and calls of
tools, too) and on its stop token, and on nothing else. Where a turn's answer begins is found by rendering the prompt before it
exactly as serving renders it, so training and serving cannot differ. Text of users that looks like a control token is
encoded as plain text.

    template_registry   the templates that danlu ships          tool_text   what a template has no place for, as text
    rendering           a template and what it can do           layout      answers and contents in the rendered text
    pieces              ids of a text in pieces             calls       thoughts and calls, read back
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from danlu.exceptions import TemplateError
from danlu.text.calls import AnswerReader
from danlu.text.chatglm_text import settled
from danlu.text.layout import Layout, lay_out
from danlu.text.pieces import LONGEST_TOKEN, Piece, PieceEncoder
from danlu.text.rendering import Renderer, first_difference
from danlu.text.template_registry import fitting_template, named_template, shipped_template
from danlu.text.tool_text import Tools, thoughts_of
from danlu.types import Message

__all__ = ["Answer", "ChatTemplate", "Encoded", "shipped_template"]

# What two templates are compared on.
PROBE: tuple[Message, ...] = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "What is 2 + 2?"},
)


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


class ChatTemplate:
    """A tokenizer together with its chat template.

    Args:
        tokenizer: a transformers tokenizer. Its own template wins; without one, the shipped format whose tokens it knows is
            used, `plain` ("Human: ... Assistant: ...") if it knows none. The template is set on the tokenizer, so it is saved
            with it.
        name: a shipped template to use instead.

    Attributes:
        name: of the shipped template, or "tokenizer".
        source: the Jinja source.
        note: what people should know about the choice, or "".
        stop_ids: tokens that end an answer: the tokenizer's end of sequence, and what the template puts after an answer.
    """

    def __init__(self, tokenizer: Any, name: str | None = None) -> None:
        self.tokenizer = tokenizer
        own, own_with_tools = _own_templates(tokenizer)
        self.note = ""
        if name is None and own:
            self.name, self.source = "tokenizer", own
            self._renderer = Renderer(tokenizer, own, own_with_tools)
        else:
            self.name = name or fitting_template(tokenizer)
            entry = named_template(self.name)
            self.source = entry.source_for(tokenizer)
            self._renderer = Renderer(tokenizer, self.source)
            notes = [_difference(self, Renderer(tokenizer, own, own_with_tools))] if own else []
            if unknown := entry.unknown_tokens(tokenizer):
                notes.append(
                    f"the tokenizer does not know {', '.join(unknown)}, which the template '{self.name}' writes: they are "
                    "plain text to it"
                )
            self.note = "; ".join(note for note in notes if note)
            tokenizer.chat_template = self.source
        self.stop_ids = self._renderer.endings.stop_ids
        self._pieces = PieceEncoder(tokenizer, self.source)
        self._reader = AnswerReader(self._renderer)

    @property
    def trains_every_answer(self) -> bool:
        """Whether all answers of a conversation can be trained at once; otherwise only its last one, see `samples`."""
        return self._renderer.endings.every_answer

    def render(self, messages: Sequence[Message], *, tools: Tools = (), add_generation_prompt: bool = False) -> str:
        """The text of a conversation; with `add_generation_prompt` up to where the assistant begins to speak.

        Raises:
            TemplateError: the template refuses these messages.
        """
        shown, left = self._renderer.shown(messages, tools)
        return self._renderer.text([s.fields for s in shown], left, generation=add_generation_prompt)

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of rendered texts: fit to count them, not to train on them, since control tokens in contents are read as such."""
        return self._pieces.ids([Piece(text, "") for text in texts])

    def encode_prompt(self, messages: Sequence[Message], *, tools: Tools = ()) -> list[int]:
        """Ids of a prompt, up to where the assistant begins to speak: the same ids that `encode` puts before the answer."""
        return self._encode([self._lay_out(messages, tools, generation=True)])[0].ids

    def encode(self, messages: Sequence[Message], *, tools: Tools = ()) -> Encoded:
        """Ids, loss weights and answers of a whole conversation. The text after the last stop token is cut off.

        Where `trains_every_answer` is false, only a last turn of the assistant is an answer, and the others are context.

        Raises:
            TemplateError: an answer cannot be told apart from its prompt in this template.
        """
        return self.encode_many([messages], [tools])[0]

    def encode_many(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools] | None = None
    ) -> list[Encoded]:
        """`encode` for many conversations with one call of the tokenizer, which is several times as fast.

        Args:
            tools: what each conversation offers; None: nothing.
        """
        offered = tools if tools is not None else [()] * len(conversations)
        return self._encode(
            [self._lay_out(m, t, generation=False) for m, t in zip(conversations, offered, strict=True)]
        )

    def encode_answer(
        self, prompt: Sequence[Message], answer: Sequence[Message], *, tools: Tools = ()
    ) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of the answer (with its stop token) that follows it."""
        ids, (found,) = self.encode_branches([(prompt, [answer])], tools=tools)[0]
        return ids, found

    def encode_branches(
        self, rows: Sequence[tuple[Sequence[Message], Sequence[Sequence[Message]]]], *, tools: Tools = ()
    ) -> list[tuple[list[int], list[list[int]]]]:
        """Ids of prompts and of the answers (with their stop tokens) that follow each: the nodes of a comparison.

        Raises:
            TemplateError: a prompt does not begin its conversation in this template.
        """
        layouts = []
        for prompt, answers in rows:
            layouts.append(self._lay_out(prompt, tools, generation=True))
            layouts += [self._lay_out([*prompt, *answer], tools, generation=False) for answer in answers]
        encoded = iter(self._encode(layouts))
        found = []
        for _, answers in rows:
            ids = next(encoded).ids
            whole = [next(encoded).ids for _ in answers]
            if any(one[: len(ids)] != ids for one in whole):
                raise TemplateError("the prompt's ids are not a prefix of the conversation's ids in this template")
            found.append((ids, [one[len(ids) :] for one in whole]))
        return found

    def samples(self, messages: Sequence[Message]) -> list[list[Message]]:
        """The conversation cut into ones that `encode` can train without losing an answer or its thoughts.

        Mostly that is the conversation itself. Templates that show only the last answer as it was generated (ChatGLM's), or drop
        the thoughts of earlier ones (Qwen3's), get one conversation an answer, with what came before it as context.
        """
        answers = [n for n, m in enumerate(messages) if n and m["role"] == "assistant" and m.get("train", True)]
        if self.trains_every_answer and not any(self._forgets(messages[n]) for n in answers[:-1]):
            return [list(messages)]
        return [[*(_context(m) for m in messages[:n]), messages[n]] for n in answers] or [list(messages)]

    def decode(self, ids: Sequence[int], *, final: bool = True) -> str:
        """The text of an answer: what stands before the first stop token, without other special tokens.

        The space that the template puts around an answer is not part of it. A tokenizer may finish answers for showing
        (ChatGLM's `process_response`).

        Args:
            final: nothing follows; else what could still be finished otherwise is left out.
        """
        kept = self._before_stop(ids)
        text = self._bare(self._pieces.decode(kept), stopped=len(kept) < len(ids))
        finish = getattr(self.tokenizer, "process_response", None)
        if finish is None:
            return text
        shown: str = finish(text) if final else settled(text, finish)
        return shown

    def decode_message(self, ids: Sequence[int]) -> Message:
        """The assistant message that these sampled ids are, with its thoughts and calls of tools (see `calls`).

        A call that is not whole, or that something other than calls follows, stays text.
        """
        kept = self._before_stop(ids)
        marked = self._pieces.decode_marked(kept, self._reader.marks.of_id)
        thoughts, text, calls = self._reader.read(self._bare(marked, stopped=len(kept) < len(ids)))
        if not thoughts and not calls:
            text = self.decode(ids)
        message: Message = {"role": "assistant", "content": text}
        if thoughts:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = calls
        return message

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _before_stop(self, ids: Sequence[int]) -> list[int]:
        stop = next((n for n, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return list(ids[:stop])

    def _forgets(self, answer: Message) -> bool:
        """Whether the template drops thoughts of this answer once another turn follows."""
        can = self._renderer.can
        thoughts, text = thoughts_of(answer)
        tagged = text != answer["content"]
        return bool(thoughts) and ((can.thoughts and not can.kept_thoughts) or (tagged and not can.kept_tags))

    def _bare(self, text: str, *, stopped: bool) -> str:
        endings = self._renderer.endings
        if not stopped and endings.lead.startswith(text):
            return ""
        text = text.removeprefix(endings.lead)
        if stopped:
            return text.removesuffix(endings.tail)
        # More may follow: what could become the tail is held back.
        held = next((n for n in range(len(endings.tail), 0, -1) if text.endswith(endings.tail[:n])), 0)
        return text[: len(text) - held]

    def _lay_out(self, messages: Sequence[Message], tools: Tools, *, generation: bool) -> Layout:
        shown, left = self._renderer.shown(messages, tools)
        return lay_out(self._renderer, shown, left, self._pieces.risky, generation=generation)

    def _encode(self, layouts: Sequence[Layout]) -> list[Encoded]:
        spans = [_spans(layout) for layout in layouts]
        pieces = [piece for of_layout in spans for span in of_layout for piece in span]
        ids = iter(self._pieces.ids(pieces))
        return [
            self._assemble(layout, [[token for _ in span for token in next(ids)] for span in of_layout])
            for layout, of_layout in zip(layouts, spans, strict=True)
        ]

    def _assemble(self, layout: Layout, spans: Sequence[Sequence[int]]) -> Encoded:
        """Spans are what stands before an answer and the answer, by turns, and what follows the last one."""
        ids: list[int] = []
        weights: list[float] = []
        answers: list[Answer] = []
        for turn, before, answer in zip(layout.turns, spans[::2], spans[1::2], strict=False):
            ids += before
            start = len(ids)
            ids += answer
            if turn.open_end and self.tokenizer.eos_token_id is not None:
                ids.append(self.tokenizer.eos_token_id)
            weights += [0.0] * len(before) + [float(turn.trained)] * (len(ids) - start)
            if len(ids) > start:
                answers.append(Answer(start, len(ids), ids[-1] in self.stop_ids))
        ids += spans[-1]
        weights += [0.0] * len(spans[-1])
        return Encoded(ids, weights, answers)


def _spans(layout: Layout) -> list[list[Piece]]:
    """The pieces of the text: of what stands before an answer, of the answer, ..., of what follows the last one."""
    edges = [0, *(edge for turn in layout.turns for edge in (turn.start, turn.end)), len(layout.text)]
    return [list(_pieces(layout, start, end)) for start, end in pairwise(edges)]


def _pieces(layout: Layout, start: int, end: int) -> Iterator[Piece]:
    def piece(begin: int, stop: int, plain: bool = False, role: str = "") -> Piece:
        return Piece(layout.text[begin:stop], layout.text[max(0, begin - LONGEST_TOKEN) : begin], plain, role)

    cursor = start
    for plain in layout.plain:
        if start <= plain.start < end:
            yield piece(cursor, plain.start)
            yield piece(plain.start, plain.end, True, plain.role)
            cursor = plain.end
    yield piece(cursor, end)


def _context(message: Message) -> Message:
    return {**message, "train": False} if message["role"] == "assistant" else message


def _own_templates(tokenizer: Any) -> tuple[str, str | None]:
    """The template that a tokenizer brings, and the one for tools if it has several."""
    own = tokenizer.chat_template
    if not isinstance(own, dict):
        return own or "", None
    return own.get("default") or next(iter(own.values()), ""), own.get("tool_use")


def _difference(named: ChatTemplate, own: Renderer) -> str:
    """What to say if a template that was asked for differs from the tokenizer's own."""

    def text(renderer: Renderer) -> str:
        shown, _ = renderer.shown(PROBE, ())
        return renderer.attempt(*(s.fields for s in shown), generation=True)

    mine, theirs = text(named._renderer), text(own)
    if mine == theirs:
        return ""
    return (
        f"the template '{named.name}' was asked for and differs from the tokenizer's own; a model that learnt to chat with that "
        f"one should keep it ({first_difference(mine, theirs)})"
    )
