"""Checking, tokenising and packing Stanford's Alpaca file, beside TRL's and LLaMA-Factory's preprocessing of the same file.

Every measurement is a process of its own, so that memory is its own: the peak is the sum over its processes, pages they share
counted once (PSS). Sides take turns, and ratios are taken within a turn. Caches are new in every turn, but for "again", which
finds what the line before it left. All sides use one tokenizer, one chat format and one limit. Seconds of tokenising run from
the file to ids and loss masks, without imports; those of `check` are those of the whole command.

The peers are called through their own functions, in environments of their own that hold them: DANLU_BENCH_TRL and
DANLU_BENCH_LLAMAFACTORY name their Python. Without these, they are not measured. DANLU_SHARED/data holds the file.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from danlu.data.read import read
from danlu.data.token_workers import cores
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import train_tokenizer

FILE = "alpaca-en/alpaca_data.json.gz"
VOCABULARY, MAX_LENGTH, BUDGET, STEP = 16_384, 512, 2048, 32_768
PEERS = {
    "TRL": ("DANLU_BENCH_TRL", "trl_side.py"),
    "LLaMA-Factory": ("DANLU_BENCH_LLAMAFACTORY", "llamafactory_side.py"),
}
HERE = Path(__file__).parent
TURNS = 3
SECONDS = 1800
SAMPLE_SECONDS = 0.1


@dataclass
class Line:
    """One side's way of doing one work, with what each turn gave.

    Attributes:
        base: the line of danlu's that it is compared with.
        again: it finds the cache that the line before it left.
    """

    work: str
    side: str
    command: list[str]
    job: dict[str, Any]
    base: str
    again: bool = False
    turns: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.work}/{self.side}"


def measure(*, quick: bool = False) -> list[dict[str, Any]]:
    """Prints and returns one row per work and side: rows per second, ratio with its range, peak memory, tokens."""
    shared = Path(os.environ.get("DANLU_SHARED", HERE.parents[1] / "shared")) / "data" / FILE
    if not shared.is_file():
        sys.exit(f"{shared} is missing: set DANLU_SHARED to the folder that holds data/{FILE}")
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as name:
        folder = Path(name)
        rows, job = _prepare(shared, folder, 4000 if quick else None)
        lines = _lines(job)
        for turn in range(1 if quick else TURNS):
            for line in lines:
                cache = folder / f"cache-{turn}-{line.name.replace('/', '-').replace(' again', '')}"
                line.turns.append(_run(line, cache))
                print(f"turn {turn + 1}: {line.name} {line.turns[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
            for cache in folder.glob("cache-*"):
                shutil.rmtree(cache)
    table = [_row(line, rows, {other.name: other for other in lines}) for line in lines]
    _print(table, rows)
    return table


def _prepare(file: Path, folder: Path, limit: int | None) -> tuple[int, dict[str, Any]]:
    """How many rows there are, and what every side is told: the file (with and without gzip), the tokenizer, the limits."""
    rows = json.loads(gzip.decompress(file.read_bytes()))[:limit]
    plain, packed = folder / "alpaca.json", folder / "alpaca.json.gz"
    plain.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    packed.write_bytes(gzip.compress(plain.read_bytes(), 6))
    texts = [m["content"] for r in read(packed, "conversation").records for m in r.messages]  # type: ignore[union-attr]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    ChatTemplate(tokenizer, "chatml").tokenizer.save_pretrained(folder / "tokenizer")
    job = {"file": str(packed), "plain": str(plain), "tokenizer": str(folder / "tokenizer"), "max_length": MAX_LENGTH}
    return len(rows), job | {"budget": BUDGET, "step": STEP}


def _lines(job: dict[str, Any]) -> list[Line]:
    check = [sys.executable, "-m", "danlu", "data", "check", job["file"], "--json"]
    found = [Line("check", "danlu", check, {}, "check/danlu")]
    sides = {"danlu": [sys.executable, "-m", "benchmarks.data_side"]}
    for name, (variable, script) in PEERS.items():
        python = os.environ.get(variable)
        if python and Path(python).is_file():
            sides[name] = [python, str(HERE / "peers" / script)]
        else:
            print(f"{name} is not measured: {variable} names no Python", file=sys.stderr)
    for processes in (1, cores()):
        work = f"tokenise, {processes} process{'es' if processes > 1 else ''}"
        for name, command in sides.items():
            found.append(Line(work, name, command, job | {"processes": processes}, f"{work}/danlu"))
            if processes > 1:
                again = f"{work} again"
                found.append(Line(again, name, command, found[-1].job, f"{again}/danlu", again=True))
    return found


def _run(line: Line, cache: Path) -> dict[str, float]:
    cache.mkdir(exist_ok=line.again)
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache / "home")}
    command = [*line.command, json.dumps(line.job | {"cache": str(cache)})] if line.job else line.command
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        begun = time.perf_counter()
        process = psutil.Popen(command, stdout=output, stderr=errors, env=environment, cwd=HERE.parent)
        peak = _Peak(process)
        status = process.wait(SECONDS)
        seconds = time.perf_counter() - begun
        peak.end()
        output.seek(0)
        errors.seek(0)
        # `check` ends with 1 where the data has faults, and says all the same what they are.
        if status not in ((0, 1) if not line.job else (0,)):
            sys.exit(f"{line.name} failed ({status}):\n{errors.read()[-3000:]}")
        found = {"seconds": seconds} if not line.job else json.loads(output.read().strip().splitlines()[-1])
    return {**found, "peak": peak.bytes}


class _Peak:
    """The most memory that a process and its children ever had together, looked at ten times a second."""

    def __init__(self, process: psutil.Popen) -> None:
        self.bytes = 0.0
        self._process, self._stop = process, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, sum(self._sizes()))

    def _sizes(self) -> Iterator[float]:
        with suppress(psutil.Error):
            for process in [self._process, *self._process.children(recursive=True)]:
                with suppress(psutil.Error):
                    yield process.memory_full_info().pss

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


def _row(line: Line, rows: int, lines: Mapping[str, Line]) -> dict[str, Any]:
    rates = [rows / turn["seconds"] for turn in line.turns]
    ours = [rows / turn["seconds"] for turn in lines[line.base].turns]
    ratios = sorted(a / b for a, b in zip(ours, rates, strict=True))
    row: dict[str, Any] = {
        "work": line.work,
        "side": line.side,
        "value": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "unit": "rows per second",
        "ratio": statistics.median(ratios),
        "low": ratios[0],
        "high": ratios[-1],
        "peak_mb": statistics.median(turn["peak"] for turn in line.turns) / 1e6,
        "turns": len(line.turns),
    }
    return row | {k: line.turns[-1][k] for k in ("tokens", "trained", "pack_seconds", "batches") if k in line.turns[-1]}


def _print(table: list[dict[str, Any]], rows: int) -> None:
    print(f"{rows:,} rows, {table[0]['turns']} turns, {cores()} cores\n")
    print(
        "| work | side | rows/s, median (lowest to highest) | danlu is faster by | peak memory | tokens, trained ones |"
    )
    print("|---|---|---|---|---|---|")
    for r in table:
        rate = f"{r['value']:,.0f} ({r['lowest']:,.0f} to {r['highest']:,.0f})"
        ratio = "" if r["side"] == "danlu" else f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
        tokens = f"{r['tokens']:,}, {r['trained']:,}" if "tokens" in r else ""
        print(f"| {r['work']} | {r['side']} | {rate} | {ratio} | {r['peak_mb']:,.0f} MB | {tokens} |")
    print(f"\n| packing into {BUDGET:,} tokens | seconds | micro-batches | filled |")
    print("|---|---|---|---|")
    for r in table:
        if "batches" in r and r["work"].startswith("tokenise, 1 "):
            filled = r["tokens"] / (r["batches"] * BUDGET)
            print(f"| {r['side']} | {r['pack_seconds']:.2f} | {r['batches']:,} | {filled:.2%} |")
