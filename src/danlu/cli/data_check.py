"""`danlu data check` and `danlu data stats`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from danlu.cli.console import people, print_json, say
from danlu.cli.data_reading import (
    SHOWN,
    Reader,
    RowBar,
    force_option,
    json_option,
    kind_option,
    licence_rows,
    pooled,
    reading_options,
    say_licences,
)
from danlu.exceptions import DataError, UsageError

if TYPE_CHECKING:
    from danlu.data.check import Checker, Measure
    from danlu.data.problems import Problem
    from danlu.data.read import ReadOptions
    from danlu.text.chat_template import ChatTemplate

LEFT_ASIDE = (".md", ".rst", ".pdf", ".html")  # beside data, when a shell's glob names everything in a folder
DEFAULT_TEMPLATE = "chatml"

model_option = click.option(
    "--model", default=None, help="Folder, run or hub id: lengths in its tokens, rows as it sees them."
)
template_option = click.option("--template", default=None, help="A shipped chat template, in place of the model's own.")


@click.command("check")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@model_option
@template_option
@click.option(
    "--max-length", type=click.IntRange(min=1), default=None, help="Limit, in tokens (with --model) or characters."
)
@kind_option
@click.option(
    "--show", type=click.IntRange(min=1), default=None, metavar="N", help="Show N rows as the model will see them."
)
@reading_options
@json_option
def check(
    paths: tuple[str, ...],
    model: str | None,
    template: str | None,
    max_length: int | None,
    kind: Any,
    show: int | None,
    reading: ReadOptions,
    as_json: bool,
) -> int:
    """What is in the data, and what is wrong with it.

    Errors are rows or files that cannot be read; with any of them the exit status is 1 (unless --skip-bad). Warnings
    are about rows that can be read.
    """
    if show is not None and as_json:
        raise UsageError("--show is for people, --json for programs: give one of them")
    seam = _template(model, template) if model or show is not None else None
    if show is not None and seam is not None:
        _show(paths, reading, kind, show, seam, model)
        return 0
    measure = _measure(seam) if model and seam is not None else None
    options = {"kind": kind, "max_length": max_length, "measure": measure}
    documents: list[dict[str, Any]] = []
    for path in paths:
        aside = _left_aside(path, several=len(paths) > 1)
        if aside:
            documents.append(
                {"path": path, "format": None, "records": 0, "left_aside": aside, "errors": 0, "problems": []}
            )
        else:
            documents.append(_check_path(path, reading, options, as_json=as_json))
        if not as_json:
            _say_document(documents[-1])
    if as_json:
        print_json(documents[0] if len(documents) == 1 else documents)
    errors = sum(document["errors"] for document in documents)
    return 1 if errors and not reading.skip_bad else 0


def _left_aside(path: str, *, several: bool) -> str:
    """Why a path is not looked at, or ""."""
    from danlu.data.importer import is_registry

    if several and Path(path).suffix.lower() in LEFT_ASIDE:
        return "a document beside the data"
    if is_registry(Path(path)):
        return "a registry of data sets: read it with `danlu data import`"
    return ""


def _check_path(path: str, reading: ReadOptions, options: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    from danlu.data.check import Checker, Findings
    from danlu.data.problems import problem_of

    findings = Findings(None if as_json else SHOWN)
    checker = Checker(path, findings, **options)
    try:
        _feed(checker, path, reading, options["kind"], quiet=as_json)
    except DataError as error:
        # A path that is not there, or content of another kind: one problem of the whole path.
        checker.problem(problem_of(error))
    summary = checker.finish()
    if not summary.records and not findings.errors:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in summary.dropped.items())
        checker.problem(_nothing(path, reasons))
    document = summary.to_json(findings)
    document["licences"] = licence_rows(summary.licences, summary.dropped)
    return document


def _feed(checker: Checker, path: str, reading: ReadOptions, kind: Any, *, quiet: bool) -> None:
    from danlu.data.read import scan

    found = scan([path], reading, kind=kind, on_problem=checker.problem, on_dropped=checker.dropped)
    with RowBar(f"check {path}", [path], quiet=quiet) as bar:
        for entry, record in pooled(bar.watch(found), kind):
            checker.add(entry, record)


def _nothing(path: str, reasons: str) -> Problem:
    from danlu.data.problems import Problem

    message = f"no row can be used ({reasons or 'there are none'})"
    return Problem("no-rows", path, 0, "", message, "Give other data; the reasons are those of the rows left out.")


def _say_document(document: Mapping[str, Any]) -> None:
    if "left_aside" in document:
        say(f"{document['path']}: left aside, {document['left_aside']}\n")
        return
    from rich.text import Text

    people.print(Text(document["path"], style="bold"), soft_wrap=True)
    for name, value in _facts(document):
        people.print(Text(f"  {name:<20}", style="dim").append(value, style="not dim"), soft_wrap=True)
    say_licences(document["licences"])
    shown = _chosen(document["problems"])
    for problem in shown:
        _say_problem(problem)
    total = document["errors"] + document["warnings"]
    if total > len(shown):
        people.print(f"  ... and {total - len(shown):,} more; --json has them all", style="dim")
    if document["counts"]:
        counts = ", ".join(f"{code} {count:,}" for code, count in document["counts"].items())
        say(f"  errors: {document['errors']:,}, warnings: {document['warnings']:,} ({counts})")
    else:
        people.print("  no problems", style="green")
    people.print()


def _facts(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    def counted(name: str) -> str:
        return ", ".join(f"{key} {count:,}" for key, count in document[name].items()) or "none"

    yield "format", counted("formats")
    yield "records", counted("kinds")
    yield "languages", counted("languages")
    lengths = document["lengths"]
    if "median" in lengths:
        parts = ", ".join(f"{name} {lengths[name]:,}" for name in ("min", "median", "p90", "p99", "max"))
        yield f"length, {lengths['unit']}", parts
    if document["answers"]["count"]:
        share = document["answers"]["without_stop"] / document["answers"]["count"]
        yield "answers", f"{document['answers']['count']:,}, of which {share:.1%} end without punctuation"
    if document["pairs"]["count"]:
        share = document["pairs"]["chosen_longer"] / document["pairs"]["count"]
        yield "pairs", f"{document['pairs']['count']:,}, the better answer is the longer one in {share:.0%}"
    if document["dropped"]:
        yield "left out", counted("dropped")


def _chosen(problems: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Up to 20: errors first, then warnings of every code in turn, so that many of one kind hide no other."""
    errors = [problem for problem in problems if problem["severity"] == "error"][:SHOWN]
    by_code: dict[str, list[Mapping[str, Any]]] = {}
    for problem in problems:
        if problem["severity"] == "warning":
            by_code.setdefault(problem["code"], []).append(problem)
    chosen: list[Mapping[str, Any]] = []
    while len(errors) + len(chosen) < SHOWN and any(by_code.values()):
        for waiting in by_code.values():
            if waiting and len(errors) + len(chosen) < SHOWN:
                chosen.append(waiting.pop(0))
    order = list(by_code)
    return errors + sorted(chosen, key=lambda problem: order.index(problem["code"]))


def _say_problem(problem: Mapping[str, Any]) -> None:
    from rich.text import Text

    place = f"{problem['file']}:{problem['line']}" if problem["line"] else problem["file"]
    line = Text("  ").append(problem["severity"], style="red" if problem["severity"] == "error" else "yellow")
    line.append(f" {problem['code']}: {place}: ")
    if problem["field"]:
        line.append(f"field '{problem['field']}': ")
    line.append(problem["message"])
    hint = problem["hint"].partition("\n")[0].strip()
    if hint:
        line.append(f" -> {hint}", style="dim")
    people.print(line, soft_wrap=True)


# -- the model's view -----------------------------------------------------------------------------------------------------


def _template(model: str | None, name: str | None) -> ChatTemplate:
    from danlu.text.chat_template import ChatTemplate

    if model is not None:
        from danlu.text.text_to_text import seam_of
        from danlu.training.templates import reads_sources, tokenizer_of

        template = seam_of(tokenizer_of(model, stage="data check"), name, encoder_decoder=reads_sources(model))
        if template.note:
            say(f"note: {template.note}")
        return template
    from danlu.data.show import stand_in_tokenizer

    return ChatTemplate(stand_in_tokenizer(name or DEFAULT_TEMPLATE), name or DEFAULT_TEMPLATE)


def _measure(template: ChatTemplate) -> Measure:
    from danlu.data.measure import TokenLengths

    return TokenLengths(template)


def _show(
    paths: Sequence[str], reading: ReadOptions, kind: Any, count: int, template: ChatTemplate, model: str | None
) -> None:
    from rich.text import Text

    from danlu.data.show import views

    reader = Reader(reading, "show", quiet=True)
    name = template.name if template.name != "tokenizer" else "its own template"
    say(f"As {model or 'a model'} with {name} sees them: [[trained]], masked, and the stop token as ⏹.")
    styles = {"masked": "dim", "trained": "bold green", "stop": "bold reverse green"}
    for record in islice(reader.records(paths, kind), count):
        for view in views(record, template):
            origin = record.origin
            place = f"{origin.file}:{origin.line} " if origin else ""
            people.print(Text(f"\n{place}{view.title}", style="bold"), soft_wrap=True)
            line = Text()
            for piece in view.pieces:
                marks = ("[[", "]]") if piece.kind == "trained" else ("", "⏹") if piece.kind == "stop" else ("", "")
                line.append(marks[0], style="dim").append(piece.text, style=styles[piece.kind]).append(marks[1], "dim")
            people.print(line, soft_wrap=True)
    reader.finish()


@click.command("stats")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@model_option
@template_option
@click.option("--html", type=click.Path(path_type=Path), default=None, help="Write a page of plots there, one file.")
@kind_option
@reading_options
@force_option
@json_option
def stats(
    paths: tuple[str, ...],
    model: str | None,
    template: str | None,
    html: Path | None,
    kind: Any,
    reading: ReadOptions,
    force: bool,
    as_json: bool,
) -> None:
    """Lengths, turns, languages, sources, licences; as text, JSON or a page of plots."""
    from danlu.data.rows_out import refuse_existing
    from danlu.data.stats import Statistics

    if html is not None:
        refuse_existing(html, force=force)
    found = Statistics(_measure(_template(model, template)) if model else None)
    reader = Reader(reading, "stats", quiet=as_json)
    for entry, record in reader.entries(paths, kind):
        found.add(entry, record)
    found.finish()
    reader.finish()
    if not found.records:
        raise DataError("no row can be used", hint="`danlu data check` tells why.")
    document = {"paths": list(paths), **found.to_json(), **reader.left.to_json()}
    if html is not None:
        from danlu.pipeline.data_page import write_page

        write_page(html, ", ".join(Path(path).name or path for path in paths), found)
        document["html"] = str(html)
    if as_json:
        print_json(document)
        return
    _say_statistics(document)
    reader.left.say()
    if html is not None:
        say(f"page: {html}")


def _say_statistics(document: Mapping[str, Any]) -> None:
    say(f"{document['records']:,} records")
    for name in ("formats", "kinds", "languages", "sources", "licences", "turns"):
        parts = [f"{key or 'not named'} {count:,}" for key, count in list(document[name].items())[:SHOWN]]
        say(f"  {name:<22}{', '.join(parts)}")
    for name in ("lengths", "questions", "answers", "chosen", "rejected"):
        lengths = document[name]
        if "median" in lengths:
            told = ", ".join(f"{key} {lengths[key]:,}" for key in ("min", "p10", "median", "mean", "p90", "p99", "max"))
            say(f"  {name + ', ' + lengths['unit']:<22}{told}")
