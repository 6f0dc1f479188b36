"""What each family can do, found out by doing it on tiny models: `make families` writes docs/families.json for the table.

python tests/family_table.py docs/families.json [FAMILY...]
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import seq2seq_models as small
import torch
from families import make
from originals import LOGITS

import danlu
from danlu.config import SftSettings
from danlu.exceptions import DanluError
from danlu.generation.protocol import SamplingParams
from danlu.models import starters
from danlu.models.convert import convert
from danlu.models.load import is_encoder_decoder, load_model, save_model
from danlu.models.registry import family_of
from danlu.trainers import mask_sft, sft

CAN = ("load", "chat", "sft", "ptuning", "serve", "convert")
NEEDS_DECODER = "needs a decoder"
NO_CAUSAL = "predicts masked tokens"
# What danlu says where a family cannot have something, and how the table puts it.
REFUSALS = {
    "encoder-decoders train all their weights": NEEDS_DECODER,
    "a UniLM predicts masked tokens": NO_CAUSAL,
    "a UniLM trains all weights": "trains all weights",
}
# Families that cannot have everything, and what they have instead.
EXPECTED = {kind: {"ptuning": NEEDS_DECODER} for kind in (*small.KINDS, "original:cpm2")} | {
    "unilm": {"chat": NO_CAUSAL, "serve": NO_CAUSAL, "ptuning": "trains all weights"}
}
IDS = {"vocab_size": small.VOCAB, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
# As users know them; the name among tests/families.py, tests/seq2seq_models.py, or of a folder of recordings.
FAMILIES: dict[str, str] = {
    "LLaMA (Alpaca, Vicuna, BELLE, Chinese-LLaMA, PMC-LLaMA, HuaTuo, ChatDoctor)": "llama",
    "OPT": "opt",
    "BLOOM, BLOOMZ": "bloom",
    "GPT-2 (Wenzhong)": "gpt2",
    "GPT-NeoX (Pythia, Dolly 2, StableLM alpha)": "gpt_neox",
    "StableLM": "stablelm",
    "CodeGen": "codegen",
    "GPT-J": "gptj",
    "Falcon": "falcon",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "GLM-4": "glm4",
    "Mistral": "mistral",
    "Gemma": "gemma",
    "Phi": "phi",
    "T5 (Flan-T5)": "t5",
    "T5 v1.1": "t5_v1_1",
    "mT5 (mT0)": "mt5",
    "BART": "bart",
    "MOSS": "original:moss",
    "CPM-1": "original:cpm1",
    "CPM-2": "original:cpm2",
    "ChatGLM-6B": "original:chatglm_v1",
    "ChatGLM2-6B": "original:chatglm2",
    "ChatGLM3-6B": "original:chatglm3",
    "GLM": "original:glm",
    "GLM-130B block": "original:glm130b",
    "UniLM": "unilm",
    "llama2.c (stories260K)": "stories260k",
}


def folder_of(kind: str, where: Path, shared: Path) -> Path | None:
    """A tiny model with a tokenizer; None where danlu does not know the family, or its recording is missing."""
    if kind in small.KINDS:
        return small.folder(where, kind)
    if kind == "unilm":
        shape = {"hidden_size": 32, "layers": 2, "heads": 4, "context": 64}
        ids = {"pad_token_id": 0, "eos_token_id": 1, "mask_token_id": 3}
        return save_model(starters.unilm(small.VOCAB, shape, ids, 0), small.tokenizer(), where)
    if kind == "stories260k":
        weights = shared / "data" / "model-stories260k" / "stories260K.bin"
        return convert(weights, where).folder if weights.is_file() else None
    if not kind.startswith("original:"):
        return save_model(make(kind, **IDS), small.tokenizer(), where)
    source = shared / "fixtures" / kind.removeprefix("original:")
    if not source.is_dir() or family_of(json.loads((source / "config.json").read_text("utf-8"))) is None:
        return None
    shutil.copytree(source, where, ignore=shutil.ignore_patterns("cases.*", "README.md"))
    for file in where.iterdir():
        file.chmod(0o644)
    if kind.startswith("original:cpm"):  # whose recordings have no tokenizer: a list of characters
        pieces = [
            "<unk>",
            "<s>",
            "</s>",
            "\u2583",
            "<sep>",
            "<pad>",
            "<mask>",
            "<eod>",
            "\u2582",
            *map(chr, range(33, 127)),
        ]
        (where / "vocab.txt").write_text("\n".join(pieces) + "\n", "utf-8")
    if kind.startswith("original:glm"):  # neither do these
        small.tokenizer().save_pretrained(where)
    return where


def attempt(work: Callable[[], Any]) -> str:
    """ "yes", or why not."""
    try:
        work()
    except DanluError as error:
        return error.message
    except Exception as error:  # whatever it is, the table says it
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "yes"


def examine(folder: Path, where: Path) -> dict[str, str]:
    """Every column for one folder."""
    short = SamplingParams(max_new_tokens=4, temperature=0)
    kind = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]

    def loads() -> None:
        load_model(folder)

    def chats() -> None:
        response, history = danlu.load(folder).chat("hello", history=[], params=short)
        assert history == [("hello", response)]

    def trains(adapter: str = "full", rate: float = 1e-3) -> None:
        turns = [{"role": "user", "content": "the door?"}, {"role": "assistant", "content": "red"}]
        data = where / "rows.jsonl"
        data.write_text((json.dumps({"messages": turns}) + "\n") * 4, "utf-8")
        settings = SftSettings(
            model=str(folder), data=str(data), eval_data=str(data), out=str(where / adapter), max_steps=3, max_length=64,
            adapter=adapter, learning_rate=rate, tokens_per_step=128, micro_tokens=128, dtype="float32",
        )  # fmt: skip
        result = (mask_sft if kind == "danlu_unilm" else sft).train(settings)
        assert result.metrics["eval_loss"] < result.metrics["first_eval_loss"]
        load_model(result.model)

    def serves() -> None:
        from fastapi.testclient import TestClient

        from danlu.data.feedback import FeedbackDatabase
        from danlu.serve.app import create_app

        app = create_app(danlu.load(folder), FeedbackDatabase(where / "votes.sqlite3", create=True), local=False)
        body = {"model": "x", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        answer = TestClient(app).post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text

    def converts() -> None:
        import transformers

        done = convert(folder, where / "plain")
        model = load_model(folder).eval()
        ids = torch.tensor([[9, 10, 11]])
        if is_encoder_decoder(model.config):
            plain: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(done.folder).eval()
            given = {"input_ids": ids, "decoder_input_ids": ids}
        else:
            auto = transformers.AutoModelForCausalLM if done.plain else None
            plain = (auto.from_pretrained(done.folder) if auto else load_model(done.folder)).eval()
            given = {"input_ids": ids}
        with torch.no_grad():
            assert float((plain(**given).logits - model(**given).logits).abs().max()) <= LOGITS

    work: dict[str, Callable[[], Any]] = {
        "load": loads,
        "chat": chats,
        "sft": trains,
        "serve": serves,
        "convert": converts,
        "ptuning": lambda: trains("ptuning", 2e-2),
    }
    found = {column: attempt(work[column]) for column in CAN}
    return {c: next((brief for says, brief in REFUSALS.items() if says in v), v) for c, v in found.items()}


def table(names: dict[str, str], shared: Path) -> dict[str, dict[str, str]]:
    """The columns of every family that can be made here."""
    found = {}
    for name, kind in names.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = folder_of(kind, Path(scratch) / "model", shared)
            if folder is not None:
                found[name] = examine(folder, Path(scratch))
                print(f"{name}: {found[name]}", file=sys.stderr)
    return found


def main(arguments: list[str]) -> None:
    """See the module."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shared = Path(os.environ.get("DANLU_SHARED", Path(__file__).parents[2] / "shared"))
    wanted = {n: k for n, k in FAMILIES.items() if len(arguments) < 2 or k in arguments[1:]}
    found = table(wanted, shared)
    file = Path(arguments[0])
    before = json.loads(file.read_text("utf-8")) if file.is_file() and len(arguments) > 1 else {}
    file.write_text(json.dumps(before | found, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
