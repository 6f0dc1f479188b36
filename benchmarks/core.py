"""Training and generation beside the peers: same weights, same rows, same tokens, in turns; `python -m benchmarks core`.

Every side is a process of its own, in an environment of its own, and only one works at a time: A B C A B C. First each takes
three steps on the same rows (or scores the same given answers); where its losses differ from danlu's by more than the tolerance,
the row is void. Then each goes over the same rows again and again; a ratio is that of two windows of one turn. The first turn
warms up, and chooses: of several settings of a peer, the fastest one goes on. Optimizer, rates and schedule are the same on all
sides.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.inputs import MAX_LENGTH, SIZES, Inputs, Rows, prepare
from benchmarks.ratios import Report, fastest, rates, row, spread
from benchmarks.turns import Side, SideFailed, Sides, take_turns
from benchmarks.works import GEMM_GOALS, WORKS, Peer, Work, command, how_to_make, shortened
from danlu.models import gguf
from danlu.models.gguf_vocab import vocabulary_of
from danlu.models.load import load_model
from danlu.pipeline.export_check import llama_python

HERE = Path(__file__).parent
OURS = [sys.executable, "-m", "benchmarks.danlu_side"]
# Tolerance of losses in two precisions: LLaMA-Factory's reward model in fp32 is 4% off its own in bf16.
OTHER_PRECISION = 0.05
RATES = {"check_rate": 2e-4, "rate": 1e-5}
# Of roll-outs that are timed: a policy that learnt would stop sooner on one side than on the other.
STILL = 1e-8
GEMM_SECONDS = 1.0


@dataclass(frozen=True)
class Measured:
    """What one side said: the losses of its first steps, its windows, its peak memory in bytes, its precision."""

    losses: list[float]
    windows: list[Report]
    peak: float
    precision: str


def default_data_root() -> Path:
    """$DANLU_SHARED/data, or `shared/data` beside the repository."""
    return Path(os.environ.get("DANLU_SHARED", HERE.parents[1] / "shared")) / "data"


def measure(
    *,
    quick: bool = False,
    data_root: Path | None = None,
    only: Sequence[str] = (),
    size: str = "",
    docs: Path | None = None,
    json_file: Path | None = None,
) -> list[dict[str, Any]]:
    """Measures, prints the table and returns its rows.

    Args:
        quick: 7M, fewer settings of each peer, fewer turns and rows, fewer and shorter answers; at most 5 minutes on two cores.
        data_root: holds `alpaca-en` and `hh-rlhf`.
        only: names of works; none: all.
        size: of the models; none: every listed work's own.
        docs: a Markdown file whose section "Core" is written anew.
        json_file: gets the rows of what is measured after every work.
    """
    begun = time.monotonic()
    root = data_root or default_data_root()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as folder, Sides(keep=quick) as children:
        inputs = prepare(root, Path(folder))
        for work in WORKS:
            asked = work.size == size if size else work.listed
            if not asked or (only and work.name not in only) or (quick and not work.quick):
                continue
            print(f"{work.name} {work.size} ({time.monotonic() - begun:.0f} s)", file=sys.stderr, flush=True)
            found += _work(work, inputs, Path(folder) / f"{work.name}-{work.size}", quick, children)
            if json_file is not None:
                json_file.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    print(tables.markdown(found))
    if docs is not None:
        words = f"`python -m benchmarks core{' --quick' if quick else ''}`, {tables.machine()}"
        tables.write_section(docs, "Core", f"{words}.\n\n{tables.NOTE}\n\n{tables.markdown(found)}")
    return found


def _work(work: Work, inputs: Inputs, folder: Path, quick: bool, children: Sides) -> list[dict[str, Any]]:
    """All rows of one work."""
    work = shortened(work) if quick else work
    folder.mkdir()
    windows = 1 if work.name == "memory" else work.turns[quick] + 1
    job = job_of(work, inputs, folder, (work.check[quick], work.rows[quick]), windows)
    peers = [p for p in work.peers if p.quick or not quick]
    own = sorted({p.ours for p in peers})
    sides = [(f"danlu {name}", OURS, work.ours[name]) for name in own]
    names: dict[str, Peer] = {}
    for index, peer in enumerate(peers):
        start = command(peer.name)
        if start is None:
            continue
        names[f"{peer.name} {peer.setting} {index}"] = peer
        sides.append((f"{peer.name} {peer.setting} {index}", start, peer.settings))
    if work.name == "sft":
        sides.append(("gemm", OURS, {}))
    labels = {name: (peer.name, peer.setting) for name, peer in names.items()}
    found = _measure(children, sides, job, folder, (1, work.trials, windows - 1 - work.trials), labels)
    return _rows(work, found, names, job) + _unmeasured(work, peers, [names[name] for name in found if name in names])


def _measure(
    children: Sides,
    sides: Sequence[tuple[str, list[str], dict[str, Any]]],
    job: dict[str, Any],
    folder: Path,
    windows: tuple[int, int, int],
    labels: dict[str, tuple[str, str]],
) -> dict[str, Measured]:
    """Every side's reports of what came after the warm-up, or of that where nothing came.

    A side that fails is named and left out.

    Args:
        windows: of the warm-up, of all sides' trials, and of the rest: of sides with one label only the one that was fastest in
            the trials (in the warm-up, if there are none) takes part in it.
    """
    started: list[Side] = []
    losses: dict[str, list[float]] = {}
    for name, start, settings in sides:
        own = {k: v for k, v in settings.items() if k != "processes"}
        told = {**job, "settings": own, "work": "gemm" if name == "gemm" else job["work"]}
        processes = settings.get("processes", 1)
        started.append(children.start(name, start, told, folder / name.replace(" ", "-"), processes))
    left_out: list[Side] = []
    for side in list(started):
        try:
            losses[side.name] = side.check()
        except SideFailed as error:
            started.remove(side)
            left_out.append(side)
            print(f"  {error}", file=sys.stderr, flush=True)
    warm_up, trials, rest = windows
    reports = _reports(started, warm_up)
    tried = _reports(started, trials)
    if rest > 0:
        kept = _survivors(tried if trials else reports, labels)
        left_out += [side for side in started if side.name not in kept]
        started = [side for side in started if side.name in kept]
    if trials or rest:
        later = _reports(started, rest)
        reports = {side.name: tried[side.name] + later[side.name] for side in started}
    measured = {s.name: Measured(losses[s.name], reports[s.name], s.next("peak")["peak"], s.precision) for s in started}
    children.ended(started, left_out)
    return measured


def _reports(sides: Sequence[Side], windows: int) -> dict[str, list[Report]]:
    found = take_turns(sides, windows)
    return {side.name: reports for side, reports in zip(sides, found, strict=True)}


def _survivors(first: dict[str, list[Report]], labels: dict[str, tuple[str, str]]) -> set[str]:
    """Of the sides of a label the fastest one, and all sides without a label."""
    kept = {name for name in first if name not in labels}
    for label in {labels[name] for name in first if name in labels}:
        kept.add(fastest([(name, found) for name, found in first.items() if labels.get(name) == label]))
    return kept


def _rows(work: Work, found: dict[str, Measured], names: dict[str, Peer], job: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    measured = {name: peer for name, peer in names.items() if name in found}
    for label in dict.fromkeys((p.name, p.setting) for p in measured.values()):
        (name,) = _fastest(found, [name for name, peer in measured.items() if (peer.name, peer.setting) == label])
        peer = measured[name]
        own = {f"danlu {peer.ours}"} & set(found)
        if peer.setting == "best":  # each side in the precision that is its fastest, too
            own |= set(_fastest(found, [n for n in found if n.startswith("danlu ")]))
        rows += [_compared(work, peer, found[ours], found[name], job) for ours in sorted(own)]
    if "gemm" in found and "danlu bfloat16" in found:
        rows.append(_share(work, found["danlu bfloat16"], found["gemm"], job))
    return rows


def _unmeasured(work: Work, wanted: Sequence[Peer], measured: Sequence[Peer]) -> list[dict[str, Any]]:
    """A row without figures for every setting of a peer of which nothing was measured."""
    rows = []
    there = {(p.name, p.setting) for p in measured}
    for name, setting in dict.fromkeys((p.name, p.setting) for p in wanted):
        if (name, setting) not in there:
            why = "it failed" if command(name) is not None else f"no environment: `{how_to_make(name)}` makes it"
            print(f"  {name}, {setting}, was not measured: {why}", file=sys.stderr, flush=True)
            facts = {"work": work.name, "size": work.size, "peer": name, "peer_setting": setting}
            rows.append({**facts, "ratio": None, "not_measured": why})
    return rows


def _compared(work: Work, peer: Peer, ours: Measured, theirs: Measured, job: dict[str, Any]) -> dict[str, Any]:
    facts = {"work": work.name, "size": work.size, "peer": peer.name, "peer_setting": peer.setting}
    facts |= {"unit": work.unit, "goal": work.goals.get(peer.setting) if peer.goal is None else peer.goal}
    facts |= {"ours_precision": ours.precision, "peer_precision": theirs.precision}
    tolerance = work.tolerance if ours.precision == theirs.precision else max(work.tolerance, OTHER_PRECISION)
    told: dict[str, Any] = {"losses": (ours.losses, theirs.losses), "tolerance": tolerance, **facts}
    if work.name == "memory":
        return row(*([{"tokens": m.peak, "seconds": 1.0}] for m in (ours, theirs)), **told)
    made = row(ours.windows, theirs.windows, **told) | _beside(work, ours, theirs, job)
    if made["ratio"] is None:
        print(
            f"  void, {peer.name} {peer.setting}: losses {ours.losses} and {theirs.losses}", file=sys.stderr, flush=True
        )
    return made


def _fastest(found: dict[str, Measured], names: Sequence[str]) -> list[str]:
    """The fastest of these, in a list; an empty one of none."""
    return [fastest([(name, found[name].windows) for name in names])] if names else []


def _beside(work: Work, ours: Measured, peer: Measured, job: dict[str, Any]) -> dict[str, Any]:
    """What the table tells beside the ratio: both sides' peak memory in bytes, and pairs or episodes per second."""
    told: dict[str, Any] = {"ours_peak": ours.peak, "peer_peak": peer.peak}
    if work.name in ("reward", "dpo"):
        each = [job["pairs"] / job["tokens"] * statistics.median(rates(m.windows)) for m in (ours, peer)]
        return told | {"item": "pair", "ours_items": each[0], "peer_items": each[1]}
    if work.name in ("grpo", "ppo"):
        each = [job["episodes"] / statistics.median(w["seconds"] for w in m.windows) for m in (ours, peer)]
        return told | {"item": "episode", "ours_items": each[0], "peer_items": each[1]}
    return told


def _share(work: Work, ours: Measured, gemm: Measured, job: dict[str, Any]) -> dict[str, Any]:
    """6 x parameters x tokens/s of SFT over the rate of bare products of the same shapes."""
    used = [6 * job["parameters"] * rate for rate in rates(ours.windows)]
    bare = rates(gemm.windows)
    share, low, high = spread(used, bare)
    return {
        "work": "gemm_share",
        "size": work.size,
        "peer": "bare bf16 products",
        "peer_setting": "best",
        "ours": sorted(used)[len(used) // 2],
        "peer_value": sorted(bare)[len(bare) // 2],
        "ours_precision": ours.precision,
        "peer_precision": gemm.precision,
        "unit": "FLOP/s",
        "ratio": share,
        "low": low,
        "high": high,
        "goal": GEMM_GOALS[work.size],
        "loss_difference": 0.0,
    }


def job_of(work: Work, inputs: Inputs, folder: Path, counts: tuple[int, int], windows: int) -> dict[str, Any]:
    """What every side of a work is told; `counts` are rows of the check and of a window."""
    check, count = counts
    models = inputs.models(work.size)
    job: dict[str, Any] = {"work": work.name, "kind": work.name, "max_length": MAX_LENGTH, "windows": windows}
    job |= {"model": str(models / "lm"), "eos": inputs.tokenizer.eos_token_id, **RATES, **work.extra}
    if work.name == "generate":
        rows = [{"prompt": r["prompt"], "new": len(r["answer"])} for r in inputs.prompts.ids[:count]]
        (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
        return job | {"rows": str(folder / "rows.json"), "gguf": _gguf(models / "lm", inputs.tokenizer)}
    if work.name in ("grpo", "ppo", "memory"):
        job["kind"] = "grpo" if work.name == "grpo" else "ppo"
        return job | _roll_outs(work, inputs, folder, count, windows)
    rows = inputs.conversations if work.name == "sft" else inputs.comparisons
    job["check"] = rows.write(folder / "check.jsonl", 0, check)
    job["rows"] = rows.write(folder / "rows.jsonl", check, count)
    job["tokens"] = sum(_tokens(r) for r in rows.ids[check : check + count])
    job["pairs"] = count
    if work.name == "reward":
        job |= {"model": str(models / "reward"), "value_head": str(models / "value-head")}
    if work.name == "sft":
        job |= _gemm(work.size, len(inputs.tokenizer))
    return job


def _gguf(folder: Path, tokenizer: Any) -> str:
    """The model as a file for llama.cpp, where that is there to read it."""
    path = folder.with_suffix(".gguf")
    if llama_python() is not None and not path.is_file():
        model = load_model(folder)
        vocabulary = vocabulary_of(tokenizer, model.config.vocab_size, frozenset({tokenizer.eos_token_id}))
        gguf.write(path, model, vocabulary, "f16", name="benchmark")
    return str(path)


def _tokens(ids: dict[str, Any]) -> int:
    """Tokens that count: of a conversation all, of a pair the prompt once."""
    parts = ("input_ids",) if "input_ids" in ids else ("prompt", "chosen", "rejected")
    return sum(len(ids[part]) for part in parts)


def _roll_outs(work: Work, inputs: Inputs, folder: Path, count: int, windows: int) -> dict[str, Any]:
    """Prompts for the check with given answers (other prompts' real ones), and prompts for every window."""
    models = inputs.models(work.size)
    model = models / ("lm" if work.name == "memory" else "stopping")
    prompts: Rows = inputs.prompts
    size = work.extra["episodes"] // count
    real = [r["answer"][: work.extra["new"] - 1] for r in prompts.ids]
    stop = inputs.tokenizer.eos_token_id
    answers = []
    for i in range(count):
        given = [real[(i * size + k) % len(real)] for k in range(size)]
        ids = [a if a[-1] == stop else [*a, stop] for a in given]
        answers.append({"prompt": prompts.ids[i]["prompt"], "messages": prompts.records[i]["prompt"], "answers": ids})
    (folder / "answers.json").write_text(json.dumps(answers), "utf-8")
    return {
        "model": str(model),
        "reward": str(models / "reward"),
        "answers": str(folder / "answers.json"),
        "check": prompts.write(folder / "check.jsonl", 0, count),
        "rows": prompts.write(folder / "rows.jsonl", 0, count * windows),
        "compare": list(work.compare),
        "rate": STILL,
    }


def _gemm(size: str, vocabulary: int) -> dict[str, Any]:
    """The shapes [out, in] of a model's linear layers, and how many parameters it has."""
    shape = SIZES[size]
    width, kv = shape["hidden_size"], shape["hidden_size"] * shape["kv_heads"] // shape["heads"]
    inner = -(-width * 8 // 3 // 32) * 32
    layer = [(width, width)] * 2 + [(kv, width)] * 2 + [(inner, width)] * 2 + [(width, inner)]
    parameters = vocabulary * width + shape["layers"] * (sum(n * k for n, k in layer) + 2 * width) + width
    return {"shapes": layer, "parameters": parameters, "seconds": GEMM_SECONDS, "gemm_rows": 4096}
