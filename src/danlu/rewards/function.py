"""A function of the user's own as a reward."""

from __future__ import annotations

import importlib
import importlib.util
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from danlu.exceptions import SettingsError
from danlu.rewards.protocol import Episode, Score, Unscored, never


class FunctionReward:
    """Calls `function(responses, prompts, references, **options)` with a whole batch.

    Args:
        where: how the function is named in errors.
        function: takes texts, lists of messages and references (mappings); gives one number for each.
    """

    def __init__(self, name: str, where: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self.name, self.where, self.function, self.options = name, where, function, options

    def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
        """See `Reward.score`.

        Raises:
            Unscored: the function failed, or gave the wrong count.
        """
        if cancelled():
            return [Score(None, "cancelled")] * len(episodes)
        responses = [e.response for e in episodes]
        prompts = [list(e.prompt) for e in episodes]
        try:
            found = list(self.function(responses, prompts, [e.reference for e in episodes], **self.options))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}, line {last.lineno}"
            raise Unscored(
                "R-FUNCTION", f"{self.where} failed with {type(error).__name__}: {error} ({place})"
            ) from error
        return scores_of(found, len(episodes), self.where)


def scores_of(found: Sequence[Any], count: int, where: str) -> list[Score]:
    """What something gave as scores of `count` answers, each checked.

    Args:
        where: what gave it, for errors.

    Raises:
        Unscored: it gave another number of scores.
    """
    if len(found) != count:
        raise Unscored("R-COUNT", f"{where} gave {len(found)} scores for {count} answers")
    scores = []
    for index, value in enumerate(found):
        plain = _plain(value)
        if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
            scores.append(Score(None, f"{where} gave {_short(plain)} as score {index}, expected a number", "R-TYPE"))
        elif not math.isfinite(plain):
            scores.append(Score(None, f"{where} gave {plain} as score {index}", "R-NAN"))
        else:
            scores.append(Score(float(plain)))
    return scores


def _plain(value: Any) -> Any:
    """A number of numpy's or torch's as one of Python's."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (ValueError, RuntimeError):  # an array of several
        return value


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."


def load_function(named: str, field: str) -> Callable[..., Any]:
    """A function by `module:function` or `path/to/file.py:function`.

    Args:
        field: of the settings, for errors.

    Raises:
        SettingsError: there is no such file, module or function, or it cannot be imported.
    """
    place, _, name = named.rpartition(":")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise SettingsError(
            f"{place} cannot be imported: {type(error).__name__}: {error}",
            field=field,
            hint="module:function, or path/to/file.py:function",
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        own = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        hint = f"functions there: {', '.join(own[:10])}" if own else ""
        raise SettingsError(f"{place} has no function '{name}'", field=field, hint=hint)
    function: Callable[..., Any] = found
    return function


def _from_file(path: Path) -> Any:
    name = f"danlu_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickle and dataclasses look for it
    spec.loader.exec_module(module)
    return module
