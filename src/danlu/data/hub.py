"""Data sets of the Hugging Face hub, `hf:owner/name[:split]`, through the optional library `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from danlu.data.files import HUB
from danlu.data.formats.containers import RawRow
from danlu.data.formats.tables import plain_value
from danlu.data.problems import RowError

_USAGE = "Write hf:owner/name, hf:owner/name:split, or hf:owner/name:configuration:split."


def hub_rows(path: str) -> Iterator[RawRow | RowError]:
    """The rows of a data set of the hub, numbered from 1; it is downloaded once and then read from the library's cache.

    Code that comes with a data set is never run.

    Args:
        path: `hf:owner/name`, then its split (by default `train`, or the only one), before that a configuration if it
            has several: `hf:openai/gsm8k:main:train`.
    """
    try:
        dataset = _load(path)
    except RowError as error:
        yield error
        return
    licence = str(getattr(getattr(dataset, "info", None), "license", None) or "")
    try:
        for number, row in enumerate(dataset, start=1):
            yield RawRow(path, number, plain_value(row), licence=licence)
    except Exception as error:  # the library raises whatever its many readers raise
        yield _failed(path, error)


def _load(path: str) -> Any:
    name, *rest = path.removeprefix(HUB).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise RowError(f"'{path}' names no data set", code="bad-path", hint=_USAGE, file=path)
    split = rest[-1] if rest else None
    configuration = rest[0] if len(rest) == 2 else None
    try:
        import datasets
    except ImportError as error:
        raise RowError(
            "data of the hub needs the library datasets, which is not installed",
            code="missing-library",
            hint="pip install 'danlu[hub]'",
            file=path,
        ) from error
    try:
        found = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # not found, no network, a missing configuration, ...: each has a class of its own
        raise _failed(path, error) from error
    if split is not None or not isinstance(found, Mapping):
        return found
    if "train" in found or len(found) == 1:
        return found["train"] if "train" in found else next(iter(found.values()))
    raise RowError(
        f"the data set has the splits {', '.join(found)}", code="bad-path", hint=f"Name one: {path}:SPLIT", file=path
    )


def _failed(path: str, error: Exception) -> RowError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return RowError(
        f"the data set cannot be loaded: {reason}",
        code="hub-failed",
        hint=f"Is there a network, and is the name right? {_USAGE}",
        file=path,
    )
