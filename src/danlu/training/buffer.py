"""Answers that wait to be trained on, in order: in memory, or as files."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from danlu import atomic
from danlu.training import distributed
from danlu.tree import Segment, Trajectory


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """A finished episode; `trajectory.policy_version` says which policy it is of.

    Args:
        score: of the judge, as it came.
        uses: updates that it was taken for.
    """

    trajectory: Trajectory
    score: float
    uses: int = 0


class ReplayBuffer:
    """A queue. What is taken goes to its end until it has been used often enough, so that all wait equally long.

    Every rank holds the same answers. A checkpoint holds them all, also those that stand in files: these can go as soon as they
    are taken, and a stage that goes on writes them anew.

    Args:
        reuse: >= 1, how often an answer is taken.
        folder: for files (each rank its own, in a folder below); None: in memory.
    """

    def __init__(self, reuse: int = 1, folder: Path | None = None) -> None:
        self.reuse = reuse
        self.folder = folder / f"rank-{distributed.world()[0]}" if folder is not None else None
        self._waiting: deque[ScoredAnswer | Path] = deque()
        self._written = 0
        self.clear()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, answers: Iterable[ScoredAnswer]) -> None:
        """To the end of the queue."""
        for answer in answers:
            if self.folder is None:
                self._waiting.append(answer)
                continue
            path = self.folder / f"{self._written:08d}.json"
            atomic.write_text(path, json.dumps(_plain(answer)))
            self._written += 1
            self._waiting.append(path)

    def take(self, count: int) -> list[ScoredAnswer]:
        """The first `count` of the queue, which must hold as many; no answer twice."""
        assert count <= len(self), "ask for no more than there are"
        taken = []
        for _ in range(count):
            place = self._waiting.popleft()
            taken.append(self._read(place))
            if isinstance(place, Path):
                place.unlink()
        used = [replace(answer, uses=answer.uses + 1) for answer in taken]
        self.add(answer for answer in used if answer.uses < self.reuse)
        return taken

    def clear(self) -> None:
        """Forgets everything, files too."""
        self._waiting.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # other ranks' files may be there, or nothing at all
                self.folder.parent.rmdir()

    def _read(self, place: ScoredAnswer | Path) -> ScoredAnswer:
        return _answer(json.loads(place.read_text("utf-8"))) if isinstance(place, Path) else place

    def state_dict(self) -> dict[str, Any]:
        """See `checkpoint.Stateful`."""
        return {"answers": [_plain(self._read(place)) for place in self._waiting]}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `checkpoint.Stateful`."""
        answers = [_answer(plain) for plain in state["answers"]]
        self.clear()
        self.add(answers)


def _plain(answer: ScoredAnswer) -> dict[str, Any]:
    """As numbers and lists that come back exactly from a checkpoint and from JSON."""
    trajectory = answer.trajectory
    return {
        "segments": [
            [list(s.ids), s.is_action, None if s.logprobs is None else list(s.logprobs)] for s in trajectory.segments
        ],
        "policy_version": trajectory.policy_version,
        "finished": trajectory.finished,
        "seed": trajectory.seed,
        "info": dict(trajectory.info),
        "score": answer.score,
        "uses": answer.uses,
    }


def _answer(plain: dict[str, Any]) -> ScoredAnswer:
    segments = tuple(
        Segment(tuple(ids), is_action, None if logprobs is None else tuple(logprobs))
        for ids, is_action, logprobs in plain["segments"]
    )
    trajectory = Trajectory(segments, plain["policy_version"], plain["finished"], plain["seed"], dict(plain["info"]))
    return ScoredAnswer(trajectory, plain["score"], plain["uses"])
