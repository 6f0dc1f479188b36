"""Proof 4: a reward model on real comparisons (HH-RLHF) beside TRL 1.16's RewardTrainer.

Both start from the same base, a starter after pre-training and SFT as in recipes/hh-assistant.yaml, with the same head, and
train on the same pairs, in orders of their own: the same number of steps, the same pairs a step (danlu's steps hold so many
tokens, chosen so that they hold as many pairs on average), AdamW of the same rate and decay, fp32, no dropout. Held-out pairs
(by hash of the prompt) are scored with danlu's judge for both; equal scores count half. Goal: danlu's accuracy is not lower
beyond the 95% interval of the paired difference; McNemar's test beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.peers import environments
from benchmarks.proofs.bench import Bench, Job, Verdict, recipe_run
from benchmarks.proofs.figures import paired
from benchmarks.turns import Side

NAME = "4 pairs"
PEER = "TRL 1.16"
FILES = ("helpful-base", "helpful-rejection-sampled", "harmless-base")
READ, QUICK_READ = 3000, 500  # rows of each file
HELDOUT = 0.2
MAX_LENGTH = 384
PAIRS = 16  # a step
RATE, WARMUP, EPOCHS = 2e-4, 10, 1
# The recipe cut down: what a base needs to have heard of English.
HH = ("pretrain.max_steps=300", "sft.max_records=4000")
QUICK_HH = ("pretrain.max_steps=60", "sft.max_records=600")


@dataclass(frozen=True)
class Pairs:
    """Comparisons that fit whole, as danlu reads them and as token ids."""

    records: list[dict[str, Any]]
    ids: list[dict[str, list[int]]]

    @property
    def tokens(self) -> list[int]:
        """Of each pair, the prompt once."""
        return [sum(len(row[part]) for part in ("prompt", "chosen", "rejected")) for row in self.ids]


def prove(bench: Bench) -> list[Verdict]:
    """One verdict over all seeds."""
    python = environments.python("trl")
    said = f"held-out accuracy not below {PEER}'s beyond the paired 95% interval"
    seeds = bench.seeds(2, 1)
    if python is None:
        return [missing(NAME, PEER, said, seeds)]
    folder = bench.place("pairs")
    name = "learning-hh-quick" if bench.quick else "learning-hh"
    changes = [f"data_root={bench.data_root.resolve()}", *(QUICK_HH if bench.quick else HH)]
    hh = bench.hh or recipe_run(bench, "hh-assistant.yaml", name, "sft", changes)
    base = _base(next(hh.glob("[0-9][0-9]-sft")) / "model", folder / "base")
    train, heldout = _read(bench, base)
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in train.records), "utf-8")
    (folder / "ids.json").write_text(json.dumps(train.ids), "utf-8")
    steps = EPOCHS * len(train.ids) // PAIRS
    right: dict[str, list[list[float]]] = {"danlu": [], PEER: []}
    seconds: dict[str, list[float]] = {"danlu": [], PEER: []}
    for seed in seeds:
        settings = settings_of(base, folder / "train.jsonl", steps, fmean(train.tokens), seed)
        own = bench.train({"danlu": Job("reward", settings | {"out": str(folder / f"danlu-{seed}")})})["danlu"]
        theirs, took = _peer(python, folder, base, steps, seed)
        bench.say(f"  {PEER}: {took:.0f} s of training")
        for side, model, time in (("danlu", own.model, own.seconds), (PEER, theirs, took)):
            right[side].append(judged(model, heldout))
            seconds[side].append(time)
    details = {"pairs": len(train.ids), "heldout": len(heldout.ids), "steps": steps, "seconds": seconds}
    return [verdict(right, seeds, said, details)]


def missing(proof: str, peer: str, goal: str, seeds: list[int]) -> Verdict:
    """A proof whose peer is not there is not held."""
    print(f"{peer} is not there: `python -m benchmarks peers` makes it", file=sys.stderr)
    return Verdict(proof, None, goal, False, seeds, {"missing": peer})


def settings_of(base: Path, data: Path, steps: int, tokens_a_pair: float, seed: int) -> dict[str, Any]:
    """danlu's reward stage; a step holds as many tokens as `PAIRS` pairs have on average."""
    # A step ends with the pair that fills it, so on average it holds half a pair more than its tokens say.
    tokens = round((PAIRS - 0.5) * tokens_a_pair)
    return {
        "model": str(base),
        "data": str(data),
        "eval_fraction": 0.0,
        "dtype": "float32",
        "max_length": MAX_LENGTH,
        "tokens_per_step": tokens,
        "micro_tokens": 8192,
        "learning_rate": RATE,
        "schedule": "constant",
        "warmup": WARMUP,
        "max_steps": steps,
        "save_every": 10**6,
        "seed": seed,
    }


def verdict(right: dict[str, list[list[float]]], seeds: list[int], goal: str, details: dict[str, Any]) -> Verdict:
    """The paired difference of what each side judged right, every pair's mean over the seeds.

    Args:
        right: of both sides, by seed: 1, 0.5 or 0 for each held-out pair.
    """
    from danlu.training.interval import wilson

    (_, ours), (peer, theirs) = right.items()
    means = [[fmean(values) for values in zip(*side, strict=True)] for side in (ours, theirs)]
    difference = paired(*means)
    told = {}
    for side, runs in right.items():
        share = fmean(fmean(run) for run in runs)
        told[side] = [share, *wilson(share, len(runs[0]))]
    tests = [paired(a, b).p for a, b in zip(ours, theirs, strict=True)]
    more = {
        "accuracy": told,
        "difference": [difference.difference, difference.low, difference.high],
        "mcnemar_p": tests,
    }
    return Verdict(f"{NAME}: {peer}", difference.difference, goal, difference.high >= 0, seeds, {**more, **details})


# -- both sides ----------------------------------------------------------------------------------------------------------


def _base(sft: Path, folder: Path) -> Path:
    """The SFT model with a small random head, which both sides load."""
    import torch

    from danlu.models.load import load_model, save_model
    from danlu.text.tokenizer import load_tokenizer

    model, tokenizer = load_model(sft, scalar=True), load_tokenizer(sft)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator) * 0.01)
    model.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    return save_model(model, tokenizer, folder)


def _read(bench: Bench, base: Path) -> tuple[Pairs, Pairs]:
    from danlu.data.collate import encode_comparisons
    from danlu.data.read import read
    from danlu.data.split import split_heldout
    from danlu.text.chat_template import ChatTemplate
    from danlu.text.tokenizer import load_tokenizer

    template = ChatTemplate(load_tokenizer(base))
    count = QUICK_READ if bench.quick else READ
    records: list[Any] = []
    for name in FILES:
        first = bench.folder / "pairs" / f"{name}.jsonl"
        _first_rows(bench.data_root / "hh-rlhf" / name / "train.jsonl.gz", first, count)
        records += read(first, "comparison").records
    found = []
    for part in split_heldout(records, HELDOUT):
        rows = Pairs([], [])
        for record in part:
            encoded = encode_comparisons([record], template, MAX_LENGTH)  # type: ignore[list-item]
            if len(encoded.items) == 1 and not encoded.answers_cut:
                prompt, chosen, rejected = (list(node.ids) for node in encoded.items[0])
                kept = {key: getattr(record, key) for key in ("prompt", "chosen", "rejected")}
                rows.records.append(kept)
                rows.ids.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        found.append(rows)
    return found[0], found[1]


def _first_rows(archive: Path, path: Path, count: int) -> None:
    import gzip

    with gzip.open(archive, "rt", encoding="utf-8") as lines:
        path.write_text("".join(islice(lines, count)), "utf-8")


def _peer(python: Path, folder: Path, base: Path, steps: int, seed: int) -> tuple[Path, float]:
    """TRL's model and its seconds of training."""
    job = {"model": str(base), "rows": str(folder / "ids.json"), "steps": steps, "pairs": PAIRS, "rate": RATE}
    job |= {"warmup": WARMUP, "seed": seed, "out": f"{folder}/trl-{seed}"}
    command = [str(python), "-m", "benchmarks.peers.trl_reward"]
    with Side(PEER, command, job, folder / f"trl-side-{seed}") as side:
        seconds = side.go()["seconds"]
        side.next("peak")  # said at the very end, when the model is saved
    return Path(f"{folder}/trl-{seed}"), seconds


def judged(model: Path, heldout: Pairs) -> list[float]:
    """1 for each held-out pair whose chosen answer has the higher score, 0.5 for equal ones, else 0."""
    scores = scored(model, [(row["prompt"], row[side]) for row in heldout.ids for side in ("chosen", "rejected")])
    return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(scores[::2], scores[1::2], strict=True)]


def scored(model: Path, answers: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """A reward model's scores of (prompt, answer) as token ids."""
    from danlu.models.load import load_model
    from danlu.rewards.model import judge_of
    from danlu.rewards.protocol import Episode
    from danlu.text.chat_template import ChatTemplate
    from danlu.text.tokenizer import load_tokenizer

    template = ChatTemplate(load_tokenizer(model))
    judge = judge_of(load_model(model, scalar=True), template, template, micro_tokens=8192, device="cpu")
    scores = judge.score([Episode(tuple(p), tuple(a), True) for p, a in answers])
    return [float(score.value) for score in scores]  # type: ignore[arg-type]
