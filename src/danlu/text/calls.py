"""An assistant's thoughts and calls of tools, read back out of what it wrote.

How a template writes them is found by rendering probes, as `rendering` does: what stands before and behind a thought, and around a
call, which is JSON with a name and arguments (or parameters), or Python as ChatGLM3 has it. Where a template has no place for them,
they are told as text (`tool_text`), and these marks are understood with every template. A call that is not whole stays text.

Special tokens of the tokenizer are single private characters in the texts here (`SpecialMarks`), so that a token and a text that
only looks like one are told apart.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from danlu.text.rendering import ANSWERED, ASK, KEY, NAME, OTHER, WANTED, Renderer, call_probe, probe_tools
from danlu.text.tool_text import parsed_arguments
from danlu.types import ToolCall

FIRST_MARK = 0xF0000
_JSON = json.JSONDecoder()
_IN_PYTHON = re.compile(r"\s*(\S+)\s*```python\s*tool_call\((.*)\)\s*```\s*", re.DOTALL)


class SpecialMarks:
    """One private character for each special token of a tokenizer."""

    def __init__(self, tokenizer: Any, special: set[str]) -> None:
        texts = sorted(special, key=len, reverse=True)
        self.of_text = {text: chr(FIRST_MARK + n) for n, text in enumerate(texts)}
        self.of_id = {tokenizer.convert_tokens_to_ids(text): mark for text, mark in self.of_text.items()}
        self._texts = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._marks = str.maketrans(dict.fromkeys(self.of_text.values(), ""))

    def put(self, text: str) -> str:
        """A rendered text with marks in place of special tokens."""
        return self._texts.sub(lambda hit: self.of_text[hit.group()], text) if self._texts else text

    def drop(self, text: str) -> str:
        """The text without marks."""
        return text.translate(self._marks)


@dataclass(frozen=True, slots=True)
class CallForm:
    """What stands before and behind a call (or a list of calls) in JSON, and between an answer's text and its first call."""

    opening: str
    closing: str
    glue: str


@dataclass(frozen=True, slots=True)
class ThoughtForm:
    """What stands before thoughts and between them and an answer's text, with the space that belongs to it."""

    opening: str
    closing: str


CALLS_AS_TEXT = CallForm("<tool_call>", "</tool_call>", "\n")
THOUGHTS_AS_TEXT = ThoughtForm("<think>\n", "\n</think>\n\n")


class AnswerReader:
    """Reads answers in the forms of one template.

    Args:
        renderer: the template.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.marks = SpecialMarks(renderer.tokenizer, renderer.special)
        calls, thoughts = _call_form(renderer, self.marks), _thought_form(renderer, self.marks)
        self._calls = list(dict.fromkeys([calls or CALLS_AS_TEXT, CALLS_AS_TEXT]))
        # A form that begins with nothing fits everything: it comes last.
        self._divider = _python_divider(renderer, self.marks)
        known = dict.fromkeys([thoughts or THOUGHTS_AS_TEXT, THOUGHTS_AS_TEXT])
        self._thoughts = sorted(known, key=lambda form: not form.opening.strip())

    def read(self, text: str) -> tuple[str, str, list[ToolCall]]:
        """Thoughts, text and calls of an answer whose special tokens are marks."""
        thoughts = ""
        for form in self._thoughts:
            if (parts := split_thoughts(text, form)) is not None:
                thoughts, text = parts
                break
        if self._divider and (found := split_python_calls(text, self._divider)) is not None:
            return self.marks.drop(thoughts), self.marks.drop(found[0]), found[1]
        for call_form in self._calls:
            if (found := split_calls(text, call_form)) is not None:
                return self.marks.drop(thoughts), self.marks.drop(found[0]), found[1]
        return self.marks.drop(thoughts), self.marks.drop(text), []


def split_thoughts(text: str, form: ThoughtForm) -> tuple[str, str] | None:
    """The thoughts at the beginning of a text, and the rest; None if it does not begin with thoughts that end."""
    opening, closing = form.opening.strip(), form.closing.strip()
    inner = text.lstrip()
    if not inner.startswith(opening):
        return None
    inner, found, rest = inner[len(opening) :].partition(closing)
    if not found:
        return None
    before = form.opening[len(form.opening.rstrip()) :]
    between = form.closing[: len(form.closing) - len(form.closing.lstrip())]
    behind = form.closing[len(form.closing.rstrip()) :]
    thoughts = inner.removeprefix(before).removesuffix(between)
    return thoughts.strip("\n"), rest[len(behind) :] if rest.startswith(behind) else rest.lstrip("\n")


def split_calls(text: str, form: CallForm) -> tuple[str, list[ToolCall]] | None:
    """The text before the calls that end an answer, and these; None if it does not end with whole calls."""
    if not form.opening:
        calls = _calls_at(text, 0, form)
        return ("", calls) if calls else None
    start = text.find(form.opening)
    while start >= 0:
        if calls := _calls_at(text, start, form):
            return text[:start].removesuffix(form.glue), calls
        start = text.find(form.opening, start + len(form.opening))
    return None


def _calls_at(text: str, at: int, form: CallForm) -> list[ToolCall]:
    """The calls from here to the end, or none if something else stands there."""
    calls: list[ToolCall] = []
    while at < len(text):
        if not text.startswith(form.opening, at):
            return []
        try:
            value, at = _JSON.raw_decode(text, _past_space(text, at + len(form.opening)))
        except ValueError:
            return []
        at = _past_space(text, at)
        if not text.startswith(form.closing, at):
            return []
        at = _past_space(text, at + len(form.closing))
        for one in value if isinstance(value, list) else [value]:
            call = _call(one)
            if call is None:
                return []
            calls.append(call)
    return calls


def split_python_calls(text: str, divider: str) -> tuple[str, list[ToolCall]] | None:
    """Like `split_calls` for ChatGLM3's way: after the divider a name, and a Python block that calls `tool_call(key=value)`."""
    before = text.split(divider)
    calls: list[ToolCall] = []
    while before and (hit := _IN_PYTHON.fullmatch(before[-1])):
        arguments = _python_arguments(hit.group(2))
        if arguments is None:
            return None
        calls.insert(0, ToolCall(type="function", function={"name": hit.group(1), "arguments": arguments}))
        before.pop()
    return (divider.join(before), calls) if calls else None


def _python_arguments(text: str) -> dict[str, Any] | None:
    """Keyword arguments whose values are literals; None if there is anything else."""
    try:
        tree = ast.parse(f"call({text})", mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args or any(k.arg is None for k in tree.keywords):
            return None
        return {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _past_space(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip())


def _call(value: Any) -> ToolCall | None:
    """A call from its JSON: name and arguments, at the top or under `function`; None if it is not one."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        return None
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    if not isinstance(name, str) or not name or not isinstance(arguments, (dict, str)):
        return None
    parsed = parsed_arguments(arguments)
    call: ToolCall = {
        "type": "function",
        "function": {"name": name, "arguments": parsed if isinstance(parsed, str) else dict(parsed)},
    }
    if isinstance(value.get("id"), str):
        call["id"] = value["id"]
    return call


# -- probes -------------------------------------------------------------------------------------------------------------


def _call_form(renderer: Renderer, marks: SpecialMarks) -> CallForm | None:
    """How a template writes calls itself; None if it does not, or not as JSON."""
    if not renderer.can.calls:
        return None
    tools = probe_tools() if renderer.can.tools else ()
    prompt = renderer.attempt(ASK, tools=tools, generation=True)

    def answer(text: str) -> str:
        whole = renderer.attempt(*call_probe(renderer.can, text=text), tools=tools)
        answered = whole[len(prompt) :] if prompt and whole.startswith(prompt) else ""
        return marks.put(answered.removeprefix(renderer.endings.lead))  # Qwen3's has empty thoughts

    bare = answer("")
    start, end = _place_of_json(bare)
    if not end:
        return None
    stops = [at for at in (bare.find(marks.put(s), end) for s in renderer.endings.stop_texts) if at >= 0]
    opening, closing = bare[:start].strip(), bare[end : min(stops, default=len(bare))].strip()
    beside = answer(ANSWERED) if renderer.can.text_beside_calls else ""
    glue, found, _ = beside.partition(ANSWERED)[2].partition(opening or NAME)
    return CallForm(opening, closing, glue if found and opening else "")


def _python_divider(renderer: Renderer, marks: SpecialMarks) -> str:
    """The special token that stands before each call where a template writes them as ChatGLM3's does; "" elsewhere."""
    tools = probe_tools() if renderer.can.tools else ()
    prompt = renderer.attempt(ASK, tools=tools, generation=True)
    whole = renderer.attempt(*call_probe(renderer.can), tools=tools) if renderer.can.calls else ""
    called = whole.startswith(prompt) and f"tool_call({KEY}=" in whole[len(prompt) :]
    last = marks.put(prompt)[-1:]
    return last if called and last in marks.of_text.values() else ""


def _place_of_json(text: str) -> tuple[int, int]:
    """Where the JSON of the probe's call stands; (0, 0) if nowhere."""
    for hit in re.finditer(r"[\[{]", text):
        try:
            value, end = _JSON.raw_decode(text, hit.start())
        except ValueError:
            continue
        call = _call(value[0] if isinstance(value, list) and value else value)
        if call is not None and call["function"] == {"name": NAME, "arguments": {KEY: OTHER}}:
            return hit.start(), end
    return 0, 0


def _thought_form(renderer: Renderer, marks: SpecialMarks) -> ThoughtForm | None:
    """How a template writes thoughts itself; None if it does not, or if nothing tells them from the text."""
    if not renderer.can.thoughts:
        return None
    prompt = renderer.attempt(ASK, generation=True)
    whole = renderer.attempt(ASK, {"role": "assistant", "content": ANSWERED, "reasoning_content": WANTED})
    if not prompt or not whole.startswith(prompt):
        return None
    opening, thought, rest = marks.put(whole[len(prompt) :]).partition(WANTED)
    closing, said, _ = rest.partition(ANSWERED)
    return ThoughtForm(opening, closing) if thought and said and closing.strip() else None
