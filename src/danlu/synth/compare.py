"""Comparisons of a policy's own answers: sample several per prompt, let the simulated annotator judge pairs of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from danlu.alignment_config import Collect
from danlu.assistant import Assistant
from danlu.evals.generation import answer
from danlu.synth.annotator import compare
from danlu.training import distributed
from danlu.types import Prompt


def collect(
    assistant: Assistant,
    prompts: Sequence[Prompt],
    settings: Collect,
    *,
    seed: int,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Rows `{"prompt", "chosen", "rejected"}` of on-policy answers.

    Only answers that ended with their stop token are compared as they are; the others count as unfinished for the rubric and
    are rendered with a stop token like any answer, as crowd data is.

    Args:
        assistant: the policy; sampled at temperature 1.
        prompts: with references; `settings.count` of them are used, drawn by seed.
        settings: how many samples, pairs and errors.
    """
    rng = random.Random(f"{seed}/collect")
    chosen_prompts = rng.sample(list(prompts), min(settings.count, len(prompts)))
    repeated = [p for p in chosen_prompts for _ in range(settings.samples)]
    replies = distributed.share(
        list(enumerate(repeated)),
        lambda part: answer(
            assistant,
            [prompt for _, prompt in part],
            temperature=1.0,
            max_new_tokens=settings.max_new_tokens,
            seed=seed,
            numbers=[number for number, _ in part],
            on_done=lambda done: on_done(done * distributed.world()[1]),
        ),
    )
    rows: list[dict[str, Any]] = []
    for index, prompt in enumerate(chosen_prompts):
        group = replies[index * settings.samples : (index + 1) * settings.samples]
        pairs = list(combinations(range(settings.samples), 2))
        rng.shuffle(pairs)
        found = 0
        for a, b in pairs:
            one, two = group[a], group[b]
            if one.text == two.text or not one.text.strip() or not two.text.strip() or found == settings.pairs:
                continue
            verdict = compare(
                prompt.reference,
                one.text,
                two.text,
                one.finish_reason == "stop",
                two.finish_reason == "stop",
                rng,
                settings.error_rate,
            )
            if verdict is None:
                continue
            better, worse = (one, two) if verdict == "a" else (two, one)
            rows.append(
                {
                    "prompt": prompt.prompt,
                    "chosen": [{"role": "assistant", "content": better.text}],
                    "rejected": [{"role": "assistant", "content": worse.text}],
                }
            )
            found += 1
    return rows
