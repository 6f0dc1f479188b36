"""danlu's side of `benchmarks/data.py`: one measurement in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from danlu.data.collate import encode_conversations
from danlu.data.packing import plan_steps
from danlu.data.read import read
from danlu.data.token_cache import Encoder, tokenise
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import load_tokenizer


def work(job: dict[str, Any]) -> dict[str, float]:
    """File to trees, then one epoch planned and cut into micro-batches."""
    encoder = Encoder(
        encode_conversations, ChatTemplate(load_tokenizer(job["tokenizer"])), {"max_length": job["max_length"]}
    )
    begun = time.perf_counter()
    records = read(job["file"], "conversation").records
    trees = tokenise(records, encoder, folder=Path(job["cache"]), processes=job["processes"])
    seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    options = {"tokens_per_step": job["step"], "micro_tokens": job["budget"]}
    steps = plan_steps(trees.lengths, **options, epochs=1.0, max_steps=None, seed=0)
    batches = sum(len(step) for step in steps)
    pack_seconds = time.perf_counter() - begun
    counted = {"tokens": int(trees.lengths.sum()), "trained": int(trees.weights.sum())}
    return {"seconds": seconds, "pack_seconds": pack_seconds, "batches": batches, **counted}


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
