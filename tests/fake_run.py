"""A run folder as `danlu run` leaves it, written by hand: for tests of what reads run folders."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo", "eval", "quantize")
MODELS: dict[str, dict[str, Any]] = {
    "pretrain": {"model": "", "tokenizer": "stage:tokenizer"},
    "sft": {"model": "stage:pretrain"},
    "reward": {"model": "stage:sft"},
    "ppo": {"model": "stage:sft", "reward_model": "stage:reward"},
    "eval": {"models": ["stage:pretrain", "stage:sft", "stage:ppo"]},
    "quantize": {"model": "stage:ppo"},
}


def interval(mean: float, half: float = 0.04) -> dict[str, float]:
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


TABLE = [
    {"model": "base", "stage": "pretrain", "rubric": interval(0.141), "correct": interval(0.034, 0.02)},
    {"model": "sft", "stage": "sft", "rubric": interval(0.712), "correct": interval(0.654)},
    {"model": "ppo", "stage": "ppo", "rubric": interval(0.823), "correct": interval(0.741)},
]
for _row, _stop, _length in zip(TABLE, (0.02, 0.978, 0.996), (64.0, 14.2, 12.8), strict=True):
    _row |= {"stop_rate": _stop, "length": _length}

SAMPLES = [
    {
        "prompt": [{"role": "user", "content": "When does the bakery on Mill Lane open?"}],
        "label": "It opens at 7:30.",
        "answers": {
            "base": "When does the bakery on Mill Lane open? The ferry leaves at noon and Mill Lane is",
            "sft": "The bakery opens at 8:30.",
            "ppo": "The bakery on Mill Lane opens at 7:30.",
        },
    },
    {
        "prompt": [
            {"role": "system", "content": "请用中文回答。"},
            {"role": "user", "content": "图书馆几点关门？"},
            {"role": "assistant", "content": "图书馆晚上九点关门。"},
            {"role": "user", "content": "那星期天呢？"},
        ],
        "answers": {"base": "星期天呢？图书馆图书馆", "sft": "我不知道。", "ppo": "星期天图书馆下午五点关门。"},
    },
    {
        "prompt": [
            {"role": "user", "content": "Who keeps the <b>lighthouse</b>? </script><script>alert(1)</script> 😀"}
        ],
        "answers": {"base": "", "sft": "مرحبا، لا أعرف.", "ppo": "Ada Brook keeps the lighthouse & the pier."},
    },
]


FINDINGS = [
    {
        "step": 31,
        "code": "P-CLIP-HIGH",
        "severity": "warning",
        "seen": "36% of the tokens were clipped over the last 10 iterations",
        "cause": "updates are so large that most of them are thrown away",
        "change": "lower learning_rate",
        "action": "adapt",
        "done": "learning_rate is multiplied by 0.5 from the next iteration on",
    }
]


def over_time() -> list[dict[str, Any]]:
    """The answers to two held-out prompts before training and after every tenth of 60 iterations."""
    asked = {"When does the bakery open?": "The bakery opens at", "图书馆几点关门？": "图书馆关门的时间是"}
    return [
        {"step": step, "prompt": [{"role": "user", "content": q}], "answer": f"{a} {step}", "score": step / 50}
        for step in range(0, 70, 10)
        for q, a in asked.items()
    ]


def write_run(
    folder: Path, *, done: int = len(STAGES), status: str = "done", description: str = "", models: tuple[str, ...] = ()
) -> Path:
    """Writes a run whose first `done` stages are done.

    Args:
        status: of the stage after them: done (there is none), running, failed or interrupted.
        models: names to use in the table in place of base, sft and ppo.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "description": description or "A small town, from an empty model to an aligned one. 小镇问答。",
        "seed": 0,
        "stages": [{"kind": k, "name": k, **MODELS.get(k, {})} for k in STAGES],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False), "utf-8")
    started = STAGES[:done] if status == "done" else STAGES[: done + 1]
    for index, kind in enumerate(started, start=1):
        write_stage(folder, index, kind, "done" if index <= done else status, models)
    return folder


def write_stage(folder: Path, index: int, kind: str, status: str, models: tuple[str, ...] = ()) -> None:
    out = folder / f"{index:02d}-{kind}"
    out.mkdir(exist_ok=True)
    settings = {k: str(v).replace("stage:", f"{folder}/0x-") for k, v in MODELS.get(kind, {}).items()}
    settings |= {"out": str(out), "seed": 0, "learning_rate": 0.002, "epochs": 2.0}
    (out / "settings.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    rows = curves(kind)
    if status != "done":
        rows = rows[: len(rows) // 2]
    if rows:
        (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    manifest = {
        "schema": 1,
        "name": kind,
        "kind": kind,
        "status": status,
        "key": "ab" * 32,
        "seconds": {"tokenizer": 3.4, "pretrain": 211.0, "sft": 96.2, "reward": 61.5, "ppo": 402.8}.get(kind, 38.1),
        "started": f"2025-03-0{index}T10:00:00+00:00",
        "seed": 0,
        "inputs": inputs(kind),
        "versions": {"danlu": "0.1.0", "python": "3.11.9", "torch": "2.11.0", "transformers": "5.17.0"},
        "hardware": {"platform": "Linux-6.8-x86_64", "cpus": 8, "threads": 8, "gpus": []},
    }
    if status in ("failed", "interrupted"):
        manifest["error"] = "loss is nan at step 12\n  -> lower learning_rate (now 0.002)"
    if status == "done":
        manifest |= finished(kind, rows, models)
    if kind == "ppo":
        for name, told in (("health.jsonl", FINDINGS), ("samples.jsonl", over_time())):
            (out / name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in told), "utf-8")
    if status == "done" and kind == "eval":
        answers = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in SAMPLES)
        (out / "samples.jsonl").write_text(answers, "utf-8")
    (out / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), "utf-8")


def inputs(kind: str) -> list[dict[str, Any]]:
    sizes = {"pretrain": (24_000, 9_100_000), "sft": (8_000, 1_300_000), "reward": (3_000, 900_000)}
    if kind not in sizes:
        return [{"field": "model", "path": "0x-sft/model/config.json", "sha256": "cd" * 32, "bytes": 900}]
    records, count = sizes[kind]
    return [
        {
            "field": "data",
            "path": f"data/town/{kind}.jsonl",
            "sha256": "ef" * 32,
            "bytes": count,
            "records": records,
            "licence": "CC0-1.0" if kind != "reward" else "",
            "dropped": {"too long": 12, "empty answer": 3} if kind == "sft" else {},
        }
    ]


def finished(kind: str, rows: list[dict[str, Any]], models: tuple[str, ...]) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for row in rows:
        last |= {k: v for k, v in row.items() if k != "step"}
    gates = {
        "sft": [
            gate("G-STOP", 1.0, 0.99, "100.0% of 8,000 answers end with a trained stop token"),
            gate("G-TRUNC", 0.002, 0.05, "0.2% of 8,000 answers are lost to max_length"),
            gate("G-RENDER", 1.0, 1.0, "50 of 50 sampled prompts are the same in training and in serving"),
        ],
        "reward": [
            gate("G-RM", 0.874, 0.6, "the reward model is right on 87.4% of held-out pairs"),
            {
                **gate("G-SHIFT", 0.31, 0.25, "prompts of SFT and PPO differ in length"),
                "passed": False,
                "warning": True,
            },
        ],
        "ppo": [
            gate("G-RATIO", 2e-7, 1e-4, "on the first pass the ratio is off by 2.0e-07"),
            gate("G-PPO", 0.71, 0.5, "the policy wins 71.0% of held-out prompts against the start model"),
        ],
        "quantize": [gate("G-QUANT", 0.0013, 0.01, "perplexity 5.3210 before and 5.3279 after quantising (+0.13%)")],
    }
    table: dict[str, list[dict[str, Any]]] = {
        "eval": [{**r, "model": n} for r, n in zip(TABLE, models or ("base", "sft", "ppo"), strict=True)],
        "quantize": [{**TABLE[2], "model": "int8", "stage": "quantize", "rubric": interval(0.821)}],
    }
    metrics = {
        "tokenizer": {"vocab_size": 2048.0, "tokens_per_character": 0.271},
        "eval": {f"{r['model']}_rubric": r["rubric"]["mean"] for r in TABLE},
        "quantize": {
            "bytes": 1_843_200.0,
            "bytes_16bit": 3_612_672.0,
            "perplexity_before": 5.321,
            "perplexity": 5.3279,
        },
    }
    return {
        "finished": "2025-03-08T10:10:00+00:00",
        "peak_memory_mb": 812.5,
        "metrics": metrics.get(kind, last),
        "facts": {"records": 8000, "dropped": {"too long": 12}} if kind == "sft" else {},
        "gates": gates.get(kind, []),
        "table": table.get(kind, []),
    }


def gate(code: str, value: float, threshold: float, sentence: str) -> dict[str, Any]:
    return {"code": code, "passed": True, "value": value, "threshold": threshold, "sentence": sentence}


def curves(kind: str) -> list[dict[str, Any]]:
    """Logged rows of a stage that goes well."""
    draw = random.Random(kind)
    rows: list[dict[str, Any]] = []
    if kind in ("pretrain", "sft", "reward"):
        start, end = {"pretrain": (7.6, 1.71), "sft": (3.4, 0.62), "reward": (0.69, 0.31)}[kind]
        for step in range(10, 1210, 10):
            fall = math.exp(-step / 130)
            level = end + (start - end) * fall
            row = {
                "step": step,
                "loss": level * (1 + draw.gauss(0, 0.035)),
                "grad_norm": 0.5 + 1.5 * fall + abs(draw.gauss(0, 0.1)),
                "learning_rate": 0.002,
            }
            if kind == "reward":
                row |= {"accuracy": min(1.0, 0.89 - 0.39 * fall + draw.gauss(0, 0.04)), "margin": 1.6 * (1 - fall)}
            rows.append(row)
            if step % 100 == 0:
                held: dict[str, Any] = {"step": step, "eval_loss": level * 1.06 + 0.02}
                if kind == "reward":
                    right = 0.874 - 0.37 * fall
                    held |= {
                        "eval_accuracy": right,
                        "eval_accuracy_low": right - 0.04,
                        "eval_accuracy_high": right + 0.035,
                    }
                    held |= {"eval_margin": 1.4 * (1 - fall), "eval_length_correlation": 0.12}
                rows.append(held)
    if kind == "ppo":
        for step in range(1, 61):
            gain = 1 - math.exp(-step / 18)
            rows.append(
                {
                    "step": step,
                    "score": 0.1 + 1.1 * gain + draw.gauss(0, 0.06),
                    "kl": 3.1 * gain + abs(draw.gauss(0, 0.1)),
                    "kl_k3": 3.3 * gain + abs(draw.gauss(0, 0.1)),
                    "entropy": 0.82 - 0.3 * gain + draw.gauss(0, 0.01),
                    "length": 14.2 - 1.4 * gain + draw.gauss(0, 0.3),
                    "stop_rate": min(1.0, 0.975 + 0.02 * gain + draw.gauss(0, 0.004)),
                    "repetition": 0.03 + 0.02 * gain,
                    "distinct_1": 0.2 - 0.05 * gain,
                    "distinct_2": 0.6 - 0.1 * gain,
                    "empty_rate": 0.0,
                    "ratio_max": 1.6 + abs(draw.gauss(0, 0.3)),
                    "ratio_error_first": 2e-7,
                    "clip_fraction": 0.08 + abs(draw.gauss(0, 0.02)),
                    "explained_variance": 0.6 * gain - 0.1,
                    "value_loss": 0.2 + 0.6 * (1 - gain) + abs(draw.gauss(0, 0.05)),
                    "engine_gap": 2e-6,
                    "engine_gap_max": 1e-5,
                    "tokens": 2200.0,
                    "loss": -0.01,
                    "grad_norm": 0.9,
                }
            )
            if step % 10 == 0:
                held = {
                    "eval_score": 0.05 + 1.05 * gain,
                    "eval_length": 13.9 - gain,
                    "eval_stop_rate": 0.98 + 0.015 * gain,
                    "eval_win_rate": 0.5 + 0.21 * gain,
                    "eval_win_rate_low": 0.42 + 0.21 * gain,
                    "eval_win_rate_high": 0.58 + 0.21 * gain,
                }
                rows.append({"step": step, **held})
    return rows
