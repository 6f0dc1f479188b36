"""`danlu runs` and `danlu report`: what was run, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from danlu.cli.console import people, print_json

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from danlu.pipeline.listing import StageView

COLOURS = {"done": "green", "failed": "red", "interrupted": "yellow", "running": "yellow"}
# In a terminal a stage is told by its first few metrics of these.
TOLD = (
    "eval_accuracy",
    "eval_loss",
    "eval_score",
    "score",
    "kl",
    "loss",
    "perplexity",
    "vocab_size",
)
TOLD_AT_MOST = 3


def command(verb: str) -> click.Command:
    """The click command."""
    return {"runs": runs, "report": report}[verb]


@click.command()
@click.argument("run", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def runs(run: str | None, as_json: bool) -> None:
    """List the runs under runs/, or show one: stages, metrics, gates, results, lineage.

    RUN is a name under runs/ or a path.
    """
    from danlu.pipeline.listing import describe, find_run, list_runs

    if run is None:
        found = list_runs()
        if as_json:
            print_json(found)
        elif found:
            people.print(_runs_table(found))
        else:
            people.print("No runs yet. Start one with: danlu run recipes/quickstart.yaml")
        return
    folder = find_run(run)
    described = describe(folder)
    if as_json:
        print_json(described)
        return
    _show(described, folder)


@click.command()
@click.argument("run")
def report(run: str) -> None:
    """Write a run's report, one HTML file, and print its path.

    RUN is a name under runs/ or a path.
    """
    from danlu.pipeline.listing import find_run
    from danlu.pipeline.report import write_report

    click.echo(str(write_report(find_run(run))))


def results_table(described: Mapping[str, Any]) -> Table:
    """The results of `describe(run)` as a table for people: means with their 95% intervals."""
    from rich.table import Table
    from rich.text import Text

    from danlu.pipeline.report_words import number
    from danlu.types import OVERLAPS

    table = Table("model", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    overlaps = [name for name in OVERLAPS if any(name in row for row in described["table"])]
    marks = (
        []
        if overlaps and not any(r.get("rubric") or r.get("correct") for r in described["table"])
        else ["rubric", "correct"]
    )
    for name in (*marks, *overlaps, "ends by itself", "tokens"):
        table.add_column(name, justify="right")
    for row in described["table"]:
        stop, length = row.get("stop_rate"), row.get("length")
        table.add_row(
            Text(str(row.get("model") or "")),
            *(_interval(row.get(name)) for name in marks),
            *(_interval(row.get(name), "{:.2f}") for name in overlaps),
            "–" if stop is None else number(stop, percent=True),
            "–" if length is None else f"{length:.1f}",
        )
    return table


def _interval(value: Mapping[str, float] | None, form: str = "{:.1%}") -> Text:
    from rich.text import Text

    if not value or value.get("mean") is None:
        return Text("–")
    text = Text(form.format(value["mean"]))
    if value.get("low") is not None and value.get("high") is not None:
        text.append(f"  {form.format(value['low'])} – {form.format(value['high'])}", style="dim")
    return text


def _runs_table(found: Sequence[Mapping[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from danlu.pipeline.report_words import duration

    table = Table("run", "recipe", "stages", "time", "last result", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for run in found:
        stages = Text(f"{run['done']}/{run['stages']} ").append(_status(run["status"]))
        description = Text(run["description"], overflow="ellipsis", no_wrap=True)
        table.add_row(Text(run["run"]), description, stages, duration(run["seconds"]), Text(_last(run["last"])))
    return table


def _last(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    for key, word in (("correct", "correct"), ("rubric", "by the rubric")):
        if (row.get(key) or {}).get("mean") is not None:
            return f"{row.get('model')}: {row[key]['mean']:.1%} {word}"
    return str(row.get("model"))


def _status(status: str) -> Text:
    from rich.text import Text

    return Text(status, style=COLOURS.get(status, "dim"))


def _show(described: Mapping[str, Any], folder: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from danlu.pipeline.listing import lineage, no_results, stage_views
    from danlu.pipeline.report_words import duration, number

    people.print(Text(str(folder), style="bold").append(f"   {duration(described['seconds'])}", style="not bold dim"))
    people.print()
    sources: dict[str, list[str]] = {}
    for link in lineage(folder):
        sources.setdefault(link.stage, []).append(link.source)
    table = Table("stage", "from", "status", "time", "key metrics", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for stage in described["stages"]:
        metrics = stage["metrics"]
        told = [k for k in TOLD if k in metrics][:TOLD_AT_MOST] or list(metrics)[:TOLD_AT_MOST]
        table.add_row(
            Text(stage["name"]),
            Text(", ".join(sources.get(stage["name"], [])) or "–", style="dim"),
            _status(stage["status"]),
            duration(stage["seconds"]) if stage["seconds"] else "–",
            Text(", ".join(f"{k} {number(metrics[k])}" for k in told)),
        )
    people.print(table)
    gates = [(g, s.name) for s in stage_views(folder) for g in s.gates]
    if gates:
        people.print()
        _show_gates(gates)
    for stage in stage_views(folder):
        _show_reward_report(stage)
    people.print()
    if described["table"]:
        people.print(results_table(described))
    else:
        people.print(no_results(stage_views(folder)), style="dim")


def _show_reward_report(stage: StageView) -> None:
    from rich.table import Table
    from rich.text import Text

    from danlu.pipeline.reward_page import figures

    told = figures(stage.reward_report)
    if not told:
        return
    people.print()
    table = Table(stage.name, "", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for label, value in told:
        table.add_row(Text(label), Text(value))
    people.print(table)


def _show_gates(gates: Sequence[tuple[Mapping[str, Any], str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from danlu.pipeline.report_words import number

    table = Table("gate", "after", "verdict", "found", "limit", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for gate, stage in gates:
        if gate.get("passed"):
            verdict = Text("holds", style="green")
        else:
            verdict = Text("warning", style="yellow") if gate.get("warning") else Text("does not hold", style="red")
        numbers = [number(gate[k]) if isinstance(gate.get(k), int | float) else "–" for k in ("value", "threshold")]
        table.add_row(Text(str(gate["code"])), Text(stage), verdict, *numbers)
    people.print(table)
