"""`danlu doctor`: what this machine can do, what is missing and how to get it."""

from __future__ import annotations

import shutil
from importlib import metadata, util
from pathlib import Path
from typing import Any

import click

from danlu.cli.console import people, print_json

EXTRAS = {
    "tensorboard": ("curves in TensorBoard", "pip install 'danlu[tracking]'"),
    "wandb": ("curves in Weights & Biases", "pip install 'danlu[tracking]'"),
    "datasets": ("data sets from the hub", "pip install 'danlu[hub]'"),
    "rensa": ("near duplicates", "pip install 'danlu[dedup]'"),
    "jieba": ("tokenizers of CPM", "pip install 'danlu[zh]'"),
    "sentencepiece": ("training SentencePiece tokenizers", "pip install 'danlu[sentencepiece]'"),
}


def command(verb: str) -> click.Command:
    """The command."""
    return doctor


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def doctor(as_json: bool) -> None:
    """What this machine can do, what is missing and how to get it."""
    found = examine()
    if as_json:
        print_json(found)
        return
    people.print(f"python {found['python']}, " + ", ".join(f"{k} {v}" for k, v in found["packages"].items()))
    people.print(
        f"{found['cpus']} CPU threads, {found['memory_gb']:.0f} GB memory, {found['disk_free_gb']:.0f} GB free disk here"
    )
    people.print(f"GPUs: {', '.join(found['gpus']) or 'none (danlu runs on the CPU)'}")
    people.print(
        f"bf16 products are {found['bf16_gain']:.1f} times as fast as fp32: `dtype: auto` will use {found['dtype']}"
    )
    for name, state in found["extras"].items():
        people.print(
            f"  {'[green]yes[/green]' if state['installed'] else '[yellow]no [/yellow]'}  {name}: {state['for']}"
        )
        if not state["installed"]:
            people.print(f"        {state['install']}", markup=False)


def examine() -> dict[str, Any]:
    """Everything the command prints."""
    import os
    import platform

    import torch

    from danlu.training.compute import bf16_gain

    gain = bf16_gain(512)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "python": platform.python_version(),
        "packages": {n: metadata.version(n) for n in ("danlu", "torch", "transformers", "peft")},
        "cpus": torch.get_num_threads(),
        "memory_gb": memory / 1e9,
        "disk_free_gb": shutil.disk_usage(Path.cwd()).free / 1e9,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "bf16_gain": gain,
        "dtype": "bfloat16" if torch.cuda.is_available() or gain >= 1.2 else "float32",
        "extras": {
            n: {"installed": util.find_spec(n) is not None, "for": what, "install": how}
            for n, (what, how) in EXTRAS.items()
        },
    }
