"""Asking a server for scores: retries with backoff, many requests at once, and a cache on disk, so that nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from danlu import atomic
from danlu.exceptions import SettingsError
from danlu.reward_config import Endpoint
from danlu.rewards.protocol import Unscored

Task = TypeVar("Task")
Result = TypeVar("Result")
AT_HOME = ("127.0.0.1", "localhost", "::1")
LONGEST_WAIT = 60.0
LATER = 429


class Client:
    """POSTs JSON to one URL.

    Args:
        term: time limit, retries, concurrency and the name of the key's variable.
        field: of the term in the settings, for errors.

    Raises:
        SettingsError: the variable with the key is not set.
    """

    def __init__(self, url: str, term: Endpoint, field: str) -> None:
        self.url, self.term = url, term
        headers = {}
        if term.api_key_env:
            key = os.environ.get(term.api_key_env)
            if not key:
                raise SettingsError(
                    f"the environment has no {term.api_key_env}",
                    field=f"{field}.api_key_env",
                    hint=f"export {term.api_key_env}=... before danlu is started",
                )
            headers["authorization"] = f"Bearer {key}"
        # A proxy of the environment is for what is elsewhere.
        home = urlsplit(url).hostname in AT_HOME
        self._http = httpx.Client(timeout=term.timeout, headers=headers, trust_env=not home)

    def post(self, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers with.

        Raises:
            Unscored: it does not answer, answers with an error status, or with something that is not JSON; after all retries.
        """
        wait, reason = self.term.backoff, ""
        for attempt in range(self.term.retries + 1):
            if attempt:
                time.sleep(min(wait, LONGEST_WAIT))
                wait *= 2
            try:
                reply = self._http.post(self.url, json=body)
            except httpx.TimeoutException:
                reason = f"did not answer within {self.term.timeout:g} s"
                continue
            except httpx.HTTPError as error:
                reason = f"cannot be reached ({error or type(error).__name__})"
                continue
            if reply.status_code == LATER or reply.status_code >= 500:
                reason = f"answered with status {reply.status_code}: {_first_line(reply.text)}"
                continue
            if reply.status_code != 200:
                raise Unscored(
                    "R-STATUS", f"{self.url} answered with status {reply.status_code}: {_first_line(reply.text)}"
                )
            try:
                return reply.json()
            except ValueError:
                raise Unscored("R-ENDPOINT", f"{self.url} answered with no JSON: {_first_line(reply.text)}") from None
        tries = f" ({self.term.retries + 1} tries)" if self.term.retries else ""
        raise Unscored("R-ENDPOINT", f"{self.url} {reason}{tries}")

    def together(self, tasks: Sequence[Task], work: Callable[[Task], Result]) -> list[Result | Unscored]:
        """`work` on each task, several at once; what it raises as `Unscored` stands in the place of its result.

        When a task got no answer after all retries, the others are not tried any more: the server is gone.
        """
        gone: list[Unscored] = []
        lock = threading.Lock()

        def one(task: Task) -> Result | Unscored:
            if gone:
                return gone[0]
            try:
                return work(task)
            except Unscored as error:
                if error.code == "R-ENDPOINT":
                    with lock:
                        gone.append(error)
                return error

        with ThreadPoolExecutor(self.term.concurrency) as pool:
            return list(pool.map(one, tasks))


def _first_line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 120 else f"{line[:120]}..."


class Cache:
    """Answers by the hash of everything that was asked; one small file each.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, asked: Any) -> Any:
        """What was answered, or None."""
        path = self._path(asked)
        return json.loads(path.read_text("utf-8")) if path is not None and path.is_file() else None

    def put(self, asked: Any, answered: Any) -> None:
        """Keeps an answer that is not None."""
        path = self._path(asked)
        if path is not None:
            atomic.write_text(path, json.dumps(answered, ensure_ascii=False))

    def _path(self, asked: Any) -> Path | None:
        if self.folder is None:
            return None
        plain = json.dumps(asked, ensure_ascii=False, sort_keys=True, default=str)
        name = hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.json"
