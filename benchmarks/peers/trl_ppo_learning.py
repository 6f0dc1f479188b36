"""TRL 1.12's PPO trainer from begin to end, for `benchmarks/proofs/beside_trl.py`; runs in its own environment, without danlu."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.meter import Meter, run
from benchmarks.peers.trl_ppo import Logs, trainer


def work(job: dict[str, Any], meter: Meter) -> None:
    """All iterations; reports KL and raw score of each."""
    logs = Logs()
    made = trainer(job, "learn", job["rate"], logs, job["rows"], job["iterations"])
    meter.wait()
    made.train()
    points = [[r["objective/kl"], r["objective/scores"]] for r in logs.rows if "objective/kl" in r]
    meter.report(points=points)


if __name__ == "__main__":
    run(work)
