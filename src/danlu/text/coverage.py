"""How well tokenizers fit a text: the table by which a base model is chosen."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from danlu.text.sample import MEGABYTE, pieces
from danlu.text.scripts import HAN, runs
from danlu.text.word_pieces import SPACE, WordPieces


@dataclass(frozen=True, slots=True)
class LanguageCount:
    """Characters of one language in the text, and the tokens that end in them."""

    characters: int
    tokens: int

    @property
    def tokens_per_character(self) -> float:
        """Lower is better: a context window holds more text."""
        return self.tokens / self.characters


@dataclass(frozen=True, slots=True)
class Coverage:
    """How a tokenizer cuts a text.

    Attributes:
        vocab_size: its tokens, added ones included.
        characters, tokens: of the whole text.
        languages: the same by script: `zh` Chinese characters, `en` Latin letters, others by the script's name. Spaces,
            digits and punctuation belong to the letters before them.
        chinese_characters: different Chinese characters in the text.
        own_token: the share of these that are one token by themselves.
        own_token_in_text: the same share, each character counted as often as it occurs.
        byte_fallback: the share of tokens that are bytes: `<0x..>`, or parts of a character.
        unknown: the share of tokens that are the unknown token.
        unchanged: the share of texts that come back from their tokens as they were (a space before them aside).
        seconds_per_mb: time for a million bytes of UTF-8, on one core.
    """

    vocab_size: int
    characters: int
    tokens: int
    languages: dict[str, LanguageCount]
    chinese_characters: int
    own_token: float | None
    own_token_in_text: float | None
    byte_fallback: float
    unknown: float
    unchanged: float
    seconds_per_mb: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "vocab_size": self.vocab_size,
            "characters": self.characters,
            "tokens": self.tokens,
            "tokens_per_character": self.tokens / self.characters,
            "languages": {
                name: {
                    "characters": count.characters,
                    "tokens": count.tokens,
                    "tokens_per_character": count.tokens_per_character,
                }
                for name, count in self.languages.items()
            },
            "chinese_characters": self.chinese_characters,
            "own_token": self.own_token,
            "own_token_in_text": self.own_token_in_text,
            "byte_fallback": self.byte_fallback,
            "unknown": self.unknown,
            "unchanged": self.unchanged,
            "seconds_per_mb": self.seconds_per_mb,
        }


def coverage(tokenizers: Sequence[Any], texts: Iterable[str]) -> list[Coverage]:
    """Measures tokenizers on the same texts, which are read once and not kept.

    Args:
        tokenizers: fast transformers tokenizers.
        texts: at least one that is not empty; long ones are cut at line ends.
    """
    counts = [_Count(tokenizer) for tokenizer in tokenizers]
    characters: Counter[str] = Counter()
    chinese: Counter[str] = Counter()
    for text in _encodable(pieces(texts)):
        starts, names = _runs(text)
        for name, length in zip(names, np.diff(np.append(starts, len(text))), strict=True):
            characters[name] += int(length)
        chinese.update(HAN.findall(text))
        for count in counts:
            count.add(text, starts, names)
    return [count.result(characters, chinese) for count in counts]


def plain_rates(tokenizer: Any, texts: Iterable[str]) -> dict[str, float]:
    """Tokens per character by script, as `Coverage.languages` has them, of a tokenizer that is not a fast one (ChatGLM's, CPM's).

    Such a tokenizer does not say where its tokens stand, so each stretch of a script is cut alone.
    """
    characters: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for text in _encodable(pieces(texts)):
        starts, names = _runs(text)
        for name, start, end in zip(names, starts, [*starts[1:], len(text)], strict=True):
            characters[name] += int(end - start)
            tokens[name] += len(_inside(tokenizer, text[start:end]))
    return {name: tokens[name] / count for name, count in characters.most_common()}


def plain_own(tokenizer: Any, characters: Sequence[str]) -> int:
    """How many characters are one token by themselves, of a tokenizer that is not a fast one."""
    found = (_inside(tokenizer, character) for character in characters)
    return sum(
        len(made) == 1 and made[0].lstrip(SPACE) == character for made, character in zip(found, characters, strict=True)
    )


def _inside(tokenizer: Any, text: str) -> list[str]:
    """Tokens of a part of a text: without the space that SentencePiece puts in front where it is a token by itself."""
    made: list[str] = tokenizer.tokenize(text)
    return made[1:] if made[:1] == [SPACE] and not text.startswith((" ", SPACE)) else made


def _encodable(texts: Iterable[str]) -> Iterator[str]:
    """Halves of characters, which no tokenizer takes, as question marks."""
    for text in texts:
        yield text.encode("utf-8", "replace").decode("utf-8")


def _runs(text: str) -> tuple[NDArray[np.int64], list[str]]:
    found = list(runs(text))
    return np.array([start for start, _ in found], dtype=np.int64), [name for _, name in found]


@dataclass
class _Count:
    """What one tokenizer made of the texts so far."""

    tokenizer: Any
    tokens: int = 0
    texts: int = 0
    unchanged: int = 0
    unknown: int = 0
    partial: int = 0
    size: int = 0
    seconds: float = 0.0
    languages: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._words = WordPieces(self.tokenizer)
        self._is_partial = np.zeros(1 + max(self.tokenizer.get_vocab().values()), dtype=bool)
        self._is_partial[list(self._words.partial)] = True
        self._core = self.tokenizer.backend_tokenizer
        self._core.no_truncation()
        self._core.no_padding()
        self._core.encode_special_tokens = True  # what looks like a control token is text here
        self._core.encode("warm", add_special_tokens=False)

    def add(self, text: str, starts: NDArray[np.int64], names: Sequence[str]) -> None:
        begun = time.perf_counter()
        encoding = self._core.encode(text, add_special_tokens=False)
        self.seconds += time.perf_counter() - begun
        self.size += len(text.encode("utf-8"))
        ids = np.array(encoding.ids, dtype=np.int64)
        self.texts += 1
        self.tokens += len(ids)
        self.partial += int(self._is_partial[ids].sum())
        self.unknown += int((ids == self._words.unknown).sum()) if self._words.unknown is not None else 0
        back = self._core.decode(encoding.ids, skip_special_tokens=False)
        self.unchanged += back in (text, f" {text}")
        # The last character of a token tells: its first one is often the space behind another language's word.
        last = np.array([max(end - 1, 0) for _, end in encoding.offsets], dtype=np.int64)
        places = np.searchsorted(starts, last, side="right") - 1
        for place, count in zip(*np.unique(places, return_counts=True), strict=True):
            self.languages[names[int(place)]] += int(count)

    def result(self, characters: Counter[str], chinese: Counter[str]) -> Coverage:
        own = [
            c for c, ids in zip(chinese, self._words.ids(list(chinese)), strict=True) if self._words.is_one_token(ids)
        ]
        return Coverage(
            vocab_size=len(self.tokenizer),
            characters=characters.total(),
            tokens=self.tokens,
            languages={n: LanguageCount(c, self.languages[n]) for n, c in characters.most_common()},
            chinese_characters=len(chinese),
            own_token=len(own) / len(chinese) if chinese else None,
            own_token_in_text=sum(chinese[c] for c in own) / chinese.total() if chinese else None,
            byte_fallback=self.partial / max(self.tokens, 1),
            unknown=self.unknown / max(self.tokens, 1),
            unchanged=self.unchanged / max(self.texts, 1),
            seconds_per_mb=self.seconds / self.size * MEGABYTE if self.size else 0.0,
        )
