"""Records -> pairs of source and target, for encoder-decoders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from danlu.data.truncate import Limits
from danlu.exceptions import DataError
from danlu.text.text_to_text import Pair, TextToText
from danlu.types import Conversation


@dataclass
class Pairs:
    """One entry an answer, and counts for the gates; see `data.collate.Trees`."""

    items: list[Pair] = field(default_factory=list)
    answers: int = 0
    answers_with_stop: int = 0
    answers_cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of both sides of each pair."""
        return np.array([pair.tokens for pair in self.items], dtype=np.int64)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Trained tokens of each pair: those of its target."""
        return np.array([len(pair.target_ids) for pair in self.items], dtype=np.float64)


def encode_pairs(records: Iterable[Conversation], template: TextToText, max_length: int | Limits) -> Pairs:
    """Every trained answer with what was said before it.

    The limits are of both sides together, of the source (`prompt`) and of the target (`answer`). What is longer is dropped, cut
    (the source's beginning first, then the target's end), or an error, as `overlength` says.

    Raises:
        DataError: something is too long and `overlength` is "error".
    """
    found, limits = Pairs(), Limits.of(max_length)
    for record in records:
        for pair in template.pairs(record.messages, tools=record.tools):
            found.answers += 1
            source, target = limits.shares(len(pair.source_ids), len(pair.target_ids))
            if source < len(pair.source_ids) or target < len(pair.target_ids):
                if limits.overlength == "error":
                    place = record.origin
                    raise DataError(
                        f"source and target have {len(pair.source_ids)} + {len(pair.target_ids)} tokens; the limit is "
                        f"{limits.total}",
                        file=place.file if place else None,
                        line=place.line if place else None,
                        hint="raise max_length, or set overlength to drop or truncate",
                    )
                if limits.overlength == "drop":
                    found.answers_cut += 1
                    found.dropped[limits.too_long] = found.dropped.get(limits.too_long, 0) + 1
                    continue
                found.answers_cut += target < len(pair.target_ids)
                pair = Pair(pair.source_ids[len(pair.source_ids) - source :], pair.target_ids[:target])
            found.answers_with_stop += pair.target_ids[-1] in template.stop_ids
            found.items.append(pair)
    return found
