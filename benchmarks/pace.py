"""Trainers paced from outside: a session is asked for its next step, and that is where a benchmark measures or waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from danlu.training.session import Session


@contextmanager
def paced(
    *,
    before: Callable[[], None] = lambda: None,
    on_log: Callable[[dict[str, float], int], None] = lambda metrics, tokens: None,
    after: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Every session calls `before` a step, `on_log` with the step's metrics and tokens, and `after` it."""
    steps, log = Session.steps, Session.log

    def watched(self: Session) -> Iterator[int]:
        for step in steps(self):
            before()
            yield step
            after()

    def logged(self: Session, step: int, metrics: dict[str, float], *, tokens: int, note: str) -> None:
        log(self, step, metrics, tokens=tokens, note=note)
        on_log(metrics, tokens)

    with mock.patch.object(Session, "steps", watched), mock.patch.object(Session, "log", logged):
        yield
