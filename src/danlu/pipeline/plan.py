"""A rough estimate of memory and time per stage, before anything runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from danlu.config import (
    EvalSettings,
    PpoSettings,
    PretrainSettings,
    QuantizeSettings,
    RewardSettings,
    Starter,
    TrainSettings,
    as_list,
)
from danlu.data.sources import files_of
from danlu.exceptions import DanluError
from danlu.pipeline.recipe import Recipe, Stage
from danlu.pipeline.run import TOWN

BYTES_PER_TOKEN = 3.5  # of a small vocabulary over English; Chinese is near 3
GZIP = 3.0
PACKED = (".gz", ".zip", ".parquet")
TOWN_TOKENS = {"pretrain": 465_000, "sft": 235_000, "comparisons": 1_200_000, "prompts": 60_000, "eval": 20_000}
# Share of the bare matrix rate that the plain loop reaches on this layout at small sizes (docs/log.md).
EFFICIENCY = 0.3
RUNTIME_MB = 600  # Python, torch and transformers themselves


def estimate(recipe: Recipe) -> list[dict[str, Any]]:
    """Rows `{"stage", "kind", "parameters", "tokens", "memory_mb", "seconds"}`, one per stage."""
    rate = gemm_rate()
    parameters = 0.0
    rows = []
    for stage in recipe.stages:
        settings = stage.settings
        if isinstance(settings, PretrainSettings) and not settings.model:
            parameters = starter_parameters(settings.starter, _vocab(recipe))
        elif isinstance(settings, TrainSettings) and not settings.model.startswith("stage:"):
            parameters = _folder_parameters(settings.model) or parameters
        rows.append({"stage": stage.name, "kind": stage.kind, **_row(stage, parameters, rate)})
    return rows


def gemm_rate(size: int = 768) -> float:
    """Floating-point operations per second of a bf16 or fp32 product on this machine, whichever is faster (best of three)."""
    best = 0.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(size, size, dtype=dtype, device=device)
        x @ x
        for _ in range(3):
            begun = time.perf_counter()
            float((x @ x)[0, 0])
            best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def starter_parameters(starter: Starter, vocab: int) -> float:
    """Parameters of the small Llama (head and embedding tied)."""
    width = starter.hidden_size
    mlp = -(-width * 8 // 3 // 32) * 32
    kv = width * starter.kv_heads // starter.heads
    layer = 2 * width * width + 2 * width * kv + 3 * width * mlp + 2 * width
    return float(vocab * width + starter.layers * layer + width)


def _vocab(recipe: Recipe) -> int:
    return next((int(getattr(s.settings, "vocab_size", 0)) for s in recipe.stages if s.kind == "tokenizer"), 32_000)


def _folder_parameters(model: str) -> float:
    """From the size of the weights: exact enough for 16-bit files, twice too many for 32-bit ones."""
    files = list(Path(model).glob("*.safetensors")) + list(Path(model).glob("*.bin"))
    config = Path(model) / "config.json"
    wide = config.is_file() and json.loads(config.read_text("utf-8")).get("dtype") == "float32"
    return sum(f.stat().st_size for f in files) / (4 if wide else 2)


def _tokens(data: Any) -> float:
    total = 0.0
    for source in as_list(data):
        if source.path.startswith(TOWN):
            total += source.weight * TOWN_TOKENS.get(source.path.removeprefix(TOWN), 50_000)
            continue
        try:
            files = files_of(source)
        except DanluError:
            continue  # a missing file is reported by the run itself, with its name
        size = sum(f.stat().st_size * (GZIP if f.suffix in PACKED else 1) for f in files)
        total += source.weight * size / BYTES_PER_TOKEN
    return total


def _row(stage: Stage, parameters: float, rate: float) -> dict[str, Any]:
    settings = stage.settings
    work = tokens = 0.0
    copies = 1.0
    if isinstance(settings, PpoSettings):
        iterations = settings.max_steps or 1
        episode = 40 + settings.rollout.max_new_tokens / 2
        tokens = iterations * settings.rollout.batch * episode
        # Roll-out, four readings, and policy and critic trained once per epoch.
        work = 2 * parameters * tokens * (5 + 6 * settings.ppo.epochs)
        copies = 4 + 4 + 2
    elif isinstance(settings, TrainSettings):
        tokens = _tokens(settings.data) * settings.epochs
        if isinstance(settings, RewardSettings) and settings.collect is not None:
            tokens += settings.collect.count * settings.collect.pairs * 50 * settings.epochs
        if settings.max_steps is not None:
            tokens = float(settings.max_steps * settings.tokens_per_step)  # wins over epochs: the data is repeated
        work = 6 * parameters * tokens
        copies = 4 if settings.adapter == "full" else 1.2
    elif isinstance(settings, EvalSettings | QuantizeSettings):
        tokens = 1000.0 * 40 * (len(settings.models) if isinstance(settings, EvalSettings) else 1)
        work = 2 * parameters * tokens * 10  # decoding is far from the matrix rate
    return {
        "parameters": parameters if stage.kind != "tokenizer" else 0.0,
        "tokens": tokens,
        "memory_mb": RUNTIME_MB + copies * parameters * 4 / 2**20 + _activations_mb(stage),
        "seconds": 2.0 + work / (rate * EFFICIENCY),
    }


def _activations_mb(stage: Stage) -> float:
    settings = stage.settings
    if not isinstance(settings, TrainSettings):
        return 100.0
    starter = getattr(settings, "starter", Starter())
    # About 34 numbers per token, layer and width unit (Korthikanti et al. 2022, without attention scores), in bf16.
    return settings.micro_tokens * starter.hidden_size * starter.layers * 34 * 2 / 2**20
