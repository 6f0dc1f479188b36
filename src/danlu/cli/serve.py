"""`danlu serve`: the API and the chat page."""

from __future__ import annotations

from pathlib import Path

import click

from danlu.cli.console import people
from danlu.cli.sampling import engine_options


def command(verb: str) -> click.Command:
    """The click command."""
    return serve


@click.command()
@click.argument("model")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on. Others than loopback need --api-key."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar="DANLU_API_KEY", show_envvar=True, help="Wanted from clients as a bearer token.")
@click.option("--bits", type=click.Choice(["16", "8", "4"]), help="8 and 4 quantise the weights while loading.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=PATH",
    help="An adapter of MODEL, served as a model of this name.",
)
@engine_options
@click.option(
    "--database",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where votes go. Default: feedback.sqlite3 in the run's folder, else here.",
)
@click.option("--no-patches", is_flag=True, help="Without the facts that the model was taught.")
def serve(
    model: str,
    host: str,
    port: int,
    api_key: str | None,
    bits: str | None,
    adapters: tuple[str, ...],
    slots: int,
    cache_gib: float,
    speculate: str,
    guesses: int,
    database: Path | None,
    no_patches: bool,
) -> None:
    """Serve MODEL (a folder, a run or a hub id): an OpenAI-compatible API and a chat page."""
    from rich.markup import escape

    from danlu.cli.chat import adapter_places
    from danlu.config import EngineSettings
    from danlu.data.feedback import FeedbackDatabase, default_database
    from danlu.serve.app import create_app, listen, make_server
    from danlu.serve.guard import check_exposure, is_loopback

    check_exposure(host, api_key)
    places = adapter_places(adapters)
    listener = listen(host, port)
    with listener:
        from danlu import assistant

        feedback = FeedbackDatabase(database or default_database(model), create=True)
        people.print(f"[dim]loading {escape(model)} ...[/dim]")
        engine = EngineSettings(slots=slots, cache_gib=cache_gib, speculate=speculate, guesses=guesses)
        loaded = assistant.load(model, bits=int(bits) if bits else None, engine=engine, patches=not no_patches)
        voices = {name: loaded.with_adapter(place, name) for name, place in places.items()}
        app = create_app(loaded, feedback, api_key=api_key, local=is_loopback(host), adapters=voices)
        name = f"[{host.strip('[]')}]" if ":" in host else host
        url = f"http://{name}:{listener.getsockname()[1]}"
        people.print(
            f"[bold]{escape(model)}[/bold]\n  chat   {escape(url)}/\n  API    {escape(url)}/v1", soft_wrap=True
        )
        people.print(f"  votes  {escape(str(feedback.path))}\n[dim]Ctrl-C stops[/dim]", soft_wrap=True)
        try:
            make_server(app).run(sockets=[listener])
        except KeyboardInterrupt:
            people.print("[dim]stopped[/dim]")
