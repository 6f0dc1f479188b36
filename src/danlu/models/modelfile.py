"""An Ollama Modelfile beside a GGUF file: the chat template in Go's template language, stop texts and sampling defaults.

Ollama does not read the Jinja template inside a GGUF file. A Jinja template is a program and cannot be translated as such; but what
most write around contents depends on nothing but who speaks and whether a system text is there. These texts are found by rendering
a conversation of marks; whether they are all there is to it is found by comparing whole conversations with the template's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from danlu.exceptions import TemplateError
from danlu.text.chat_template import ChatTemplate
from danlu.types import Message

MARK: Final = "# Written by danlu export."
_GO_STRINGS: Final = {"{{": '{{ "{{" }}', '"""': r'{{ "\"\"\"" }}'}
_SYSTEM, _FIRST, _ANSWER, _NEXT, _OTHER = (
    "\ue000s\ue001",
    "\ue000u\ue001",
    "\ue000a\ue001",
    "\ue000v\ue001",
    "\ue000b\ue001",
)


@dataclass(frozen=True, slots=True)
class Around:
    """What a chat template writes around contents.

    Attributes:
        with_system: before and after a system text, up to the first question; None: the template has no place for one.
        start: before the first question without a system text.
        ask: between a question and its answer, `speak` the same where the answer is still to come.
        turn: between an answer and the next question.
    """

    with_system: tuple[str, str] | None
    start: str
    ask: str
    speak: str
    turn: str

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation that begins with a question, or with a system text, and ends with a question."""
        parts: list[str] = []
        turns = list(messages)
        if turns[0]["role"] == "system" and self.with_system:
            parts += [self.with_system[0], turns.pop(0)["content"], self.with_system[1]]
        else:
            parts.append(self.start)
        for number, message in enumerate(turns):
            if message["role"] == "user":
                parts += [message["content"], self.speak if number == len(turns) - 1 else self.ask]
            else:
                parts += [message["content"], self.turn]
        return "".join(parts)


def around(template: ChatTemplate) -> Around | None:
    """What a template writes around contents, or None if that depends on more than who speaks."""
    try:
        text = template.render(_talk(None, 3), add_generation_prompt=True)
        start, ask, turn, speak = _between(text, (_FIRST, _ANSWER, _NEXT))
        system = _with_system(template)
        found = Around(system, start, ask, speak, turn)
        for turns in (1, 3, 5):
            for said in (None, "Be brief.") if system else (None,):
                messages = _talk(said, turns, plain=True)
                if found.render(messages) != template.render(messages, add_generation_prompt=True):
                    return None
    except (TemplateError, ValueError):
        return None
    return found


def _with_system(template: ChatTemplate) -> tuple[str, str] | None:
    try:
        before, after, _ = _between(template.render(_talk(_SYSTEM, 1), add_generation_prompt=True), (_SYSTEM, _FIRST))
    except (TemplateError, ValueError):
        return None
    return before, after


def _between(text: str, marks: Sequence[str]) -> list[str]:
    """What stands before, between and behind marks; `ValueError` if one is missing or comes twice."""
    found = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError("a content is lost, or written twice")
        before, text = text.split(mark)
        found.append(before)
    return [*found, text]


def _talk(system: str | None, turns: int, *, plain: bool = False) -> list[Message]:
    """A conversation of so many turns, of marks or (plain) of words."""
    words = (
        ("How are you?", "Fine.", "And now?", "Still 2.", "你好！") if plain else (_FIRST, _ANSWER, _NEXT, _OTHER, "")
    )
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": "assistant" if n % 2 else "user", "content": words[n]} for n in range(turns)]
    return messages


def go_template(found: Around) -> str:
    """The same as an Ollama template (Go's text/template with `.System` and `.Messages`)."""
    if found.with_system is None:
        head = _literal(found.start)
    else:
        before, after = found.with_system
        head = f"{{{{ if .System }}}}{_literal(before)}{{{{ .System }}}}{_literal(after)}"
        head += f"{{{{ else }}}}{_literal(found.start)}{{{{ end }}}}"
    if found.ask == found.speak:
        reply = _literal(found.ask)
    else:
        reply = "{{ if eq (len (slice $.Messages $i)) 1 }}" + _literal(found.speak)
        reply += "{{ else }}" + _literal(found.ask) + "{{ end }}"
    return (
        head
        + '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ .Content }}'
        + reply
        + '{{ else if eq .Role "assistant" }}{{ .Content }}'
        + _literal(found.turn)
        + "{{ end }}{{ end }}"
    )


def _literal(text: str) -> str:
    """Text that stands for itself: what would open a command or end the Modelfile's quotes is written as a Go string."""
    return re.sub(r'\{\{|"""', lambda found: _GO_STRINGS[found.group()], text)


def modelfile(
    gguf_name: str,
    template: ChatTemplate | None,
    parameters: Mapping[str, Any],
    *,
    stop_texts: Sequence[str] = (),
    bos: str = "",
) -> tuple[str, str]:
    """A Modelfile's text, and what people should know about its template ("": it is the model's own).

    Args:
        gguf_name: the file beside it.
        parameters: sampling defaults and `num_ctx`.
        bos: the token that llama.cpp puts before a text by itself, so that the template must not.
    """
    lines = [MARK, "# ollama create NAME -f Modelfile && ollama run NAME", f"FROM ./{gguf_name}"]
    found = around(template) if template is not None else None
    note = ""
    if found is not None:
        text = go_template(_without_bos(found, bos))
        lines.append(f'TEMPLATE """{text}"""')
    elif template is not None:
        note = (
            "the chat template writes more than what depends on who speaks, so Ollama gets none and would chat without its marks; "
            "llama.cpp's own server (llama-server --jinja) uses the template in the file"
        )
        lines.append(f"# No TEMPLATE: {note}.")
    lines += [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    lines += [f'PARAMETER stop "{text}"' for text in stop_texts]
    return "\n".join(lines) + "\n", note


def _without_bos(found: Around, bos: str) -> Around:
    if not bos:
        return found
    system = found.with_system and (found.with_system[0].removeprefix(bos), found.with_system[1])
    return Around(system, found.start.removeprefix(bos), found.ask, found.speak, found.turn)
