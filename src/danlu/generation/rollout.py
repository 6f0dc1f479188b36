"""Roll-outs: answers of the current policy to prompts, as trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from danlu.generation.protocol import Engine, Request, SamplingParams, generate
from danlu.generation.seeds import mix_seed
from danlu.tree import Segment, Trajectory


def rollout(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    seed: int,
    step: int,
    numbers: Sequence[int] | None = None,
) -> list[Trajectory]:
    """One trajectory per prompt (give a prompt G times for a group).

    Draws are a function of (seed, step, sample) alone, so a resumed run repeats them.

    Args:
        prompts: token ids.
        params: for all of them; `seed` in it is replaced.
        seed, step: of the run and of the optimizer step.
        numbers: of these samples among all of the step; default 0, 1, 2, ...
    """
    seeds = [mix_seed(seed, step, number) for number in (range(len(prompts)) if numbers is None else numbers)]
    requests = [Request(p, replace(params, seed=s)) for p, s in zip(prompts, seeds, strict=True)]
    return [
        Trajectory(
            segments=(Segment(tuple(p), False), Segment(c.ids, True, c.logprobs)),
            policy_version=c.policy_version,
            finished=c.finish_reason == "stop",
            seed=s,
        )
        for p, c, s in zip(prompts, generate(engine, requests), seeds, strict=True)
    ]
