"""Verifiers: an answer is right or not, by a rule, held against its prompt's reference.

A reference (`Prompt.reference`) says how with `verifier`, and holds what is right in `answer`, or in `answers` as the rubric has
it (a list of lists; the variants of the first item count).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from danlu.rewards.protocol import Episode, Score, never

# A sign counts where it does not follow a digit, as in "5-3"; a comma where three digits follow it.
_NUMBER: Final = re.compile(r"((?:(?<!\d)[-+])?)[$€£¥]?(\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)")
_MARK: Final = "####"


def exact(answer: str, reference: Mapping[str, Any]) -> bool:
    """Whether an answer equals a right one, up to Unicode compatibility and white space."""
    return _plain(answer) in {_plain(variant) for variant in _variants(reference)}


def number(answer: str, reference: Mapping[str, Any]) -> bool:
    """Whether the number of an answer equals a right one: the first after its last `####`, else its last (Cobbe et al. 2021)."""
    found = number_in(answer)
    return found is not None and found in {number_in(variant) for variant in _variants(reference)}


def number_in(text: str) -> Decimal | None:
    """The number that a text ends up with, or None; thousands separators and currency signs are left out."""
    plain = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    _, mark, end = plain.rpartition(_MARK)
    found = _NUMBER.findall(end)
    if not found:
        return None
    sign, digits = found[0 if mark else -1]
    return Decimal(sign + digits.replace(",", ""))


VERIFIERS: Final[dict[str, Callable[[str, Mapping[str, Any]], bool]]] = {"number": number, "exact": exact}


def _variants(reference: Mapping[str, Any]) -> list[str]:
    items = reference.get("answers") or [[reference.get("answer", "")]]
    return [str(variant) for variant in items[0]]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


class Verifier:
    """1 for a right answer, 0 for a wrong one, and 0 where the prompt has no reference.

    Args:
        kind: one of `VERIFIERS` for all prompts, or "auto": the one that each reference names.
    """

    name = "verifier"

    def __init__(self, kind: str = "auto") -> None:
        self.kind = kind

    def of(self, reference: Mapping[str, Any]) -> str:
        """The verifier of a reference: its name, known or not; "" if there is none."""
        if self.kind == "auto":
            return str(reference.get("verifier", ""))
        return self.kind if "answer" in reference or reference.get("answers") else ""

    def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
        """See `Reward.score`."""
        return [Score(None, "cancelled") if cancelled() else self._score(e) for e in episodes]

    def _score(self, episode: Episode) -> Score:
        name = self.of(episode.reference)
        if not name:
            return Score(0.0)
        if name not in VERIFIERS:
            return Score(None, f"there is no verifier '{name}'")
        return Score(float(VERIFIERS[name](episode.response, episode.reference)))
