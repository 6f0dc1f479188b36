"""The server: an OpenAI-compatible API, a chat page and its votes, on one assistant."""

from __future__ import annotations

import errno
import mimetypes
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anyio
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from danlu.assistant import Assistant
from danlu.data.feedback import FeedbackDatabase
from danlu.exceptions import DanluError, EngineError, GenerationFailed, ModelError, TemplateError
from danlu.serve import completions, feedback, page
from danlu.serve.guard import Guard
from danlu.serve.protocol import ApiError, from_validation

WAITING_THREADS: Final = 256
SHUTDOWN_SECONDS: Final = 3
STATIC: Final = Path(__file__).parent / "web" / "static"


def create_app(
    assistant: Assistant,
    database: FeedbackDatabase,
    *,
    api_key: str | None = None,
    local: bool = True,
    adapters: Mapping[str, Assistant] | None = None,
) -> FastAPI:
    """The application.

    Args:
        assistant: what answers; its engine is shared by all requests.
        database: where votes go.
        api_key: wanted on `/v1` and `/api` if given.
        local: the server is bound to a loopback address (see `guard`).
        adapters: further assistants by the name that requests give as `model` (see `Assistant.with_adapter`).

    Raises:
        ModelError: the model has no tokenizer.
    """
    if assistant.template is None:
        raise ModelError(
            "this model folder has no tokenizer files, so it cannot be served",
            file=assistant.name or None,
            hint="add tokenizer.json",
        )
    # Some systems map .js to text/plain, which browsers refuse for modules.
    mimetypes.add_type("text/javascript", ".js")
    app = FastAPI(title="danlu", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.assistant = assistant
    app.state.feedback = database
    app.state.model_name = assistant.name or "danlu"
    app.state.adapters = dict(adapters or {})
    app.state.started = int(time.time())
    app.state.waiting = anyio.CapacityLimiter(WAITING_THREADS)
    for part in (completions, feedback, page):
        app.include_router(part.router)
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    _answer_errors(app)
    app.add_middleware(Guard, api_key=api_key, local=local)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Every error has OpenAI's shape."""

    @app.exception_handler(ApiError)
    def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error).response()

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        detail = "There is nothing at this address" if error.status_code == 404 else str(error.detail)
        return ApiError(error.status_code, f"{detail} ({request.method} {request.url.path}).").response()

    @app.exception_handler(TemplateError)
    @app.exception_handler(EngineError)
    def refused(_: Request, error: DanluError) -> JSONResponse:
        return ApiError(400, error.message, param="messages").response()

    @app.exception_handler(GenerationFailed)
    @app.exception_handler(Exception)
    def broken(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"The server failed ({type(error).__name__}); its log says why.").response()


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, taken before the model is loaded, so that a used port is known at once.

    Raises:
        DanluError: the port is in use or the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise DanluError(f"the address {host} cannot be used: {error.strerror}", hint="see --host") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise DanluError(
                f"port {port} on {host} is in use by another program",
                hint="choose another with --port (0 takes a free one)",
            ) from error
        raise DanluError(
            f"cannot listen on {host}, port {port}: {error.strerror}", hint="see --host and --port"
        ) from error
    return bound


def make_server(app: FastAPI) -> uvicorn.Server:
    """A uvicorn server for an application; call `run(sockets=[listen(...)])`."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )
