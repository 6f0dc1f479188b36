"""Signs of life: each rank counts up in the store that all met by, and looks whether the others do.

A rank that is killed closes its connections, which shows at once. One that hangs, or whose machine is gone, does not, and the
others would wait for it for ever. Threads count and look, so a rank that saves or compiles for minutes still beats.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

EVERY_SECONDS = 1.0
# A rank that has not counted up for so long is lost.
SILENT_SECONDS = 20.0
# So long is enough when a connection broke, which says that some rank has ended; and for a rank to leave after rank 0.
BROKEN_SECONDS = 5.0
# A look that comes so late says that this process was not running either.
LATE_SECONDS = 5.0


class Store(Protocol):
    """What of a `torch.distributed.Store` is needed."""

    def set(self, key: str, value: str, /) -> None:
        """Keeps a value."""
        ...

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """The values of keys that are there."""
        ...


class Pulse:
    """When each rank was last heard of. Times are seconds of one clock."""

    def __init__(self, size: int, now: float) -> None:
        self._beats: list[bytes] = [b""] * size
        self._changed = [now] * size
        self._answered = now
        self._broken: float | None = None

    def heard(self, beats: Sequence[bytes], now: float) -> None:
        """The store's answer: every rank's count."""
        self._changed = [
            now if beat != known else then for beat, known, then in zip(beats, self._beats, self._changed, strict=True)
        ]
        self._beats, self._answered = list(beats), now

    def broke(self, now: float) -> None:
        """The connection to the store was closed."""
        self._broken = now

    def slept(self, now: float) -> None:
        """This process did not run for a while: what it has not heard meanwhile says nothing."""
        self._changed, self._answered = [now] * len(self._changed), now

    def silent(self, now: float, seconds: float) -> int | None:
        """The rank that was not heard of for longest, if it is so many seconds. Rank 0 answers for the store, which it or
        its launcher keeps: while the store is silent, nothing is known of the others.
        """
        if self._broken is not None:
            return 0 if now - self._broken >= BROKEN_SECONDS else None
        if now - self._answered >= seconds:
            return 0
        rank = min(range(len(self._changed)), key=self._changed.__getitem__)
        return rank if self._answered - self._changed[rank] >= seconds else None


class Heartbeat:
    """Beats for this rank and watches the others, from `start` to `end`.

    Args:
        store: a connection of its own, since the threads must not wait for what others ask of it.
        name: of this group among others that the store may know.
        on_lost: called with the rank that was silent for `SILENT_SECONDS`, again and again until `end`.
    """

    def __init__(self, store: Store, name: str, rank: int, size: int, on_lost: Callable[[int], None]) -> None:
        self._store, self._on_lost = store, on_lost
        self._own = f"{name}/{rank}"
        self._keys = [f"{name}/{number}" for number in range(size)]
        self._pulse = Pulse(size, time.monotonic())
        self._lock = threading.Lock()
        self._ended = threading.Event()
        store.set(self._own, "0")

    def start(self) -> None:
        """To be called when all ranks have made theirs."""
        with self._lock:
            self._pulse.slept(time.monotonic())
        for work in (self._beat, self._watch):
            threading.Thread(target=work, daemon=True, name=f"danlu{work.__name__}").start()

    def end(self) -> None:
        """No more beats, no more looks."""
        self._ended.set()

    def missing(self) -> int | None:
        """Who has gone, after a connection broke: None if nobody falls silent."""
        limit = time.monotonic() + 2 * BROKEN_SECONDS
        while (rank := self._silent(BROKEN_SECONDS)) is None and time.monotonic() < limit:
            time.sleep(0.1)
        return rank

    def _silent(self, seconds: float) -> int | None:
        with self._lock:
            return self._pulse.silent(time.monotonic(), seconds)

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(EVERY_SECONDS):
            count += 1
            try:
                self._store.set(self._own, str(count))
                beats = self._store.multi_get(self._keys)
            except RuntimeError:  # torch's errors of networks and stores are such
                with self._lock:
                    self._pulse.broke(time.monotonic())
                return
            with self._lock:
                self._pulse.heard(beats, time.monotonic())

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(EVERY_SECONDS):
            now = time.monotonic()
            if now - last > LATE_SECONDS:
                with self._lock:
                    self._pulse.slept(now)
            last = now
            lost = self._silent(SILENT_SECONDS)
            if lost is not None and not self._ended.is_set():
                self._on_lost(lost)
