"""`danlu tokenizer|pretrain|sft|reward|dpo|ppo|grpo|quantize`: one stage, with the same settings as in a recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from danlu.cli.console import people, say
from danlu.cli.options import given_values, options_of
from danlu.exceptions import DanluError, GateError, Interrupted, SettingsError, UsageError

DEFAULT_OUT = "out"


def command(verb: str) -> click.Command:
    """The command of a stage kind."""
    from danlu.config import KINDS, POLICY_KINDS

    cls = KINDS[verb]
    if verb == "quantize":
        return quantize_command()
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
        if verb in POLICY_KINDS:
            say(f"try it: danlu chat {values['out']}/model")

    head = (cls.__doc__ or "").strip().split("\n")[0]
    return click.Command(verb, params=options, callback=run, help=head)


def quantize_command() -> click.Command:
    """`danlu quantize MODEL`: the stage, with the model as an argument, a folder by default, and its figures printed."""
    from danlu.config import QuantizeSettings

    options: list[click.Parameter] = [click.Argument(["given"], metavar="[MODEL]", required=False)]
    options += options_of(QuantizeSettings)
    options.append(click.Option(["--force"], is_flag=True, help="Keep the result although a gate does not hold."))
    options.append(click.Option(["--json", "as_json"], is_flag=True, help="One JSON document on stdout."))

    def run(given: str | None, force: bool, as_json: bool, **arguments: Any) -> None:
        from danlu.parsing import parse
        from danlu.pipeline.run import run_stage

        values = given_values(arguments)
        if given and values.get("model", given) != given:
            raise UsageError("two models are given", hint="danlu quantize MODEL, or --model MODEL")
        values["model"] = given or values.get("model", "")
        if not values["model"]:
            raise UsageError("no model is given", hint="danlu quantize MODEL --bits 8|4")
        if values.get("calibration"):
            values.setdefault("method", "gptq")
            values.setdefault("bits", 4)
        if not values.get("out"):
            values["out"] = f"{_plain_name(values['model'])}-int{values.get('bits', 8)}"
        try:
            settings = parse(QuantizeSettings, values)
        except SettingsError as error:
            raise UsageError(str(error)) from None
        with _nothing_left(Path(settings.out)):
            manifest = run_stage("quantize", "quantize", settings, force=force, say=say)
        figures = manifest["metrics"]
        if as_json:
            shown = {"model": f"{settings.out}/model", "bits": settings.bits, "method": settings.method}
            print(json.dumps(shown | figures | {"gates": manifest.get("gates", [])}, ensure_ascii=False, indent=2))
        else:
            _show(figures)
        if experts := manifest["facts"].get("bytes_of_experts"):
            say(f"the experts of this mixture stay in 16 bits: {experts / 1e6:,.1f} MB")
        say(f"written to {settings.out}/model")
        say(f"try it: danlu chat {settings.out}/model")

    head = (QuantizeSettings.__doc__ or "").strip()
    return click.Command("quantize", params=options, callback=run, help=f"Make MODEL small. {head}")


@contextmanager
def _nothing_left(out: Path) -> Iterator[None]:
    """What is refused leaves no folder; one that was there before, a gate's verdict and an interrupted run stay."""
    fresh = not out.exists()
    try:
        yield
    except (GateError, Interrupted):
        raise
    except DanluError:
        if fresh:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _plain_name(model: str) -> str:
    path = Path(model)
    return (path.parent.name if path.name == "model" else path.name).replace(":", "-") or "model"


def _show(figures: dict[str, float]) -> None:
    from rich.table import Table

    table = Table("", "before", "after", box=None, pad_edge=False)
    size = [f"{figures[n] / 1e6:,.1f} MB" for n in ("bytes_16bit", "bytes")]
    table.add_row("weights", f"{size[0]} in 16 bits", size[1])
    if "perplexity" in figures:
        before, after = figures["perplexity_before"], figures["perplexity"]
        table.add_row("perplexity", f"{before:.4f}", f"{after:.4f} ({after / before - 1:+.2%})")
    speed = [f"{figures[n]:,.1f}" for n in ("tokens_per_second_before", "tokens_per_second")]
    table.add_row("tokens a second, one answer", *speed)
    people.print(table)
