"""Text of a conversation by a Jinja template, and what a template can do: found out by rendering probes.

Templates are programs, so what one does with tools, thoughts or a system text, and what it writes after an answer, is found by
asking it. A probe is a small conversation whose contents are marks that no text has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from danlu.exceptions import TemplateError
from danlu.text.tool_text import Abilities, Shown, Tools, shown_messages
from danlu.types import Message

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Endings:
    """What a template writes around answers.

    Attributes:
        stop_ids: tokens that end an answer.
        stop_texts: the same as text, longest first.
        lead, tail: what stands between the prompt and an answer's content, and between the content and the stop token.
        every_answer: answers in the middle of a conversation stand there as they are generated (after the prompt that serving
            renders, with a stop token behind them), so that all can be trained at once; otherwise only the last can.
    """

    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    lead: str
    tail: str
    every_answer: bool


def control_tokens(tokenizer: Any) -> tuple[set[str], set[str]]:
    """Texts of the special tokens, and of other tokens that were added to the vocabulary."""
    added = tokenizer.added_tokens_decoder.values()
    special = {str(t) for t in added if t.special} | set(tokenizer.all_special_tokens)
    return special - {""}, {str(t) for t in added} - special - {""}


class Renderer:
    """A template's source with the tokenizer whose special tokens it writes.

    Args:
        tokenizer: a transformers tokenizer.
        source: Jinja source; `tool_source`, if given, is used where tools are on offer.
    """

    def __init__(self, tokenizer: Any, source: str, tool_source: str | None = None) -> None:
        self.tokenizer, self.source, self.tool_source = tokenizer, source, tool_source or source
        self.special, self.added = control_tokens(tokenizer)
        # What the template writes around contents, by roles and `generation`; see `text/layout.py`.
        self.shapes: dict[tuple[tuple[str, ...], bool], list[str] | None] = {}
        self.can = _abilities(self)
        self.endings = _endings(self)

    def shown(self, messages: Sequence[Message], tools: Tools) -> tuple[list[Shown], Tools]:
        """Messages and tools as the template gets them: what it has no place for is told as text."""
        return shown_messages(messages, tools, self.can)

    def text(self, fields: Sequence[Fields], tools: Tools = (), *, generation: bool = False) -> str:
        """What the template writes, with `generation` up to where the assistant begins to speak.

        Raises:
            TemplateError: the template refuses these messages.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(fields),
                tools=[dict(t) for t in tools] or None,
                tokenize=False,
                add_generation_prompt=generation,
                chat_template=self.tool_source if tools else self.source,
            )
        # Jinja templates raise whatever they like: all of it means "these messages do not fit".
        except Exception as error:
            raise TemplateError(f"the chat template refuses these messages: {error}") from error
        return text

    def attempt(self, *fields: Fields, tools: Tools = (), generation: bool = False) -> str:
        """`text`, or "" where the template refuses."""
        try:
            return self.text(fields, tools, generation=generation)
        except TemplateError:
            return ""


# -- probes -------------------------------------------------------------------------------------------------------------


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


ASKED, ANSWERED, ASKED_AGAIN, ANSWERED_AGAIN, WANTED, KEY, NAME, OTHER = (_mark(n) for n in range(8))


def _turn(role: str, content: str, **more: Any) -> Fields:
    return {"role": role, "content": content, **more}


ASK, ANSWER = _turn("user", ASKED), _turn("assistant", ANSWERED)
ASK_AGAIN, ANSWER_AGAIN = _turn("user", ASKED_AGAIN), _turn("assistant", ANSWERED_AGAIN)


def _abilities(renderer: Renderer) -> Abilities:
    see = renderer.attempt
    thinking = _turn("assistant", ANSWERED, reasoning_content=WANTED)
    tagged = _turn("assistant", f"<think>\n{WANTED}\n</think>\n\n{ANSWERED}")
    tools = probe_tools()
    found = Abilities(
        system=WANTED in see(_turn("system", WANTED), ASK, generation=True),
        late_system=WANTED in see(ASK, ANSWER, _turn("system", WANTED), ASK_AGAIN, generation=True),
        tools=NAME in see(ASK, tools=tools, generation=True),
        thoughts=WANTED in see(ASK, thinking),
        kept_thoughts=WANTED in see(ASK, thinking, ASK_AGAIN, ANSWER_AGAIN),
        kept_tags=WANTED in see(ASK, tagged, ASK_AGAIN, ANSWER_AGAIN),
    )
    offered: Tools = tools if found.tools else ()
    for text_arguments, call_ids in ((False, False), (True, False), (False, True), (True, True)):
        tried = replace(found, text_arguments=text_arguments, call_ids=call_ids)
        if _shows_calls(renderer, tried, offered):
            tried = replace(tried, calls=True, results=WANTED in see(*call_probe(tried, results=1), tools=offered))
            beside = see(*call_probe(tried, text=ANSWERED), tools=offered)
            several = see(*call_probe(tried, calls=2, results=2), tools=offered)
            return replace(
                tried,
                text_beside_calls=ANSWERED in beside and NAME in beside,
                several_calls=several.count(NAME) - see(ASK, tools=offered).count(NAME) > 1,
            )
    return replace(found, results=WANTED in see(ASK, ANSWER, _turn("tool", WANTED), generation=True))


def probe_tools() -> Tools:
    """One tool on offer, of marks."""
    tool = {
        "name": NAME,
        "description": OTHER,
        "parameters": {"type": "object", "properties": {KEY: {"type": "string"}}},
    }
    return ({"type": "function", "function": tool},)


def call_probe(can: Abilities, *, text: str = "", calls: int = 1, results: int = 0) -> list[Fields]:
    """A question and an answer that calls the probe's tool, as a template that can all of it gets them."""
    made: list[Message] = [
        {"role": "user", "content": ASKED},
        {
            "role": "assistant",
            "content": text,
            "tool_calls": [{"type": "function", "function": {"name": NAME, "arguments": {KEY: OTHER}}}] * calls,
        },
    ]
    made += [{"role": "tool", "content": WANTED, "name": NAME}] * results
    can = replace(can, tools=True, calls=True, results=True, text_beside_calls=True, several_calls=True)
    return [s.fields for s in shown_messages(made, (), can)[0]]


def _shows_calls(renderer: Renderer, can: Abilities, tools: Tools) -> bool:
    """Whether a call is rendered whole: its name and arguments, as JSON only once encoded, and a stop token after it."""
    text = renderer.attempt(*call_probe(can, results=1), tools=tools) or renderer.attempt(*call_probe(can), tools=tools)
    at = text.rfind(OTHER)
    call = text[max(text.rfind(ASKED), 0) :] if at >= 0 else ""
    whole = NAME in call and "{'" + KEY not in call and '\\"' + KEY not in call
    return whole and bool(_call_stop(renderer, can, tools))


def _call_stop(renderer: Renderer, can: Abilities, tools: Tools) -> str:
    """The control token that ends a turn with a call: the last of the conversation, or else the first before the result."""
    groups = [sorted(group, key=len, reverse=True) for group in (renderer.special, renderer.added) if group]
    text = renderer.attempt(*call_probe(can), tools=tools)
    rest = text[text.rfind(OTHER) + len(OTHER) :].rstrip()
    for tokens in groups:
        for token in tokens:
            if rest.endswith(token):
                return token
    text = renderer.attempt(*call_probe(can, results=1), tools=tools)
    rest = text[text.rfind(OTHER) + len(OTHER) :].split(WANTED)[0]
    for tokens in groups:
        if found := re.search("|".join(map(re.escape, tokens)), rest):
            return found.group()
    return ""


def _endings(renderer: Renderer) -> Endings:
    tokenizer = renderer.tokenizer
    whole = renderer.text([ASK, ANSWER])
    prompt = renderer.attempt(ASK, generation=True)
    two = renderer.attempt(ASK, ANSWER, ASK_AGAIN, ANSWER_AGAIN)
    at = whole.rfind(ANSWERED)
    lead = whole[len(prompt) : at] if prompt and at >= 0 and whole.startswith(prompt) else ""
    closing, token = _closing(renderer, whole, ANSWERED)
    tail = closing.removesuffix(token) if token else ""
    if not token:  # nothing ends the last answer: then what follows an answer in the middle stops it
        _, token = _closing(renderer, two, ANSWERED)
        if token and token == tokenizer.bos_token != tokenizer.eos_token:
            token = ""  # another conversation begins: that is not what the model says
    texts = {token, tokenizer.eos_token or ""}
    if renderer.can.calls:
        name = {"type": "function", "function": {"name": NAME, "description": OTHER, "parameters": {"type": "object"}}}
        texts.add(_call_stop(renderer, renderer.can, (name,) if renderer.can.tools else ()))
    texts -= {""}
    return Endings(
        frozenset(tokenizer.convert_tokens_to_ids(t) for t in texts),
        tuple(sorted(texts, key=len, reverse=True)),
        lead,
        tail,
        _keeps_answers(renderer, two, prompt, texts),
    )


def _closing(renderer: Renderer, text: str, answer: str) -> tuple[str, str]:
    """What follows an answer up to the end of the first control token, if only space is between them; and that token."""
    at = text.rfind(answer)
    rest = text[at + len(answer) :] if at >= 0 else ""
    bare = rest.lstrip()
    for token in sorted(renderer.special | renderer.added, key=len, reverse=True):
        if bare.startswith(token):
            return rest[: len(rest) - len(bare) + len(token)], token
    return "", ""


def _keeps_answers(renderer: Renderer, two: str, prompt: str, stops: set[str]) -> bool:
    """See `Endings.every_answer`. A template that refuses the probe or loses a part of it is taken at its word."""
    if not all(mark in two for mark in (ASKED, ANSWERED, ASKED_AGAIN, ANSWERED_AGAIN)):
        return True
    rest = two[two.find(ANSWERED) + len(ANSWERED) :].lstrip()
    if two.startswith(prompt) and any(rest.startswith(stop) for stop in stops):
        return True
    last = renderer.attempt(ASK, ANSWER, ASK_AGAIN, generation=True)
    return not (last and two.startswith(last))


def first_difference(left: str, right: str) -> str:
    """Where two texts part, in short, for a message."""
    at = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return f"after {left[:at][-24:]!r}: {left[at:][:24]!r} against {right[at:][:24]!r}"
