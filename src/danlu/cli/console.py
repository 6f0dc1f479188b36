"""Where output goes: people's on stderr through rich, results and `--json` documents on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

people = Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """A line for people, as it is: no markup, and not broken at the width of a terminal that may not be one."""
    people.print(line, markup=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout, and nothing else there."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()
