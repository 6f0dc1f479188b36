"""The beginnings of the published files under their own names: reading all of them takes longer than the stages."""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import IO, Any

from danlu.pipeline.recipe import load_recipe

FILES = (
    "advertise-gen/dev.json",
    "alpaca-en/alpaca_data.json.gz",
    "alpaca-en/seed_tasks.jsonl",
    "alpaca-eval-prefs/vicuna-13b/annotations.json",
    "alpaca-zh/alpaca_chinese_part_0.json",
    "alpaca-zh/alpaca_chinese_zh.json.gz",
    "belle-seed-zh/zh_seed_tasks.json",
    "chatdoctor/chatdoctor5k.json.gz",
    "chatdoctor/format_dataset.csv",
    "gpteacher/roleplay-simple-deduped-roleplay-instruct.json.gz",
    "gsm8k/train.jsonl.gz",
    "hh-rlhf/harmless-base/train.jsonl.gz",
    "hh-rlhf/helpful-base/train.jsonl.gz",
    "hh-rlhf/helpful-rejection-sampled/train.jsonl.gz",
    "huatuo-med-zh/infer.json",
    "huatuo-med-zh/liver_cancer.json",
    "huatuo-med-zh/llama_data.json.gz",
    "huatuo-med-zh/med_chatglm_train_sample.txt",
    "instruction-wild/data/seed_prompts_ch.jsonl",
    "instruction-wild/data/seed_prompts_en.jsonl",
    "moss-sft/SFT_data.zip",
    "oasst/en_100_tree.jsonl",
    "oasst/oaast_rm_zh.json",
    "oasst/oaast_sft_zh.json",
)
ROWS = 80
CHARACTERS = 60_000
SHAPE = "{hidden_size: 32, layers: 2, heads: 4, kv_heads: 2, context: 1152}"
FEW: dict[str, dict[str, Any]] = {
    "tokenizer": {"vocab_size": 600, "data": "${data_root}/pretrain-en/tinystories_sample.txt"},
    "pretrain": {"max_records": 60, "max_steps": 3, "tokens_per_step": 2048},
    "sft": {"max_records": 60, "max_steps": 3, "tokens_per_step": 2048, "overlength": "drop"},
    "dpo": {"max_steps": 3, "tokens_per_step": 2048},
    "reward": {
        "max_records": 60,
        "max_steps": 3,
        "tokens_per_step": 2048,
        "min_accuracy": 0,
        "max_length_correlation": 1,
    },
    "ppo": {
        "max_records": 60,
        "max_steps": 2,
        "rollout.batch": 4,
        "rollout.max_new_tokens": 8,
        "ppo.critic_warmup": 1,
    },
    "grpo": {"max_records": 60, "max_steps": 2, "rollout.batch": 8, "rollout.max_new_tokens": 8, "grpo.group_size": 4},
    "eval": {"limit": 8},
    "quantize": {"eval_data": "${data_root}/alpaca-en/seed_tasks.jsonl"},
}


def _open(path: Path, mode: str) -> IO[Any]:
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, mode, encoding="utf-8", newline="")  # type: ignore[call-overload, no-any-return]


def first_rows(data: Path, folder: Path) -> Path:
    """Copies the beginning of each file that recipes read into `folder`, which then is a `data_root`."""
    for name in FILES:
        source, target = data / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".zip"):
            _first_members(source, target)
            continue
        with _open(source, "rt") as file, _open(target, "wt") as copy:
            if name.endswith(".csv"):
                csv.writer(copy).writerows(islice(csv.reader(file), ROWS // 2))
                continue
            start = file.read(1)
            file.seek(0)
            if start == "[":
                json.dump(json.load(file)[: 2 * ROWS], copy, ensure_ascii=False)
            else:
                copy.writelines(islice(file, ROWS))
    english, chinese = data / "pretrain-en", data / "pretrain-zh"
    books = [next((english / "gutenberg").glob("*.txt")), *english.glob("*.txt")]
    for book in [*books, next((chinese / "novels").glob("*.txt.gz"))]:
        target = folder / book.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _open(book, "rt") as file, _open(target, "wt") as copy:
            copy.write(file.read(CHARACTERS))
    poems = min((chinese / "poetry").rglob("*.json*"), key=lambda p: p.stat().st_size)
    target = folder / poems.relative_to(data)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(poems.read_bytes())
    return folder


def _first_members(source: Path, target: Path) -> None:
    """Eight files of each folder of an archive."""
    seen: Counter[str] = Counter()
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            folder = name.rpartition("/")[0]
            seen[folder] += 1
            if seen[folder] <= 8 and name.endswith(".json"):
                copy.writestr(name, archive.read(name))


def overrides(path: Path, data: Path, *changes: str) -> list[str]:
    """`--set` for a tiny run."""
    found = [f"data_root={data}", "processes=1", *changes]
    for stage in load_recipe(path).stages:
        few = FEW[stage.kind] | ({} if stage.kind in ("tokenizer", "eval", "quantize") else {"dtype": "float32"})
        if stage.kind == "pretrain" and not getattr(stage.settings, "model", ""):
            family = stage.settings.starter.family  # type: ignore[attr-defined]
            few["starter"] = SHAPE.replace("{", f"{{family: {family}, ", 1)
        found += [f"{stage.name}.{key}={value}" for key, value in few.items()]
    return [x for text in found for x in ("--set", text)]
