"""`danlu convert-model SRC DST`: any model that danlu loads, as an ordinary transformers folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from danlu.cli.console import print_json, say


def command(verb: str) -> click.Command:
    """The command."""
    return convert_model


@click.command("convert-model")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the weights; default: as they are."
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of one weight file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def convert_model(source: str, target: Path, dtype: str | None, max_shard_size: str, as_json: bool) -> None:
    """Write SOURCE as safetensors into the folder TARGET, with its tokenizer.

    SOURCE is a model folder (MOSS, CPM-1, CPM-2 and danlu's other families too, `.bin` or safetensors, sharded or not), a run,
    a hub id, or a `.bin` of llama2.c. Plain transformers opens the result where it knows the family: MOSS is a CodeGen,
    CPM-1 a GPT-2, CPM-2 a T5, llama2.c's models are LLaMA.
    """
    from danlu.models.convert import convert
    from danlu.training.runs import resolve_model

    found = convert(resolve_model(source), target, dtype=dtype, max_shard_size=max_shard_size)
    if as_json:
        print_json(asdict(found) | {"folder": str(found.folder)})
        return
    opens = "opens in plain transformers" if found.plain else "a family of danlu's own: open it with danlu"
    say(
        f"{found.family} -> {found.model_type}, {found.parameters:,} parameters, {found.dtype}, "
        f"{found.size / 2**20:,.1f} MiB in {len(found.files)} file{'s' if len(found.files) > 1 else ''}: {found.folder} ({opens})"
    )
