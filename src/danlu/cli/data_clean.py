"""`danlu data dedup` and `danlu data decontaminate`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from danlu.cli.console import print_json, say
from danlu.cli.data_reading import (
    SHOWN,
    Reader,
    force_option,
    json_option,
    kind_option,
    out_option,
    reading_options,
    wrong_usage,
)
from danlu.exceptions import DataError

if TYPE_CHECKING:
    from danlu.data.read import ReadOptions
    from danlu.types import Origin


@click.command("dedup")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--near", type=float, default=None, metavar="SIMILARITY", help="Also rows at least so alike, such as 0.8."
)
@click.option(
    "--by",
    type=click.Choice(["row", "prompt"]),
    default="row",
    show_default=True,
    help="Compare whole rows, or prompts alone.",
)
@out_option
@kind_option
@reading_options
@force_option
@json_option
def dedup(
    paths: tuple[str, ...],
    near: float | None,
    by: Any,
    out: Path,
    kind: Any,
    reading: ReadOptions,
    force: bool,
    as_json: bool,
) -> None:
    """Without duplicates: the first of equal rows stays.

    With --near rows are compared by the share of their 3-grams (words, Chinese characters) that they have in common,
    estimated by MinHash.
    """
    from danlu.data.dedup import Duplicate, Seen
    from danlu.data.dedup import dedup as without_duplicates
    from danlu.data.rows_out import RowFile, check_out, row_of

    check_out(out, force=force)
    with wrong_usage():
        seen = Seen(near=near, by=by)
    reader = Reader(reading, "dedup", quiet=as_json)
    duplicates: list[Duplicate] = []
    with RowFile(out) as file:
        for record in without_duplicates(reader.records(paths, kind), seen, duplicates):
            file.write(row_of(record))
        reader.finish()
        _some(file.rows)
    exact = sum(duplicate.exact for duplicate in duplicates)
    if as_json:
        told = [
            {"row": _place(d.origin), "first": _place(d.first), "similarity": round(d.similarity, 3)}
            for d in duplicates
        ]
        counts = {"rows": file.rows, "exact": exact, "near": len(duplicates) - exact, "duplicates": told}
        print_json({"out": str(out), **counts, **reader.left.to_json()})
        return
    reader.left.say()
    for duplicate in duplicates[:SHOWN]:
        alike = "the same as" if duplicate.exact else f"{duplicate.similarity:.0%} like"
        say(f"  {_place(duplicate.origin)}: {alike} {_place(duplicate.first)}")
    if len(duplicates) > SHOWN:
        say(f"  ... and {len(duplicates) - SHOWN:,} more; --json has them all")
    say(f"{file.rows:,} rows in {out}; left out {exact:,} exact and {len(duplicates) - exact:,} near duplicates")


@click.command("decontaminate")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--against", multiple=True, required=True, metavar="EVAL", help="Evaluation data; may be given several times."
)
@click.option(
    "--ngram", type=click.IntRange(min=1), default=13, show_default=True, help="Words or characters in a row."
)
@out_option
@kind_option
@reading_options
@force_option
@json_option
def decontaminate(
    paths: tuple[str, ...],
    against: tuple[str, ...],
    ngram: int,
    out: Path,
    kind: Any,
    reading: ReadOptions,
    force: bool,
    as_json: bool,
) -> None:
    """Without rows that hold text of an evaluation's prompts.

    A row is left out if it shares 13 words (of Chinese: characters) in a row with a prompt. A shorter prompt must be a
    question of the row as a whole.
    """
    from danlu.data.decontaminate import Benchmark, Match
    from danlu.data.read import ReadOptions
    from danlu.data.rows_out import RowFile, check_out, row_of

    check_out(out, force=force)
    evaluations = Reader(ReadOptions(), "evaluation", quiet=as_json)
    benchmark = Benchmark(evaluations.records(against), ngram)
    evaluations.finish()
    reader = Reader(reading, "decontaminate", quiet=as_json)
    matches: list[Match] = []
    with RowFile(out) as file:
        for record in reader.records(paths, kind):
            found = benchmark.match(record)
            if found is None:
                file.write(row_of(record))
            else:
                matches.append(found)
        reader.finish()
        _some(file.rows)
    prompts = len({match.prompt for match in matches})
    if as_json:
        told = [
            {"row": _place(m.origin), "prompt": _place(m.prompt), "field": m.field, "text": m.text} for m in matches
        ]
        sizes = {
            "rows": file.rows,
            "prompts": len(benchmark.origins),
            "prompts_found": prompts,
            "common": benchmark.common,
        }
        print_json({"out": str(out), **sizes, "matches": told, **reader.left.to_json()})
        return
    reader.left.say()
    for match in matches[:SHOWN]:
        say(f"  {_place(match.origin)}: field '{match.field}': {_place(match.prompt)}: '{match.text}'")
    if len(matches) > SHOWN:
        say(f"  ... and {len(matches) - SHOWN:,} more; --json has them all")
    files = Counter(match.prompt.file for match in matches if match.prompt is not None)
    for name, count in files.items():
        say(f"{count:,} rows hold prompts of {name}")
    if benchmark.common:
        say(f"{benchmark.common:,} phrases were not looked for: they are in more than ten prompts")
    say(
        f"{file.rows:,} rows in {out}; left out {len(matches):,}, with {prompts:,} of {len(benchmark.origins):,} prompts"
    )


def _place(origin: Origin | None) -> str:
    return f"{origin.file}:{origin.line}" if origin else ""


def _some(rows: int) -> None:
    if not rows:
        raise DataError("no row is left to write", hint="`danlu data check` tells what the files hold.")
