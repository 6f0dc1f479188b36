"""What engines that go on in steps do alike: whoever waits for a token takes the lock and moves all requests one step on."""

from __future__ import annotations

import threading
import uuid
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from danlu.exceptions import EngineError, GenerationFailed
from danlu.generation.protocol import Completion, FinishReason, Request, Token, TopLogprobs, require_single


@dataclass(eq=False, kw_only=True)
class Row:
    """The state of one request. Readers without the lock go by the length of `ids`, so it grows last."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    version: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[TopLogprobs] = field(default_factory=list)
    finished: FinishReason | None = None
    error: BaseException | None = None
    read: int = 0


R = TypeVar("R", bound=Row)


class StepwiseEngine(ABC, Generic[R]):
    """Hands out what `step` has made of the rows in `_rows`.

    Attributes:
        context: tokens that prompt and answer may have together.
        vocabulary: rows of the model's embedding; none: the backend looks at ids itself.
    """

    context: int
    vocabulary: int | None = None

    def __init__(self) -> None:
        self.version = 0
        self._lock = threading.RLock()
        self._rows: dict[str, R] = {}

    @abstractmethod
    def step(self) -> None:
        """Moves every request one step on; the lock is held."""

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""

    def stream(self, request_id: str) -> Iterator[Token]:
        """See `Engine.stream`."""
        row = self._row(request_id)
        try:
            while True:
                # Looked at before the tokens: another thread may append the last one and finish the row in between.
                error, finished = row.error, row.finished
                while row.read < len(row.ids):
                    at, row.read = row.read, row.read + 1
                    yield Token(row.ids[at], row.logprobs[at], row.tops[at] if at < len(row.tops) else ())
                if error is not None:
                    raise GenerationFailed(f"generation failed: {error}") from error
                if finished is not None:
                    return
                self._advance(row, row.read)
        finally:
            if row.finished is None:
                self.cancel(request_id)

    def result(self, request_id: str) -> Completion:
        """See `Engine.result`."""
        row = self._row(request_id)
        try:
            while row.finished is None:
                self._advance(row, len(row.ids))
        finally:
            self.cancel(request_id)
            with self._lock:
                self._rows.pop(request_id, None)
        if row.error is not None:
            raise GenerationFailed(f"generation failed: {row.error}") from row.error
        return Completion(row.id, tuple(row.ids), tuple(row.logprobs), row.finished, row.version, tuple(row.tops))

    def _check(self, request: Request) -> None:
        """Raises EngineError for several answers at once, and a prompt that is empty, has unknown ids or leaves no room."""
        prompt = len(request.prompt_ids)
        require_single(request.params)
        if prompt == 0:
            raise EngineError("the prompt is empty")
        self._check_ids(request.prompt_ids)
        if prompt >= self.context:
            raise EngineError(
                f"the prompt has {prompt} tokens and the model's context holds {self.context}",
                hint="shorten the conversation",
            )

    def _check_ids(self, prompt_ids: Sequence[int]) -> None:
        """In a step that others share it would be too late to find out."""
        try:
            ids = array("q", prompt_ids)
        except (TypeError, OverflowError) as error:
            raise EngineError(f"the prompt is not made of token ids: {error}") from error
        unknown = [i for i in (min(ids), max(ids)) if i < 0 or (self.vocabulary is not None and i >= self.vocabulary)]
        if unknown:
            raise EngineError(
                f"the prompt has the token id {unknown[0]}, which the model does not know",
                hint=f"its ids are 0 to {self.vocabulary - 1}" if self.vocabulary is not None else "",
            )

    def _row(self, request_id: str) -> R:
        row = self._rows.get(request_id)
        if row is None:
            raise EngineError(f"no request has the id {request_id}")
        return row

    def _advance(self, row: R, known: int) -> None:
        """One step, unless another thread already took this row past the `known` tokens."""
        with self._lock:
            if row.finished is None and len(row.ids) <= known:
                self.step()
