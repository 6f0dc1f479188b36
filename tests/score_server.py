"""A real HTTP server on this machine that scores answers as a test wants it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What is asked, to (status, body); a body that is no text is sent as JSON.
Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class ScoreServer:
    """Counts what it is asked; `die_after` requests it closes every connection without a word.

    Attributes:
        asked: the bodies, in order of arrival; headers: of the last request.
    """

    def __init__(self, answer: Answer, *, die_after: int | None = None, port: int = 0) -> None:
        self.answer, self.die_after = answer, die_after
        self.asked: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if server.die_after is not None and len(server.asked) >= server.die_after:
                    self.close_connection = True
                    return
                server.asked.append(body)
                server.headers = {k.lower(): v for k, v in self.headers.items()}
                status, said = server.answer(body)
                data = (said if isinstance(said, str) else json.dumps(said)).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def serving(answer: Answer, *, die_after: int | None = None, port: int = 0) -> Iterator[ScoreServer]:
    server = ScoreServer(answer, die_after=die_after, port=port)
    try:
        yield server
    finally:
        server.close()


def lengths(body: dict[str, Any]) -> tuple[int, Any]:
    """Scores an answer by its number of characters."""
    return 200, {"scores": [len(r) / 10 for r in body["responses"]]}


def says(reply: str) -> Answer:
    """A judge that always gives the same reply."""
    return lambda body: (200, {"choices": [{"message": {"role": "assistant", "content": reply}}]})
