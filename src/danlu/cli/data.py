"""`danlu data`: check, convert, mix, split and clean data before a second of training."""

from __future__ import annotations

import importlib

import click

# verb -> (module in danlu.cli, its command, one line of help)
VERBS: dict[str, tuple[str, str, str]] = {
    "check": ("data_check", "check", "What is in the data, and what is wrong with it"),
    "stats": ("data_check", "stats", "Lengths, turns, languages, sources, licences; a page of plots"),
    "convert": ("data_convert", "convert", "Write the data in another format"),
    "import": ("data_convert", "import_", "LLaMA-Factory's dataset_info.json as a list of sources"),
    "mix": ("data_write", "mix", "One file of several sources by weight"),
    "split": ("data_write", "split", "Parts by a hash of the prompt: train and test, or phases"),
    "dedup": ("data_clean", "dedup", "Without duplicates, exact or near"),
    "decontaminate": ("data_clean", "decontaminate", "Without rows that hold an evaluation's prompts"),
}


class Verbs(click.Group):
    """A group that knows its verbs without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module, attribute, _ = VERBS[name]
        command: click.Command = getattr(importlib.import_module(f"danlu.cli.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, line) for verb, (_, _, line) in VERBS.items()])


def command(verb: str) -> click.Command:
    """The click command."""
    return data


@click.group("data", cls=Verbs)
def data() -> None:
    """Data before training: check it, convert it, mix, split and clean it.

    A PATH is a file, a folder, a glob, or hf:owner/name[:split]. Rows are recognised by their content.
    """
