"""The quickstart for seeds 0, 1 and 2: does PPO beat SFT on the rubric with separate intervals, every time?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from danlu.pipeline.listing import describe

SEEDS = (0, 1, 2)
RECIPE = "recipes/quickstart.yaml"


def measure(*, quick: bool = False) -> list[dict[str, Any]]:
    """Runs (or finds finished) `runs/quickstart-seed<N>` and prints the table in Markdown."""
    rows: list[dict[str, Any]] = []
    for seed in SEEDS[:1] if quick else SEEDS:
        name = f"quickstart-seed{seed}"
        command = [sys.executable, "-m", "danlu", "run", RECIPE, "--set", f"seed={seed}", "--name", name]
        subprocess.run(command, check=True)
        found = describe(Path("runs") / name)
        table = {row["model"]: row for row in found["table"]}
        reward = next(s["metrics"] for s in found["stages"] if s["kind"] == "reward")
        rows.append(
            {"seed": seed, "seconds": found["seconds"], "reward_accuracy": reward["eval_accuracy"], "table": table}
        )
    print("| seed | model | rubric (95% interval) | correct (95% interval) | stop rate | tokens |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        for model, values in row["table"].items():
            cells = [_interval(values["rubric"]), _interval(values["correct"])]
            print(
                f"| {row['seed']} | {model} | {' | '.join(cells)} | {values['stop_rate']:.3f} | {values['length']:.1f} |"
            )
    for row in rows:
        sft, ppo = row["table"]["sft"], row["table"]["ppo"]
        separate = ppo["rubric"]["low"] > sft["rubric"]["high"]
        gain = 100 * (ppo["correct"]["mean"] - sft["correct"]["mean"])
        print(
            f"seed {row['seed']}: intervals {'separate' if separate else 'OVERLAP'}, correctness {gain:+.1f} points, "
            f"reward model {row['reward_accuracy']:.3f}, {row['seconds']:.0f} s"
        )
    return rows


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
