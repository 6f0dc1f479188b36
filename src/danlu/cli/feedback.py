"""`danlu feedback`: votes from the chat page as training data, and their statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from danlu.cli.console import people, print_json
from danlu.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from danlu.data.feedback import FeedbackDatabase

_database = click.option(
    "--database",
    type=click.Path(path_type=Path),
    default=Path("feedback.sqlite3"),
    show_default=True,
    help="The file that `danlu serve` wrote, or the run folder it is in.",
)


def command(verb: str) -> click.Command:
    """The click command."""
    return feedback


@click.group()
def feedback() -> None:
    """Votes from the chat page: export as training data, statistics."""


@feedback.command()
@_database
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSON Lines file to write.")
@click.option(
    "--kind",
    type=click.Choice(["pairs", "votes"]),
    default="pairs",
    show_default=True,
    help="pairs: a liked and a disliked answer to one prompt; votes: every vote by itself.",
)
@click.option("--force", is_flag=True, help="Overwrite the file.")
def export(database: Path, out: Path, kind: str, force: bool) -> None:
    """Write votes as data that training reads."""
    from danlu.atomic import write_jsonl
    from danlu.data.feedback import preference_rows, vote_rows

    if out.exists() and not force:
        raise DataError("the file exists already", hint="choose another --out, or overwrite it with --force", file=out)
    opened = _open(database)
    make: Callable[[FeedbackDatabase], list[dict[str, Any]]] = preference_rows if kind == "pairs" else vote_rows
    rows = make(opened)
    if not rows:
        count = len(opened.votes())
        if kind == "votes" or not count:
            raise DataError(
                "there are no votes yet", hint="vote on answers on the page of `danlu serve`", file=database
            )
        raise DataError(
            f"there are {count} votes but no pair: a pair is a liked and a disliked answer to the same prompt",
            hint="answer a question again on the chat page and vote on both answers, or use --kind votes",
            file=database,
        )
    try:
        write_jsonl(out, rows)
    except OSError as error:
        raise DataError(f"the file cannot be written: {error.strerror}", file=out) from error
    people.print(f"{len(rows)} {kind if len(rows) != 1 else kind[:-1]} -> {out}", soft_wrap=True, markup=False)


@feedback.command()
@_database
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def stats(database: Path, as_json: bool) -> None:
    """Count votes, by model."""
    from rich.markup import escape
    from rich.table import Table

    from danlu.data.feedback import statistics

    counts = statistics(_open(database))
    if as_json:
        print_json(counts)
        return
    table = Table("model", "up", "down", box=None)
    for name, votes in counts["models"].items():
        table.add_row(escape(name), str(votes["up"]), str(votes["down"]))
    people.print(
        f"{counts['votes']} votes on answers to {counts['prompts']} prompts: {counts['up']} up, {counts['down']} down, "
        f"{counts['pairs']} pairs for training"
    )
    if counts["votes"]:
        people.print(table)


def _open(database: Path) -> FeedbackDatabase:
    from danlu.data.feedback import FILE_NAME, FeedbackDatabase

    return FeedbackDatabase(database / FILE_NAME if database.is_dir() else database)
