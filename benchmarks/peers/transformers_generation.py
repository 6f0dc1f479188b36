"""transformers' `generate` and `generate_batch` as sides of `benchmarks/core.py`; runs in TRL's environment, without danlu.

Every prompt is continued, greedily, by as many tokens as its real answer has: `generate` is told which rows are done by a stopping
criterion, as a stop token would, and goes on until the last row of its batch is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.peers.meter import Meter, precision, run

CHECKED = 8


class Lengths(StoppingCriteria):
    """A row is done when it has its number of new tokens."""

    def __init__(self, prompt: int, new: list[int]) -> None:
        self.ends = torch.tensor([prompt + n for n in new])

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def work(job: dict[str, Any], meter: Meter) -> None:
    """The log-probabilities of the first batch's first tokens, then windows over all prompts."""
    rows = json.loads(Path(job["rows"]).read_text("utf-8"))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["settings"]["dtype"])).eval()
    meter.wait()
    found = _batch(model, rows[: job["slots"]], output_scores=True, return_dict_in_generate=True)
    scores = torch.stack(found.scores[:CHECKED], 1).float().log_softmax(-1).amax(-1)
    losses = [x for row, given in zip(scores.tolist(), rows, strict=False) for x in row[: given["new"]]]
    meter.checked(losses, precision(model.dtype))
    if job["settings"].get("by_length"):
        rows = sorted(rows, key=lambda r: len(r["prompt"]) + r["new"])
    one_pass = METHODS[job["settings"]["method"]](model, rows, job)
    for _ in range(job["windows"]):
        meter.wait()
        meter.report(tokens=one_pass(rows), steps=1)
    one_pass.stop()


def _batch(model: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    """One padded batch, prompts to the right."""
    longest = max(len(r["prompt"]) for r in rows)
    pad = model.config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(r["prompt"])) + r["prompt"] for r in rows])
    new = [r["new"] for r in rows]
    return model.generate(
        input_ids=ids,
        attention_mask=(ids != pad).long(),
        max_new_tokens=max(new),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList([Lengths(longest, new)]),
        **options,
    )


class _Static:
    """Padded batches, one after the other."""

    def __init__(self, model: Any, rows: list[dict[str, Any]], job: dict[str, Any]) -> None:
        self.model, self.slots = model, job["slots"]

    def __call__(self, rows: list[dict[str, Any]]) -> int:
        for start in range(0, len(rows), self.slots):
            _batch(self.model, rows[start : start + self.slots])
        return sum(r["new"] for r in rows)

    def stop(self) -> None:
        pass


class _Continuous:
    """All requests through one continuous-batching manager, which runs from window to window."""

    def __init__(self, model: Any, rows: list[dict[str, Any]], job: dict[str, Any]) -> None:
        options = {"max_new_tokens": max(r["new"] for r in rows), "do_sample": False, "eos_token_id": -1}
        generation = GenerationConfig(**options, pad_token_id=model.config.pad_token_id)
        # Without these numbers it measures the memory for seconds.
        limits = {"num_blocks": 256, "max_batch_tokens": 512, "max_requests_per_batch": job["slots"]}
        config = ContinuousBatchingConfig(**{**limits, **job["settings"].get("manager", {})})
        self.manager = model.init_continuous_batching(generation, config)
        self.manager.start()

    def __call__(self, rows: list[dict[str, Any]]) -> int:
        for row in rows:
            self.manager.add_request(row["prompt"], max_new_tokens=row["new"])
        done = tokens = 0
        while done < len(rows):
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                done += 1
                tokens += len(result.generated_tokens)
            elif result is None and not self.manager.is_running():
                raise RuntimeError("the continuous-batching manager stopped")
        return tokens

    def stop(self) -> None:
        self.manager.stop(block=True)


METHODS = {"generate": _Static, "generate_batch": _Continuous}

if __name__ == "__main__":
    run(work)
