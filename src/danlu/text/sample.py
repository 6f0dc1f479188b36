"""A bounded and even sample of a stream of texts: trainers of tokenizers hold in memory what they are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PIECE = 20_000  # characters; longer texts are cut at line ends
MEGABYTE = 1_000_000
SIZE = 32 * MEGABYTE  # the byte-level trainer needs about 85 MB for 1 MB of Chinese


@dataclass(frozen=True, slots=True)
class Sample:
    """What is left of a stream.

    Attributes:
        texts: the kept texts, in order.
        seen: how many texts the stream had (long ones in pieces).
        characters: how many characters it had.
    """

    texts: list[str]
    seen: int
    characters: int

    @property
    def whole(self) -> bool:
        """Whether nothing was left out."""
        return self.seen == len(self.texts)


def sample(texts: Iterable[str], size: int = SIZE) -> Sample:
    """All texts if they have at most `size` bytes, else every second, fourth, ... of them, evenly over the stream.

    One pass, and never more than `size` bytes in memory, however long the stream is. No chance is involved.
    """
    kept: list[tuple[int, str]] = []  # length in bytes, text
    held = seen = characters = 0
    stride = 1
    for text in pieces(texts):
        if seen % stride == 0:
            length = len(text.encode("utf-8", "surrogatepass"))
            kept.append((length, text))
            held += length
            while held > size and len(kept) > 1:
                kept = kept[::2]
                stride *= 2
                held = sum(length for length, _ in kept)
        seen += 1
        characters += len(text)
    return Sample([text for _, text in kept], seen, characters)


def pieces(texts: Iterable[str], length: int = PIECE) -> Iterator[str]:
    """The texts that are not empty; those of more than `length` characters in pieces, cut after line ends if they have any."""
    for text in texts:
        start = 0
        while len(text) - start > length:
            end = text.rfind("\n", start, start + length) + 1
            end = end if end > start else start + length
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:] if start else text
