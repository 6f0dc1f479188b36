"""The chat page in a real browser. `pytest -m browser`; DANLU_SCREENSHOTS=folder keeps pictures of it."""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromium
import pytest

from danlu.assistant import Assistant
from danlu.data.feedback import FeedbackDatabase, preference_rows
from danlu.generation.protocol import Completion, Request, Token
from danlu.models.starters import starter
from danlu.serve.app import create_app, listen, make_server
from danlu.text.tokenizer import train_tokenizer

pytestmark = pytest.mark.browser

ANSWERS = [
    "The old observatory opens at 7:30 in the evening, Wednesday to Sunday.\n\n"
    "Ada Brook leads the tours. If the sky is clear, she lets visitors use the large telescope after nine.",
    "7:30. <b>Ask</b> Ada Brook & co.",
    "可以。周三到周日晚上七点半开门，布鲁克女士带大家参观。天气好的话，九点以后还能用大望远镜看星星。🔭",
]
SLOW = "A long story. " * 400


class ScriptEngine:
    """Says what it is told, a token every few milliseconds."""

    version = 0

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.context = tokenizer, 100_000
        self.script: list[str] = []
        self.pause = 0.004
        self.open: dict[str, tuple[list[int], list[int]]] = {}
        self.cancelled: list[str] = []
        self.seeds: list[int] = []

    def submit(self, request: Request) -> str:
        self.seeds.append(request.params.seed)
        name = uuid.uuid4().hex
        self.open[name] = (self.tokenizer(self.script.pop(0))["input_ids"], [])
        return name

    def stream(self, name: str) -> Iterator[Token]:
        planned, said = self.open[name]
        for token in planned:
            if name in self.cancelled:
                return
            time.sleep(self.pause)
            said.append(token)
            yield Token(token, -1.0)

    def result(self, name: str) -> Completion:
        _, said = self.open.pop(name)
        reason = "cancelled" if name in self.cancelled else "stop"
        return Completion(name, tuple(said), (-1.0,) * len(said), reason, 0)

    def cancel(self, name: str) -> None:
        planned, said = self.open[name]
        if len(said) < len(planned):
            self.cancelled.append(name)


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    tokenizer = train_tokenizer([*ANSWERS, SLOW], 400, context=1024)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = starter(len(tokenizer), hidden_size=32, layers=1, heads=2, kv_heads=1, context=1024, seed=3, ids=ids)
    assistant = Assistant(model, tokenizer, name="runs/quickstart")
    assistant.engine = ScriptEngine(tokenizer)  # type: ignore[assignment]
    return assistant


@pytest.fixture
def engine(assistant: Assistant) -> ScriptEngine:
    engine = assistant.engine
    assert isinstance(engine, ScriptEngine)
    engine.script, engine.cancelled, engine.seeds = [], [], []
    return engine


@pytest.fixture
def database(tmp_path: Path) -> FeedbackDatabase:
    return FeedbackDatabase(tmp_path / "feedback.sqlite3", create=True)


@contextmanager
def serving(assistant: Assistant, database: FeedbackDatabase, api_key: str | None = None) -> Iterator[str]:
    with listen("127.0.0.1", 0) as listener:
        server = make_server(create_app(assistant, database, api_key=api_key))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    command = chromium.find()
    if command is None:
        reason = "the chat page is NOT tested: Chromium is missing (apt-get install chromium)"
        print(f"\n*** {reason} ***", file=sys.__stderr__)
        pytest.skip(reason)
    running = chromium.Chromium(command, tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture
def page(
    browser: chromium.Chromium, assistant: Assistant, engine: ScriptEngine, database: FeedbackDatabase
) -> Iterator[chromium.Page]:
    with serving(assistant, database) as url:
        page = browser.open(url)
        page.look()
        yield page
        assert page.faults() == []
        assert all(address.startswith((url, "about:")) for address in page.requested())
        page.go("about:blank")


def picture(page: chromium.Page, name: str) -> None:
    if folder := os.environ.get("DANLU_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        time.sleep(0.2)
        page.screenshot(Path(folder) / f"{name}.png")


def ask(page: chromium.Page, text: str) -> None:
    page.click("#input")
    page.type(text)
    page.press("Enter", 13)


DONE = "document.querySelectorAll('.answer').length && !document.querySelector('.answer.writing')"


def test_conversation(page: chromium.Page, engine: ScriptEngine, database: FeedbackDatabase) -> None:
    engine.script = list(ANSWERS)
    picture(page, "empty")
    assert page.run("document.activeElement.id") == "input"
    assert page.run("document.getElementById('send').disabled")
    ask(page, "When does the observatory open?")
    page.wait("document.querySelector('.answer .text').textContent.length > 10")
    page.wait("!document.getElementById('stop').hidden")
    growing = page.text(".answer .text")
    page.wait(DONE)
    assert (
        page.text(".answer .text") == ANSWERS[0] and ANSWERS[0].startswith(growing) and len(growing) < len(ANSWERS[0])
    )

    # Another version, one thumb each: a pair. The model's markup is text.
    page.click(".down")
    page.click(".again")
    page.wait("document.querySelectorAll('.count').length && document.querySelector('.count').textContent === '2/2'")
    page.wait(DONE)
    assert page.text(".answer .text") == ANSWERS[1]
    assert page.run("document.querySelectorAll('#log b').length") == 0
    page.click(".up")
    page.wait("document.querySelector('.up').ariaPressed === 'true'")
    wait_for_votes(database, 2)
    [pair] = preference_rows(database)
    assert pair["chosen"][0]["content"] == ANSWERS[1] and pair["rejected"][0]["content"] == ANSWERS[0]
    assert [v.params["seed"] for v in database.votes()] == engine.seeds
    page.click(".previous")
    assert (page.text(".answer .text"), page.text(".count")) == (ANSWERS[0], "1/2")
    assert page.run("document.querySelector('.down').ariaPressed") == "true"

    # A second turn continues with the version shown; everything is there after a reload.
    ask(page, "我可以带孩子去吗？")
    page.wait("document.querySelectorAll('.answer').length === 2")
    page.wait(DONE)
    picture(page, "light")
    before = page.text("#log")
    page.reload()
    page.wait("document.querySelectorAll('.answer').length === 2")
    assert page.text("#log") == before
    assert page.run("document.querySelector('.down').ariaPressed") == "true"
    page.look(dark=True)
    picture(page, "dark")
    page.look(width=375, height=667, mobile=True)
    assert page.run("document.documentElement.scrollWidth") <= 375
    picture(page, "phone")
    page.look(width=375, height=667, mobile=True, dark=True)
    picture(page, "phone-dark")
    page.click("#new-chat")
    assert page.run("document.querySelectorAll('article').length") == 0
    page.reload()
    assert page.run("!document.getElementById('welcome').hidden")


def wait_for_votes(database: FeedbackDatabase, count: int) -> None:
    end = time.monotonic() + 5
    while len(database.votes()) != count:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["click", "Escape", "new chat", "reload"])
def test_stopping_frees_the_engine(page: chromium.Page, engine: ScriptEngine, how: str) -> None:
    engine.script = [SLOW, "Short."]
    ask(page, "Tell me a story")
    page.wait("document.querySelector('.answer .text').textContent.length > 30")
    if how == "click":
        picture(page, "writing")
        page.click("#stop")
    elif how == "Escape":
        page.press("Escape", 27)
    elif how == "new chat":
        page.click("#new-chat")
    else:
        page.reload()
    end = time.monotonic() + 5
    while not engine.cancelled or engine.open:
        assert time.monotonic() < end, "the engine still runs"
        time.sleep(0.02)
    if how != "new chat":
        page.wait(DONE)
        assert page.text(".note") == "Stopped."
        assert SLOW.startswith(page.text(".answer .text")) and len(page.text(".answer .text")) > 30
    page.wait("document.getElementById('stop').hidden")
    ask(page, "More")
    page.wait("[...document.querySelectorAll('.answer .text')].at(-1).textContent === 'Short.'")


def test_input_methods_and_keys(page: chromium.Page, engine: ScriptEngine) -> None:
    engine.script = ["好。"]
    # Enter that picks a candidate of an input method does not send; nor does Shift+Enter.
    page.send("Input.imeSetComposition", text="ni hao", selectionStart=6, selectionEnd=6)
    page.press("Enter", 229, text="")
    page.run(
        "document.getElementById('input').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert page.run("document.querySelectorAll('article').length") == 0
    page.type("你好")
    height = page.run("document.getElementById('input').clientHeight")
    page.press("Enter", 13, modifiers=8)
    page.type("再见")
    assert page.run("document.getElementById('input').value") == "你好\n再见"
    assert page.run("document.getElementById('input').clientHeight") > height
    page.press("Enter", 13)
    page.wait(DONE)
    assert page.text(".question .text") == "你好\n再见"
    # Every control can be reached and used with the keyboard alone, and has a name.
    page.run("document.querySelector('.up').focus()")
    page.press(" ", 32)
    page.wait("document.querySelector('.up').ariaPressed === 'true'")
    unnamed = "[...document.querySelectorAll('button')].filter(b => !b.ariaLabel && !b.innerText.trim()).length"
    assert page.run(unnamed) == 0


def test_api_key_is_asked_once_and_errors_are_shown(
    browser: chromium.Chromium, assistant: Assistant, engine: ScriptEngine, database: FeedbackDatabase
) -> None:
    engine.script = ["Welcome."]
    with serving(assistant, database, api_key="s3cret") as url:
        page = browser.open(url)
        page.look()
        ask(page, "Hi")
        page.wait("document.getElementById('key-dialog').open")
        picture(page, "key")
        page.type("wrong")
        page.press("Enter", 13)
        page.wait("document.getElementById('key-dialog').open && !document.getElementById('key').value")
        page.type("s3cret")
        page.click("#key-use")
        page.wait(DONE)
        assert page.text(".answer .text") == "Welcome."
        page.click(".up")
        wait_for_votes(database, 1)
        assert not page.run("document.getElementById('key-dialog').open")
        engine.context = 5
        ask(page, "Too long now")
        page.wait("document.querySelector('.failed .note')")
        assert "context" in page.text(".note")
    engine.context = 100_000
    page.click(".again")
    page.wait("[...document.querySelectorAll('.note')].at(-1).textContent.includes('reached')")
    picture(page, "error")
    page.go("about:blank")
