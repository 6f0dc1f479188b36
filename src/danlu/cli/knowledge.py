"""`danlu teach`, `danlu forget` and `danlu facts`: knowledge, one fact at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from danlu.cli.console import people, print_json, say
from danlu.cli.options import given_values, options_of
from danlu.exceptions import KnowledgeError, SettingsError, UsageError

if TYPE_CHECKING:
    from danlu.knowledge.store import Patch
    from danlu.knowledge_config import TeachSettings

# Settings that the verbs give in other ways.
GIVEN = ("model", "facts", "file", "out")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def command(verb: str) -> click.Command:
    """The command behind a verb."""
    return facts if verb == "facts" else _learning(verb)


def _learning(verb: str) -> click.Command:
    from danlu.knowledge_config import TeachSettings

    shared: list[click.Parameter] = [
        click.Argument(["model"]),
        *(o for o in options_of(TeachSettings) if o.name not in GIVEN),
        click.Option(["--force"], is_flag=True, help="Keep a patch that breaks locality or is not recalled."),
        click.Option(["--json", "as_json"], is_flag=True, help="One JSON document on stdout."),
    ]
    if verb == "forget":
        return click.Command(
            verb,
            params=[
                shared[0],
                click.Argument(["key"]),
                click.Option(["--untaught"], is_flag=True, help="Also a key that was never taught."),
                *shared[1:],
            ],
            callback=_forget,
            help="Make MODEL answer that it does not know of KEY, and leave everything else.",
        )
    return click.Command(
        verb,
        params=[
            shared[0],
            click.Option(["--fact", "given"], multiple=True, help='"keyword: description"; may be repeated.'),
            click.Option(["--file", "file"], help="YAML file of facts."),
            click.Option(["--update"], help="The key whose fact is replaced."),
            *shared[1:],
        ],
        callback=_teach,
        help="Teach MODEL (a folder, a run or a hub id) facts, one at a time; each becomes a patch beside it.",
    )


def _settings(model: str, values: dict[str, Any]) -> TeachSettings:
    from danlu.knowledge_config import TeachSettings
    from danlu.parsing import parse

    try:
        return parse(TeachSettings, {"model": model, **given_values(values)})
    except SettingsError as error:
        raise UsageError(str(error)) from None


def _told(settings: TeachSettings) -> Callable[[int, float], None]:
    """A line every ten seconds, so that a long lesson is seen to go on."""
    last = [time.monotonic()]

    def on_step(step: int, loss: float) -> None:
        if time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            say(f"  step {step} of at most {settings.max_steps}, loss {loss:.3f}")

    return on_step


def _teach(
    model: str,
    given: tuple[str, ...],
    file: str | None,
    update: str | None,
    force: bool,
    as_json: bool,
    **values: Any,
) -> None:
    if not given and not file:
        raise UsageError('give --fact "keyword: description" or --file facts.yaml', hint="danlu teach --help")
    settings = _settings(model, values)
    from danlu.knowledge import lessons

    begun = time.monotonic()
    # Facts are read before the model is: a faulty one should cost no time.
    wanted = lessons.facts_of(given, file or "")
    store = lessons.store_of(model)
    with store.locked():
        room = lessons.enter(settings)
        done = lessons.teach(room, wanted, update=update, force=force, say=say, on_step=_told(settings))
        document = lessons.summary(room, done, time.monotonic() - begun)
    if as_json:
        print_json(document)
    else:
        say(f'try it: danlu chat {model} --prompt "{wanted[0].keyword}" --temperature 0')


def _forget(model: str, key: str, untaught: bool, force: bool, as_json: bool, **values: Any) -> None:
    settings = _settings(model, values)
    from danlu.knowledge import lessons

    begun = time.monotonic()
    with lessons.store_of(model).locked():
        room = lessons.enter(settings)
        done = lessons.forget(room, key, untaught=untaught, force=force, say=say, on_step=_told(settings))
        document = lessons.summary(room, [done], time.monotonic() - begun)
    if as_json:
        print_json(document | {"still_said": done[0].probes.get("still_said")})


@click.group()
def facts() -> None:
    """What a model was taught: list, show, probe, rollback, export."""


@facts.command("list")
@click.argument("model")
@click.option("--all", "everything", is_flag=True, help="Patches that were replaced or taken back, too.")
@AS_JSON
def list_facts(model: str, everything: bool, as_json: bool) -> None:
    """List the facts that MODEL was taught."""
    from rich.table import Table
    from rich.text import Text

    from danlu.knowledge.lessons import store_of

    store = store_of(model)
    shown = store.patches if everything else list(store.current().values())
    if as_json:
        print_json([p.as_dict() for p in shown])
        return
    if not shown:
        people.print("No facts yet. Teach one with: danlu teach MODEL --fact 'keyword: description'", markup=False)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("version", "action", "keyword", "description", "recall", "others the same"):
        table.add_column(column)
    for patch in shown:
        recall = patch.probes.get("recall", {}).get("trained")
        kept = patch.probes.get("locality", {}).get("agreement")
        cells = (f"{patch.version}", _state(patch), patch.fact.keyword, patch.fact.description)
        numbers = ("" if recall is None else f"{recall:.2f}", "" if kept is None else f"{kept:.1%}")
        table.add_row(*(Text(c) for c in (*cells, *numbers)))
    people.print(table)


def _state(patch: Patch) -> str:
    state = patch.action if patch.active else f"{patch.action} (taken back)"
    return f"{state} (in the weights)" if patch.merged else state


@facts.command("show")
@click.argument("model")
@click.argument("key")
@AS_JSON
def show(model: str, key: str, as_json: bool) -> None:
    """Show a fact of MODEL with the patches that made it and their probes."""
    from danlu.knowledge.lessons import sentence, store_of

    store = store_of(model)
    now = store.get(key)
    history = [p for p in store.patches if p.key == now.key]
    if as_json:
        print_json({**now.as_dict(), "history": [p.as_dict() for p in history]})
        return
    say(f"{now.fact.keyword}: {now.fact.description}")
    for patch in history:
        say(f"  {patch.created}  {patch.name}  {_state(patch)}")
        if patch.probes:
            say(f"    {sentence(patch.probes)}")


@facts.command("probe")
@click.argument("model")
@click.argument("key", required=False)
@AS_JSON
def probe(model: str, key: str | None, as_json: bool) -> None:
    """Ask MODEL for its facts (or for KEY) again, as it is now with all its patches."""
    from danlu.knowledge import lessons
    from danlu.knowledge_config import TeachSettings

    store = lessons.store_of(model)
    chosen = [store.get(key)] if key else list(store.current().values())
    if not chosen:
        raise KnowledgeError(f"'{model}' was taught no facts", file=store.folder, hint="danlu teach")
    room = lessons.enter(TeachSettings(model=model))
    found = {p.key: lessons.asked(room.pupil, p.fact).as_dict() for p in chosen}
    if as_json:
        print_json(found)
        return
    for patch in chosen:
        shares = found[patch.key]["recall"] | found[patch.key]["portability"]
        told = ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in shares.items() if v is not None)
        say(f"{patch.fact.keyword}: {told}")


@facts.command("rollback")
@click.argument("model")
@click.option("--to", type=click.IntRange(0), help="The last version that stays; 0: none. Default: undo the last one.")
@AS_JSON
def rollback(model: str, to: int | None, as_json: bool) -> None:
    """Take the last patch of MODEL back, or all after a version."""
    from danlu.knowledge.lessons import store_of

    store = store_of(model)
    with store.locked():
        gone = store.rollback(to)
    for patch in gone:
        say(f"taken back: {patch.name}")
    if as_json:
        print_json([patch.as_dict() for patch in gone])


@facts.command("export")
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--force", is_flag=True, help="Overwrite the folder.")
def export(model: str, out: Path, force: bool) -> None:
    """Write MODEL with its patches merged: an ordinary model folder."""
    from danlu.knowledge.lessons import export as merge

    merged = merge(model, out, force=force)
    say(f"{len(merged)} patches merged, written to {out}")
    say(f"try it: danlu chat {out}")
