"""`danlu base MODEL... --text FILES`: the table by which a base model is chosen; `--known` lists the published ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from danlu.cli.console import people, print_json, say
from danlu.cli.data_reading import Reader, json_option, reading_options
from danlu.exceptions import UsageError

if TYPE_CHECKING:
    from danlu.data.read import ReadOptions
    from danlu.pipeline.base import Base


def command(verb: str) -> click.Command:
    """The command."""
    return base


@click.command("base")
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--text", "--data", "texts", multiple=True, metavar="FILES", help="Text for tokens and perplexity.")
@click.option(
    "--limit", default=2000, show_default=True, type=click.IntRange(min=1), help="Only the first so many texts."
)
@click.option("--known", "show_known", is_flag=True, help="Published base and tuned models, with sources.")
@click.option("--html", type=click.Path(path_type=Path), default=None, help="Write the tables as one HTML file, too.")
@reading_options
@json_option
def base(
    models: tuple[str, ...],
    texts: tuple[str, ...],
    limit: int,
    show_known: bool,
    html: Path | None,
    reading: ReadOptions,
    as_json: bool,
) -> None:
    """Compare model folders as bases: size, context, licence, languages, tokens per character, memory, perplexity per character."""
    if not models and not show_known:
        raise UsageError("no model is given", hint="danlu base FOLDER... --text FILES, or danlu base --known")
    from danlu import atomic
    from danlu.models.places import resolve
    from danlu.pipeline.base import bases, known, page
    from danlu.training.runs import resolve_model

    folders = [resolve(resolve_model(model))[0] for model in models]
    read: Sequence[str] = ()
    if texts:
        reader = Reader(reading, "base", quiet=as_json)
        read = list(itertools.islice(_texts(reader, texts), limit))
        reader.finish()
    rows = bases(folders, read)
    listed = known() if show_known else []
    if html is not None:
        atomic.write_text(html, page(rows, listed))
    if as_json:
        print_json({"models": [asdict(row) for row in rows], "known": listed})
        return
    if rows:
        _say(rows)
    if listed:
        _say_known(listed)
    if html is not None:
        say(f"written: {html}")


def _texts(reader: Reader, paths: Sequence[str]) -> Any:
    from danlu.data.corpus import texts_of

    for _, record in reader.natural(paths):
        yield from texts_of(record)


def _say(rows: Sequence[Base]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("model", overflow="fold")
    for head in (
        "family",
        "parameters",
        "context",
        "licence",
        "languages",
        "zh",
        "en",
        "own zh",
        "16/8/4 bits",
        "LoRA",
        "ppl",
    ):
        table.add_column(head, justify="left" if head in ("family", "licence", "languages") else "right")
    for r in rows:
        memory = ["/".join(f"{gb:.1f}" for gb in found.values()) or "-" for found in (r.inference_gb, r.lora_gb)]
        rates = [f"{r.tokens_per_character[n]:.3f}" if n in r.tokens_per_character else "-" for n in ("zh", "en")]
        table.add_row(
            r.model,
            r.family,
            f"{r.parameters:,}" if r.parameters else "-",
            str(r.context or "-"),
            r.licence or "not stated",
            ", ".join(r.languages) or "not stated",
            *rates,
            "-" if r.own_chinese is None else f"{r.own_chinese:,}",
            *memory,
            f"{r.perplexity_per_character:.3f}" if r.perplexity_per_character else "-",
        )
    people.print(table)
    say(
        "zh, en: tokens per character. own zh: of 20,902 Chinese characters, those that are one token (LLaMA: about 700)."
    )
    say(
        "16/8/4 bits, LoRA: GB for inference with one conversation of 2,048 tokens, and for LoRA (r 8) on rows of 512 tokens."
    )
    say("ppl: perplexity per character of the text, which does not depend on the tokenizer; lower is better.")


def _say_known(listed: Sequence[dict[str, str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("name", "kind", "base", "size", "tokens", "language", "licence", "commercial", "source"):
        table.add_column(head, overflow="fold")
    for entry in listed:
        table.add_row(*(entry.get(str(column.header), "") for column in table.columns))
    people.print(table)
