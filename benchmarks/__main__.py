"""`python -m benchmarks seeds|core|data [--json FILE]`: what is measured, with ratios taken in one run and their spread."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import core, data, seeds


def main() -> None:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    parts = {"seeds": seeds.measure, "core": core.measure, "data": data.measure}
    for name in parts:
        command = commands.add_parser(name)
        command.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
        command.add_argument("--quick", action="store_true", help="fewer repetitions")
    arguments = parser.parse_args()
    rows = parts[arguments.command](quick=arguments.quick)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
