"""`danlu chat`: one answer for a script, conversations from a pipe and in a terminal, Ctrl-C, contexts that fill up."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import danlu.assistant
from danlu.assistant import Assistant
from danlu.cli.chat import interruptible, lines, visible
from danlu.cli.main import run
from danlu.models.load import save_model
from danlu.models.starters import starter
from danlu.text.tokenizer import train_tokenizer
from danlu.types import Message

CONTEXT = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer(["The furnace is hot. 你好，今天天气很好。"] * 4, 320, context=CONTEXT)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = starter(len(tokenizer), hidden_size=32, layers=2, heads=2, kv_heads=1, context=CONTEXT, seed=3, ids=ids)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def assistant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Assistant:
    """The model that `danlu chat` will get; it notes the prompts that it is asked."""
    loaded = danlu.assistant.load(folder)
    loaded.defaults = replace(loaded.defaults, max_new_tokens=8)
    monkeypatch.setattr(danlu.assistant, "load", lambda *_args, **_options: loaded)
    return loaded


@pytest.fixture
def asked(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Message]]:
    prompts: list[Sequence[Message]] = []
    submit, request = assistant.engine.submit, assistant.request

    def note(messages: Sequence[Message], params: Any = None) -> Any:
        made = request(messages, params)
        noted[id(made)] = (made, messages)
        return made

    def submit_noted(made: Any) -> str:
        prompts.append(noted[id(made)][1])
        return submit(made)

    noted: dict[int, Any] = {}
    monkeypatch.setattr(assistant, "request", note)
    monkeypatch.setattr(assistant.engine, "submit", submit_noted)
    return prompts


def type_in(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def test_prompt_gives_one_answer_on_stdout(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [
        "chat",
        str(folder),
        "--prompt",
        "你好",
        "--system",
        "Be kind.",
        "--temperature",
        "0",
        "--max-new-tokens",
        "9",
    ]
    assert run([*command, "--seed", "4"]) == 0
    loaded = danlu.assistant.load(folder)
    messages: list[Message] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "你好"}]
    [reply] = loaded.generate([messages], replace(loaded.defaults, temperature=0.0, max_new_tokens=9))
    captured = capfd.readouterr()
    assert captured.out == reply.text + "\n"
    assert "cut at 9 tokens" in captured.err
    assert run([*command, "--bits", "8"]) == 0


def test_seeds(assistant: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*more: str) -> str:
        assert run(["chat", "m", "--prompt", "Hi", "--max-new-tokens", "30", "--temperature", "1", *more]) == 0
        return capsys.readouterr().out

    assert answer("--seed", "1") == answer("--seed", "1") != answer("--seed", "2")
    assert len({answer() for _ in range(3)}) > 1


def test_conversation_from_a_pipe(
    assistant: Assistant,
    asked: list[Sequence[Message]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "3")
    type_in(monkeypatch, "hi\n\n  再说一遍  \nCLEAR\nnew\nstop\nnever asked\n")
    assert run(["chat", "[m]", "--max-new-tokens", "2"]) == 0
    contents = [[m["content"] for m in messages] for messages in asked]
    captured = capsys.readouterr()
    assert contents[0] == ["hi"]
    assert (contents[1][0], contents[1][-1]) == ("hi", "再说一遍")
    assert contents[2] == ["new"]
    assert len(asked) == 3
    assert captured.out.startswith(contents[1][1] + "\n") and "forgotten" not in captured.out
    assert not assistant.engine._rows


def test_the_end_of_input_ends(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (b"", b"hi", b"caf\xe9\n"):
        type_in(monkeypatch, text)
        assert run(["chat", "m"]) == 0


def test_oldest_turns_are_dropped_with_a_notice(
    assistant: Assistant,
    asked: list[Sequence[Message]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    questions = [f"{n} furnace {n} furnace" for n in range(8)]
    too_long = "x" * 4 * CONTEXT
    type_in(monkeypatch, "\n".join([*questions, too_long, "last"]))
    assert run(["chat", "m", "--system", "Be kind."]) == 0
    captured = capsys.readouterr()
    assert "forgotten" in captured.err
    assert "context" in captured.err.split("forgotten")[-1]
    assert [messages[-1]["content"] for messages in asked] == [*questions, too_long, "last"]
    assert all(messages[0]["content"] == "Be kind." for messages in asked)
    assert assistant.template is not None
    fitting = [m for m in asked if m[-1]["content"] != too_long]
    assert all(len(assistant.template.encode_prompt(m)) + 8 <= CONTEXT for m in fitting)
    # The question that was too long for any conversation cost no turn.
    assert len(asked[-1]) >= 4 and asked[-1][-3]["content"] == questions[-1]


def test_a_prompt_that_is_not_utf8(assistant: Assistant, asked: list[Sequence[Message]]) -> None:
    assert run(["chat", "m", "--prompt", "caf\udce9", "--system", "\udcff"]) == 0
    assert [m["content"] for m in asked[0]] == ["?", "caf?"]


def test_a_prompt_that_is_too_long(assistant: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "m", "--prompt", "x" * 4 * CONTEXT]) == 1
    assert "context" in capsys.readouterr().err


@pytest.fixture
def interrupting(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of the third step of the first answer."""
    steps = 0
    take = assistant.engine._take

    def pressed(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            signal.raise_signal(signal.SIGINT)
        take(*arguments)

    monkeypatch.setattr(assistant.engine, "_take", pressed)


def test_ctrl_c_stops_the_answer_only(
    assistant: Assistant,
    interrupting: None,
    asked: list[Sequence[Message]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_in(monkeypatch, "hi\nagain\n")
    assert run(["chat", "m", "--max-new-tokens", "60", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    assert "stopped" in captured.err and len(asked) == 2
    first, second = captured.out.rstrip("\n"), asked[1]
    assert len(second) == 3 and first.startswith(second[1]["content"])
    assert not assistant.engine._running and not assistant.engine._rows
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_during_the_only_answer(assistant: Assistant, interrupting: None) -> None:
    assert run(["chat", "m", "--max-new-tokens", "60", "--prompt", "hi"]) == 130


def test_ctrl_c_twice_leaves() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGINT)


def test_a_terminal_gets_an_editor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", _Terminal())
    monkeypatch.setattr(sys, "stdout", _Terminal())
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("你好\x7f吗\r")  # backspace
        keys.send_text("wrong\x03")  # Ctrl-C clears the line
        keys.send_text("right\r\x04")  # Ctrl-D ends
        found = lines()
        assert list(found) == ["你吗", "right"]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_answers_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[2J\x07b\r\n\t你\u0085好\u200d") == "a[2Jb\n\t你好\u200d"


@pytest.fixture(autouse=True)
def _own_interrupts() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
