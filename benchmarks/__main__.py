"""`python -m benchmarks WHAT`: ratios of one run, their spread, and where the time goes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def main() -> None:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("core", "data", "seeds", "learning", "teach", "small", "families", "vocabulary", "gpu"):
        command = commands.add_parser(name)
        command.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
        if name != "gpu":
            command.add_argument("--quick", action="store_true", help="fewer repetitions")
    commands.add_parser("peers", help="make the peers' environments")
    settings = commands.add_parser("settings", help="try the settings of the peers' trainers")
    settings.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    settings.add_argument("--data-root", type=Path, default=None, help="folder with alpaca-en and hh-rlhf")
    settings.add_argument("--only", default="", help="works, separated by commas")
    settings.add_argument("--size", default="7M", help="of the model")
    settings.add_argument("--having", default="", help="only settings that have these words, such as 'packing True'")
    for name, does in (("profile", "where the time of SFT goes"), ("compile", "what torch.compile would make of it")):
        inside = commands.add_parser(name, help=does)
        inside.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
        inside.add_argument("--data-root", type=Path, default=None, help="folder with alpaca-en and hh-rlhf")
        inside.add_argument("--size", default="60M", help="of the model")
        if name == "compile":
            inside.add_argument("--only", default="", help="works, separated by commas: sft, generate")
    core = commands.choices["core"]
    core.add_argument("--data-root", type=Path, default=None, help="folder with alpaca-en and hh-rlhf")
    core.add_argument("--only", default="", help="works, separated by commas")
    core.add_argument(
        "--size", default="", help="of the models: 7M, 60M, 0.5B; reward and dpo at 60M run only if it is given"
    )
    core.add_argument("--write-docs", action="store_true", help="write the table into docs/benchmarks.md")
    learning = commands.choices["learning"]
    learning.add_argument("--only", default="", help="numbers of proofs, separated by commas")
    learning.add_argument("--data-root", type=Path, default=None, help="folder with hh-rlhf, alpaca-en, pretrain-en")
    learning.add_argument("--town", type=Path, default=None, help="a finished run of recipes/quickstart.yaml")
    learning.add_argument("--hh", type=Path, default=None, help="a finished run of recipes/hh-assistant.yaml")
    learning.add_argument("--workers", type=int, default=2, help="processes that train at the same time")
    learning.add_argument("--write-docs", action="store_true", help="write docs/benchmarks.md and its plots")
    teach = commands.choices["teach"]
    teach.add_argument("--model", default="runs/quickstart", help="the policy that is taught")
    teach.add_argument("--facts", type=int, default=20, help="how many are taught one by one; 0: none")
    small = commands.choices["small"]
    small.add_argument("--only", default="", help="sizes, separated by commas")
    small.add_argument("--write-docs", action="store_true", help="write the table into docs/benchmarks.md")
    families = commands.choices["families"]
    families.add_argument("--write-docs", action="store_true", help="write the table into docs/benchmarks.md")
    vocabulary = commands.choices["vocabulary"]
    vocabulary.add_argument(
        "--data-root", type=Path, default=Path("data"), help="folder with model-stories260k, pretrain-*"
    )
    vocabulary.add_argument("--write-docs", action="store_true", help="write the table into docs/tokenizers.md")
    gpu = commands.choices["gpu"]
    gpu.add_argument("--tiny", action="store_true", help="tiny models: a test of the benchmark itself, on any machine")
    gpu.add_argument("--only", default="", help="parts, separated by commas")
    arguments = parser.parse_args()
    rows = _measure(arguments)
    if rows is not None and arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    sys.stdout.flush()


def _measure(arguments: argparse.Namespace) -> list[dict[str, Any]] | dict[str, Any] | None:
    only = [name for name in getattr(arguments, "only", "").split(",") if name]
    if arguments.command == "core":
        from benchmarks import core

        docs = DOCS if arguments.write_docs else None
        options = {"only": only, "size": arguments.size, "docs": docs, "json_file": arguments.json}
        return core.measure(quick=arguments.quick, data_root=arguments.data_root, **options)
    if arguments.command == "settings":
        from benchmarks import settings

        options = {"size": arguments.size, "having": arguments.having}
        return settings.measure(data_root=arguments.data_root, only=only, **options)
    if arguments.command in ("profile", "compile"):
        from benchmarks import inside

        if arguments.command == "profile":
            return inside.profiled(size=arguments.size, data_root=arguments.data_root)
        return inside.compiled(sizes=[arguments.size], only=only, data_root=arguments.data_root)
    if arguments.command == "small":
        from benchmarks import small

        return small.measure(quick=arguments.quick, only=only, docs=DOCS if arguments.write_docs else None)
    if arguments.command == "families":
        from benchmarks import families

        return families.measure(quick=arguments.quick, docs=DOCS if arguments.write_docs else None)
    if arguments.command == "vocabulary":
        from benchmarks import vocabulary

        page = DOCS.with_name("tokenizers.md") if arguments.write_docs else None
        return vocabulary.measure(quick=arguments.quick, data_root=arguments.data_root, docs=page)
    if arguments.command == "gpu":
        from benchmarks import gpu

        return gpu.measure(tiny=arguments.tiny, only=only)
    if arguments.command == "learning":
        from benchmarks import learning

        docs = DOCS if arguments.write_docs else None
        options = {
            "town": arguments.town,
            "hh": arguments.hh,
            "workers": arguments.workers,
            "json_file": arguments.json,
        }
        return learning.measure(quick=arguments.quick, only=only, data_root=arguments.data_root, docs=docs, **options)
    if arguments.command == "teach":
        from benchmarks import teach

        return teach.measure(model=arguments.model, quick=arguments.quick, facts=arguments.facts)
    if arguments.command == "seeds":
        from benchmarks import seeds

        return seeds.measure(quick=arguments.quick)
    from benchmarks.peers import environments

    if arguments.command == "peers":
        environments.make_all()
        return None
    from benchmarks import data

    for variable, name in (("DANLU_BENCH_TRL", "trl"), ("DANLU_BENCH_LLAMAFACTORY", "llamafactory")):
        python = environments.python(name)
        if python is not None:
            os.environ.setdefault(variable, str(python))
    return data.measure(quick=arguments.quick)


if __name__ == "__main__":
    main()
