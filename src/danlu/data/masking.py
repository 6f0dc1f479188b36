"""Texts to UniLM's rows (Dong et al. 2019): a mode, 15% of the tokens to predict, of these 80% masked, 10% replaced, 10% kept."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

# Index: the mode's number in models/unilm.py: bidirectional, left to right, right to left, seq2seq.
SHARES = (1 / 3, 1 / 6, 1 / 6, 1 / 3)
SEQ2SEQ = 3


@dataclass(frozen=True)
class MaskRow:
    """ids and targets are aligned; loss is 1 where a target is learnt; source: tokens of the first part."""

    ids: list[int]
    targets: list[int]
    loss: list[int]
    mode: int
    source: int


def mask_tokens(
    text: Sequence[int],
    mask: int,
    vocabulary: int,
    rng: random.Random,
    *,
    never: Collection[int],
    ratio: float = 0.15,
    first: int = 0,
    masked: float = 0.8,
    replaced: float = 0.1,
) -> tuple[list[int], list[int]]:
    """(ids, loss): at least one and about `ratio` of the tokens from `first` on are to be predicted.

    Args:
        vocabulary: random tokens are drawn below it; never: ids that are neither predicted nor drawn (special tokens).
        masked, replaced: of the predicted tokens, the shares that become [MASK] and a random token; the rest stays.
    """
    ids, loss = list(text), [0] * len(text)
    places = [i for i in range(first, len(ids)) if ids[i] not in never]
    if not places:
        return ids, loss
    for place in rng.sample(places, max(1, round(ratio * len(places)))):
        loss[place] = 1
        draw = rng.random()
        if draw < masked:
            ids[place] = mask
        elif draw < masked + replaced:
            other = rng.randrange(vocabulary)
            while other in never:
                other = rng.randrange(vocabulary)
            ids[place] = other
    return ids, loss


def unilm_row(
    text: Sequence[int], mask: int, end: int, vocabulary: int, rng: random.Random, *, never: Collection[int]
) -> MaskRow:
    """A row of a mode drawn by `SHARES`. For seq2seq the text is divided into two parts, and `end` closes the first.

    Tokens of both parts are predicted, as in pre-training; the end of a text may be, so that it is learnt to stop.
    """
    mode = rng.choices(range(len(SHARES)), weights=SHARES)[0]
    whole, source = list(text), len(text)
    if mode == SEQ2SEQ and len(whole) >= 4:
        source = rng.randint(2, len(whole) - 2)
        whole = [*whole[:source], end, *whole[source:]]
        source += 1
    kept = set(never) - {end}
    ids, loss = mask_tokens(whole, mask, vocabulary, rng, never=kept, first=1)  # the beginning is given
    return MaskRow(ids, whole, loss, mode, source)


def target_row(
    source: Sequence[int], target: Sequence[int], mask: int, rng: random.Random, ratio: float = 0.7
) -> MaskRow:
    """For fine-tuning: `ratio` of the target's tokens become [MASK], its stop token, which must be the last one, among them.

    The stop token takes part as any other: that it is predicted teaches the model to end (section 2.4 of the paper).
    """
    ids, loss = mask_tokens(target, mask, 1, rng, never=(), ratio=ratio, masked=1.0, replaced=0.0)
    return MaskRow([*source, *ids], [*source, *target], [0] * len(source) + loss, SEQ2SEQ, len(source))
