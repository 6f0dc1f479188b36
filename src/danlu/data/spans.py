"""Texts to span corruption (Raffel et al. 2020, T5, section 3.1.4): spans become sentinels, and are written behind them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SpanRow:
    """source: what the encoder reads; target: what the decoder writes, the end included."""

    source: list[int]
    target: list[int]


def span_lengths(length: int, ratio: float, mean_span: float, most: int) -> tuple[int, int]:
    """(noise tokens, spans): `ratio` of a text, at least one token and not all, in at most `most` spans of this mean."""
    noise = min(max(round(length * ratio), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), most, length - noise)
    return noise, spans


def corrupt(
    text: Sequence[int],
    sentinels: Sequence[int],
    end: int,
    rng: random.Random,
    *,
    ratio: float = 0.15,
    mean_span: float = 3.0,
) -> SpanRow:
    """Kept and cut parts take turns, a kept one first; their lengths are a random composition of their totals.

    Args:
        text: at least two ids, without its end token.
        sentinels: a different one for each span, in this order; at least one.
        end: closes source and target.
        ratio: of the tokens that are cut, in (0, 1); mean_span: >= 1.
    """
    assert len(text) >= 2 and sentinels, "the callers leave shorter texts out"
    noise, spans = span_lengths(len(text), ratio, mean_span, len(sentinels))
    kept = _composition(len(text) - noise, spans, rng)
    cut = _composition(noise, spans, rng)
    source: list[int] = []
    target: list[int] = []
    place = 0
    for sentinel, stays, goes in zip(sentinels, kept, cut, strict=False):
        source += [*text[place : place + stays], sentinel]
        place += stays
        target += [sentinel, *text[place : place + goes]]
        place += goes
    return SpanRow([*source, end], [*target, end])


def restore(row: SpanRow, sentinels: Sequence[int]) -> list[int]:
    """The text from what encoder and decoder have: the inverse of `corrupt`."""
    known = set(sentinels)
    pieces: dict[int, list[int]] = {}
    current: list[int] = []
    for token in row.target[:-1]:
        if token in known:
            current = pieces.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in row.source[:-1] for t in (pieces[token] if token in known else [token])]


def _composition(total: int, parts: int, rng: random.Random) -> list[int]:
    """`parts` numbers >= 1 with the sum `total`, every such list equally likely."""
    cuts = sorted(rng.sample(range(1, total), parts - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
