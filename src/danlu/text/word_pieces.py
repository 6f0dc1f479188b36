"""What a fast tokenizer makes of a word inside a text: without the space that many put before whatever they are given."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from danlu.exceptions import ModelError

Core = dict[str, Any]
Style = Literal["bytes", "spaces", "plain"]
SPACE: Final = "\u2581"
_EMPTY: Final = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
_BYTE_PIECE: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def core_of(tokenizer: Any) -> Core:
    """The content of a tokenizer's `tokenizer.json`.

    Raises:
        ModelError: it has none, because it is not a fast tokenizer.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        name = type(tokenizer).__name__
        raise ModelError(
            f"{name} is not a fast tokenizer", file=tokenizer.name_or_path or None, hint="it needs a tokenizer.json"
        )
    found: Core = json.loads(core.to_str())
    return found


def nodes(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences taken apart."""
    if not isinstance(part, dict):
        return
    inner = next((part[k] for k in ("normalizers", "pretokenizers", "decoders") if k in part), None)
    if inner is None:
        yield part
        return
    for one in inner:
        yield from nodes(one)


def style_of(core: Core) -> Style:
    """How spaces and foreign characters are written: as bytes (GPT-2), with U+2581 for spaces (SentencePiece), or as they are."""
    steps = [*nodes(core["normalizer"]), *nodes(core["pre_tokenizer"]), *nodes(core["decoder"])]
    if any(step["type"] == "ByteLevel" for step in steps):
        return "bytes"
    marks = (
        step["type"] == "Metaspace" or step.get("content") == SPACE or step.get("prepend") == SPACE for step in steps
    )
    return "spaces" if any(marks) else "plain"


def without_prefix(core: Core) -> Core:
    """The same tokenizer for text that is normalised already, putting no space before it; it neither cuts nor fills up."""
    found: Core = json.loads(json.dumps(core))
    found["truncation"] = found["padding"] = found["normalizer"] = None
    for step in nodes(found["pre_tokenizer"]):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    return found


class WordPieces:
    """Asks a tokenizer about words.

    Args:
        tokenizer: a fast transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer, normalizers

        self.core = core_of(tokenizer)
        self.style = style_of(self.core)
        # Words are normalised apart from the rest: SentencePiece's own table turns its mark for a space into one.
        steps = [step for step in nodes(self.core["normalizer"]) if step["type"] != "Prepend"]
        with_steps = Tokenizer.from_str(
            json.dumps({**_EMPTY, "normalizer": {"type": "Sequence", "normalizers": steps}})
        )
        self._normalizer: normalizers.Normalizer = with_steps.normalizer
        self._bare = Tokenizer.from_str(json.dumps(without_prefix(self.core)))
        self._vocabulary: dict[str, int] = self._bare.get_vocab(with_added_tokens=True)
        self.unknown = _unknown(self.core, self._bare)
        self._added = {token["id"] for token in self.core["added_tokens"]}
        self._has_byte_pieces = bool(self.core["model"].get("byte_fallback"))

    def written(self, word: str) -> str:
        """A word of a text as the vocabulary would write it; a space before it means that it begins behind a space."""
        if self.style == "bytes":
            return str(self._normalizer.normalize_str(word))
        text = str(self._normalizer.normalize_str(word.strip())).replace(" ", SPACE if self.style == "spaces" else " ")
        return SPACE + text if self.style == "spaces" and word.startswith(" ") else text

    def ids(self, words: Sequence[str]) -> list[list[int]]:
        """The ids of every word as it stands inside a text, with the space before it if it has one."""
        written = [self.written(word) for word in words]
        return [encoding.ids for encoding in self._bare.encode_batch(written, add_special_tokens=False)]

    def has(self, content: str) -> bool:
        """Whether the vocabulary has a token that is written so, even one that is never used."""
        return content in self._vocabulary

    def is_one_token(self, ids: Sequence[int]) -> bool:
        """Whether these ids of a word are a single token that says what it is."""
        return len(ids) == 1 and ids[0] != self.unknown and not self.is_partial(ids[0])

    @functools.cached_property
    def partial(self) -> frozenset[int]:
        """Tokens that are bytes in place of characters: `<0x..>`, or bytes that make no whole characters."""
        vocabulary = self._vocabulary
        if self.style != "bytes":
            if not self._has_byte_pieces:
                return frozenset()
            return frozenset(i for token, i in vocabulary.items() if _BYTE_PIECE.fullmatch(token))
        return frozenset(i for token, i in vocabulary.items() if i not in self._added and not _is_text(token))

    def is_partial(self, token: int) -> bool:
        """See `partial`."""
        return token in self.partial


def _unknown(core: Core, bare: Any) -> int | None:
    model = core["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    if model.get("unk_token") is None:
        return None
    found: int | None = bare.token_to_id(model["unk_token"])
    return found


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with: printable ones as they are, the rest from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(kept)]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(others)}


def _is_text(token: str) -> bool:
    alphabet = byte_alphabet()
    if not all(c in alphabet for c in token):
        return True
    try:
        bytes(alphabet[c] for c in token).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
