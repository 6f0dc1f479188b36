"""Splitting records by a hash of their prompt: stable when rows are added, and equal prompts stay on one side."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from danlu.data.formats.turns import before_answer
from danlu.exceptions import SettingsError
from danlu.types import Conversation, Document, Record

R = TypeVar("R", bound=Record)


def prompt_text(record: Record) -> str:
    """What identifies a record's prompt: the messages before the answer, or the first 200 characters of a document."""
    if isinstance(record, Document):
        return record.text[:200]
    messages = before_answer(record.messages) if isinstance(record, Conversation) else record.prompt
    return json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)


def split_heldout(
    records: Sequence[R], fraction: float, key: Callable[[R], str] | None = None
) -> tuple[list[R], list[R]]:
    """Split into (train, heldout), both in the given order.

    Args:
        records: records of any kind; the same prompt falls on the same side whatever the kind.
        fraction: the expected share of prompts held out, in [0, 1). With a fraction above 0 and at least two distinct
            prompts neither side is empty.
        key: what to hash instead of the prompt.
    """
    if not 0 <= fraction < 1:
        raise SettingsError(f"found {fraction}, expected at least 0 and below 1", field="fraction")
    if fraction == 0:
        return list(records), []
    places = _places(records, "heldout", key)
    distinct = sorted(set(places))
    # Between the lowest and the highest place both sides have something. One prompt alone is trained on.
    bound = max(fraction, math.nextafter(distinct[0], 1)) if len(distinct) > 1 else 0.0
    bound = min(bound, distinct[-1]) if distinct else bound
    train = [record for record, place in zip(records, places, strict=True) if place >= bound]
    heldout = [record for record, place in zip(records, places, strict=True) if place < bound]
    return train, heldout


def _places(records: Sequence[R], use: str, key: Callable[[R], str] | None) -> list[float]:
    """A place in [0, 1) for each record.

    `use` salts the hash: with one hash for both uses, the held-out prompts would all come from the first phase.
    """
    texts = (key(record) if key else prompt_text(record) for record in records)
    digests = (hashlib.sha256(f"{use}\0{text}".encode(errors="surrogatepass")).digest() for text in texts)
    # 53 bits, so that the float is exact and below 1.
    return [(int.from_bytes(digest[:8]) >> 11) / 2**53 for digest in digests]
