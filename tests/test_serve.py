"""The server over real HTTP on loopback, with a tiny random model and the official `openai` client."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.assistant import Assistant
from danlu.cli.main import run
from danlu.data.feedback import FeedbackDatabase
from danlu.data.read import read
from danlu.exceptions import DanluError, UsageError
from danlu.models.starters import starter
from danlu.serve.app import create_app, listen, make_server
from danlu.serve.guard import check_exposure, is_loopback
from danlu.text.tokenizer import train_tokenizer
from danlu.types import Comparison, Message

CONTEXT = 512
HELLO: list[Message] = [{"role": "user", "content": "你好, how are you?"}]


def make_assistant() -> Assistant:
    tokenizer = train_tokenizer(["The furnace is hot. How are you? 你好，今天天气很好。"] * 4, 320, context=CONTEXT)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = starter(len(tokenizer), hidden_size=32, layers=2, heads=2, kv_heads=1, context=CONTEXT, seed=3, ids=ids)
    return Assistant(model, tokenizer, name="runs/tiny")


@contextmanager
def running(assistant: Assistant, database: FeedbackDatabase, api_key: str | None = None) -> Iterator[str]:
    """The address of a server in a thread."""
    with listen("127.0.0.1", 0) as listener:
        server = make_server(create_app(assistant, database, api_key=api_key))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def wait_for(holds: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return make_assistant()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> FeedbackDatabase:
    return FeedbackDatabase(tmp_path_factory.mktemp("votes") / "feedback.sqlite3", create=True)


@pytest.fixture(scope="module")
def server(assistant: Assistant, database: FeedbackDatabase) -> Iterator[str]:
    with running(assistant, database) as url:
        yield url


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **options: Any) -> Any:
    options = {"messages": HELLO, "model": "any", "max_tokens": 12, "seed": 1} | options
    return client.chat.completions.create(**options)


def idle(assistant: Assistant) -> bool:
    engine = assistant.engine
    return not engine._running and not engine._waiting and not engine._rows


# --- completions ------------------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    assert (card.id, card.owned_by) == ("runs/tiny", "danlu")
    assert client.models.retrieve("runs/tiny").id == "runs/tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_plain_completion_is_the_assistants_own_answer(client: openai.OpenAI, assistant: Assistant) -> None:
    answer = chat(client, temperature=0)
    [expected] = assistant.generate([HELLO], _params(assistant, temperature=0.0, max_new_tokens=12))
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(expected.prompt_ids)
    assert answer.usage.completion_tokens == len(expected.ids) == 12
    assert answer.usage.total_tokens == len(expected.prompt_ids) + 12
    assert (answer.model, answer.object) == ("runs/tiny", "chat.completion")
    assert idle(assistant)


def test_stream_equals_plain(client: openai.OpenAI, assistant: Assistant) -> None:
    plain = chat(client, max_tokens=40)
    chunks = list(chat(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == plain.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason
    assert not chunks[-1].choices
    assert chunks[-1].usage == plain.usage.model_copy(update={"completion_tokens_details": None})
    assert len({c.id for c in chunks}) == 1
    assert not any(c.usage for c in chat(client, stream=True))
    wait_for(lambda: idle(assistant))


def test_stop_texts_and_seeds(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=40).choices[0].message.content
    assert chat(client, max_tokens=40).choices[0].message.content == whole
    assert chat(client, max_tokens=40, seed=2).choices[0].message.content != whole
    unseeded = {chat(client, max_tokens=40, seed=None).choices[0].message.content for _ in range(3)}
    assert len(unseeded) > 1
    stop = next(c for c in whole[3:] if c.isprintable() and c != "\ufffd")
    for wanted in (stop, ["never there", stop]):
        for stream in (False, True):
            answer = chat(client, max_tokens=40, stop=wanted, stream=stream)
            parts = list(answer) if stream else []
            text = "".join(c.choices[0].delta.content or "" for c in parts) or answer.choices[0].message.content
            assert text == whole[: whole.index(stop)]
            assert (parts[-1] if stream else answer).choices[0].finish_reason == "stop"


def test_several_choices(client: openai.OpenAI) -> None:
    answer = chat(client, n=3, max_completion_tokens=8, max_tokens=None)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({c.message.content for c in answer.choices}) == 3
    assert answer.usage.completion_tokens == 24
    assert answer.choices[0].message.content == chat(client, max_tokens=8).choices[0].message.content


def test_logprobs(client: openai.OpenAI, assistant: Assistant) -> None:
    answer = chat(client, logprobs=True, temperature=0.9, top_p=0.8)
    [expected] = assistant.generate([HELLO], _params(assistant, temperature=0.9, top_p=0.8, seed=1, max_new_tokens=12))
    content = answer.choices[0].logprobs.content
    assert [round(c.logprob, 4) for c in content] == [round(p, 4) for p in expected.logprobs]
    assert all(c.bytes is None or bytes(c.bytes).decode() == c.token for c in content)
    assert chat(client).choices[0].logprobs is None


def test_top_logprobs(client: openai.OpenAI, assistant: Assistant) -> None:
    options = {"temperature": 0.9, "top_k": 3, "seed": 1}
    answer = chat(client, logprobs=True, top_logprobs=4, extra_body={"top_k": 3}, temperature=0.9)
    params = _params(assistant, **options, top_p=assistant.defaults.top_p, max_new_tokens=12, logprobs=4)
    [expected] = assistant.generate([HELLO], params)
    for entry, top in zip(answer.choices[0].logprobs.content, expected.top_logprobs, strict=True):
        assert [round(t.logprob, 4) for t in entry.top_logprobs] == [round(p, 4) for _, p in top]
        assert [t.token for t in entry.top_logprobs] == [assistant.tokenizer.decode([i]) for i, _ in top]
        assert 1 <= len(entry.top_logprobs) <= 3
        assert entry.token in {t.token for t in entry.top_logprobs}
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_every_sampling_field_acts(client: openai.OpenAI, assistant: Assistant) -> None:
    plain = {"temperature": 1.0, "max_tokens": 20}
    assistant_params = {"temperature": 1.0, "max_new_tokens": 20, "seed": 1}
    fields: dict[str, Any] = {
        "presence_penalty": 2.0,
        "frequency_penalty": 2.0,
        "min_p": 0.9,
        "typical_p": 0.01,
        "top_k": 1,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "logit_bias": {"40": 50.0},
    }
    base = chat(client, **plain).choices[0].message.content
    for name, value in fields.items():
        text = chat(client, **plain, extra_body={name: value}).choices[0].message.content
        own = {40: 50.0} if name == "logit_bias" else value
        [expected] = assistant.generate([HELLO], _params(assistant, **assistant_params, **{name: own}))
        assert text == expected.text != base, name
    stop = [i for i in range(len(assistant.tokenizer)) if i not in assistant.template.stop_ids]
    short = chat(client, max_tokens=6, extra_body={"logit_bias": dict.fromkeys(map(str, stop), -100)})
    assert short.usage.completion_tokens == 1
    minimum = {"logit_bias": dict.fromkeys(map(str, stop), -100), "min_tokens": 4}
    assert chat(client, max_tokens=6, extra_body=minimum).usage.completion_tokens == 5


def test_content_parts_developer_and_unknown_fields(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "你好, how "}, {"type": "text", "text": "are you?"}]
    same = chat(client, messages=[{"role": "user", "content": parts}], user="me", extra_body={"strange": {"a": 1}})
    assert same.choices[0].message.content == chat(client).choices[0].message.content
    pair = [chat(client, messages=[{"role": r, "content": "Be kind."}, *HELLO]).usage for r in ("system", "developer")]
    assert pair[0].prompt_tokens == pair[1].prompt_tokens


def _params(assistant: Assistant, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(assistant.defaults, **changes)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "half \ud800"}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "long " * 2000}]}, "messages"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": 3}, "stop"),
        ({"seed": 1 << 70}, "seed"),
        ({"n": 9}, "n"),
        ({"n": 2, "stream": True}, "n"),
        ({"stream": True, "logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"min_p": -0.1}, "min_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": [3]}, "logit_bias"),
        ({"min_tokens": 5, "max_tokens": 4}, None),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_bad_requests_name_the_field(server: str, change: dict[str, Any], param: str) -> None:
    body = {"messages": HELLO, "model": "m"} | change
    reply = post(server, "/v1/chat/completions", content=json.dumps(body))
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]


@pytest.mark.parametrize("body", ["", "{", "[]", "3", '{"messages":' + "[" * 100_000, '"text"'])
def test_bodies_that_are_no_object(server: str, body: str) -> None:
    reply = post(server, "/v1/chat/completions", content=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_too_long_a_prompt_has_openais_code(client: openai.OpenAI, assistant: Assistant) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=[{"role": "user", "content": "long " * 2000}], stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert str(CONTEXT) in caught.value.message
    assert idle(assistant)


def test_other_errors_have_the_same_shape(server: str) -> None:
    for reply in (httpx.get(f"{server}/v1/nothing"), httpx.get(f"{server}/v1/chat/completions")):
        assert reply.status_code in (404, 405)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    big = post(server, "/v1/chat/completions", content=b" " * (9 << 20))
    assert (big.status_code, big.json()["error"]["code"]) == (413, "request_too_large")


def post(server: str, path: str, **options: Any) -> httpx.Response:
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    return httpx.post(f"{server}{path}", headers=headers, timeout=30, **options)


# --- concurrency and leaving ------------------------------------------------------------------------------------------


def test_parallel_streams_finish_and_equal_single_ones(client: openai.OpenAI, assistant: Assistant) -> None:
    def text(seed: int) -> str:
        chunks = chat(client, stream=True, max_tokens=60, seed=seed)
        return "".join(c.choices[0].delta.content or "" for c in chunks)

    alone = [text(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(text, range(4))) == alone
    wait_for(lambda: idle(assistant))


@contextmanager
def endless(assistant: Assistant) -> Iterator[threading.Event]:
    """Makes the model slow, so that an answer lasts for minutes. The event is set at the first step."""
    engine, stepped = assistant.engine, threading.Event()
    step = engine.step

    def slow() -> None:
        step()
        stepped.set()
        time.sleep(0.2)

    engine.step = slow  # type: ignore[method-assign]
    try:
        yield stepped
    finally:
        del engine.step  # type: ignore[method-assign]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(server: str, assistant: Assistant, stream: bool) -> None:
    with endless(assistant) as stepped:
        host, _, port = server.removeprefix("http://").partition(":")
        body = json.dumps({"messages": HELLO, "stream": stream, "n": 1 if stream else 2, "max_tokens": 400}).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert stepped.wait(10)
            assert not idle(assistant)
        wait_for(lambda: idle(assistant))


def test_those_who_stay_are_not_disturbed(client: openai.OpenAI, assistant: Assistant) -> None:
    alone = chat(client, max_tokens=50, seed=5).choices[0].message.content
    with ThreadPoolExecutor(1) as pool:
        leaving = chat(client, stream=True, max_tokens=400)
        next(leaving)
        staying = pool.submit(chat, client, max_tokens=50, seed=5)
        wait_for(lambda: len(assistant.engine._running) == 2)
        leaving.close()
        assert staying.result().choices[0].message.content == alone
    wait_for(lambda: idle(assistant))


def test_waiting_does_not_block_the_event_loop(server: str, client: openai.OpenAI, assistant: Assistant) -> None:
    with endless(assistant) as stepped, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat, client, max_tokens=6)
        assert stepped.wait(10)
        assert httpx.get(f"{server}/health").json() == {"status": "ok"}
        assert not answer.done()
        answer.result()


# --- who may talk to it -----------------------------------------------------------------------------------------------


def test_api_key(assistant: Assistant, tmp_path: Path) -> None:
    database = FeedbackDatabase(tmp_path / "f.sqlite3", create=True)
    with running(assistant, database, api_key="s3cret") as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0) as client:
            assert chat(client).choices
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            chat(client)
        assert caught.value.code == "invalid_api_key"
        for headers in (
            {},
            {"authorization": "s3cret"},
            {"authorization": "Bearer x"},
            {"authorization": b"Bearer \xff"},
        ):
            assert post(url, "/api/vote", json={}, headers=headers).status_code == 401
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/").status_code == 200


def test_other_machines_need_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "no-such-model", "--host", "0.0.0.0"]) == 2
    assert "--api-key" in capsys.readouterr().err
    check_exposure("0.0.0.0", "key")
    for key in ("", "  ", "a\nb", "密钥"):
        with pytest.raises(UsageError):
            check_exposure("127.0.0.1", key)
    assert [is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")] == [True] * 5
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "192.168.1.2", "example.com", "localhost.example.com", "")] == [
        False
    ] * 6


def test_used_port(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert run(["serve", "no-such-model", "--port", port]) == 1
    assert f"port {port} on 127.0.0.1 is in use" in capsys.readouterr().err
    with pytest.raises(DanluError, match="cannot"):
        listen("203.0.113.1", 0)


def test_pages_of_others_are_refused(server: str, database: FeedbackDatabase) -> None:
    before = len(database.votes())
    body = {"messages": HELLO, "answer": "x", "vote": "up"}
    refused = (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8000"},
    )
    for headers in refused:
        assert post(server, "/api/vote", json=body, headers=headers).status_code == 403, headers
    simple = httpx.post(f"{server}/api/vote", content=json.dumps(body), headers={"content-type": "text/plain"})
    assert simple.status_code == 400
    assert httpx.get(f"{server}/", headers={"host": "evil.example"}).status_code == 403
    assert len(database.votes()) == before
    assert post(server, "/api/vote", json=body, headers={"origin": server, "sec-fetch-site": "same-origin"}).is_success
    assert post(server, "/api/vote", json=body | {"vote": "none"}).is_success
    assert (
        "access-control-allow-origin" not in httpx.get(f"{server}/v1/models", headers={"origin": "https://a.b"}).headers
    )


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_is_whole_strict_and_in_two_languages(server: str) -> None:
    page = httpx.get(f"{server}/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "runs/tiny" in page.text and "New chat" in page.text
    assert "新对话" in httpx.get(f"{server}/", headers={"accept-language": "fr, zh-TW;q=0.9, en;q=0.8"}).text
    for name, kind in (("app.js", "text/javascript"), ("style.css", "text/css"), ("icon.svg", "image/svg+xml")):
        file = httpx.get(f"{server}/static/{name}")
        assert file.headers["content-type"].startswith(kind)
        assert file.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in file.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in file.text
    assert httpx.get(f"{server}/static/../app.py").status_code == 404
    assert httpx.get(f"{server}/static/%2e%2e/%2e%2e/app.py").status_code == 404


def test_a_models_name_cannot_break_the_page(tmp_path: Path) -> None:
    strange = make_assistant()
    strange.name = '</script><script>alert("x")</script>'
    with running(strange, FeedbackDatabase(tmp_path / "f.sqlite3", create=True)) as url:
        assert "<script>alert" not in httpx.get(url).text


# --- votes ------------------------------------------------------------------------------------------------------------


def test_votes_become_comparisons(
    server: str, assistant: Assistant, database: FeedbackDatabase, tmp_path: Path
) -> None:
    messages: list[Message] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Open when?\n\n七点？"},
    ]
    for answer, vote in (("bad", "up"), ("good ✓", "up"), ("bad", "down"), ("worse", "down")):
        body = {"messages": messages, "answer": answer, "vote": vote, "params": {"seed": 7, "temperature": 0.7}}
        assert post(server, "/api/vote", json=body).json() == {"vote": vote}
    mine = [v for v in database.votes() if v.messages == messages]
    assert [(v.answer, v.vote) for v in mine] == [("bad", "down"), ("good ✓", "up"), ("worse", "down")]
    assert assistant.template is not None
    assert {v.prompt for v in mine} == {assistant.template.render(messages, add_generation_prompt=True)}
    assert {(v.model, v.params["seed"]) for v in mine} == {("runs/tiny", 7)}
    out = tmp_path / "pairs.jsonl"
    assert run(["feedback", "export", "--database", str(database.path), "--out", str(out)]) == 0
    found = [r for r in read(out, "comparison").records if isinstance(r, Comparison) and r.prompt == messages]
    assert [(r.chosen[0]["content"], r.rejected[0]["content"]) for r in found] == [
        ("good ✓", "bad"),
        ("good ✓", "worse"),
    ]
    for answer in ("bad", "good ✓", "worse"):
        assert post(server, "/api/vote", json={"messages": messages, "answer": answer, "vote": "none"}).is_success
    assert not [v for v in database.votes() if v.messages == messages]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"vote": "sideways"}, "vote"),
        ({"answer": None}, "answer"),
        ({"answer": "half \udc00"}, "answer"),
        ({"messages": []}, "messages"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages"),
    ],
)
def test_bad_votes(server: str, change: dict[str, Any], param: str) -> None:
    body = {"messages": HELLO, "answer": "x", "vote": "up"} | change
    reply = post(server, "/api/vote", content=json.dumps(body))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


odd_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(question=odd_text, answer=odd_text)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_vote_text_is_stored_exactly(
    server: str, assistant: Assistant, database: FeedbackDatabase, question: str, answer: str
) -> None:
    messages: list[Message] = [{"role": "user", "content": question}]
    body = {"messages": messages, "answer": answer, "vote": "down"}
    assert post(server, "/api/vote", json=body).is_success
    stored = database.votes()[-1]
    assert (stored.messages, stored.answer) == (messages, answer)
    assert assistant.template is not None
    assert stored.prompt == assistant.template.render(messages, add_generation_prompt=True)
    assert post(server, "/api/vote", json=body | {"vote": "none"}).is_success
