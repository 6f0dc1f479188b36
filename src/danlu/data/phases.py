"""Splitting into named parts by a hash of the prompt: equal prompts stay together, and added rows move no other row."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from danlu.data.split import prompt_text
from danlu.exceptions import SettingsError
from danlu.types import Record

PHASES: Final = ("sft", "reward", "rl")


@dataclass(frozen=True, slots=True)
class Part:
    """A part's name and its share of the prompts; shares need not add up to 1."""

    name: str
    share: float


class Splitter:
    """Says of each record which part it belongs to.

    Args:
        parts: at least two, each with a share above 0.
        salt: mixed into the hash. Splits with different salts are independent of each other: otherwise the test part
            would hold prompts of the first phase only.
    """

    def __init__(self, parts: Sequence[Part], salt: str) -> None:
        if len(parts) < 2:
            raise SettingsError(f"found {len(parts)} part, expected at least 2", field="parts")
        names = [part.name for part in parts]
        if len(set(names)) < len(names):
            raise SettingsError(f"a part is named twice: {', '.join(names)}", field="parts")
        self.parts = tuple(parts)
        self._salt = salt
        self._bounds = list(accumulate(part.share for part in parts))

    def part(self, record: Record) -> int:
        """The place of the record's part in `parts`."""
        digest = hashlib.sha256(f"{self._salt}\0{prompt_text(record)}".encode(errors="surrogatepass")).digest()
        # 53 bits, so that the float is exact and below 1.
        place = (int.from_bytes(digest[:8]) >> 11) / 2**53
        return min(bisect_right(self._bounds, place * self._bounds[-1]), len(self.parts) - 1)


def parse_parts(text: str) -> list[Part]:
    """`train=0.9,test=0.1` as parts.

    Raises:
        SettingsError: a name or a share is missing or wrong.
    """
    found = []
    for item in text.split(","):
        name, equals, number = item.strip().partition("=")
        if not equals or not name or not name.replace("-", "").replace("_", "").isalnum():
            raise SettingsError(f"found '{item}', expected a name and a share, as in train=0.9", field="parts")
        found.append(Part(name, _share(number, "parts")))
    return found


def parse_phases(text: str) -> list[Part]:
    """`2,4,4` as the three phases sft, reward and rl, as DeepSpeed-Chat's `--data_split`.

    Raises:
        SettingsError: there are not three numbers.
    """
    numbers = text.split(",")
    if len(numbers) != len(PHASES):
        raise SettingsError(
            f"found {len(numbers)} numbers, expected 3 as in 2,4,4 ({', '.join(PHASES)})", field="phases"
        )
    return [Part(name, _share(number, "phases")) for name, number in zip(PHASES, numbers, strict=True)]


def _share(number: str, field: str) -> float:
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise SettingsError(f"found '{number}', expected a number above 0", field=field)
    return share
