"""`danlu tokenizer|pretrain|sft|reward|dpo|ppo|grpo|quantize`: one stage, with the same settings as in a recipe."""

from __future__ import annotations

from typing import Any

import click

from danlu.cli.console import say
from danlu.cli.options import given_values, options_of
from danlu.exceptions import SettingsError, UsageError

DEFAULT_OUT = "out"


def command(verb: str) -> click.Command:
    """The command of a stage kind."""
    from danlu.config import KINDS, POLICY_KINDS

    cls = KINDS[verb]
    options: list[click.Parameter] = list(options_of(cls))
    options.append(click.Option(["--force"], is_flag=True, help="Go on although a gate does not hold."))

    def run(force: bool, **arguments: Any) -> None:
        from danlu.parsing import parse
        from danlu.pipeline.run import run_stage

        if verb == "tokenizer" and arguments.get("data") == () and not arguments.get("out"):
            raise UsageError("give --data and --out", hint=f"danlu {verb} --help")
        values = given_values(arguments)
        if not values.get("out"):
            raise UsageError("--out is missing: the folder to write into", hint=f"danlu {verb} --help")
        try:
            settings = parse(cls, values)
        except SettingsError as error:
            raise UsageError(str(error)) from None
        run_stage(verb, verb, settings, force=force, say=say)
        say(f"written to {values['out']}")
        if verb in (*POLICY_KINDS, "quantize"):
            say(f"try it: danlu chat {values['out']}/model")

    head = (cls.__doc__ or "").strip().split("\n")[0]
    return click.Command(verb, params=options, callback=run, help=head)
