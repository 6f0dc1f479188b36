"""Small things that whole stages can run on in a second: data, a tokenizer, a model, a recipe, and a chain run once per process."""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from danlu.cli.main import main, run
from danlu.models.load import save_model
from danlu.models.starters import starter
from danlu.synth.town.write import write_town
from danlu.text.tokenizer import train_tokenizer

torch.set_num_threads(1)  # models this small only lose by threads, and `pytest -n 2` shares two cores

SHAPE: dict[str, int] = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "context": 192}
COLOURS = ("red", "green", "blue", "black", "white", "brown")
THINGS = ("door", "lamp", "boat", "bell", "hat", "cup", "coat", "gate")


# -- data ---------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def toy(folder: Path) -> dict[str, Path]:
    """Data with one rule that can be learnt: things keep their colour, and good answers name it kindly."""
    facts = [(t, COLOURS[i % len(COLOURS)], n) for n in range(12) for i, t in enumerate(THINGS)]
    documents = [{"text": f"Note {n}: the {t} is {c}. The {t} is {c}, as ever."} for t, c, n in facts]
    asked = [(f"{n}: which colour has the {t}?", f"The {t} is {c}.") for t, c, n in facts]
    conversations = [{"messages": user(q) + assistant(a)} for q, a in asked]
    pairs = [
        # Now one, now the other side is the longer one: length must not tell them apart.
        {"prompt": user(q), "chosen": assistant(f"Gladly. {a * (1 + i % 2)}")}
        | {"rejected": assistant(f"No idea. {a * (2 - i % 2)}")}
        for i, (q, a) in enumerate(asked)
    ]
    prompts = [{"prompt": user(q), "reference": {"answers": [[a.split()[-1][:-1]]], "max_chars": 40}} for q, a in asked]
    tables = {"documents": documents, "conversations": conversations, "comparisons": pairs, "prompts": prompts}
    return {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in tables.items()}


# -- tokenizer and models ------------------------------------------------------------------------------------------------


@functools.cache
def home() -> Path:
    """A folder of this process for what tests share and must not change."""
    folder = Path(tempfile.mkdtemp(prefix="danlu-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def data() -> dict[str, Path]:
    """`toy` data that no test may change."""
    return toy(home() / "toy")


def tokenizer() -> Any:
    texts = [json.loads(line)["text"] for line in data()["documents"].read_text("utf-8").splitlines()]
    return train_tokenizer([*texts, "Gladly. No idea. which colour has"] * 4, 420, context=SHAPE["context"])


@functools.cache
def tokenizer_folder() -> Path:
    folder = home() / "tokenizer"
    tokenizer().save_pretrained(folder)
    return folder


def model_folder(folder: Path, *, seed: int = 0, with_tokenizer: bool = True, **shape: int) -> Path:
    """A chat model with fresh weights."""
    text = tokenizer()
    ids = {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = starter(len(text), **SHAPE | shape, seed=seed, ids=ids)
    return save_model(model, text if with_tokenizer else None, folder)


@functools.cache
def model() -> Path:
    """A chat model with fresh weights that no test may change."""
    return model_folder(home() / "fresh" / "model")


@functools.cache
def reward_model() -> Path:
    """A reward model with fresh weights and a head that is not zero."""
    import transformers

    text = tokenizer()
    torch.manual_seed(5)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(model(), num_labels=1)
    torch.nn.init.normal_(loaded.score.weight, std=0.5)
    loaded.config.pad_token_id = text.pad_token_id
    return save_model(loaded, text, home() / "judge" / "model")


# -- stages -------------------------------------------------------------------------------------------------------------

SMALL = {
    "dtype": "float32",
    "max_length": 64,
    "tokens_per_step": 512,
    "micro_tokens": 256,
    "log_every": 1,
    "eval_fraction": 0.1,
}


def stage(kind: str, out: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a small stage on `toy` data."""
    inputs = {"pretrain": "documents", "sft": "conversations", "reward": "comparisons", "dpo": "comparisons"}
    inputs |= {"ppo": "prompts", "grpo": "prompts"}
    values: dict[str, Any] = {"out": str(out), "data": str(data()[inputs[kind]]), **SMALL}
    if kind == "pretrain":
        values |= {"tokenizer": str(tokenizer_folder()), "starter": SHAPE}
    else:
        values |= {"model": str(model()), "learning_rate": 3e-3}
    if kind == "ppo":
        values |= {"reward_model": str(reward_model()), "rollout": {"batch": 8, "max_new_tokens": 8}}
        values |= {"ppo": {"critic_learning_rate": 1e-3}}
    if kind == "grpo":
        values |= {"reward_model": str(reward_model()), "rollout": {"batch": 8, "max_new_tokens": 8}}
        values |= {"grpo": {"group_size": 4}}
    return values | changes


def arguments(kind: str, values: Mapping[str, Any]) -> list[str]:
    """A command line that gives these settings."""
    return [kind, *_flags(values, "")]


def _flags(values: Mapping[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flags(value, f"{prefix}{name}.")
        elif value is True:
            found.append("--" + (prefix + name).replace("_", "-"))
        else:
            found += ["--" + (prefix + name).replace("_", "-"), str(value)]
    return found


def steps_of(out: Path) -> list[int]:
    """Steps in metrics.jsonl that have a training loss or a score, as they stand there."""
    rows = metrics_of(out)
    return [r["step"] for r in rows if "grad_norm" in r or "critic_grad_norm" in r]


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    path = out / "metrics.jsonl"
    text = path.read_text("utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def mostly_slow(kept: Iterable[Any], rest: Iterable[Any]) -> list[Any]:
    """Parameters of a test: those that `make test` runs, and the rest, which `make slow` adds."""
    return [*kept, *(pytest.param(*(p if isinstance(p, tuple) else (p,)), marks=pytest.mark.slow) for p in rest)]


# -- other processes -----------------------------------------------------------------------------------------------------


@functools.cache
def _server() -> Any:
    """Forks children that have danlu imported already; importing torch takes longer than a whole tiny stage."""
    context = multiprocessing.get_context("forkserver")
    trainers = [f"danlu.trainers.{name}" for name in ("pretrain", "sft", "reward_model", "dpo", "kto", "ppo", "grpo")]
    context.set_forkserver_preload(["danlu.pipeline.run", "danlu.cli.main", "danlu.models.starters", *trainers])
    return context


def _in_child(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    main(arguments)


def start(arguments: list[str], log: Path, **environment: str) -> Any:
    """`danlu ARGUMENTS` in a process of its own; what it prints goes to `log`."""
    child = _server().Process(target=_in_child, args=(arguments, str(log), environment), daemon=True)
    child.start()
    return child


def wait_for(reached: Callable[[], bool], child: Any, *, seconds: float = 280.0) -> None:
    """Waits until something holds or the child ends; the limit is for what hangs, not for a machine that is busy."""
    limit = time.monotonic() + seconds
    while not reached() and child.is_alive():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.001)


# -- a whole chain ------------------------------------------------------------------------------------------------------

STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo", "eval", "quantize")


def recipe(folder: Path, name: str = "tiny", **changes: Mapping[str, Any]) -> Path:
    """A recipe of all seven stages on a small town; `changes` are settings by stage."""
    if not (folder / "town" / "eval.jsonl").is_file():
        write_town(folder / "town", 0, scale=0.02)
    common = {"dtype": "float32", "max_length": 192, "tokens_per_step": 512, "micro_tokens": 512, "log_every": 1}
    town = "${data_root}"
    stages: dict[str, dict[str, Any]] = {
        "tokenizer": {"data": [f"{town}/pretrain.jsonl", f"{town}/sft.jsonl"], "vocab_size": 400},
        "pretrain": {"data": f"{town}/pretrain.jsonl", "eval_data": f"{town}/pretrain_heldout.jsonl"}
        | {"starter": dict(SHAPE), "max_steps": 4, **common},
        "sft": {"data": f"{town}/sft.jsonl", "eval_data": f"{town}/sft_heldout.jsonl", "max_steps": 20, **common}
        | {"learning_rate": 3e-3},
        "reward": {"data": f"{town}/comparisons.jsonl", "eval_data": f"{town}/comparisons_heldout.jsonl"}
        | {"max_steps": 3, "min_accuracy": 0.0, "max_length_correlation": 1.0, **common}
        | {
            "collect": {"prompts": f"{town}/prompts.jsonl", "count": 12, "samples": 3, "pairs": 1, "max_new_tokens": 40}
        },
        "ppo": {"data": f"{town}/prompts.jsonl", "max_steps": 2, **common}
        | {"learning_rate": 1e-3, "rollout": {"batch": 8, "max_new_tokens": 8}},
        "eval": {"data": f"{town}/eval.jsonl", "limit": 6, "max_new_tokens": 8},
        "quantize": {"eval_data": f"{town}/sft_heldout.jsonl", "questions": f"{town}/eval.jsonl"}
        | {"max_new_tokens": 8, "max_length": 192},
    }
    listed = [{"kind": kind, **values, **changes.get(kind, {})} for kind, values in stages.items()]
    path = folder / f"{name}.yaml"
    content = {"description": "tiny", "seed": 0, "data_root": str(folder / "town"), "stages": listed}
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path


@dataclass(frozen=True)
class Chain:
    """A finished run of the tiny recipe, made in two commands.

    first: stage folders after `--until sft`.
    """

    recipe: Path
    runs: Path
    first: list[str]

    @property
    def run(self) -> Path:
        return self.runs / "tiny"

    def model(self, stage: str) -> Path:
        return self.run / f"{STAGES.index(stage) + 1:02d}-{stage}" / "model"


@functools.cache
def chain() -> Chain:
    """The tiny recipe, run once per process; copy the run folder before changing it."""
    folder = home() / "chain"
    folder.mkdir()
    path = recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANLU_RUNS", str(folder / "runs"))
        assert run(["run", str(path), "--until", "sft"]) == 0
        first = sorted(p.name for p in (folder / "runs" / "tiny").glob("[0-9]*"))
        assert run(["run", str(path)]) == 0
    return Chain(path, folder / "runs", first)
