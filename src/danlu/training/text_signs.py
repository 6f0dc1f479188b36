"""Signs of bad health that are read from the sampled tokens alone: answers that repeat themselves or one another, or are empty."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import fmean

REPEATED = 3  # tokens: shorter runs repeat in any language, longer ones are rare in short answers


def text_signs(answers: Sequence[Sequence[int]], stop_ids: Collection[int]) -> dict[str, float]:
    """`repetition`, `distinct_1`, `distinct_2` and `empty_rate` of a batch of answers; each from 0 to 1.

    `repetition` is the mean over the answers of the share of their 3-grams that occurred before in the same answer. `distinct_n`
    (Li et al. 2016, arXiv 1510.03055) is the number of different n-grams of the batch over that of all its n-grams. `empty_rate` is
    the share of answers without any token but a stop token.

    Args:
        answers: token ids, at least one answer.
        stop_ids: a last token among these is no part of the text.
    """
    texts = [tuple(a[:-1] if a and a[-1] in stop_ids else a) for a in answers]
    return {
        "repetition": fmean(1 - _distinct([t], REPEATED) for t in texts),
        "distinct_1": _distinct(texts, 1),
        "distinct_2": _distinct(texts, 2),
        "empty_rate": fmean(not t for t in texts),
    }


def _distinct(texts: Sequence[tuple[int, ...]], n: int) -> float:
    """Different n-grams over all n-grams; 1 where there is none."""
    grams = [t[i : i + n] for t in texts for i in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
