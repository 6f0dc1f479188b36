"""TRL 1.16's RewardTrainer on given token ids, for `benchmarks/proofs/pairs.py`; runs in TRL's own environment, without danlu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from benchmarks.peers.meter import Meter, run


def work(job: dict[str, Any], meter: Meter) -> None:
    """Trains and saves into `job["out"]`."""
    rows = json.loads(Path(job["rows"]).read_text("utf-8"))
    data = Dataset.from_list([{f"{k}_ids": r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in rows])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    options: dict[str, Any] = {"output_dir": f"{job['out']}-checkpoints", "report_to": [], "save_strategy": "no"}
    options |= {"use_cpu": not torch.cuda.is_available(), "bf16": False, "gradient_checkpointing": False}
    options |= {
        "learning_rate": job["rate"],
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": job["warmup"],
    }
    options |= {"weight_decay": 0.0, "adam_beta2": 0.95, "max_grad_norm": 1.0, "seed": job["seed"]}
    options |= {"max_length": None, "max_steps": job["steps"], "per_device_train_batch_size": job["pairs"]}
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    trainer = RewardTrainer(model, args=RewardConfig(**options), train_dataset=data, processing_class=tokenizer)
    meter.wait()
    trainer.train()
    meter.report(steps=job["steps"])
    model.save_pretrained(job["out"])
    tokenizer.save_pretrained(job["out"])


if __name__ == "__main__":
    run(work)
