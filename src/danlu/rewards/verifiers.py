"""Verifiers: an answer is right or not, by a rule, held against its prompt's reference.

A reference (`Prompt.reference`) says how with `verifier`, and holds what is right: in `answer`, or in `answers` as the rubric has
it (a list of lists; the variants of the first item count), in `pattern`, `schema` or `tests`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from danlu.rewards import code_tests
from danlu.rewards.choice import LETTERS, letter_in
from danlu.rewards.json_schema import fits, parsed, schema_fault
from danlu.rewards.protocol import Episode, Score, Unscored, never
from danlu.rewards.sandbox import Limits

# A sign counts where it does not follow a digit, as in "5-3"; a comma where three digits follow it.
_NUMBER: Final = re.compile(r"((?:(?<!\d)[-+])?)[$€£¥]?(\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)")
_MARK: Final = "####"
_FENCE: Final = re.compile(r"```(?:json)?[^\S\n]*\n(.*?)```", re.DOTALL | re.IGNORECASE)

# -- right or not --------------------------------------------------------------------------------------------------------


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


def choice(answer: str, reference: Mapping[str, Any]) -> bool:
    """Whether an answer settles on the right letter; see `choice.letter_in`. Without `choices` the options are A to J."""
    found = letter_in(answer, len(reference["choices"]) if reference.get("choices") else 10)
    return found is not None and found in {_plain(variant).upper() for variant in _variants(reference)}


def regex(answer: str, reference: Mapping[str, Any]) -> bool:
    """Whether `pattern` matches somewhere in an answer."""
    return re.search(reference["pattern"], answer) is not None


def fits_schema(answer: str, reference: Mapping[str, Any]) -> bool:
    """Whether an answer is JSON, alone or in its last fenced block, that fits `schema`; see `json_schema`."""
    fenced = _FENCE.findall(answer)
    try:
        return fits(parsed(fenced[-1] if fenced else answer), reference["schema"])
    except ValueError:
        return False


# -- references that cannot be used ----------------------------------------------------------------------------------------


def _no_fault(reference: Mapping[str, Any]) -> str | None:
    return None


def _choice_fault(reference: Mapping[str, Any]) -> str | None:
    wrong = [v for v in _variants(reference) if len(_plain(v)) != 1 or _plain(v).upper() not in LETTERS]
    return f"found {wrong[0]!r} as its answer, expected a letter" if wrong else None


def _regex_fault(reference: Mapping[str, Any]) -> str | None:
    try:
        re.compile(reference["pattern"])
    except (re.error, TypeError) as error:
        return f"its pattern is no regular expression ({error})"
    return None


def _json_fault(reference: Mapping[str, Any]) -> str | None:
    fault = schema_fault(reference["schema"])
    return f"its schema: {fault}" if fault else None


@dataclass(frozen=True)
class Rule:
    """A verifier: what decides, the keys of which a reference needs one, and what may be wrong with such a reference."""

    decides: Callable[[str, Mapping[str, Any]], bool]
    needs: tuple[str, ...] = ("answer", "answers")
    fault: Callable[[Mapping[str, Any]], str | None] = _no_fault


VERIFIERS: Final[dict[str, Rule]] = {
    "number": Rule(number),
    "exact": Rule(exact),
    "choice": Rule(choice, fault=_choice_fault),
    "regex": Rule(regex, ("pattern",), _regex_fault),
    "json": Rule(fits_schema, ("schema",), _json_fault),
    "tests": Rule(code_tests.passes, ("tests",), code_tests.fault),
}


def _variants(reference: Mapping[str, Any]) -> list[str]:
    items = reference.get("answers") or [[reference.get("answer", "")]]
    return [str(variant) for variant in items[0]]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


class Verifier:
    """1 for a right answer, 0 for a wrong one, and 0 where the prompt has no reference.

    Args:
        kind: one of `VERIFIERS` for all prompts, or "auto": the one that each reference names.
        limits: of the code that the verifier `tests` runs.
    """

    name = "verifier"

    def __init__(self, kind: str = "auto", limits: Limits | None = None) -> None:
        self.kind, self.limits = kind, limits or Limits()

    def of(self, reference: Mapping[str, Any]) -> str:
        """The verifier of a reference: its name, known or not; "" if there is none."""
        if self.kind == "auto":
            return str(reference.get("verifier", ""))
        return self.kind if any(reference.get(key) not in (None, []) for key in VERIFIERS[self.kind].needs) else ""

    def fault(self, reference: Mapping[str, Any]) -> str | None:
        """Why no answer can be held against a reference that has a verifier, in a sentence, or None."""
        name = self.of(reference)
        if name not in VERIFIERS:
            return f"there is no verifier '{name}'"
        rule = VERIFIERS[name]
        if not any(reference.get(key) not in (None, []) for key in rule.needs):
            return f"the verifier '{name}' needs {' or '.join(rule.needs)} in the reference"
        fault = rule.fault(reference)
        return f"the verifier '{name}' cannot use the reference: {fault}" if fault else None

    def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
        """See `Reward.score`. Code is run by as many processes as there are cores."""

        def judged(episode: Episode) -> Score:
            return Score(None, "cancelled") if cancelled() else self._score(episode)

        if not any(self.of(e.reference) == "tests" for e in episodes):
            return [judged(e) for e in episodes]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return list(pool.map(judged, episodes))

    def _score(self, episode: Episode) -> Score:
        name = self.of(episode.reference)
        if not name:
            return Score(0.0)
        fault = self.fault(episode.reference)
        if fault:
            return Score(None, fault, "R-VERIFIER")
        if name != "tests":
            return Score(float(VERIFIERS[name].decides(episode.response, episode.reference)))
        try:
            return Score(float(code_tests.passes(episode.response, episode.reference, self.limits)))
        except Unscored as error:
            return error.score
