"""Rows as a table, the machine in words, and the sections of `docs/benchmarks.md`."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

NOTE = (
    "Sides took turns; a ratio is danlu's rate over the peer's within one turn (memory: bytes over bytes, less is better). "
    "Losses are those of three steps on the same rows, or the scores of the same given answers; where they differ too much the "
    'row is void. Of several settings, the fastest one is "best". Precisions are what each side said of its own trainer or model: '
    '"mixed bf16" has fp32 weights and optimizer states and bf16 products (autocast), as danlu trains. '
    "A peer's best is held against danlu in the same precision and, where danlu is faster in another one, against that, too."
)


def machine() -> str:
    """Cores, memory and versions; no names."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    system = f"{cores} cores ({platform.machine()}), {threads}, {memory:.0f} GiB memory"
    return f"{system}, Python {platform.python_version()}, torch {torch.__version__}"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of `benchmarks/core.py`."""
    lines = [
        "| work | size | peer, setting | precision: danlu, peer | danlu | peer | unit | ratio (lowest to highest) | goal "
        "| loss difference | pairs or episodes/s | peak, GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "not_measured" in r:
            head = f"| {r['work']} | {r['size']} | {r['peer']}, {r['peer_setting']} |"
            lines.append(f"{head} | | | | not measured: {r['not_measured']} | | | | |")
            continue
        # Of memory less is better, of all else more.
        goal = "" if r["goal"] is None else f"{'<=' if r['work'] == 'memory' else '>='} {r['goal']:g}"
        lines.append(
            f"| {r['work']} | {r['size']} | {r['peer']}, {r['peer_setting']} | {r['ours_precision']}, {r['peer_precision']} "
            f"| {_number(r['ours'])} | {_number(r['peer_value'])} | {r['unit']} | {_ratio(r)} | {goal} | {_difference(r)} "
            f"| {_items(r)} | {_peaks(r)} |"
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"


def _ratio(r: dict[str, Any]) -> str:
    return "void" if r["ratio"] is None else f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"


def _difference(r: dict[str, Any]) -> str:
    return "other steps" if r["loss_difference"] is None else f"{r['loss_difference']:.1e}"


def _items(r: dict[str, Any]) -> str:
    return f"{r['ours_items']:.3g}, {r['peer_items']:.3g} {r['item']}s" if "item" in r else ""


def _peaks(r: dict[str, Any]) -> str:
    return f"{r['ours_peak'] / 1e9:.2f}, {r['peer_peak'] / 1e9:.2f}" if "ours_peak" in r else ""


def write_section(path: Path, title: str, text: str) -> None:
    """Puts `text`, with today's date before it, in place of a Markdown file's section `## title`, or at its end."""
    lines = path.read_text("utf-8").splitlines() if path.is_file() else ["# Benchmarks"]
    head = f"## {title}"
    begin = lines.index(head) if head in lines else len(lines)
    end = next((i for i in range(begin + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    section = [head, "", f"{datetime.date.today().isoformat()}, {text}", ""]
    before = lines[:begin] if begin == 0 or not lines[begin - 1] else [*lines[:begin], ""]
    path.write_text("\n".join([*before, *section, *lines[end:]]).rstrip("\n") + "\n", "utf-8")
