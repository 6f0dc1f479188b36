"""LLaMA-Factory's side of `benchmarks/data.py`; runs in an environment that has it and need not have danlu.

Its loader reads the file (it does not know gzip) and its supervised processor tokenises it. Packing is its
`greedy_knapsack`, called as its packed processor does, for every 1,000 rows; it packs indices.
"""

from __future__ import annotations

import importlib.machinery
import json
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any

# It imports torchaudio, which text does not need and a CPU build need not have.
_AUDIO = types.ModuleType("torchaudio")
_AUDIO.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules.setdefault("torchaudio", _AUDIO)

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer  # noqa: E402
from llamafactory.data.processor.processor_utils import greedy_knapsack  # noqa: E402
from llamafactory.hparams import DataArguments, ModelArguments  # noqa: E402
from transformers import AutoTokenizer, Seq2SeqTrainingArguments  # noqa: E402

BATCH = 1000


def work(job: dict[str, Any]) -> dict[str, float]:
    folder = Path(job["cache"]) / "data"
    folder.mkdir(exist_ok=True)
    if not (folder / "alpaca.json").is_file():
        shutil.copy2(job["plain"], folder / "alpaca.json")
    (folder / "dataset_info.json").write_text(json.dumps({"alpaca": {"file_name": "alpaca.json"}}), "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    data = DataArguments(
        template="chatml",
        dataset="alpaca",
        dataset_dir=str(folder),
        cutoff_len=job["max_length"],
        preprocessing_num_workers=job["processes"] if job["processes"] > 1 else None,
        preprocessing_batch_size=BATCH,
    )
    model = ModelArguments(model_name_or_path=job["tokenizer"], cache_dir=job["cache"])
    training = Seq2SeqTrainingArguments(output_dir=job["cache"] + "/out", report_to=[], use_cpu=True)
    template = get_template_and_fix_tokenizer(tokenizer, data)
    begun = time.perf_counter()
    found = get_dataset(template, model, data, training, "sft", tokenizer)["train_dataset"]
    seconds = time.perf_counter() - begun
    lengths = [len(ids) for ids in found["input_ids"]]
    trained = sum(sum(label != -100 for label in labels) for labels in found["labels"])
    begun = time.perf_counter()
    batches = sum(len(greedy_knapsack(lengths[i : i + BATCH], job["budget"])) for i in range(0, len(lengths), BATCH))
    pack_seconds = time.perf_counter() - begun
    counted = {"tokens": sum(lengths), "trained": trained}
    return {"seconds": seconds, "pack_seconds": pack_seconds, "batches": batches, **counted}


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
