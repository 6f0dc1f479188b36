"""`danlu export`."""

from __future__ import annotations

from pathlib import Path

import click

from danlu.cli.console import people, print_json, say
from danlu.exceptions import UsageError

TYPES = {"hf": ("bf16", "f16", "f32"), "gguf": ("f16", "q8_0", "q4_0")}


def command(verb: str) -> click.Command:
    """The command behind the verb."""
    return {"export": export}[verb]


@click.command("export")
@click.argument("model")
@click.option(
    "--format",
    "shape",
    required=True,
    type=click.Choice(list(TYPES)),
    help="A folder for transformers and vLLM, or a file for llama.cpp and Ollama.",
)
@click.option(
    "--type",
    "kind",
    type=click.Choice([t for ts in TYPES.values() for t in dict.fromkeys(ts)]),
    help="Precision. hf: bf16 (default), f16, f32; gguf: f16 (default), q8_0, q4_0.",
)
@click.option("--out", required=True, help="A folder; for gguf also a file that ends in .gguf.")
@click.option("--name", default="", help="What the model is called; by default like its run or folder.")
@click.option(
    "--licence", default="", help="Licence of the weights for the card: an id of the hub, such as apache-2.0."
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="hf: the largest weight file.")
@click.option(
    "--check/--no-check",
    default=None,
    help="G-EXPORT: have the program that it is for open the export. By default where that is possible.",
)
@click.option("--dequantize", is_flag=True, help="Export packed weights of 8 or 4 bits as ordinary ones.")
@click.option("--no-patches", is_flag=True, help="Without the facts that the model was taught.")
@click.option("--force", is_flag=True, help="Overwrite, and keep an export that its gate fails.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def export(
    model: str,
    shape: str,
    kind: str | None,
    out: str,
    name: str,
    licence: str,
    max_shard_size: str,
    check: bool | None,
    dequantize: bool,
    no_patches: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a model for other programs, with a model card beside it; have one of them check it.

    MODEL is a folder, a hub id, a run (runs/NAME) or a stage (runs/NAME:STAGE).
    """
    chosen = kind or TYPES[shape][0]
    if chosen not in TYPES[shape]:
        raise UsageError(f"--type {chosen} is not one of --format {shape}", hint=f"one of {', '.join(TYPES[shape])}")
    from danlu.pipeline.export import Order
    from danlu.pipeline.export import export as write

    order = Order(
        model=model,
        format="hf" if shape == "hf" else "gguf",
        kind=chosen,
        out=Path(out),
        name=name,
        licence=licence,
        max_shard_size=max_shard_size,
        check=check,
        dequantize=dequantize,
        patches=not no_patches,
        force=force,
    )
    done = write(order, say)
    gate = done.verdict.gate
    if not done.verdict.numbers["checked"]:
        say(f"{gate.code} {gate.sentence}")
    else:
        people.print(f"{gate.code} {'holds' if gate.passed else 'DOES NOT HOLD'}: ", end="", markup=False)
        say(gate.sentence)
    for note in done.notes:
        say(f"note: {note}")
    if as_json:
        print_json(done.as_dict())
    else:
        for file in done.files:
            say(f"  {file}")
