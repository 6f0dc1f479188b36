"""Which settings of a peer can be its best: all of them in turn, outside the timed run; `python -m benchmarks settings`.

A setting trains the rows of `benchmarks/core.py` in a process that its peer's other settings have used before it: a window to warm
up, then one that counts, in seconds of CPU time, so that other work on the machine matters less. What can win belongs into
`WORKS`, the rest stays in `TRIED`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.core import OURS, default_data_root, job_of
from benchmarks.inputs import prepare
from benchmarks.ratios import loss_difference
from benchmarks.turns import SideFailed, Sides
from benchmarks.works import TRIED, WORKS, Peer, Work, command, how_to_make

WINDOWS = 2


def measure(
    *, data_root: Path | None = None, only: Sequence[str] = (), size: str = "7M", having: str = ""
) -> list[dict[str, Any]]:
    """Measures, prints the table and returns its rows.

    Args:
        data_root: holds `alpaca-en` and `hh-rlhf`.
        only: names of works; none: all that have something in `TRIED`.
        size: of the model.
        having: only settings that have this in their words.
    """
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="danlu-settings-") as folder, Sides(keep=True) as children:
        inputs = prepare(data_root or default_data_root(), Path(folder))
        for work in WORKS:
            if work.size == size and work.name in TRIED and (not only or work.name in only):
                place = Path(folder) / work.name
                place.mkdir()
                job = job_of(work, inputs, place, (work.check[1], work.rows[0]), WINDOWS)
                found += _work(work, job, place, children, having)
    print(markdown(found))
    return found


def _work(work: Work, job: dict[str, Any], folder: Path, children: Sides, having: str) -> list[dict[str, Any]]:
    ours = Peer("danlu", "best", work.ours["bfloat16"])
    rows = [_tried(work, ours, OURS, job, folder / "danlu", children)]
    candidates = [p for p in work.peers if p.setting == "best"] + TRIED[work.name]
    candidates = [p for p in candidates if having in words(p.settings)]
    for index, peer in enumerate(sorted(candidates, key=lambda p: p.name)):
        start = command(peer.name)
        if start is None:
            print(f"  {peer.name} is not there: `{how_to_make(peer.name)}` makes it", file=sys.stderr)
            continue
        rows.append(_tried(work, peer, start, job, folder / str(index), children))
    given = rows[0]["losses"]
    return [{**row, "loss_difference": loss_difference(given, row["losses"])} for row in rows]


def _tried(
    work: Work, peer: Peer, start: list[str], job: dict[str, Any], folder: Path, children: Sides
) -> dict[str, Any]:
    row = {"work": work.name, "size": work.size, "peer": peer.name, "settings": peer.settings, "losses": []}
    side = children.start(peer.name, start, {**job, "settings": peer.settings}, folder)
    try:
        row |= {"losses": side.check(), "precision": side.precision}
        reports = [side.go() for _ in range(WINDOWS)][1:]
        peak = side.next("peak")["peak"]
    except SideFailed as error:
        children.ended([], [side])
        print(error, file=sys.stderr, flush=True)
        return {**row, "failed": str(error).strip().splitlines()[-1]}
    children.ended([side], [])
    seconds = min(r["cpu"] for r in reports)
    row |= {"cpu": seconds, "tokens_per_cpu_second": reports[0]["tokens"] / seconds, "peak": peak}
    print(f"  {work.name} {peer.name} {words(peer.settings)}: {seconds:.2f} s", file=sys.stderr, flush=True)
    return row


def words(settings: dict[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{k} {v}" for k, v in settings.items())


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| work | peer | settings | precision | tokens / CPU second | loss difference |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        told = r["failed"] if "failed" in r else f"{r['tokens_per_cpu_second']:,.0f}"
        difference = "" if "failed" in r else f"{r['loss_difference']:.1e}"
        lines.append(
            f"| {r['work']} {r['size']} | {r['peer']} | {words(r['settings'])} | {r.get('precision', '')} | {told} | {difference} |"
        )
    return "\n".join(lines)
