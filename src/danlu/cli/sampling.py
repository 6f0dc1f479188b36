"""Flags that say how answers are sampled; their meaning is that of `generation.protocol.SamplingParams`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from danlu.exceptions import UsageError

if TYPE_CHECKING:
    from danlu.generation.protocol import SamplingParams

Command = Callable[..., Any]

DRAWING: tuple[tuple[str, click.ParamType[Any], str], ...] = (
    ("temperature", click.FloatRange(0, 10), "0 takes the most likely token."),
    ("top_k", click.IntRange(0), "Sample from so many of the likeliest tokens; 0: from all."),
    ("top_p", click.FloatRange(0, 1, min_open=True), "Sample from the likeliest tokens of this mass."),
    ("min_p", click.FloatRange(0, 1), "Sample from tokens at least this times as likely as the likeliest."),
    ("typical_p", click.FloatRange(0, 1, min_open=True), "Locally typical sampling: from typical tokens of this mass."),
    (
        "repetition_penalty",
        click.FloatRange(0, min_open=True),
        "Above 1: what was said, in the prompt too, is less likely.",
    ),
    ("presence_penalty", click.FloatRange(-2, 2), "Taken from the logits of tokens that the answer has."),
    ("frequency_penalty", click.FloatRange(-2, 2), "The same, for each time that it has them."),
    ("no_repeat_ngram_size", click.IntRange(0), "No sequence of so many tokens occurs twice; 0: any may."),
    ("min_new_tokens", click.IntRange(0), "Shortest answer."),
    ("max_new_tokens", click.IntRange(1), "Longest answer."),
)
SEARCHING: tuple[tuple[str, click.ParamType[Any], str], ...] = (
    ("n", click.IntRange(1), "Answers to each prompt."),
    ("best_of", click.IntRange(0), "Sample so many and keep the n likeliest by mean log-probability."),
    ("num_beams", click.IntRange(1), "Above 1: beam search."),
    ("length_penalty", click.FLOAT, "Of beam search: above 0 favours long answers."),
    ("penalty_alpha", click.FloatRange(0, 1), "Contrastive search among the --top-k candidates."),
)


def sampling_options(*, searches: bool) -> Callable[[Command], Command]:
    """Adds the flags, None where one is not given; `searches` those too that a streamed chat has no use for."""

    def add(command: Command) -> Command:
        for name, kind, text in reversed(DRAWING + (SEARCHING if searches else ())):
            command = click.option("--" + name.replace("_", "-"), type=kind, help=text)(command)
        return command

    return add


def chosen(defaults: SamplingParams, given: dict[str, Any]) -> SamplingParams:
    """The defaults with what the flags say.

    Raises:
        UsageError: flags that make no sense together.
    """
    from dataclasses import replace

    try:
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UsageError(str(error)) from error
