"""`/v1`: the part of the OpenAI API that its clients need to chat.

The engine is synchronous and moves when somebody waits, so waiting happens in worker threads and the event loop stays
free. A client that goes away frees its slot in the engine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import anyio
from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from danlu.assistant import Assistant, cut_at_stop
from danlu.generation.protocol import Completion
from danlu.serve.answering import Answering
from danlu.serve.protocol import ApiError, ChatRequest, Envelope, choice, usage

router = APIRouter(prefix="/v1")
logger = logging.getLogger("danlu.serve")


@router.get("/models")
def models(request: Request) -> dict[str, Any]:
    """The model that is served, and its adapters."""
    state = request.app.state
    return {"object": "list", "data": [_model_card(request, name) for name in (state.model_name, *state.adapters)]}


@router.get("/models/{name:path}")
def model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    _assistant_of(request, name, strict=True)
    return _model_card(request, name)


@router.post("/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation, whole or as server-sent events."""
    state = request.app.state
    name: str = body.model if body.model and body.model in state.adapters else state.model_name
    assistant = _assistant_of(request, body.model, strict=bool(state.adapters))
    body.check(assistant.model.config.vocab_size)
    messages = [message.plain() for message in body.messages]
    params = body.sampling(assistant.defaults)
    answering = await to_thread.run_sync(Answering, assistant, messages, params)
    envelope = Envelope(name)
    if body.stream:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return _Events(answering, _events(answering, envelope, state.waiting, with_usage=with_usage))
    try:
        results = await _results(answering, request)
    finally:
        await _close(answering)
    return JSONResponse(await to_thread.run_sync(_whole, assistant, answering, envelope, results, bool(body.logprobs)))


def _assistant_of(request: Request, name: str | None, *, strict: bool) -> Assistant:
    """Who answers as a model of this name: the model, or one of its adapters; none given: the model.

    Args:
        strict: whether another name than these is an error.
    """
    state = request.app.state
    if name in state.adapters:
        found: Assistant = state.adapters[name]
        return found
    if strict and name not in (None, state.model_name):
        known = ", ".join(f"'{n}'" for n in (state.model_name, *state.adapters))
        message = f"The model '{name}' does not exist; {known} is served here."
        raise ApiError(404, message, param="model", code="model_not_found")
    model: Assistant = state.assistant
    return model


def _model_card(request: Request, name: str) -> dict[str, Any]:
    state = request.app.state
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "danlu",
        "context_length": _assistant_of(request, name, strict=False).context,
    }


async def _results(answering: Answering, request: Request) -> list[Completion]:
    """Waits for the answers, or for the client to go away, which ends them early."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        await to_thread.run_sync(answering.cancel)

    results: list[Completion] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        results = await to_thread.run_sync(answering.results, limiter=request.app.state.waiting)
        tasks.cancel_scope.cancel()
    return results


async def _close(answering: Answering) -> None:
    with anyio.CancelScope(shield=True):
        await to_thread.run_sync(answering.close)


class _Events(StreamingResponse):
    """Server-sent events that end their engine request however they end, also when they never begin."""

    def __init__(self, answering: Answering, events: AsyncIterator[bytes]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await _close(self._answering)


async def _events(
    answering: Answering, envelope: Envelope, waiting: anyio.CapacityLimiter, *, with_usage: bool
) -> AsyncIterator[bytes]:
    try:
        yield _event(envelope.chunk({"role": "assistant", "content": ""}))
        pieces = answering.pieces()
        while (piece := await to_thread.run_sync(next, pieces, None, limiter=waiting)) is not None:
            yield _event(envelope.chunk({"content": piece}))
        [done] = await to_thread.run_sync(answering.results, limiter=waiting)
        yield _event(envelope.chunk({}, _finish_reason(done)))
        if with_usage:
            yield _event(envelope.usage_chunk(usage(answering.prompt_tokens, len(done.ids))))
        yield b"data: [DONE]\n\n"
    except Exception:
        # The status line is gone already: an error event is all that is left to tell the client.
        logger.exception("an answer broke off")
        yield _event(ApiError(500, "The server failed while answering; its log says why.").body)


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def _whole(
    assistant: Assistant, answering: Answering, envelope: Envelope, results: list[Completion], logprobs: bool
) -> dict[str, Any]:
    choices = [
        choice(
            index,
            _text(assistant, answering, done),
            _finish_reason(done),
            _logprobs(assistant, answering, done) if logprobs else None,
        )
        for index, done in enumerate(results)
    ]
    return envelope.completion(choices, usage(answering.prompt_tokens, sum(len(done.ids) for done in results)))


def _text(assistant: Assistant, answering: Answering, done: Completion) -> str:
    """The answer up to the first stop text."""
    template = assistant.template
    assert template is not None, "a request was rendered with it"
    return cut_at_stop(template.decode(done.ids), answering.stop)


def _finish_reason(done: Completion) -> str:
    return "length" if done.finish_reason == "length" else "stop"


def _logprobs(assistant: Assistant, answering: Answering, done: Completion) -> dict[str, Any]:
    """One entry for each token but the stop token."""
    tops = done.top_logprobs or ((),) * len(done.ids)
    entries = [
        _token(assistant, token, logprob) | {"top_logprobs": [_token(assistant, *other) for other in top]}
        for token, logprob, top in zip(done.ids, done.logprobs, tops, strict=True)
        if token not in answering.stop_ids
    ]
    return {"content": entries, "refusal": None}


def _token(assistant: Assistant, token: int, logprob: float) -> dict[str, Any]:
    """`bytes` is null for a token that is a part of a character."""
    tokenizer: Any = assistant.tokenizer
    text = tokenizer.decode([token])
    data = None if "\ufffd" in text else list(text.encode())
    # JSON has no minus infinity; OpenAI sends this number.
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": data}
