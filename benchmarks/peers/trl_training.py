"""TRL's SFT, reward, DPO and GRPO trainers as a side of `benchmarks/core.py`; runs in TRL's own environment, without danlu.

Rows come as token ids, which TRL takes as a data set that is prepared already.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.peers.meter import Meter, precision, run

CHECK_STEPS = 3


class PreparedDPOTrainer(DPOTrainer):
    """TRL's, with rows that are token ids already; the other trainers see that for themselves."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **_: Any) -> Dataset:
        return dataset


TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "reward": (RewardTrainer, RewardConfig),
    "dpo": (PreparedDPOTrainer, DPOConfig),
}


class Losses(TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.rows.append(logs)


class Epochs(TrainerCallback):
    """Every epoch is one window."""

    def __init__(self, meter: Meter, tokens: int) -> None:
        self.meter, self.tokens, self.first = meter, tokens, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first = state.global_step
        self.meter.wait()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.report(tokens=self.tokens, steps=state.global_step - self.first)


class Steps(TrainerCallback):
    """Every optimizer step is one window; `facts` are those of the step's log."""

    def __init__(self, meter: Meter, losses: Losses, episodes: int) -> None:
        self.meter, self.losses, self.episodes = meter, losses, episodes

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "completions/mean_length" in logs:
            tokens = logs["completions/mean_length"] * self.episodes
            self.meter.report(tokens=tokens, score=logs["reward"], steps=1)


def work(job: dict[str, Any], meter: Meter) -> None:
    """The check's steps, then the windows."""
    (_grpo if job["work"] == "grpo" else _rows)(job, meter)


def _options(job: dict[str, Any], out: str, rate: float, **changes: Any) -> dict[str, Any]:
    """The same optimizer and schedule as danlu's; all that decides speed is in `job["settings"]`."""
    common = {"output_dir": str(Path(job["folder"]) / out), "report_to": [], "use_cpu": not torch.cuda.is_available()}
    common |= {"learning_rate": rate, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    common |= {"adam_beta2": 0.95, "max_grad_norm": 1.0, "logging_steps": 1, "save_strategy": "no", "seed": 0}
    own = {k: v for k, v in job["settings"].items() if k not in ("weights", "attention")}
    return {**common, **own, **changes}


def _data(job: dict[str, Any], file: str) -> Dataset:
    rows = json.loads(Path(f"{file}.ids.json").read_text("utf-8"))
    if job["work"] == "sft":
        return Dataset.from_list(rows)
    if job["work"] == "reward":
        given = [{f"{k}_ids": r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in rows]
    else:
        given = [{f"{k}_ids": r[k] for k in ("prompt", "chosen", "rejected")} for r in rows]
    lengths = [len(r["prompt"]) + max(len(r["chosen"]), len(r["rejected"])) for r in rows]  # for grouping by length
    return Dataset.from_list([{**r, "length": n} for r, n in zip(given, lengths, strict=True)])


def _model(job: dict[str, Any]) -> Any:
    how = {"dtype": getattr(torch, job["settings"].get("weights", "float32"))}
    how["attn_implementation"] = job["settings"].get("attention", "sdpa")
    if job["work"] == "reward":
        return AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, **how)
    return AutoModelForCausalLM.from_pretrained(job["model"], **how)


def _precision(trainer: Any) -> str:
    return precision(next(trainer.model.parameters()).dtype, trainer.args.bf16)


def _rows(job: dict[str, Any], meter: Meter) -> None:
    trainer, config = TRAINERS[job["work"]]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    longest = None if job["settings"].get("padding_free") else job["max_length"]
    options = {"max_length": job["settings"].get("max_length", longest)}
    meter.wait()
    losses, data = Losses(), _data(job, job["check"])
    size = job["settings"].get("per_device_train_batch_size", 8)
    whole = {"max_steps": CHECK_STEPS, "gradient_accumulation_steps": max(1, len(data) // size)}
    args = config(**_options(job, "check", job["check_rate"], **options, **whole))
    checked = trainer(_model(job), args=args, train_dataset=data, processing_class=tokenizer, callbacks=[losses])
    checked.train()
    meter.checked([row["loss"] for row in losses.rows], _precision(checked))
    del checked  # its memory is not the windows'

    args = config(**_options(job, "timed", job["rate"], **options, num_train_epochs=job["windows"]))
    windows = [Epochs(meter, job["tokens"])]
    data = _data(job, job["rows"])
    trainer(_model(job), args=args, train_dataset=data, processing_class=tokenizer, callbacks=windows).train()


def _grpo(job: dict[str, Any], meter: Meter) -> None:
    """Given answers in the check, sampled ones in the windows; the reward model reads prompt and answer as token ids."""
    judge = AutoModelForSequenceClassification.from_pretrained(job["reward"], num_labels=1, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    pad = tokenizer.pad_token_id
    answers = json.loads(Path(job["answers"]).read_text("utf-8"))
    texts = {json.dumps(r["messages"]): r for r in answers}

    @torch.no_grad()
    def reward(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        asked = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
        rows = [a + c for a, c in zip(asked, completion_ids, strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([r + [pad] * (longest - len(r)) for r in rows])
        mask = torch.arange(longest) < torch.tensor([len(r) for r in rows])[:, None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = judge.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        last = hidden[torch.arange(len(rows)), mask.sum(1) - 1].float()
        return (last @ judge.score.weight[0]).tolist()

    def given(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        handed: dict[str, int] = {}
        found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
        for prompt in map(json.dumps, prompts):
            row = texts[prompt]
            found["prompt_ids"].append(row["prompt"])
            found["completion_ids"].append(row["answers"][handed.setdefault(prompt, 0)])
            handed[prompt] += 1
        return found

    def trainer(out: str, rate: float, callbacks: list[Any], file: str, **changes: Any) -> GRPOTrainer:
        rollout = changes.pop("rollout_func", None)
        rows = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]
        args = GRPOConfig(**_options(job, out, rate, **changes))
        data = Dataset.from_list(rows)
        options = {"train_dataset": data, "processing_class": tokenizer, "callbacks": callbacks}
        return GRPOTrainer(_model(job), reward, args, rollout_func=rollout, **options)

    losses = Losses()
    meter.wait()
    checked = trainer("check", job["check_rate"], [losses], job["check"], max_steps=1, rollout_func=given)
    checked.train()
    names = {"score": "reward", "loss": "loss"}
    meter.checked([losses.rows[0][names[key]] for key in job["compare"]], _precision(checked))
    del checked  # its memory is not the windows'
    steps = Steps(meter, losses, job["episodes"])
    trainer("timed", job["rate"], [steps], job["rows"], max_steps=job["windows"]).train()


if __name__ == "__main__":
    run(work)
