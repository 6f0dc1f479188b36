"""Records to token trees for every trainer: through the cache beside the runs, with a bar while they are encoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from danlu.data.collate import Trees
from danlu.data.token_cache import Encoder, tokenise
from danlu.training import distributed
from danlu.training.progress import Bar
from danlu.training.runs import runs_root
from danlu.types import Record

VARIABLE = "DANLU_CACHE"


def cache_root() -> Path:
    """Where encoded records are kept: $DANLU_CACHE, or `.cache/tokens` where runs are kept. It may be deleted at any time."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else runs_root() / ".cache" / "tokens"


def trees_of(
    function: Callable[..., Trees], records: Sequence[Record], text: Any, *, stage: str, **options: Any
) -> Trees:
    """`function(records, text, **options)`; of a large set that was encoded before, the trees are read back.

    Args:
        function: one of `data/collate.py`.
        text: the chat template, or the tokenizer for documents.
        stage: named by the bar.
    """
    encoder = Encoder(function, text, options)
    with ExitStack() as stack:
        bars: list[Bar] = []

        def on_part(done: int, total: int, tokens: int) -> None:
            if not bars:
                bar = Bar(f"{stage}: tokens", total, quiet=not distributed.is_main())
                bars.append(stack.enter_context(bar))
            bars[0].advance(tokens, "")

        return tokenise(records, encoder, folder=cache_root(), on_part=on_part)
