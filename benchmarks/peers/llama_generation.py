"""llama.cpp as a side of `benchmarks/core.py`, through llama-cpp-python's bindings; runs in its own environment, without danlu.

Sixteen sequences share one cache, and a sequence that is done gives its place to the next prompt at once, as llama.cpp's own server
does. Every prompt is continued, greedily, by as many tokens as its real answer has.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from benchmarks.peers.meter import Meter, run

CHECKED = 8


class Model:
    """A loaded GGUF file with a cache for `slots` sequences of at most `longest` tokens."""

    def __init__(self, path: str, slots: int, longest: int) -> None:
        lib.llama_backend_init()
        model_params = lib.llama_model_default_params()
        # Weights repacked for AMX end some virtual machines' processes (illegal instruction); F16 is not repacked otherwise.
        model_params.use_extra_bufts = False
        self.model = lib.llama_model_load_from_file(path.encode(), model_params)
        params = lib.llama_context_default_params()
        params.n_ctx = slots * longest
        params.n_batch = params.n_ubatch = max(512, longest)
        params.n_seq_max = slots
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = lib.llama_init_from_model(self.model, params)
        self.slots, self.room = slots, int(params.n_batch)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(self.room, 0, 1)

    def add(self, token: int, position: int, slot: int, wanted: bool) -> None:
        """One more token for the next `decode`."""
        at = self.batch.n_tokens
        self.batch.token[at] = token
        self.batch.pos[at] = position
        self.batch.n_seq_id[at] = 1
        self.batch.seq_id[at][0] = slot
        self.batch.logits[at] = wanted
        self.batch.n_tokens = at + 1

    def decode(self) -> None:
        """Reads what was added."""
        if lib.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")

    def logits(self, at: int) -> Any:
        """Of the token that was added as number `at`: `[V]`."""
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, at), shape=(self.vocabulary,))

    def free(self, slot: int) -> None:
        """Empties a sequence's cache."""
        lib.llama_memory_seq_rm(lib.llama_get_memory(self.context), slot, -1, -1)


def generate(model: Model, rows: list[dict[str, Any]]) -> list[list[float]]:
    """All rows, `slots` at a time; the log-probabilities of the first tokens of each."""
    waiting = list(enumerate(rows))[::-1]
    found: list[list[float]] = [[] for _ in rows]
    active: dict[int, list[int]] = {}  # slot: number of the row, next token, its position, tokens left
    while waiting or active:
        model.batch.n_tokens = 0
        ends: dict[int, int] = {}
        for slot, (_, token, position, _) in active.items():
            ends[slot] = model.batch.n_tokens
            model.add(token, position, slot, True)
        for slot in range(model.slots):
            if slot in active or not waiting:
                continue
            prompt = rows[waiting[-1][0]]["prompt"]
            if model.batch.n_tokens + len(prompt) > model.room:
                break
            number, row = waiting.pop()
            for position, token in enumerate(prompt):
                model.add(token, position, slot, position == len(prompt) - 1)
            ends[slot] = model.batch.n_tokens - 1
            active[slot] = [number, 0, len(prompt) - 1, row["new"]]
        model.decode()
        for slot, at in ends.items():
            logits_V = model.logits(at)
            number, _, position, left = active[slot]
            best = int(logits_V.argmax())
            if len(found[number]) < CHECKED:
                shifted_V = logits_V - logits_V[best]
                found[number].append(-float(np.log(np.exp(shifted_V).sum())))
            active[slot] = [number, best, position + 1, left - 1]
            if left == 1:
                del active[slot]
                model.free(slot)
    return found


def work(job: dict[str, Any], meter: Meter) -> None:
    """The log-probabilities of the first batch's first tokens, then windows over all prompts."""
    rows = json.loads(Path(job["rows"]).read_text("utf-8"))
    model = Model(job["gguf"], job["slots"], max(len(r["prompt"]) + r["new"] for r in rows))
    meter.wait()
    meter.checked([x for found in generate(model, rows[: job["slots"]]) for x in found], "fp16")
    for _ in range(job["windows"]):
        meter.wait()
        generate(model, rows)
        meter.report(tokens=sum(r["new"] for r in rows), steps=1)


if __name__ == "__main__":
    run(work)
