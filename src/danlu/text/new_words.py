"""Words that a tokenizer takes to pieces, found in a text: what would save most tokens if it were one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from danlu.text.scripts import UNSPACED, WORD
from danlu.text.word_pieces import WordPieces

LONGEST_UNSPACED: Final = 8  # characters of a word in a script without spaces; longer ones are set phrases at best
LONGEST: Final = 40
RUNS_AT_ONCE: Final = 1000
_NOTHING: Final = "\0"


@dataclass(frozen=True, slots=True)
class Found:
    """A word (with a space before it if it was counted with one) and how often it would be used."""

    text: str
    count: int


def find_words(pieces: WordPieces, texts: Sequence[str], limit: int, *, min_count: int = 5) -> list[Found]:
    """The words whose tokens would save most, best first.

    Scripts with spaces give whole words. In those without, a BPE over characters gives the candidates; they are counted
    as a tokenizer would use them, the longest from left to right, and the least useful half leaves until `limit` are left.

    Args:
        pieces: the tokenizer that is to know them.
        texts: where to look.
        limit: how many at most.
        min_count: rarer words are left out: an embedding that is hardly ever trained does harm.
    """
    if limit < 1:
        return []
    saved = _spaced_words(pieces, texts, min_count)
    runs = [run.group() for text in texts for run in UNSPACED.finditer(text)]
    saved.update(_unspaced_words(pieces, runs, limit, min_count))
    best = sorted(saved.items(), key=lambda item: (-item[1][0], item[0]))[:limit]
    return [Found(word, count) for word, (_, count) in best]


def _spaced_words(pieces: WordPieces, texts: Iterable[str], min_count: int) -> dict[str, tuple[int, int]]:
    """Word to (tokens saved, count)."""
    counts = Counter(word.group() for text in texts for word in WORD.finditer(text))
    frequent = [w for w, count in counts.items() if count >= min_count and len(w) <= LONGEST and len(w.strip()) > 1]
    savings = _savings(pieces, frequent)
    return {w: (counts[w] * saving, counts[w]) for w, saving in zip(frequent, savings, strict=True) if saving}


def _unspaced_words(pieces: WordPieces, runs: list[str], limit: int, min_count: int) -> dict[str, tuple[int, int]]:
    candidates = _frequent_strings(runs, limit, min_count)
    by_saving = {w: saving for w, saving in zip(candidates, _savings(pieces, candidates), strict=True) if saving}
    words = list(by_saving)
    while True:
        counts = _usage(words, runs)
        ranked = sorted(
            ((w, count * by_saving[w]) for w, count in zip(words, counts, strict=True) if count >= min_count),
            key=lambda item: (-item[1], item[0]),
        )
        if len(ranked) == len(words) and len(words) <= limit:
            used = dict(zip(words, counts, strict=True))
            return {w: (saved, used[w]) for w, saved in ranked}
        # Where a word leaves, its parts are used more: so not all leave at once, and the rest is counted again.
        words = [w for w, _ in ranked[: max(limit, len(words) // 2)]]


def _savings(pieces: WordPieces, words: Sequence[str]) -> list[int]:
    """Tokens that each word would save; a character that is unknown so far counts as one."""
    found = pieces.ids(words)
    return [
        0 if pieces.is_one_token(ids) or pieces.has(pieces.written(word)) else max(len(ids) - 1, 1)
        for word, ids in zip(words, found, strict=True)
    ]


def _frequent_strings(runs: list[str], limit: int, min_count: int) -> list[str]:
    from tokenizers import Tokenizer, models, trainers

    alphabet = len(set(itertools.chain.from_iterable(runs)))
    if not alphabet:
        return []
    core = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=alphabet + max(4 * limit, 1000),
        min_frequency=min_count,
        max_token_length=LONGEST_UNSPACED,
        show_progress=False,
    )
    core.train_from_iterator(runs, trainer)
    vocabulary: dict[str, int] = core.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _usage(words: list[str], runs: list[str]) -> list[int]:
    """How often each word is used when all of them are tokens, the longest from left to right."""
    from tokenizers import AddedToken, Tokenizer, models

    core: Any = Tokenizer(models.WordLevel({_NOTHING: 0}, unk_token=_NOTHING))
    core.add_tokens([AddedToken(word, normalized=False) for word in words])
    counts = np.zeros(len(words) + 1, dtype=np.int64)
    for start in range(0, len(runs), RUNS_AT_ONCE):
        joined = "\n".join(runs[start : start + RUNS_AT_ONCE])  # no word holds a line end
        counts += np.bincount(core.encode(joined, add_special_tokens=False).ids, minlength=len(counts))
    return [int(count) for count in counts[1:]]
