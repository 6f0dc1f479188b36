"""Flags that say how answers are sampled; their meaning is that of `generation.protocol.SamplingParams`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Bias(click.ParamType[tuple[int, float]]):
    """`ID=NUMBER`."""

    name = "id=number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        """See click."""
        token, sign, bias = str(value).partition("=")
        try:
            if not sign:
                raise ValueError("no sign")
            return int(token), float(bias)
        except ValueError:
            self.fail(f"'{value}' is not ID=NUMBER, as 17=-2.5 or 17=-inf", param, ctx)


# Each may be given several times; the flag names one of them.
SEVERAL: tuple[tuple[str, str, click.ParamType[Any], str], ...] = (
    ("stop", "--stop", click.STRING, "A text that ends the answer and is no part of it; may be given several times."),
    (
        "stop_ids",
        "--stop-id",
        click.IntRange(0),
        "A token id that ends the answer beside the template's own; several times.",
    ),
    (
        "bad_words",
        "--bad-word",
        click.STRING,
        "A text that the answer never has, as its tokens spell it; several times.",
    ),
    (
        "logit_bias",
        "--logit-bias",
        Bias(),
        "Added to the logits of a token id, as 17=-2.5; -inf bans it; several times.",
    ),
)
LOGPROBS = "Write the answer's log-probabilities, and so many of the likeliest tokens at each of its places (0: none)."


def sampling_options(*, searches: bool) -> Callable[[Command], Command]:
    """Adds the flags, None or () where one is not given; `searches` those too that a streamed chat has no use for."""

    def add(command: Command) -> Command:
        if searches:
            command = click.option("--logprobs", type=click.IntRange(0), help=LOGPROBS)(command)
        for name, flag, kind, text in reversed(SEVERAL):
            command = click.option(flag, name, type=kind, multiple=True, help=text)(command)
        for name, kind, text in reversed(DRAWING + (SEARCHING if searches else ())):
            command = click.option("--" + name.replace("_", "-"), type=kind, help=text)(command)
        return command

    return add


def engine_options(command: Command) -> Command:
    """Adds the flags of `config.EngineSettings`."""
    for flag, kind, default, text in (
        ("--guesses", click.IntRange(1, 32), 4, "Tokens that are guessed at once."),
        (
            "--speculate",
            click.STRING,
            "off",
            "Guess tokens ahead: off, ngram, or a smaller model. Answers stay the same.",
        ),
        ("--cache-gib", click.FloatRange(0), 0.0, "Memory for keys and values; 0: by what is free."),
        ("--slots", click.IntRange(1), 64, "Answers that are written at once."),
    ):
        command = click.option(flag, type=kind, default=default, show_default=True, help=text)(command)
    return command


def chosen(defaults: SamplingParams, given: dict[str, Any]) -> SamplingParams:
    """The defaults with what the flags say, but for `bad_words`, which only a tokenizer can read (`with_bad_words`).

    Raises:
        UsageError: flags that make no sense together.
    """
    from dataclasses import replace

    values = {name: value for name, value in given.items() if value not in (None, ()) and name != "bad_words"}
    if "logit_bias" in values:
        values["logit_bias"] = dict(values["logit_bias"])
    try:
        return replace(defaults, **values)
    except ValueError as error:
        raise UsageError(str(error)) from error


def with_bad_words(params: SamplingParams, words: Sequence[str], tokenizer: Any) -> SamplingParams:
    """The parameters with texts banned as a tokenizer spells them, at the beginning of a text and after a space."""
    from dataclasses import replace

    spelt = [tuple(tokenizer.encode(form, add_special_tokens=False)) for word in words for form in (word, f" {word}")]
    return replace(params, bad_words=(*params.bad_words, *dict.fromkeys(ids for ids in spelt if ids)))
