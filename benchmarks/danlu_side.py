"""danlu's side of `benchmarks/core.py`: the trainers and the engine that users run, paced from outside.

A trainer asks its session for the next step; that is where it waits for its turn. Nothing else of it is changed, but that in
the check of `ppo` and `grpo` the roll-outs are given, so that both sides score and train the same answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.pace import paced
from benchmarks.peers.meter import Meter, precision, run
from danlu.config import KINDS
from danlu.models.load import load_model
from danlu.parsing import parse
from danlu.training import distributed
from danlu.tree import Segment, Trajectory

CHECK_STEPS = 3


def work(job: dict[str, Any], meter: Meter) -> None:
    """One work of `benchmarks/core.py`."""
    if job["work"] == "generate":
        _generate(job, meter)
    elif job["work"] == "gemm":
        _gemm(job, meter)
    elif job["kind"] in ("ppo", "grpo"):
        _roll_out_and_train(job, meter)
    else:
        _train_rows(job, meter)


def _train(job: dict[str, Any], out: str, **settings: Any) -> None:
    from importlib import import_module

    kind = job["kind"]
    values = {"out": str(Path(job["folder"]) / out), "model": job["model"], "eval_fraction": 0.0, "save_every": 10**6}
    if "reward" in job:
        values |= {"reward_model": job["reward"]}
    values |= {"schedule": "constant", "warmup": 0, "max_length": job["max_length"], **job["settings"], **settings}
    module = import_module("danlu.trainers." + {"reward": "reward_model"}.get(kind, kind))
    module.train(parse(KINDS[kind], values))


def _precision(job: dict[str, Any]) -> str:
    """Of training: weights are fp32 whatever the dtype of products."""
    return precision(torch.float32, mixed=job["settings"]["dtype"] == "bfloat16")


def _train_rows(job: dict[str, Any], meter: Meter) -> None:
    """Three steps on the check's rows, all of them in each; then every epoch over the timed rows is one window."""
    losses: list[float] = []
    meter.wait()
    with paced(on_log=lambda metrics, _: losses.append(metrics["loss"])):
        options = {"data": job["check"], "tokens_per_step": 10**6, "learning_rate": job["check_rate"]}
        _train(job, "check", max_steps=CHECK_STEPS, **options)
    meter.checked(losses, _precision(job))

    count = {"tokens": 0, "steps": 0}

    def add(metrics: dict[str, float], tokens: int) -> None:
        count["tokens"] += tokens
        count["steps"] += 1

    def before() -> None:
        if count["tokens"] == 0:
            meter.wait()

    def after() -> None:
        if count["tokens"] >= job["tokens"]:
            meter.report(tokens=_told_once(count["tokens"]), steps=count["steps"])
            count.update(tokens=0, steps=0)

    with paced(before=before, on_log=add, after=after):
        _train(job, "timed", data=job["rows"], epochs=job["windows"], learning_rate=job["rate"])


def _roll_out_and_train(job: dict[str, Any], meter: Meter) -> None:
    """One iteration on given answers; then every iteration is one window."""
    from danlu.training import rollouts

    answers = {tuple(r["prompt"]): r["answers"] for r in json.loads(Path(job["answers"]).read_text("utf-8"))}
    given: list[dict[str, float]] = []
    meter.wait()
    watched = paced(on_log=lambda metrics, _: given.append(dict(metrics)))
    with mock.patch.object(rollouts, "rollout", _given(answers, job)), watched:
        _train(job, "check", data=job["check"], max_steps=1, learning_rate=job["check_rate"])
    meter.checked([given[0][key] for key in job["compare"]], _precision(job))

    found: dict[str, float] = {}

    def add(metrics: dict[str, float], tokens: int) -> None:
        found.update(tokens=_told_once(metrics["length"] * job["episodes"]), score=metrics["score"])

    def after() -> None:
        meter.report(**found, steps=1)

    with paced(before=meter.wait, on_log=add, after=after):
        _train(job, "timed", data=job["rows"], max_steps=job["windows"], learning_rate=job["rate"])


def _told_once(tokens: float) -> float:
    """Of several ranks, all of which know all tokens, rank 0 reports them."""
    return tokens if distributed.is_main() else 0


def _given(answers: dict[tuple[int, ...], list[list[int]]], job: dict[str, Any]) -> Callable[..., list[Trajectory]]:
    """A `rollout` that hands out the given answers of a prompt, one after the other."""

    def rollout(engine: Any, prompts: Sequence[Sequence[int]], *_: Any, **__: Any) -> list[Trajectory]:
        handed: dict[tuple[int, ...], int] = {}
        found = []
        for prompt in map(tuple, prompts):
            ids = answers[prompt][handed.setdefault(prompt, 0)]
            handed[prompt] += 1
            action = Segment(tuple(ids), True, (0.0,) * len(ids))
            found.append(Trajectory((Segment(prompt, False), action), 0, ids[-1] == job["eos"]))
        return found

    return rollout


def _generate(job: dict[str, Any], meter: Meter) -> None:
    """Every prompt continued by as many tokens as its real answer has, greedily, 16 at a time; then checked token by token."""
    from danlu.generation.engine import LocalEngine
    from danlu.generation.protocol import Request, SamplingParams, generate

    rows = json.loads(Path(job["rows"]).read_text("utf-8"))
    model = load_model(job["model"], dtype=getattr(torch, job["settings"]["dtype"]))
    engine = LocalEngine(model, max_slots=job["slots"])
    requests = [Request(r["prompt"], SamplingParams(max_new_tokens=r["new"], temperature=0.0)) for r in rows]
    meter.wait()
    found = generate(engine, requests[: job["slots"]])
    meter.checked([t for c in found for t in c.logprobs[:8]], precision(model.dtype))
    for _ in range(job["windows"]):
        meter.wait()
        done = generate(engine, requests)
        meter.report(tokens=sum(len(c.ids) for c in done), steps=1)


def _gemm(job: dict[str, Any], meter: Meter) -> None:
    """Bare bf16 products of the shapes that the model's layers take, forward and backward; reports operations per second."""
    shapes: list[list[int]] = job["shapes"]
    rows = job["gemm_rows"]
    products = [(torch.randn(rows, k).bfloat16(), torch.randn(n, k).bfloat16()) for n, k in shapes]
    meter.wait()
    meter.checked([], "bf16")
    for _ in range(job["windows"]):
        meter.wait()
        operations, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < job["seconds"]:
            for x, weight in products:
                torch.nn.functional.linear(x, weight)
                operations += 2 * x.numel() * len(weight)
        meter.report(tokens=operations, steps=1)


if __name__ == "__main__":
    run(work)
