"""`danlu chat`: one answer for a script, or a conversation in the terminal."""

from __future__ import annotations

import secrets
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from danlu.cli.console import people
from danlu.cli.sampling import chosen, sampling_options, with_bad_words
from danlu.exceptions import EngineError, TemplateError, UsageError

if TYPE_CHECKING:
    from danlu.assistant import Assistant
    from danlu.generation.protocol import FinishReason, SamplingParams
    from danlu.types import Message

LEAVE = frozenset({"stop", "exit", "quit"})
FORGET = "clear"
SWITCH = "/adapter"
BASE = "base"  # the model without an adapter


def command(verb: str) -> click.Command:
    """The click command."""
    return chat


@click.command()
@click.argument("model")
@click.option("--prompt", help="Answer this on stdout and leave.")
@click.option("--system", help="A system message that stays in front of the conversation.")
@sampling_options(searches=False)
@click.option("--seed", type=int, help="The same seed gives the same answers. Default: another one each turn.")
@click.option("--bits", type=click.Choice(["16", "8", "4"]), help="8 and 4 quantise the weights while loading.")
@click.option("--no-patches", is_flag=True, help="Without the facts that the model was taught.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="NAME=PATH", help="An adapter of MODEL, for /adapter NAME."
)
def chat(
    model: str,
    prompt: str | None,
    system: str | None,
    seed: int | None,
    bits: str | None,
    no_patches: bool,
    adapters: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Talk to MODEL (a folder, a run or a hub id)."""
    from danlu import assistant

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for what it lacks
    places = adapter_places(adapters)
    loaded = assistant.load(model, bits=int(bits) if bits else None, patches=not no_patches)
    params = chosen(loaded.defaults, sampling)
    if sampling["bad_words"] and loaded.tokenizer is not None:
        params = with_bad_words(params, sampling["bad_words"], loaded.tokenizer)
    voices = {BASE: loaded, **{name: loaded.with_adapter(place, name) for name, place in places.items()}}
    conversation = Conversation(loaded, params, system=system, seed=seed, voices=voices)
    if len(places) == 1:
        conversation.choose(next(iter(places)))
    if prompt is not None:
        if conversation.answer(prompt) == "cancelled":
            raise click.Abort
        return
    people.print(model, style="bold", markup=False)
    people.print("'clear' forgets the conversation, 'stop' leaves, Ctrl-C stops an answer", style="dim")
    talk(conversation, lines())


def talk(conversation: Conversation, questions: Iterator[str]) -> None:
    """Answers line after line until `stop` or the end."""
    for line in questions:
        question = line.strip()
        if question == SWITCH or question.startswith(f"{SWITCH} "):
            people.print(conversation.choose(question.removeprefix(SWITCH).strip()), style="dim", markup=False)
            continue
        if question.lower() in LEAVE:
            return
        if question.lower() == FORGET:
            conversation.forget()
            people.print("forgotten", style="dim")
        elif question:
            try:
                conversation.answer(question)
            except (EngineError, TemplateError) as error:
                people.print(str(error), style="red", markup=False)


class Conversation:
    """The turns so far and how to answer the next one.

    Args:
        assistant: what answers.
        params: how; its seed is replaced by `seed`, or by another one each turn.
        system: a system message in front of every prompt.
        seed: the seed of every turn.
        voices: assistants to choose from by name, the model itself as "base".
    """

    def __init__(
        self,
        assistant: Assistant,
        params: SamplingParams,
        *,
        system: str | None = None,
        seed: int | None = None,
        voices: dict[str, Assistant] | None = None,
    ) -> None:
        self.assistant = assistant
        self.voices = voices or {BASE: assistant}
        self.params = params
        self.seed = seed
        self._system: list[Message] = [{"role": "system", "content": _whole_characters(system)}] if system else []
        self._turns: list[tuple[Message, Message]] = []

    def choose(self, name: str) -> str:
        """Lets another adapter answer from now on; the turns so far stay. Returns what to tell people."""
        known = ", ".join(self.voices)
        if name not in self.voices:
            return f"there is no adapter '{name}' here; known: {known}" if name else f"adapters: {known}"
        self.assistant = self.voices[name]
        return "the model without adapter answers" if name == BASE else f"adapter '{name}' answers"

    def forget(self) -> None:
        """Starts again."""
        self._turns = []

    def answer(self, question: str) -> FinishReason:
        """Writes an answer to stdout as it is made, keeps the turn, and says how the answer ended.

        Raises:
            EngineError: the question alone is too long for the model.
        """
        asked: Message = {"role": "user", "content": _whole_characters(question)}
        messages = self._fitting(asked)
        params = replace(self.params, seed=self.seed if self.seed is not None else secrets.randbits(31))
        request = self.assistant.request(messages, params)
        request_id = self.assistant.engine.submit(request)
        text = ""
        show = visible if sys.stdout.isatty() else str
        with interruptible() as interrupted:
            pieces = self.assistant.stream_request(request_id, params.stop)
            for piece in pieces:
                text += piece
                sys.stdout.write(show(piece))
                sys.stdout.flush()
                if interrupted():
                    break
            pieces.close()  # type: ignore[attr-defined]
        sys.stdout.write("\n")
        sys.stdout.flush()
        done = self.assistant.engine.result(request_id)
        if done.finish_reason == "length":
            people.print(f"(cut at {len(done.ids)} tokens)", style="dim")
        elif done.finish_reason == "cancelled":
            people.print("(stopped)", style="dim")
        if text.strip():
            self._turns.append((asked, {"role": "assistant", "content": text}))
        return done.finish_reason

    def _fitting(self, asked: Message) -> list[Message]:
        """The messages, without the oldest turns when prompt and answer would not fit the model's context."""
        context = self.assistant.context
        # An answer may want more than is left, but at least a quarter of the context should be free for it.
        room = min(self.params.max_new_tokens, context // 4)
        for dropped in range(len(self._turns) + 1):
            kept = self._turns[dropped:]
            messages = [*self._system, *(message for turn in kept for message in turn), asked]
            length = len(self.assistant.request(messages).prompt_ids)
            if length + room <= context:
                break
        if length < context and dropped:
            self._turns = kept
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            people.print(f"(the oldest {turns} forgotten: the conversation no longer fits the context)", style="dim")
        return messages


def adapter_places(given: tuple[str, ...]) -> dict[str, str]:
    """`NAME=PATH` by name.

    Raises:
        UsageError: it is not of that form, or a name comes twice.
    """
    found: dict[str, str] = {}
    for one in given:
        name, sign, place = one.partition("=")
        if not (name and sign and place) or name == BASE or name in found:
            raise UsageError(
                f"--adapter wants NAME=PATH, each name once (found: {one})", hint="--adapter kind=out/adapter"
            )
        found[name] = place
    return found


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside the block Ctrl-C only asks to stop, so that it never cuts an engine step in two; twice interrupts.

    Yields a function that says whether it was pressed.
    """
    pressed = False

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: pressed
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def visible(text: str) -> str:
    """Text without control characters, so that an answer cannot steer the terminal; line breaks and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _whole_characters(text: str) -> str:
    """Bytes of an argument that are not UTF-8 arrive as half surrogates, which no tokenizer takes."""
    return text.encode(errors="replace").decode()


def lines() -> Iterator[str]:
    """What people type: edited lines in a terminal, plain ones from a pipe."""
    if not sys.stdin.isatty():
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    # The prompt belongs to people: it must not end up in a file that stdout is redirected to.
    session: PromptSession[str] = PromptSession(
        output=None if sys.stdout.isatty() else create_output(stdout=sys.stderr)
    )
    while True:
        try:
            yield session.prompt("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            continue  # Ctrl-C at the prompt clears the line
