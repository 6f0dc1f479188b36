"""The `danlu` command: a table of verbs, each imported when it is used, and the one place where errors become exit statuses."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from danlu.exceptions import DanluError, UsageError
from danlu.training import place

# verb -> (module in danlu.cli, one line of help); each module has `command(verb) -> click.Command`
VERBS: dict[str, tuple[str, str]] = {
    "run": ("run", "Run a recipe: the whole chain, resumable"),
    "plan": ("run", "Memory and time per stage, before anything runs"),
    "recipes": ("run", "List the recipes of a folder, one line each"),
    "runs": ("runs", "List runs, or show one: stages, metrics, gates"),
    "report": ("runs", "Write a run's report and print its path"),
    "data": ("data", "Data before training: check, convert, mix, split, dedup, decontaminate, stats"),
    "tokenizer": ("tokenizer", "Train a tokenizer, add words to one, compare several on a text"),
    "pretrain": ("stages", "Pre-train on plain text, from nothing or from a model"),
    "sft": ("stages", "Supervised fine-tuning on conversations"),
    "reward": ("stages", "Train a reward model on comparisons"),
    "dpo": ("stages", "DPO: align a policy with comparisons, without a reward model"),
    "ppo": ("stages", "PPO: align a policy with a reward model, a verifier or other rewards"),
    "grpo": (
        "stages",
        "GRPO: align a policy with a reward model, a verifier or other rewards, by groups of answers",
    ),
    "base": ("base", "Which base model? Size, licence, tokens per character, memory, perplexity; the published ones"),
    "convert-model": ("convert", "Any model that danlu loads as a plain transformers folder"),
    "merge": ("merge", "Make one model of adapters and the model that they were trained on"),
    "quantize": ("stages", "Make a model small: weights in 8 or 4 bits"),
    "export": ("export", "Ship a model: a folder for transformers and vLLM, or GGUF for llama.cpp and Ollama"),
    "teach": ("knowledge", "Teach a model a fact; each becomes a patch beside it"),
    "forget": ("knowledge", "Make a model answer that it does not know of a key"),
    "facts": ("knowledge", "What a model was taught: list, show, probe, rollback, export"),
    "chat": ("chat", "Talk to a model in the terminal"),
    "serve": ("serve", "Serve a model: OpenAI-compatible API and a chat page"),
    "feedback": ("feedback", "Votes from the chat page: export as preference data, statistics"),
    "generate": ("generate", "Answers for a file of prompts"),
    "eval": ("generate", "Perplexity, exact match or rubric score of a model on a file"),
    "doctor": ("doctor", "What this machine can do, and what is missing"),
}

ONE_OF_SEVERAL = (
    "danlu: accelerate was asked for several processes and started one, as it does with --cpu; "
    "`accelerate launch --multi_gpu` or torchrun start them"
)


class Verbs(click.Group):
    """A group that knows its verbs without importing them: `danlu --help` must be fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = importlib.import_module(f"danlu.cli.{VERBS[name][0]}")
        command: click.Command = module.command(name)
        return command

    def format_help(self, ctx: click.Context, formatter: Any) -> None:
        from rich.table import Table

        from danlu.cli.console import people

        people.print("\n[bold]danlu[/bold] (丹炉): conversations in, an aligned chat model out.\n")
        people.print("Usage: danlu [--debug] VERB [OPTIONS]      danlu VERB --help\n")
        table = Table.grid(padding=(0, 2))
        for verb, (_, line) in VERBS.items():
            table.add_row(f"  [bold]{verb}[/bold]", line)
        people.print(table)
        people.print("\nStart with: danlu run recipes/quickstart.yaml\n")


@click.group(cls=Verbs)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="danlu")
def root(debug: bool) -> None:
    """danlu (丹炉)."""
    if debug:
        os.environ["DANLU_DEBUG"] = "1"


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit status: 0 fine, 1 the input or a gate is at fault, 2 wrong usage, 3 a bug, 130 interrupted."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns its exit status."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Said outright, since it warns people about forks otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    place.adopt(os.environ)
    if place.wanted_more(os.environ):
        print(ONE_OF_SEVERAL, file=sys.stderr)

    def verb() -> int:
        result = root.main(args=arguments, prog_name="danlu", standalone_mode=False)
        return result if isinstance(result, int) else 0

    try:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return verb()
        from danlu.pipeline.ranks import lead_or_follow  # torchrun started several of us

        return lead_or_follow(verb)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.Abort:  # click's name for Ctrl-C
        _say(UsageError("interrupted"))
        return 130
    except click.ClickException as error:
        error.show(sys.stderr)
        return 2
    except DanluError as error:
        _say(error)
        return error.exit_status
    except BrokenPipeError:
        return 0
    except Exception as error:
        _say(error)
        again = "" if os.environ.get("DANLU_DEBUG") else "run again with --debug and "
        print(f"  -> this is a bug in danlu: {again}report it", file=sys.stderr)
        return 3


def _say(error: Exception) -> None:
    if os.environ.get("DANLU_DEBUG") and not isinstance(error, UsageError):
        import traceback

        traceback.print_exception(error)
    prefix = "" if isinstance(error, DanluError) else f"{type(error).__name__}: "
    print(f"danlu: {prefix}{error}", file=sys.stderr)
