"""`danlu data mix` and `danlu data split`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from danlu.cli.console import print_json, say
from danlu.cli.data_reading import (
    Reader,
    force_option,
    json_option,
    kind_option,
    out_option,
    reading_options,
    wrong_usage,
)
from danlu.exceptions import DataError, UsageError

if TYPE_CHECKING:
    from danlu.data.read import ReadOptions
    from danlu.types import Record


@click.command("mix")
@click.argument("sources", nargs=-1, required=True, metavar="PATH[=WEIGHT]...")
@click.option("--replay", multiple=True, metavar="PATH=FRACTION", help="General data: this fraction of the whole.")
@click.option("--total", type=click.IntRange(min=1), required=True, help="Rows to write.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw and of the order.")
@out_option
@kind_option
@reading_options
@force_option
@json_option
def mix(
    sources: tuple[str, ...],
    replay: tuple[str, ...],
    total: int,
    seed: int,
    out: Path,
    kind: Any,
    reading: ReadOptions,
    force: bool,
    as_json: bool,
) -> None:
    """One file of several sources, each with its share of the rows.

    Weights are relative to each other: a.jsonl=2 b.jsonl=1 takes two rows of a for one of b. No row of a source comes
    twice before all of them came once.
    """
    from danlu.data.mix import mixed, parse_weighted, with_replay
    from danlu.data.rows_out import RowFile, check_out

    check_out(out, force=force)
    with wrong_usage():
        weighted = with_replay([parse_weighted(s) for s in sources], [parse_weighted(s) for s in replay])
    reader = Reader(reading, "mix", quiet=as_json)
    kinds: dict[str, str] = {}

    def lines(name: str) -> Iterator[str]:
        from danlu.data.kinds import kind_of
        from danlu.data.rows_out import row_of

        for record in reader.records([name], kind):
            first = kinds.setdefault(kind_of(record), name)
            if len(kinds) > 1:
                raise _mixed_kinds(kinds, first)
            yield json.dumps(row_of(_named(record, name)), ensure_ascii=False)

    drawn: list[tuple[Any, Callable[[], Iterator[str]]]] = [
        (source, partial(lines, source.name)) for source in weighted
    ]
    with mixed(drawn, total, seed) as (rows, shares):
        reader.finish()
        with RowFile(out) as file:
            for row in rows:
                file.write_line(row)
    if as_json:
        told = [{"source": s.name, "rows": s.rows, "taken": s.taken, "epochs": round(s.epochs, 4)} for s in shares]
        print_json({"out": str(out), "rows": file.rows, "seed": seed, "sources": told, **reader.left.to_json()})
        return
    reader.left.say()
    for share in shares:
        again = f", each {share.epochs:.2f} times" if share.epochs > 1 else ""
        say(f"{share.taken:,} of {share.rows:,} rows of {share.name}{again}")
    say(f"{file.rows:,} rows in {out}")


def _named(record: Record, name: str) -> Record:
    """The record with a source, so that the mixture still tells where its rows came from."""
    origin = record.origin
    if origin is None or origin.source:
        return record
    return replace(record, origin=replace(origin, source=name if name.startswith("hf:") else Path(name).name))


def _mixed_kinds(kinds: dict[str, str], name: str) -> DataError:
    found = ", ".join(f"{kind}s in {place}" for kind, place in kinds.items())
    return DataError(
        f"found {found}: a mixture holds one kind",
        hint="Say which with --kind, for example --kind conversation.",
        file=name,
    )


@click.command("split")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write the parts into.")
@click.option("--parts", default=None, metavar="NAME=SHARE,...", help="Such as train=0.9,test=0.1.")
@click.option("--phases", default=None, metavar="A,B,C", help="Shares of the phases sft, reward and rl, such as 2,4,4.")
@kind_option
@reading_options
@force_option
@json_option
def split(
    paths: tuple[str, ...],
    out: Path,
    parts: str | None,
    phases: str | None,
    kind: Any,
    reading: ReadOptions,
    force: bool,
    as_json: bool,
) -> None:
    """Parts by a hash of the prompt, one file each.

    Equal prompts fall into one part, and rows that are added later move no other row. With --phases no phase sees
    another's prompts (DeepSpeed-Chat's --data_split).
    """
    from danlu.data.phases import Splitter, parse_parts, parse_phases
    from danlu.data.rows_out import RowFile, refuse_existing, row_of

    if (parts is None) == (phases is None):
        raise UsageError("give either --parts train=0.9,test=0.1 or --phases 2,4,4")
    with wrong_usage():
        splitter = Splitter(parse_parts(parts), "parts") if parts else Splitter(parse_phases(phases or ""), "phase")
    if out.is_file():
        raise DataError("this is a file, expected a folder", file=out)
    files = [out / f"{part.name}.jsonl" for part in splitter.parts]
    for file in files:
        refuse_existing(file, force=force)
    reader = Reader(reading, "split", quiet=as_json)
    with ExitStack() as stack:
        opened = [stack.enter_context(RowFile(file)) for file in files]
        for record in reader.records(paths, kind):
            opened[splitter.part(record)].write(row_of(record))
        reader.finish()
        for one in opened:
            if not one.rows:
                raise DataError(
                    f"no prompt falls into the part '{one.path.stem}'", hint="Give more rows, or it a larger share."
                )
    if as_json:
        told = [{"part": f.path.stem, "file": str(f.path), "rows": f.rows} for f in opened]
        print_json({"out": str(out), "parts": told, **reader.left.to_json()})
        return
    reader.left.say()
    for one in opened:
        say(f"{one.rows:,} rows in {one.path}")
