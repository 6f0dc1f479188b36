"""How much faster packed weights answer and read than bfloat16 on this CPU, and what loading them takes; sides take turns.

Random models of Llama's shape: speed does not depend on what the weights say. Peak memory is that of a process of its own, over
what it takes to import.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, int]] = {
    "60M": {"hidden_size": 512, "intermediate_size": 1536, "layers": 12, "heads": 8, "kv_heads": 8, "vocab": 16_000},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "vocab": 151_936},
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 2, "kv_heads": 2, "vocab": 500}
MARK = "## Small"
PEAK = """
import json, sys
import torch
from danlu.training.peak import peak_memory_mb, reset_peak_memory
from danlu.models.quantize import load_in_bits
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM
reset_peak_memory()  # else the parent's peak would be inherited
base = peak_memory_mb()
folder, bits = sys.argv[1], int(sys.argv[2])
model = load_in_bits(folder, bits, dtype=torch.bfloat16, tables=True)  # as `danlu.load` does
peak = peak_memory_mb()
tensors = list(model.parameters()) + list(model.buffers())
held = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
print(json.dumps({"peak": int((peak - base) * 2**20), "held": held}))
"""


def make(shape: dict[str, int], folder: Path) -> Path:
    """A folder of bfloat16 weights, drawn layer by layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.05, 0.05)
    model.save_pretrained(folder)
    return folder


def sides(folder: Path) -> dict[str, Any]:
    """An engine for each kind of weights."""
    import danlu

    given = {"bf16": 16, "int8": 8, "int4": 4}
    return {n: danlu.load(folder, dtype="bfloat16", bits=b, device="cpu").engine for n, b in given.items()}


def _ask(engine: Any, prompt: int, answer: int) -> float:
    from danlu.generation.protocol import Request, SamplingParams, generate

    ids = [3 + i % 400 for i in range(prompt)]
    ids[0] = 3 + int(time.perf_counter() * 1e6) % 400  # another prompt each time: nothing is recalled
    begun = time.process_time()
    generate(engine, [Request(ids, SamplingParams(max_new_tokens=answer, temperature=0.0))])
    return time.process_time() - begun


def turns(engines: dict[str, Any], work: Callable[[Any], float], count: int) -> dict[str, list[float]]:
    """CPU seconds of each side, side after side: other work on the machine then slows all of them alike."""
    found: dict[str, list[float]] = {n: [] for n in engines}
    for engine in engines.values():
        work(engine)
    for _ in range(count):
        for name, engine in engines.items():
            found[name].append(work(engine))
    return found


def peak(folder: Path, bits: int) -> dict[str, int]:
    """Bytes that loading takes at its peak, and that stay."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(bits)], check=True, capture_output=True, text=True
    )
    result: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(*, quick: bool, only: list[str], docs: Path | None) -> list[dict[str, Any]]:
    """One row a size and kind of weights."""
    shapes = {"tiny": TINY} if quick else {n: s for n, s in SHAPES.items() if not only or n in only}
    prompt, answer, count = (64, 8, 1) if quick else (1024, 16, 3)
    rows: list[dict[str, Any]] = []
    for size, shape in shapes.items():
        with tempfile.TemporaryDirectory() as place:
            folder = make(shape, Path(place) / "model")
            gc.collect()
            loaded = {bits: peak(folder, bits) for bits in (8, 4)}
            engines = sides(folder)
            # The first token is part of reading the prompt; the others are single rows.
            decode = turns(engines, lambda e: (_ask(e, 8, answer + 1) - _ask(e, 8, 1)) / answer, count)
            read = turns(engines, lambda e: _ask(e, prompt, 1), count)
            for name in engines:
                row: dict[str, Any] = {"size": size, "weights": name}
                for key, found in (("decode", decode), ("prefill", read)):
                    ratios = [b / own for b, own in zip(found["bf16"], found[name], strict=True)]
                    row[key] = statistics.median(found[name])
                    row[f"{key}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
                row |= loaded.get({"int8": 8, "int4": 4}.get(name, 16), {})
                rows.append(row)
                print(json.dumps(row), flush=True)
    if docs is not None:
        _write(rows, prompt, docs)
    return rows


def _write(rows: list[dict[str, Any]], prompt: int, docs: Path) -> None:
    threads, date = torch.get_num_threads(), time.strftime("%Y-%m-%d")
    lines = [
        f"{MARK}\n\n{date}, `python -m benchmarks small`, {threads} thread, torch {torch.__version__}. CPU seconds, since other",
        "work was running: median of three turns; ratio to bfloat16 (lowest to highest), above 1 is faster. The prompt has",
        f"{prompt:,} tokens; peak of loading is over what importing takes.",
        "",
        "| size | weights | ms a token, one answer | ratio | s to read the prompt | ratio | peak of loading / what stays |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, second = (
            f"{row[k][0]:.2f} ({row[k][1]:.2f} to {row[k][2]:.2f})" for k in ("decode_ratio", "prefill_ratio")
        )
        memory = f"{row['peak'] / 1e6:,.0f} / {row['held'] / 1e6:,.0f} MB" if "peak" in row else ""
        decode, read = f"{row['decode'] * 1e3:.1f}", f"{row['prefill']:.2f}"
        lines.append(f"| {row['size']} | {row['weights']} | {decode} | {first} | {read} | {second} | {memory} |")
    text = docs.read_text("utf-8")
    text = re.sub(rf"\n{MARK}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL).rstrip("\n")
    docs.write_text(f"{text}\n\n" + "\n".join(lines) + "\n", "utf-8")
