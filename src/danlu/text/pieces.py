"""Ids of a text that is encoded piece by piece, as if the pieces stood in one text.

A text is cut where an answer begins, so that the ids of a prompt are the first ids of its conversation whatever follows, and around
contents that hold the text of a control token. Many tokenizers read a piece differently when it stands alone: SentencePiece
puts a space in front of it, and some control tokens swallow the space behind them. So where a tokenizer does that, a
piece is encoded behind what stands before it.
"""

from __future__ import annotations

import re
import threading
from typing import Any

from danlu.text.rendering import control_tokens

LONGEST_TOKEN = 64  # characters of text before a piece that are looked at for a control token
FRONT = "\ue0ff"  # stands for ordinary text before a piece; no tokenizer merges it with what follows


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

    def ids(self, piece: str, before: str, *, plain: bool = False, role: str = "") -> list[int]:
        """Ids of a piece of a text.

        Args:
            before: the text before it.
            plain: read control tokens in it as ordinary text; `role` is who wrote it.
        """
        if not piece:
            return []
        if not plain:
            return self._after(piece, before, plain=False)
        ids: list[int] = []
        for part in self._broken(piece) if role in ("user", "tool") else [piece]:
            ids += self._after(part, before, plain=True)
            before = part
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids from the middle of a text, without special tokens."""
        text: str
        if not self._depends:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            return text
        front = self._after(FRONT, "", plain=False)
        text = self.tokenizer.decode(front + ids, skip_special_tokens=True)
        shown: str = self.tokenizer.decode(front, skip_special_tokens=True)
        return text[len(shown) :] if text.startswith(shown) else self.tokenizer.decode(ids, skip_special_tokens=True)

    def _broken(self, text: str) -> list[str]:
        """The text cut inside every mark, so that no piece holds a whole one."""
        if self._marks is None:
            return [text]
        parts, cursor = [], 0
        for hit in self._marks.finditer(text):
            parts.append(text[cursor : hit.start() + 1])
            cursor = hit.start() + 1
        return [part for part in [*parts, text[cursor:]] if part]

    def _after(self, piece: str, before: str, *, plain: bool) -> list[int]:
        if not self._depends or not before:
            return self._encode(piece, plain=plain)
        control = self._ends_in_control.search(before[-LONGEST_TOKEN:]) if self._ends_in_control and not plain else None
        front = control.group() if control else FRONT
        if (front, plain) not in self._fronts:
            self._fronts[front, plain] = self._encode(front, plain=plain)
        together, alone = self._encode(front + piece, plain=plain), self._fronts[front, plain]
        if together[: len(alone)] != alone:
            return self._encode(piece, plain=plain)
        return together[len(alone) :]

    def _encode(self, text: str, *, plain: bool) -> list[int]:
        # split_special_tokens is a switch on the shared tokenizer: two threads must not turn it at once.
        with self._lock:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        return ids

    def _needs_context(self, control: set[str]) -> bool:
        fronts = [FRONT, *sorted(control, key=len)[:1]]
        swallows = any(t.rstrip or t.lstrip for t in self.tokenizer.added_tokens_decoder.values())
        probe = "a b"
        alone = self._encode(probe, plain=False)
        return swallows or any(
            self._encode(f + probe, plain=False) != self._encode(f, plain=False) + alone for f in fronts
        )


def _any_of(texts: set[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None
