"""Who may talk to the server: a plain ASGI layer around the application.

On a loopback address everybody on this machine may, but no web page of somebody else: a foreign `Host` (DNS rebinding)
and a foreign `Origin` (a page that posts to localhost) are refused. With an API key, `/v1` and `/api` want it.
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danlu.exceptions import UsageError
from danlu.serve.protocol import ApiError

MAX_BODY: Final = 8 << 20
READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether a host name or address can be reached from this machine only."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, api_key: str | None) -> None:
    """Refuses to open the server to others without a key.

    Raises:
        UsageError: the host is not a loopback address and there is no key, or the key cannot be sent in a header.
    """
    if api_key is not None and (not api_key.strip() or not api_key.isascii() or not api_key.isprintable()):
        raise UsageError(
            "--api-key must be printable ASCII text that is not empty", hint="for example: openssl rand -hex 16"
        )
    if api_key is None and not is_loopback(host):
        raise UsageError(
            f"--host {host} lets other machines use this model, read its answers and vote, and there is no --api-key",
            hint="add --api-key KEY (or DANLU_API_KEY), or stay on 127.0.0.1",
        )


class Guard:
    """The layer itself.

    Args:
        app: what it protects.
        api_key: wanted as `Authorization: Bearer KEY` on `/v1` and `/api`.
        local: bound to a loopback address: only loopback names are accepted in `Host`.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, local: bool) -> None:
        self.app = app
        self._key = api_key.strip().encode() if api_key is not None else None
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, _limited(receive), send_with_headers)
        except ApiError as refusal:
            await refusal.response()(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            message = f"This server is for this machine only; the request is for the host '{host}'."
            raise ApiError(403, message, code="foreign_host")
        if scope["method"] not in READING:
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
                raise ApiError(403, f"Requests from pages of '{origin}' are refused.", code="foreign_origin")
            if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
                raise ApiError(403, "Requests from pages of other sites are refused.", code="foreign_origin")
        if self._key is not None and scope["path"].startswith(("/v1", "/api")):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
                raise ApiError(401, "Send the API key as 'Authorization: Bearer KEY'.", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > MAX_BODY:
            raise _too_large()


def _too_large() -> ApiError:
    return ApiError(413, f"The request body is larger than {MAX_BODY >> 20} MiB.", code="request_too_large")


def _limited(receive: Receive) -> Receive:
    """Counts what a body without a length really holds."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY:
            raise _too_large()
        return message

    return counted
