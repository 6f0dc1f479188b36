"""TRL 1.12's PPO trainer as a side of `benchmarks/core.py` (the last release that has one); runs in its own environment.

Policy, reference, critic and reward model are four models. With `lora` in the job, policy and critic train adapters of that rank
on bases of their own, which is what the memory of one trunk is compared with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.peers.meter import Meter, precision, run


class Iterations(TrainerCallback):
    """Every iteration is one window, from one step's end to the next one's."""

    def __init__(self, meter: Meter, windows: int) -> None:
        self.meter, self.windows, self.tokens = meter, windows, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.report(tokens=self.tokens, steps=1)
        self.windows -= 1
        if self.windows:
            self.meter.wait()


class Logs(TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.rows.append(dict(logs or {}))


def work(job: dict[str, Any], meter: Meter) -> None:
    """One iteration on given answers, then every iteration is one window."""
    generation = ppo_trainer.batch_generation
    logs = Logs()
    meter.wait()
    ppo_trainer.batch_generation = _given(job)
    checked = trainer(job, "check", job["check_rate"], logs, job["check"], 1)
    checked.train()
    names = {"score": "objective/scores", "kl": "objective/kl"}
    own = precision(next(checked.policy_model.parameters()).dtype, checked.args.bf16)
    del checked  # its memory is not the windows'
    meter.checked([logs.rows[0][names[key]] for key in job["compare"]], own)

    windows = Iterations(meter, job["windows"])

    def counted(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        found, logits = generation(model, queries, *rest)
        stops = (found[:, queries.shape[1] :] == job["eos"]).int()
        windows.tokens = int((stops.cumsum(1) - stops == 0).sum())  # up to the stop token, with it
        return found, logits

    ppo_trainer.batch_generation = counted
    trainer(job, "timed", job["rate"], windows, job["rows"], job["windows"]).train()


def trainer(job: dict[str, Any], out: str, rate: float, callback: Any, file: str, iterations: int) -> PPOTrainer:
    """TRL's trainer with four models.

    Args:
        job: model, reward, new (tokens of an answer), episodes (of an iteration), settings (they win over what is set here).
        out: a folder under the job's.
        file: of rows; their ids stand beside it in `FILE.ids.json`.
    """
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    rows = json.loads(Path(f"{file}.ids.json").read_text("utf-8"))
    options = {"learning_rate": rate, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    options |= {"adam_beta2": 0.95, "logging_steps": 1, "save_strategy": "no", "seed": 0, "report_to": []}
    options |= {"num_ppo_epochs": 1, "num_mini_batches": 1, "num_sample_generations": 0, "temperature": 1.0}
    options |= {"response_length": job["new"], "stop_token": "eos", "kl_coef": 0.05, "disable_tqdm": True}
    options |= {"total_episodes": iterations * job["episodes"], "use_cpu": not torch.cuda.is_available()}
    args = PPOConfig(**{"output_dir": str(Path(job["folder"]) / out), **options, **job["settings"]})
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    critic = AutoModelForSequenceClassification.from_pretrained(job["reward"], num_labels=1, dtype=torch.float32)
    if job.get("lora"):
        lora = LoraConfig(r=job["lora"], lora_alpha=16, target_modules="all-linear")
        policy, critic = (inject_adapter_in_model(lora, model) for model in (policy, critic))
    return PPOTrainer(
        args,
        tokenizer,
        policy,
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        AutoModelForSequenceClassification.from_pretrained(job["reward"], num_labels=1, dtype=torch.float32),
        Dataset.from_list([{"input_ids": r["prompt"]} for r in rows]),
        critic,
        callbacks=[callback],
    )


def _given(job: dict[str, Any]) -> Any:
    """A `batch_generation` that hands out the given answer of each prompt, with the policy's own logits for it."""
    answers = {tuple(r["prompt"]): r["answers"][0] for r in json.loads(Path(job["answers"]).read_text("utf-8"))}

    def batch_generation(model: Any, queries: torch.Tensor, size: int, pad: int, config: Any) -> Any:
        found = [answers[tuple(q[q != pad].tolist())] for q in queries]
        longest = max(map(len, found))
        responses = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in found])
        whole = torch.cat([queries, responses], 1)
        logits = ppo_trainer.forward(model, whole, pad).logits[:, queries.shape[1] - 1 : -1]
        return whole, logits

    return batch_generation


if __name__ == "__main__":
    run(work)
