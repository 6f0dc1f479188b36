"""`danlu data convert` and `danlu data import`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from danlu.cli.console import print_json, say
from danlu.cli.data_reading import (
    KINDS,
    Reader,
    force_option,
    json_option,
    licence_rows,
    out_option,
    pooled,
    reading_options,
    say_licences,
)
from danlu.exceptions import DataError

if TYPE_CHECKING:
    from danlu.data.read import ReadOptions
    from danlu.types import Record

TARGETS = (
    "danlu",
    "alpaca",
    "sharegpt",
    "openai",
    "trl-preference",
    "chatllama-actor",
    "chatllama-reward",
    "chatllama-rlhf",
)


@click.command("convert")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--to", type=click.Choice(TARGETS), default="danlu", show_default=True, help="The format to write.")
@out_option
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Read only the first so many rows.")
@click.option("--kind", type=click.Choice(KINDS), default=None, help="Turn the rows into this kind first.")
@click.option(
    "--pairs",
    type=click.Choice(["best-worst", "all", "adjacent"]),
    default="best-worst",
    show_default=True,
    help="Which comparisons a ranking gives.",
)
@click.option("--margin", is_flag=True, help="Comparisons made of scores keep their difference as margin.")
@reading_options
@force_option
@json_option
def convert(
    paths: tuple[str, ...],
    to: str,
    out: Path,
    limit: int | None,
    kind: Any,
    pairs: Any,
    margin: bool,
    reading: ReadOptions,
    force: bool,
    as_json: bool,
) -> None:
    """Write data in another format.

    What the format cannot hold stops the conversion, or with --skip-bad is left out; details that have no place in it
    are counted and named.
    """
    from danlu.data.convert import TARGETS as KNOWN
    from danlu.data.convert import Converted
    from danlu.data.convert import convert as rows_of
    from danlu.data.rows_out import RowFile, check_out

    check_out(out, force=force)
    reader = Reader(reading, "convert", quiet=as_json)
    told = Converted()

    def records() -> Iterator[Record]:
        target = KNOWN[to]
        wanted = kind or (target.becomes if "ranking" not in target.writers else None)
        for _, record in pooled(islice(reader.natural(paths), limit), wanted):
            yield from _as(record, kind, reader, pairs, margin) if kind else [record]

    with RowFile(out) as file:
        for row in rows_of(records(), to, told, pairs=pairs, margin=margin, on_problem=reader.problem):
            file.write(row)
        reader.finish()
        reader.left.dropped.update(told.dropped)
        if not file.rows:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in reader.left.dropped.items())
            raise DataError(f"no row can be written as '{to}' ({reasons or 'there are none'})")
    licences = licence_rows(told.licences, reader.left.dropped)
    if as_json:
        counts = {"kinds": dict(told.kinds), "changed": dict(told.changed), "licences": licences}
        print_json(
            {"out": str(out), "to": to, "records": told.read, "rows": told.rows, **counts, **reader.left.to_json()}
        )
        return
    reader.left.say()
    for what, count in told.changed.items():
        say(f"{what}: {count:,} records")
    say_licences(licences)
    say(f"{told.read:,} records -> {told.rows:,} rows of '{to}' in {out}")


def _as(record: Record, kind: Any, reader: Reader, pairs: Any, margin: bool) -> list[Record]:
    from danlu.data.formats.base import RowDropped
    from danlu.data.kinds import as_kind
    from danlu.data.problems import problem_of

    try:
        return as_kind(record, kind, pairs=pairs, margin=margin)
    except RowDropped as reason:
        reader.left.dropped[str(reason)] += 1
    except DataError as error:
        reader.problem(problem_of(error))
    return []


@click.command("import")
@click.argument("registry", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="YAML file to write: a list of sources.")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=None, help="Where the data files lie, if not beside it."
)
@force_option
@json_option
def import_(registry: Path, out: Path, folder: Path | None, force: bool, as_json: bool) -> None:
    """LLaMA-Factory's dataset_info.json as a list of sources for `data:` in a recipe.

    Entries that danlu cannot read (pictures, loading scripts, files that are not there) are named and left out.
    """
    from danlu import atomic
    from danlu.data.importer import import_registry, sources_yaml
    from danlu.data.rows_out import refuse_existing

    refuse_existing(out, force=force)
    found = import_registry(registry, folder or registry.parent)
    if not found.sources:
        raise DataError("no entry of this file can be used", hint="The reasons: " + found.reasons(), file=registry)
    atomic.write_text(out, sources_yaml(found))
    if as_json:
        print_json({"out": str(out), "sources": found.to_json(), "left_out": dict(found.left_out)})
        return
    for name, reason in found.left_out.items():
        say(f"left out, {name}: {reason}")
    say(f"{len(found.sources):,} sources in {out}; {len(found.left_out):,} entries left out")
