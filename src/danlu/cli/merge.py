"""`danlu merge`: adapters into their base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from danlu.cli.console import people, say
from danlu.exceptions import UsageError


def command(verb: str) -> click.Command:
    """The click command."""
    return merge


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), help="Default: ADAPTER-merged.")
@click.option("--weights", help="One for each adapter, as 0.7,0.3. Default: equal shares.")
@click.option("--method", type=click.Choice(["linear", "ties", "dare"]), default="linear", show_default=True)
@click.option(
    "--density", type=float, default=0.5, show_default=True, help="Share of the changes that ties and dare keep."
)
@click.option("--seed", default=0, show_default=True, help="Of what dare drops.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: as the base is stored.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of one weight file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def merge(
    adapters: tuple[str, ...],
    into: Path | None,
    weights: str | None,
    method: Any,
    density: float,
    seed: int,
    dtype: str | None,
    max_shard_size: str,
    as_json: bool,
) -> None:
    """Merge one or several ADAPTER folders into the model that they were trained on; their logits are compared (G-MERGE)."""
    import torch

    from danlu.models.merging import TOLERANCE, merge_adapters
    from danlu.models.places import resolve
    from danlu.training.runs import patches_folder, resolve_model

    def taught(base: str) -> Path:
        name, local = resolve(base)
        return patches_folder(name, local=local)

    try:
        shares = [float(w) for w in weights.split(",")] if weights else None
    except ValueError:
        raise UsageError(f"--weights wants numbers (found: {weights})", hint="--weights 0.7,0.3") from None
    out = into or Path(f"{adapters[0].rstrip('/')}-merged")
    chosen = getattr(torch, dtype) if dtype else None
    report = merge_adapters(
        [resolve_model(a) for a in adapters],
        out,
        weights=shares,
        method=method,
        density=density,
        seed=seed,
        dtype=chosen,
        taught=taught,
        max_shard_size=max_shard_size,
    )
    if report["patches"]:
        say(f"the facts that the base was taught are in the weights, too: {', '.join(report['patches'])}")
    say(
        f"G-MERGE holds: logits differ by {report['logit_difference']:.1e} at most (limit {TOLERANCE:g} of "
        f"{max(1.0, report['logit_scale']):.3g})"
    )
    if report["dtype"] != "float32":
        say(f"rounded to {report['dtype']} they differ by {report['rounding_difference']:.1e}")
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        people.print(f"written to {out}", markup=False)
