"""A stage in as many processes as its settings ask for; or, under torchrun, in all that there are.

With `processes: N` the user's process starts N others for its training stages (`training/launch.py`) and waits. Under
torchrun or accelerate the processes are there already: rank 0 is the user's process and leads; the others follow, which
means that they take part in the training stages and do nothing else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from danlu.exceptions import PeerLost
from danlu.pipeline.stages import STAGES, Outcome
from danlu.train_config import StageSettings, TrainSettings
from danlu.training import distributed
from danlu.training.launch import Crew, resolve_count
from danlu.training.peak import peak_memory_mb, reset_peak_memory
from danlu.training.runs import resolve_model

Task = tuple[str, StageSettings]
# A follower that failed gives rank 0 so long to say the same, before it speaks itself.
PATIENCE_SECONDS = 3.0
_lost = False


class Runner:
    """Runs stages one after the other; its processes stay from one training stage to the next. Use as a context manager."""

    def __init__(self) -> None:
        self._crew: Crew | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dismiss()

    def run(self, kind: str, settings: StageSettings) -> Outcome:
        """What the stage reports, with the peak memory of all its processes.

        Raises:
            PeerLost: another process of torchrun's has ended.
        """
        if not isinstance(settings, TrainSettings):
            with distributed.alone():
                return work((kind, settings))
        if distributed.launched():
            with _leading():
                return work(distributed.same((kind, settings)))
        count = resolve_count(settings.processes, _parameters(settings))
        if count == 1:
            return work((kind, settings))
        if self._crew is None or self._crew.size != count:
            self._dismiss()
            self._crew = Crew(count)
        outcomes = self._crew.run(work, (kind, settings))
        outcomes[0].peak_memory_mb = sum(o.peak_memory_mb for o in outcomes)
        return outcomes[0]

    def _dismiss(self) -> None:
        if self._crew is not None:
            self._crew.close()
            self._crew = None


def work(task: Task) -> Outcome:
    """The stage itself, in this process."""
    kind, settings = task
    reset_peak_memory()
    outcome: Outcome = STAGES[kind].run(settings)
    outcome.peak_memory_mb = peak_memory_mb()
    return outcome


def _parameters(settings: TrainSettings) -> int:
    """About how many parameters a process trains: from the weight files (16 bits each), 0 for a starter or a hub id."""
    folder = Path(resolve_model(settings.model)) if settings.model else Path()
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) // 2 if settings.model else 0


# -- torchrun ------------------------------------------------------------------------------------------------------------


def lead_or_follow(verb: Callable[[], int]) -> int:
    """The exit status of a command line of which there are as many processes as torchrun started."""
    with distributed.naming_the_lost():
        distributed.start()
    if not distributed.is_main():
        return _follow()
    try:
        return verb()
    finally:
        if not _lost:
            with suppress(PeerLost), distributed.naming_the_lost():
                distributed.same(None)
                distributed.stop()


@contextmanager
def _leading() -> Iterator[None]:
    """After an error in the middle of a stage nobody knows what the others wait for: they end when this process does."""
    global _lost
    try:
        with distributed.naming_the_lost():
            yield
    except BaseException:
        _lost = True
        raise


def _follow() -> int:
    try:
        with distributed.naming_the_lost():
            while (task := distributed.same(None)) is not None:
                work(task)
        distributed.stop()
        return 0
    except KeyboardInterrupt:
        return 1
    except PeerLost as error:  # rank 0 may be the one that cannot say it
        print(f"danlu: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        time.sleep(PATIENCE_SECONDS)
        print(f"danlu: rank {distributed.world()[0]}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
