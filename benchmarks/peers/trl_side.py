"""TRL's side of `benchmarks/data.py`; runs in an environment that has TRL and need not have danlu.

The rows become TRL's conversational prompt and completion by a function as its documents show, then `SFTTrainer` prepares them
while it is made. Packing is its `pack_dataset`, which also writes the packed columns.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer, pack_dataset


def _turns(row: dict[str, str]) -> dict[str, Any]:
    asked = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
    prompt = [{"role": "user", "content": asked}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": row["output"]}]}


def work(job: dict[str, Any]) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    workers = job["processes"] if job["processes"] > 1 else None
    config = SFTConfig(
        output_dir=job["cache"] + "/out",
        max_length=job["max_length"],
        dataset_num_proc=workers,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    )
    begun = time.perf_counter()
    rows = load_dataset("json", data_files=job["file"], split="train")
    rows = rows.map(_turns, remove_columns=rows.column_names, num_proc=workers)
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - begun
    found = trainer.train_dataset
    lengths = [len(ids) for ids in found["input_ids"]]
    trained = sum(sum(label != -100 for label in labels) for labels in found["labels"])
    begun = time.perf_counter()
    packed = pack_dataset(found.select_columns(["input_ids", "labels"]), job["budget"], "bfd")
    pack_seconds = time.perf_counter() - begun
    counted = {"tokens": sum(lengths), "trained": trained}
    return {"seconds": seconds, "pack_seconds": pack_seconds, "batches": len(packed), **counted}


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
