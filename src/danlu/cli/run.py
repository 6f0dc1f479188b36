"""`danlu run`, `danlu plan`, `danlu recipes`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from danlu.cli.console import people, print_json, say
from danlu.exceptions import UsageError


def command(verb: str) -> click.Command:
    """The command behind a verb."""
    return {"run": run, "plan": plan, "recipes": recipes}[verb]


@click.command("run")
@click.argument("recipe_file", metavar="RECIPE")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting: seed=1, sft.max_steps=10, model=PATH.",
)
@click.option("--name", default=None, help="Name of the run (default: the recipe's file name).")
@click.option("--until", default=None, metavar="STAGE", help="Stop after this stage.")
@click.option(
    "--processes", default=None, metavar="N", help="Processes that share the work of training: a number, or auto."
)
@click.option("--force", is_flag=True, help="Go on although a gate does not hold.")
def run(
    recipe_file: str,
    overrides: tuple[str, ...],
    name: str | None,
    until: str | None,
    processes: str | None,
    force: bool,
) -> None:
    """Run a recipe: the whole chain. Finished stages are not run again; an interrupted one goes on."""
    from danlu.pipeline.recipe import load_recipe
    from danlu.training.runs import RECIPE, last_policy, runs_root

    recipe = load_recipe(recipe_file, overrides, processes=processes)
    given = Path(recipe_file)
    # The recipe inside a run folder is that run's own: going on must not begin another.
    inside = given.name == RECIPE and given.resolve().parent.parent == runs_root().resolve()
    used = name or (given.resolve().parent.name if inside else given.stem)
    if Path(used).name != used or used.startswith("."):
        raise UsageError(f"'{used}' is no name for a run", hint="letters, digits, - and _")
    folder = runs_root() / used

    from danlu.pipeline.listing import describe
    from danlu.pipeline.report import write_report
    from danlu.pipeline.run import execute

    people.print(f"[bold]{used}[/bold]: {recipe.description}")
    try:
        execute(recipe, folder, until=until, force=force, say=say)
    finally:
        # Also after a failed gate or Ctrl-C: the report says what there is and what is missing.
        report = write_report(folder) if (folder / RECIPE).is_file() else None
    from danlu.cli.runs import results_table

    found = describe(folder)
    if found["table"]:
        people.print(results_table(found))
    people.print(f"\n{found['seconds']:.0f} s in all stages. Report: [bold]{report}[/bold]")
    if last_policy(folder) is None:
        return
    people.print("Try next:")
    me = _as_called()
    people.print(f"  {me} chat {folder}")
    people.print(f"  {me} serve {folder}")


@click.command("plan")
@click.argument("recipe_file", metavar="RECIPE")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As for run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def plan(recipe_file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """A rough estimate of memory and time per stage, before anything runs."""
    from danlu.pipeline.plan import estimate
    from danlu.pipeline.recipe import load_recipe

    rows = estimate(load_recipe(recipe_file, overrides))
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table(
        "stage", "parameters", "tokens", "tokens/parameter", "FLOPs", "memory", "time", title="A plan for this machine"
    )
    for row in rows:
        table.add_row(
            row["stage"],
            f"{row['parameters'] / 1e6:,.1f} M" if row["parameters"] else "",
            f"{row['tokens'] / 1e6:,.2f} M" if row["tokens"] else "",
            f"{row['tokens_per_parameter']:,.2f}" if row["tokens_per_parameter"] else "",
            f"{row['flops']:.1e}" if row["flops"] else "",
            _room(row),
            _minutes(row),
        )
    people.print(table)
    _by_bits([row for row in rows if row["inference_mb"]])
    trained = [row for row in rows if row["strategies"]]
    if trained:
        names = [s["strategy"] for s in trained[0]["strategies"]]
        for title, shown_as in (
            ("Peak memory of a process, by strategy (ZeRO: over several processes)", _room),
            ("Time, by strategy (ZeRO: of so many processes as if each had this machine)", _minutes),
            ("FLOPs of a process, by strategy", lambda s: f"{s['flops']:.1e}"),
        ):
            table = Table("stage", *names, title=title)
            for row in trained:
                table.add_row(row["stage"], *(shown_as(s) for s in row["strategies"]))
            people.print(table)
    people.print(
        "Red: does not fit this machine. Memory is counted, times follow from the matrix rate measured now, tokens from the "
        "sizes of the files: expect a factor of two for time."
    )


def _by_bits(rows: list[dict[str, Any]]) -> None:
    """Memory of answering and of training with each kind of adapter, by the bits of the weights."""
    from rich.table import Table

    kinds = {kind: list(found) for row in rows for kind, found in row["tuning_mb"].items()}
    if not rows:
        return
    table = Table("", "bits", *(row["stage"] for row in rows), title="Peak memory, by adapter and bits of the weights")
    for bits in rows[0]["inference_mb"]:
        table.add_row("answering", bits, *(f"{row['inference_mb'][bits]:,.0f} MB" for row in rows))
    for kind, several in kinds.items():
        for bits in several:
            found = (row["tuning_mb"].get(kind, {}).get(bits) for row in rows)
            table.add_row(kind, bits, *("" if mb is None else f"{mb:,.0f} MB" for mb in found))
    people.print(table)


def _as_called() -> str:
    """How the user can call danlu again: not every environment is on the shell's path."""
    if shutil.which("danlu"):
        return "danlu"
    return f"{sys.executable} -m danlu" if Path(sys.argv[0]).name == "__main__.py" else sys.argv[0]


def _minutes(row: dict[str, Any]) -> str:
    return f"{row['seconds'] / 60:,.1f} min"


def _room(row: dict[str, Any]) -> str:
    text = f"{row['memory_mb']:,.0f} MB"
    return text if row["fits"] else f"[red]{text}[/red]"


@click.command("recipes")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--folder", default="recipes", help="Where the recipes are.")
def recipes(as_json: bool, folder: str) -> None:
    """List the recipes of a folder with one line each."""
    import yaml

    found = []
    for path in sorted(Path(folder).glob("*.yaml")):
        raw = yaml.safe_load(path.read_text("utf-8")) or {}
        stages = [s.get("name", s.get("kind")) for s in raw.get("stages", [])]
        found.append({"recipe": str(path), "description": raw.get("description", ""), "stages": stages})
    if as_json:
        print_json(found)
        return
    if not found:
        raise UsageError(f"no recipes in '{folder}'", hint="run from danlu's folder or give --folder")
    for row in found:
        people.print(f"[bold]{row['recipe']}[/bold]  {row['description']}")
        people.print(f"    {' -> '.join(row['stages'])}", style="dim")
