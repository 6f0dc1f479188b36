"""Ids of a text that is encoded piece by piece, as if the pieces stood in one text.

A text is cut where an answer begins, so that the ids of a prompt are the first ids of its conversation whatever follows, and around
contents that hold the text of a control token. Many tokenizers read a piece differently when it stands alone: SentencePiece
puts a space in front of it, and some control tokens swallow the space behind them. So where a tokenizer does that, a
piece is encoded behind what stands before it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from danlu.text.rendering import control_tokens

LONGEST_TOKEN = 64  # characters of text before a piece that are looked at for a control token
FRONT = "\ue0ff"  # stands for ordinary text before a piece; no tokenizer merges it with what follows


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a text.

    Attributes:
        before: the end of the text before it.
        plain: read control tokens in it as ordinary text; `role` is who wrote it.
    """

    text: str
    before: str
    plain: bool = False
    role: str = ""


class PieceEncoder:
    """Encodes pieces of texts with one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        source: the chat template: tokens that were added to the vocabulary and occur in it are its marks.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        self._fronts: dict[tuple[str, bool], list[int]] = {}
        special, added = control_tokens(tokenizer)
        self._special = _any_of(special)
        # Words may be added to a vocabulary, too, and stand in a template by chance: marks have brackets or bars.
        self._marks = _any_of({t for t in added if t in source and len(t) > 2 and set(t) & set("<>[]{}|")})
        self._control = _any_of(special | added)
        self._ends_in_control = re.compile(f"(?:{self._control.pattern})\\Z") if self._control else None
        self._direct = self._is_direct(special | added)
        self._depends = self._needs_context(special | added)

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock, so that a template can be sent to another process."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def risky(self, role: str, text: str) -> bool:
        """Whether a text by somebody holds what would be read as a control token.

        Special tokens always are. A mark that the template writes and that is no special token (Qwen's `<tool_call>`, say) is
        the assistant's own word, and the operator's; users and tools cannot say it.
        """
        if self._special is not None and self._special.search(text):
            return True
        return role in ("user", "tool") and self._marks is not None and self._marks.search(text) is not None

    def ids(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Ids of each piece; many at once take a fraction of the time of each alone."""
        parts = [self._parts(piece) for piece in pieces]
        found = iter(self._after([part for group in parts for part in group]))
        return [[token for _ in group for token in next(found)] for group in parts]

    def decode(self, ids: list[int]) -> str:
        """The text of ids from the middle of a text, without special tokens."""
        text: str
        if not self._depends:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            return text
        front = self._front(FRONT, plain=False)
        text = self.tokenizer.decode(front + ids, skip_special_tokens=True)
        shown: str = self.tokenizer.decode(front, skip_special_tokens=True)
        return text[len(shown) :] if text.startswith(shown) else self.tokenizer.decode(ids, skip_special_tokens=True)

    def decode_marked(self, ids: list[int], marks: Mapping[int, str]) -> str:
        """Like `decode`, with the marks in place of the special tokens that have one."""
        parts: list[str] = []
        start = 0
        for at, token in enumerate([*ids, None]):
            if token is None or token in marks:
                parts += [self.decode(ids[start:at]) if start < at else "", "" if token is None else marks[token]]
                start = at + 1
        return "".join(parts)

    def _broken(self, text: str) -> list[str]:
        """The text cut inside every mark, so that no piece holds a whole one."""
        if self._marks is None:
            return [text]
        parts, cursor = [], 0
        for hit in self._marks.finditer(text):
            parts.append(text[cursor : hit.start() + 1])
            cursor = hit.start() + 1
        return [part for part in [*parts, text[cursor:]] if part]

    def _parts(self, piece: Piece) -> list[Piece]:
        """The piece, or what it is cut into so that no control token is whole; nothing if it is empty."""
        if not piece.plain or piece.role not in ("user", "tool"):
            return [piece] if piece.text else []
        texts = self._broken(piece.text)
        befores = [piece.before, *texts]
        return [Piece(text, before, True, piece.role) for text, before in zip(texts, befores, strict=False)]

    def _after(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Ids of pieces, each behind what stands before it."""
        fronts = [self._front_text(piece) for piece in pieces]
        found: list[list[int]] = [[]] * len(pieces)
        for plain in (False, True):
            places = [n for n, piece in enumerate(pieces) if piece.plain == plain]
            texts = [fronts[n] + pieces[n].text for n in places]
            for n, ids in zip(places, self._encode(texts, plain=plain), strict=True):
                alone = self._front(fronts[n], plain=plain)
                if ids[: len(alone)] == alone:
                    found[n] = ids[len(alone) :]
                else:
                    (found[n],) = self._encode([pieces[n].text], plain=plain)
        return found

    def _front_text(self, piece: Piece) -> str:
        """What a piece is encoded behind: the control token that it follows, or something ordinary."""
        if not self._depends or not piece.before:
            return ""
        control = (
            self._ends_in_control.search(piece.before[-LONGEST_TOKEN:])
            if self._ends_in_control and not piece.plain
            else None
        )
        return control.group() if control else FRONT

    def _front(self, front: str, *, plain: bool) -> list[int]:
        if not front:
            return []
        if (front, plain) not in self._fronts:
            (self._fronts[front, plain],) = self._encode([front], plain=plain)
        return self._fronts[front, plain]

    def _encode(self, texts: Sequence[str], *, plain: bool) -> list[list[int]]:
        if not texts:
            return []
        # split_special_tokens is a switch on the shared tokenizer: two threads must not turn it at once.
        with self._lock:
            return self._backend_ids(texts, plain) if self._direct else self._called_ids(texts, plain)

    def _called_ids(self, texts: Sequence[str], plain: bool) -> list[list[int]]:
        found = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=plain)
        ids: list[list[int]] = found["input_ids"]
        return ids

    def _backend_ids(self, texts: Sequence[str], plain: bool) -> list[list[int]]:
        """From the library under the tokenizer: without the offsets and masks that a call makes, in half the time."""
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = plain
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _is_direct(self, control: set[str]) -> bool:
        """Whether the library under the tokenizer gives the ids that a call does: tokenizers may do more in a call."""
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            return False
        probes = ["", " a  b\n", "7日，Ａ é", *(f"x {token} y" for token in sorted(control)[:4])]
        return all(self._called_ids(probes, plain) == self._backend_ids(probes, plain) for plain in (False, True))

    def _needs_context(self, control: set[str]) -> bool:
        fronts = [FRONT, *sorted(control, key=len)[:1]]
        swallows = any(t.rstrip or t.lstrip for t in self.tokenizer.added_tokens_decoder.values())
        probe = "a b"
        (alone,) = self._encode([probe], plain=False)
        return swallows or any(
            self._encode([front + probe], plain=False) != [self._front(front, plain=False) + alone] for front in fronts
        )


def _any_of(texts: set[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None
