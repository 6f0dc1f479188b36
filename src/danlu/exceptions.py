"""One exception tree. Every error says what was found, where, what was expected and what to do next."""

from __future__ import annotations

from pathlib import Path


class DanluError(Exception):
    """Base of every error that danlu raises on purpose.

    Args:
        message: one sentence: what was found and what was expected.
        hint: the next step for the user, or "".
        file: the file at fault, if any.
        line: 1-based line in that file, if known.
        field: the field at fault, if known.
    """

    exit_status = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        file: str | Path | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.file = str(file) if file is not None else None
        self.line = line
        self.field = field

    @property
    def where(self) -> str:
        """`file:line: field`, as far as known."""
        place = self.file or ""
        if self.line is not None:
            place += f":{self.line}"
        if self.field:
            place += f": field '{self.field}'" if place else f"field '{self.field}'"
        return place

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  -> {self.hint}" if self.hint else text


class UsageError(DanluError):
    """The command line is wrong (exit status 2)."""

    exit_status = 2


class SettingsError(DanluError):
    """A setting or recipe key is unknown, missing or out of range."""


class DataError(DanluError):
    """A data file is missing, empty, broken or of the wrong kind."""


class ModelError(DanluError):
    """A model folder is missing, incomplete or not supported."""


class TemplateError(DanluError):
    """A chat template cannot be used to render or to mask a conversation."""


class CheckpointError(DanluError):
    """A checkpoint is damaged, of a newer schema, or belongs to other settings."""


class EngineError(DanluError):
    """A generation request cannot be served."""


class GenerationFailed(EngineError):
    """The engine broke while it worked on a request (out of memory, ...): not the request's fault."""


class RewardError(DanluError):
    """A reward returned the wrong count or a value that is no number."""


class TrainingError(DanluError):
    """Training cannot go on (diverged, nothing to train on, ...)."""


class PeerLost(TrainingError):
    """Another process that shares the work has ended."""


class GateError(DanluError):
    """A gate between two stages does not hold, and nobody said to go on all the same."""


class RunError(DanluError):
    """A run folder or a stage in it is missing or not in the state that was asked for."""


class KnowledgeError(DanluError):
    """A fact is incomplete or already there, or a patch does not fit its model or was refused."""


class Interrupted(DanluError):
    """The user pressed Ctrl-C or the process was told to end; the state was saved (exit status 130)."""

    exit_status = 130
