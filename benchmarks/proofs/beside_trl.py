"""Proof 6: PPO beside TRL 1.12's, the last release that has one.

Both sides start from the town's SFT model with the same reward model (critics too), and take the same number of iterations
with as many episodes of the same prompts, one to each, in orders of their own; rate, KL coefficient, clip ranges, gamma,
lambda, epochs and mini-batches are the same, fp32, and neither clips scores, whitens rewards or punishes an answer that does
not end. What differs is code, and what danlu does by itself: gradients are clipped at norm 1.

A score alone says little, for it can be bought with KL. So scores (raw, of the reward model) are compared at equal KL: the
points (KL, score) of a side's iterations are smoothed over five, the KL is the smaller of the two sides' greatest, and each
side's score is read where its curve first reaches it, on a straight line between points. Goal: the mean difference over the
seeds is not below 0 beyond its 95% interval. Seconds an episode stand beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.peers import environments
from benchmarks.proofs import plots
from benchmarks.proofs.bench import Bench, Job, Town, Verdict, town_of
from benchmarks.proofs.figures import at_equal_kl, over_seeds
from benchmarks.proofs.pairs import missing
from benchmarks.turns import Side

NAME = "6 beside TRL"
PEER = "TRL 1.12"
EPISODES, NEW = 32, 24
ITERATIONS, QUICK_ITERATIONS = 20, 10
RATE, MINIBATCHES, EPOCHS, KL_COEF = 1e-4, 2, 2, 0.05
SMOOTH = 5
MAX_PROMPT = 96
Points = list[tuple[float, float]]


def prove(bench: Bench) -> list[Verdict]:
    """One verdict over all seeds."""
    python = environments.python("trl-ppo")
    seeds = bench.seeds(5, 2)
    said = f"score at equal KL not below {PEER}'s beyond the 95% interval over seeds"
    if python is None:
        return [missing(NAME, PEER, said, seeds)]
    town = town_of(bench)
    folder = bench.place("beside-trl")
    judge = plain_judge(Path(town.model("reward")), folder / "judge")
    iterations = QUICK_ITERATIONS if bench.quick else ITERATIONS
    rows = _prompts(town, folder / "prompts.jsonl", iterations * EPISODES)
    common = ours(town, judge, rows, iterations)
    found = bench.train(
        {f"danlu, seed {s}": Job("ppo", common | {"seed": s, "out": str(folder / f"danlu-{s}")}) for s in seeds}
    )
    sides: dict[str, list[Points]] = {"danlu": [], PEER: []}
    seconds: dict[str, list[float]] = {"danlu": [], PEER: []}
    for seed in seeds:
        trained = found[f"danlu, seed {seed}"]
        sides["danlu"].append([(row["kl"], row["score"]) for row in trained.rows if "kl" in row])
        seconds["danlu"].append(trained.seconds)
        points, took = _peer(python, folder, town, judge, rows, iterations, seed)
        bench.say(f"  {PEER}, seed {seed}: {took:.0f} s of training")
        sides[PEER].append(points)
        seconds[PEER].append(took)
    if bench.images is not None:
        plots.beside(bench.images / "learning-beside-trl.svg", sides)
    return [verdict(sides, seconds, seeds, said, iterations * EPISODES)]


def ours(town: Town, judge: Path, rows: Path, iterations: int) -> dict[str, Any]:
    """danlu's settings."""
    return {
        "model": town.model("sft"),
        "reward_model": str(judge),
        "data": str(rows),
        "eval_fraction": 0.0,
        "dtype": "float32",
        "max_length": MAX_PROMPT + NEW,
        "micro_tokens": 4096,
        "learning_rate": RATE,
        "schedule": "constant",
        "warmup": 0.0,
        "max_steps": iterations,
        "save_every": 10**6,
        "log_every": 1,
        "rollout": {"batch": EPISODES, "max_new_tokens": NEW},
        "ppo": {
            "kl_coef": KL_COEF,
            "epochs": EPOCHS,
            "minibatches": MINIBATCHES,
            "critic_learning_rate": RATE,
            "score_clip": 1e6,
            "missing_stop_penalty": 0.0,
            "max_kl": 1e6,
        },
    }


def theirs(seed: int) -> dict[str, Any]:
    """TRL's settings, beside those of `peers/trl_ppo.py`.

    A device batch holds all episodes of an iteration and is cut into `MINIBATCHES`, each with an optimizer step: with accumulation
    TRL would step only once for as many mini-batches as are accumulated.
    """
    sizes = {"per_device_train_batch_size": EPISODES, "gradient_accumulation_steps": 1}
    passes = {"num_ppo_epochs": EPOCHS, "num_mini_batches": MINIBATCHES}
    return {**sizes, **passes, "kl_coef": KL_COEF, "seed": seed, "bf16": False, "gradient_checkpointing": False}


def verdict(
    sides: dict[str, list[Points]], seconds: dict[str, list[float]], seeds: list[int], goal: str, episodes: int
) -> Verdict:
    """The mean difference of scores at equal KL, danlu less TRL, over the seeds.

    Args:
        sides: points (KL, score) of the iterations, by seed.
        seconds: of training, by seed; episodes: of a run.
    """
    equal = [at_equal_kl(a, b, SMOOTH) for a, b in zip(*sides.values(), strict=True)]
    mean, low, high = over_seeds([a - b for _, a, b in equal])
    details = {
        "low": low,
        "high": high,
        "kl": [kl for kl, _, _ in equal],
        "scores": [[a, b] for _, a, b in equal],
        "last_score": {side: fmean(fmean(p[1] for p in run[-SMOOTH:]) for run in runs) for side, runs in sides.items()},
        "last_kl": {side: fmean(fmean(p[0] for p in run[-SMOOTH:]) for run in runs) for side, runs in sides.items()},
        "seconds_an_episode": {side: fmean(took) / episodes for side, took in seconds.items()},
    }
    return Verdict(NAME, mean, goal, high >= 0, seeds, details)


def plain_judge(reward_model: Path, folder: Path) -> Path:
    """The reward model with its scale in the head, so that its logit is the score on both sides, but for a constant."""
    import torch

    from danlu.models.load import load_model, save_model
    from danlu.rewards.model import CONFIG_KEY, normaliser_of
    from danlu.text.tokenizer import load_tokenizer

    model, tokenizer = load_model(reward_model, scalar=True), load_tokenizer(reward_model)
    with torch.no_grad():
        model.score.weight /= normaliser_of(model)[1]
    setattr(model.config, CONFIG_KEY, {"mean": 0.0, "std": 1.0})
    return save_model(model, tokenizer, folder)


def _prompts(town: Town, path: Path, count: int) -> Path:
    """The town's prompts that are short enough, as danlu reads them, and as token ids beside it."""
    from danlu.data.read import read
    from danlu.text.chat_template import ChatTemplate
    from danlu.text.tokenizer import load_tokenizer

    template = ChatTemplate(load_tokenizer(town.model("sft")))
    records: list[Any] = list(read(town.file("prompts"), "prompt").records)
    found = [(r.prompt, template.encode_prompt(r.prompt)) for r in records]
    kept = [(prompt, ids) for prompt, ids in found if len(ids) <= MAX_PROMPT][:count]
    path.write_text("".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p, _ in kept), "utf-8")
    Path(f"{path}.ids.json").write_text(json.dumps([{"prompt": ids} for _, ids in kept]), "utf-8")
    return path


def _peer(
    python: Path, folder: Path, town: Town, judge: Path, rows: Path, iterations: int, seed: int
) -> tuple[Points, float]:
    """TRL's points (KL, score) and its seconds of training."""
    job = {"model": town.model("sft"), "reward": str(judge), "rows": str(rows), "iterations": iterations, "new": NEW}
    job |= {"episodes": EPISODES, "rate": RATE, "settings": theirs(seed)}
    command = [str(python), "-m", "benchmarks.peers.trl_ppo_learning"]
    with Side(PEER, command, job, folder / f"side-{seed}") as side:
        report = side.go()
    return [(kl, score) for kl, score in report["points"]], report["seconds"]
