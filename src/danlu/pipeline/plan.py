"""A rough estimate of memory and time per stage, before anything runs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from danlu.alignment_config import (
    REFERENCE_FREE,
    DpoSettings,
    GrpoSettings,
    PpoSettings,
    RewardSettings,
    RolloutSettings,
)
from danlu.config import PRESETS, EvalSettings, PretrainSettings, QuantizeSettings, Starter
from danlu.data.sources import files_of
from danlu.exceptions import DanluError
from danlu.models.adapter_files import read_info
from danlu.models.places import adapter_place, base_of, is_adapter
from danlu.pipeline.footprint import (
    STRATEGIES,
    Shape,
    Strategy,
    inference_memory,
    learnt_parameters,
    own_strategy,
    shape_of_folder,
    shape_of_starter,
    stage_memory,
    tuning_by_adapter,
)
from danlu.pipeline.recipe import Recipe, Stage
from danlu.pipeline.run import TOWN
from danlu.train_config import StageSettings, TrainSettings, as_list, as_models

BYTES_PER_TOKEN = 3.5  # of a small vocabulary over English; Chinese is near 3
GZIP = 3.0
PACKED = (".gz", ".zip", ".parquet")
TOWN_TOKENS = {"pretrain": 465_000, "sft": 235_000, "comparisons": 1_200_000, "prompts": 60_000, "eval": 20_000}
# Share of the bare matrix rate that the plain loop reaches on this layout at small sizes (docs/log.md).
EFFICIENCY = 0.3
RUNTIME_MB = 370  # Python, torch and transformers themselves (CPU build)
BITS = (16, 8, 4)
MANY = 8  # processes, where the settings name none


def estimate(recipe: Recipe) -> list[dict[str, Any]]:
    """One row per stage: `{"stage", "kind", "parameters", "trained_parameters", "tokens", "tokens_per_parameter", "flops",
    "memory_mb", "seconds", "fits", "parts", "strategies"}`.

    `memory_mb` is the peak of a process with the stage's own settings, `parts` what it is made of; `strategies` has memory, FLOPs
    and time of a process, and `fits`, of each. Training stages also have `inference_mb` (a cache of 2,048 tokens) by the bits of
    the weights, and `tuning_mb` by the kind of adapter and the bits of its base. ZeRO is that of as many processes as the
    settings say, or of `MANY`.
    """
    rate = gemm_rate()
    room = memory_here()
    shape: Shape | None = None
    rows = []
    for stage in recipe.stages:
        settings = stage.settings
        if isinstance(settings, PretrainSettings) and not settings.model:
            shape = shape_of_starter(_starter(settings), _vocab(recipe))
        elif isinstance(settings, TrainSettings) and not settings.model.startswith("stage:"):
            shape = shape_of_folder(settings.model) or shape
        rows.append(
            {"stage": stage.name, "kind": stage.kind, **_row(stage, shape, rate, room, _beside(recipe, stage.settings))}
        )
    return rows


def _starter(settings: PretrainSettings) -> Starter:
    """The shape that is trained from nothing; an OPT layer has as many parameters as a Llama layer of its width."""
    if not settings.preset:
        return settings.starter
    size = PRESETS[settings.preset]
    shape = {name: size[name] for name in ("hidden_size", "layers", "heads", "context")}
    return Starter(**shape, kv_heads=size["heads"])


def memory_here() -> float:
    """Megabytes that a process can have: of the GPU, or of this machine's memory what is free now."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 2**20
    found = Path("/proc/meminfo")
    if found.is_file():
        line = next(x for x in found.read_text().splitlines() if x.startswith("MemAvailable"))
        return int(line.split()[1]) / 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


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


def _vocab(recipe: Recipe) -> int:
    return next((int(getattr(s.settings, "vocab_size", 0)) for s in recipe.stages if s.kind == "tokenizer"), 32_000)


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


def _row(stage: Stage, shape: Shape | None, rate: float, room: float, beside: int) -> dict[str, Any]:
    settings = stage.settings
    parameters = float(shape.parameters) if shape is not None and stage.kind != "tokenizer" else 0.0
    tokens = _stage_tokens(settings)
    work = 2 * parameters * tokens * _passes(settings)
    trains = isinstance(settings, TrainSettings) and shape is not None
    trained = float(learnt_parameters(shape, settings)) if trains else 0.0  # type: ignore[arg-type]
    row: dict[str, Any] = {
        "parameters": parameters,
        "trained_parameters": trained,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters if parameters else 0.0,
        "flops": work,
    }
    if not isinstance(settings, TrainSettings) or shape is None:
        memory = RUNTIME_MB + 100.0 + 4 * parameters / 2**20
        return row | {
            "inference_mb": {},
            "tuning_mb": {},
            "memory_mb": memory,
            "seconds": 2.0 + work / (rate * EFFICIENCY),
            "fits": memory <= room,
            "parts": {},
            "strategies": [],
        }
    several = settings.processes if isinstance(settings.processes, int) else 1
    own = own_strategy(settings)
    if own == "full" and several > 1:
        shared: dict[str, Strategy] = {"zero2": "zero2", "fsdp2": "zero3"}
        own = shared.get(settings.strategy, own)
    shown = list(dict.fromkeys([*STRATEGIES, own]))
    found = {
        s: _with(s, shape, settings, work, rate, room, several if several > 1 else MANY, beside=beside) for s in shown
    }
    chosen = found[own]
    length = max(16, settings.max_length // 2)
    dtype = "float32" if settings.dtype == "float32" else "bfloat16"
    return row | {
        "inference_mb": {str(b): RUNTIME_MB + sum(inference_memory(shape, b).values()) for b in BITS},
        "tuning_mb": {
            kind: {str(bits): RUNTIME_MB + sum(parts.values()) for bits, parts in by_bits.items()}
            for kind, by_bits in tuning_by_adapter(shape, settings, dtype=dtype, length=length).items()
        },
        "memory_mb": chosen["memory_mb"],
        "seconds": chosen["seconds"],
        "fits": chosen["fits"],
        "parts": chosen["parts"],
        "strategies": [
            {"strategy": s, **{k: v for k, v in f.items() if k != "parts"}} for s, f in found.items() if s in STRATEGIES
        ],
    }


def _with(
    strategy: Strategy,
    shape: Shape,
    settings: TrainSettings,
    work: float,
    rate: float,
    room: float,
    processes: int,
    *,
    beside: int,
) -> dict[str, Any]:
    dtype = "float32" if settings.dtype == "float32" else "bfloat16"
    length = max(16, settings.max_length // 2)
    parts = stage_memory(shape, settings, strategy, dtype=dtype, length=length, processes=processes, beside=beside)
    memory = RUNTIME_MB + sum(parts.values())
    if strategy in ("lora", "qlora", "prefix"):
        work *= 2 / 3  # frozen weights take no gradient
    if settings.activation_checkpointing:
        work *= 4 / 3  # a second forward pass
    if strategy.startswith("zero"):
        work /= processes
    return {
        "memory_mb": memory,
        "flops": work,
        "seconds": 2.0 + work / (rate * EFFICIENCY),
        "fits": memory <= room,
        "parts": parts,
    }


def _beside(recipe: Recipe, settings: StageSettings) -> int:
    """Reward models of a stage that are adapters of the base which its policy starts from."""
    if not isinstance(settings, RolloutSettings):
        return 0
    stages = {f"stage:{stage.name}": stage.settings for stage in recipe.stages}
    found = 0
    for name in as_models(settings.reward_model):
        made = stages.get(name)
        if isinstance(made, RewardSettings):
            found += made.adapted and made.frozen_bits == 16 and made.model == settings.model
        elif is_adapter(place := adapter_place(name)):
            found += read_info(place).base_bits == 16 and Path(base_of(place)) == Path(settings.model).resolve()
    return found


def _stage_tokens(settings: StageSettings) -> float:
    if isinstance(settings, PpoSettings | GrpoSettings):
        episode = 40 + settings.rollout.max_new_tokens / 2
        return (settings.max_steps or 1) * settings.rollout.batch * episode
    if isinstance(settings, TrainSettings):
        if settings.max_steps is not None:
            return float(settings.max_steps * settings.tokens_per_step)  # wins over epochs: the data is repeated
        tokens = _tokens(settings.data)
        if settings.max_records is not None:  # of half the greatest length, as memory is counted for
            tokens = min(tokens, settings.max_records * settings.max_length / 2)
        tokens *= settings.epochs
        if isinstance(settings, RewardSettings) and settings.collect is not None:
            tokens += settings.collect.count * settings.collect.pairs * 50 * settings.epochs
        return tokens
    if isinstance(settings, EvalSettings | QuantizeSettings):
        return 1000.0 * 40 * (len(settings.models) if isinstance(settings, EvalSettings) else 1)
    return 0.0


def _passes(settings: StageSettings) -> float:
    """Forward passes that a token's work equals; training is three (Kaplan et al. 2020: 6 N D in all)."""
    if isinstance(settings, PpoSettings):
        judges = len(as_models(settings.reward_model))
        return 4 + judges + 6 * settings.ppo.epochs  # roll-out, readings, policy and critic trained once per epoch
    if isinstance(settings, GrpoSettings) and settings.method == "raft":
        # Roll-outs and their judges; of each group a few answers are trained on.
        share = settings.raft.keep / settings.grpo.group_size if settings.raft.train else 0.0
        return 1 + len(as_models(settings.reward_model)) + 3 * settings.grpo.epochs * share
    if isinstance(settings, GrpoSettings):
        judges = len(as_models(settings.reward_model))
        return 3 + judges + 3 * settings.grpo.epochs  # roll-out, two readings and the judges', the policy
    if isinstance(settings, DpoSettings):
        # The reference is read, too; for kto both of them once more on other answers.
        return 3 if settings.loss in REFERENCE_FREE else 6 if settings.loss == "kto" else 4
    if isinstance(settings, TrainSettings):
        return 3
    return 10  # decoding is far from the matrix rate
