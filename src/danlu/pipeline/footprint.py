"""What training holds in memory, counted: a small copy of the model makes one forward pass, and what autograd keeps is added up.

Activations grow in proportion to tokens and layers, so one and two layers of the model's family at two sizes tell what a token
keeps in a layer, whatever attention, dtype and adapters do. A wide model is narrowed for that, and the count scaled back.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from danlu.alignment_config import DpoSettings, GrpoSettings, PpoSettings, RewardSettings, RolloutSettings
from danlu.config import Starter
from danlu.exceptions import ModelError
from danlu.generation.kv_cache import arena_length
from danlu.losses.logprobs import CHUNK_ENTRIES, CHUNK_ENTRIES_CUDA
from danlu.models import cpm, moss
from danlu.models.adapters import ia3_targets, targets_of
from danlu.models.packed_tables import Tables
from danlu.models.prepacked import MOST_BYTES
from danlu.models.registry import family_of
from danlu.models.roles import AdapterRoles, SeparateModels
from danlu.models.root import RootModel
from danlu.models.starters import starter_config
from danlu.shapes import power_of_two, rounded
from danlu.train_config import QUANTISED_BASES, AdapterKind, TrainSettings, as_models
from danlu.training import fisher
from danlu.training.compute import Compute
from danlu.training.step import language_loss
from danlu.tree import TreeBatch, conversation, forest

MB = 2.0**20
Strategy = Literal["full", "freeze", "lora", "qlora", "prefix", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[Strategy, ...] = ("full", "lora", "qlora", "prefix", "zero1", "zero2", "zero3")
# Kinds of adapters that take different memory: rslora takes what lora does, qlora what lora does on few bits.
PLANNED: tuple[AdapterKind, ...] = ("full", "freeze", "lora", "dora", "adalora", "ia3", "ptuning", "prompt")
# Peak over what is kept: the backward pass's own arrays, and what an allocator cannot hand out again (measured, docs/log.md).
OVERHEAD = {"float32": 1.1, "bfloat16": 1.3}
OVERHEAD_LORA = {"float32": 1.1, "bfloat16": 1.5}  # two more products a layer, whose arrays come between what is kept
OVERHEAD_CUDA = 1.1
BUFFERS_MB = 75.0  # of the libraries, from their first use on
COMPILED_MB = 30.0  # products that a CPU compiles for their shapes (`danlu/shapes.py`)
LANES = 64  # of the engine, where nobody asks for another number
MOST_CACHE, MOST_CACHE_CUDA = 4 * 2**30, 32 * 2**30  # bytes (`generation/engine.py`)
REFERENCE = {32: 1.0, 8: 0.5}  # of a frozen model in 16 bits, by `ref_bits`
PREFIX = 128  # virtual tokens of P-Tuning v2
WIDEST = 512  # of a probe
VOCABULARY = 64
ROWS = (2, 6)  # of the two sizes


@dataclass(frozen=True)
class Shape:
    """What a model's memory and time follow from.

    config: transformers'; parameters: of the causal language model, shared ones once; head: in the head, also where it is
    the embedding.
    """

    config: Any
    parameters: int
    head: int

    @functools.cached_property
    def model(self) -> Any:
        """The causal language model itself, without weights."""
        import transformers

        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(self.config)

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab(self) -> int:
        return int(self.config.vocab_size)

    @property
    def products(self) -> int:
        """Parameters that take part in matrix products: the layers' and the head's."""
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        return self.parameters - (0 if tied else self.head)

    @property
    def tables(self) -> int:
        """Parameters of embedding and head, once where they are the same."""
        return self.head * (1 if getattr(self.config, "tie_word_embeddings", False) else 2)

    @functools.cached_property
    def experts(self) -> int:
        """Parameters of the experts of a mixture, which quantising leaves as they are."""
        return sum(p.numel() for p in self.model.parameters() if p.dim() > 2)

    @property
    def key_values(self) -> int:
        """Numbers that a token keeps in the cache of a roll-out."""
        heads = int(self.config.num_attention_heads)
        # ChatGLM's later generations say it in a name of their own.
        names = ("num_key_value_heads", "key_value_heads")
        groups = next((int(found) for n in names if (found := getattr(self.config, n, None))), heads)
        head = int(getattr(self.config, "head_dim", None) or self.width // heads)
        return 2 * self.layers * groups * head


def shape_of_starter(settings: Starter, vocab: int) -> Shape:
    """Of the small Llama that `pretrain` makes when no model is given."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return _shape(starter_config(vocab, **settings.model_dump(), ids=ids))


def shape_of_folder(model: str) -> Shape | None:
    """Of a model folder, by its config.json; None for a hub id, and for a family that is no causal model."""
    import transformers

    if not model or not (Path(model) / "config.json").is_file():
        return None
    raw = json.loads((Path(model) / "config.json").read_text("utf-8"))
    family_of(raw)  # registers danlu's own
    if moss.says(raw):
        return _shape(moss.codegen_config(raw))
    if cpm.says(raw):
        return _shape(cpm.gpt2_config(raw))
    try:
        return _shape(transformers.AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False))
    except (ValueError, KeyError, AttributeError):
        return None


def _shape(config: Any) -> Shape:
    import transformers

    if getattr(config, "quantization_bit", None):  # ChatGLM's: packed weights are no parameters
        config = copy.deepcopy(config)
        config.quantization_bit = 0
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight
    return Shape(config, sum(p.numel() for p in model.parameters()), head.numel())


# -- activations ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Bytes that one token keeps for the backward pass: in each layer, and outside of the layers."""

    layer: float
    rest: float


def kept(shape: Shape, *, length: int, dtype: str, rank: int | None = None) -> Kept:
    """Counts what autograd keeps, in items of `length` tokens.

    Args:
        dtype: of matrix products: "float32" or "bfloat16".
        rank: of LoRA adapters; None: all weights learn.
    """
    return _kept(_Probe(shape.config), length, dtype, rank)


class _Probe:
    """A small copy of a configuration that is equal to others like it, so that it is counted once.

    scale: how many times narrower it is.
    """

    def __init__(self, config: Any) -> None:
        self.config = copy.deepcopy(config)
        self.scale = 1
        while config.hidden_size // self.scale > WIDEST and config.num_attention_heads % (2 * self.scale) == 0:
            self.scale *= 2
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
            value = getattr(self.config, name, None)
            if isinstance(value, int):
                setattr(self.config, name, max(1, value // self.scale))
        if hasattr(config, "head_dim"):
            self.config.head_dim = head
        self.config.vocab_size = VOCABULARY
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self.config, name, 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Probe) and self.config.to_dict() == other.config.to_dict()

    def __hash__(self) -> int:
        return hash((self.config.model_type, self.config.hidden_size, self.config.num_attention_heads))

    def root(self, layers: int, rank: int | None) -> RootModel:
        import transformers

        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        model = transformers.AutoModelForCausalLM.from_config(config)
        roles: nn.Module
        if rank is None:
            roles = SeparateModels({"policy": model}, ["policy"])
        else:
            roles = AdapterRoles(model, ["policy"], rank=rank)
        return RootModel(roles).train()


@functools.lru_cache(maxsize=32)
def _kept(probe: _Probe, length: int, dtype: str, rank: int | None) -> Kept:
    compute = Compute("cpu", "bfloat16" if dtype == "bfloat16" else "float32", torch.get_num_threads())
    sizes: list[list[int]] = []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layers in (1, 2):
            root = probe.root(layers, rank)
            sizes.append([_bytes(root, rows, length, compute) for rows in ROWS])
    tokens = (ROWS[1] - ROWS[0]) * length
    one, two = ((large - small) / tokens * probe.scale for small, large in sizes)
    return Kept(two - one, max(0.0, 2 * one - two))


def _bytes(root: RootModel, rows: int, length: int, compute: Compute) -> int:
    items = [conversation([3] * length, [0.0] + [1.0] * (length - 1)) for _ in range(rows)]
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), compute.autocast():
        loss, _ = root(
            TreeBatch.of(forest(items)), "policy", lambda out: language_loss(out, 1.0), reads=TreeBatch.before_loss
        )
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for t in found.values())


# -- a stage --------------------------------------------------------------------------------------------------------------


# Bytes of a packed weight: its code, and of groups of 64 the zero (1) and what the kernel wants of zero and scale (4).
WEIGHT_BYTES = {16: 2.0, 8: 1.0, 4: 0.5 + 5 / 64}
TABLE_BYTES = {16: 2.0, 8: 1.0, 4: 1.0}  # of embedding and head where `models/packed_tables.py` packs them


def inference_memory(shape: Shape, bits: int, *, positions: int = 2048) -> dict[str, float]:
    """Megabytes of a model that answers in bfloat16: weights in 16, 8 or 4 bits (embedding and head not below 8), and its cache.

    Args:
        positions: tokens that the cache holds.
    """
    layers = shape.parameters - shape.tables - shape.experts
    tables = TABLE_BYTES[bits] if Tables(shape.model).embedding else 2.0
    weights = layers * WEIGHT_BYTES[bits] + shape.tables * tables + 2.0 * shape.experts
    return {"weights": weights / MB, "cache": 2.0 * positions * shape.key_values / MB, "buffers": BUFFERS_MB}


def tuning_memory(
    shape: Shape, settings: TrainSettings, bits: int, *, dtype: str, length: int, adapter: AdapterKind = "lora"
) -> dict[str, float]:
    """Megabytes of training with a kind of adapter on a base of 16 (as it is), 8 or 4 bits; see `stage_memory`."""
    own = settings.model_copy(update={"adapter": adapter, "base_bits": bits, "base_format": "rounded"})
    return stage_memory(shape, own, own_strategy(own), dtype=dtype, length=length, processes=1)


def tuning_by_adapter(
    shape: Shape, settings: TrainSettings, *, dtype: str, length: int
) -> dict[str, dict[int, dict[str, float]]]:
    """`tuning_memory` of every kind of adapter by the bits that its base can have.

    rslora takes what lora does, and qlora what lora does on 8 or 4 bits. Kinds that do not fit the family are left out.
    """
    found: dict[str, dict[int, dict[str, float]]] = {}
    for kind in PLANNED:
        bits = (16, 8, 4) if kind in QUANTISED_BASES else (16,)
        try:
            found[kind] = {b: tuning_memory(shape, settings, b, dtype=dtype, length=length, adapter=kind) for b in bits}
        except ModelError:  # which layers (IA)^3 scales is not known, or there are none of the target's name
            continue
    return found


def _sides(shape: Shape, target: str | Sequence[str] = "auto") -> dict[str, tuple[int, int]]:
    """What goes into each of the target's linear layers (auto: all of the trunk), and what comes out, by name."""
    names = targets_of(shape.model, target)
    found: dict[str, tuple[int, int]] = {}
    for name, module in shape.model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and any(name == t or name.endswith(f".{t}") for t in names):
            first, second = module.weight.shape
            found[name] = (first, second) if isinstance(module, Conv1D) else (second, first)
    return found


def _natural_states(shape: Shape) -> float:
    """Bytes of `optimizer: natural`: a mean of gradients, and of each side of a layer a moment with its eigenvectors."""
    mean = sum(into * out for into, out in _sides(shape).values())
    return 4.0 * mean + sum(
        8.0 * (n if n > fisher.WIDEST else n * n) for sides in _sides(shape).values() for n in sides
    )


def adapter_parameters(shape: Shape, rank: int, target: str | Sequence[str] = "auto") -> int:
    """Of LoRA on the target's linear layers (auto: all of the trunk): rank times what goes in and what comes out.

    Raises:
        ModelError: the model has no such layers.
    """
    return rank * sum(sum(sides) for sides in _sides(shape, target).values())


def learnt_parameters(shape: Shape, settings: TrainSettings) -> int:
    """Numbers that learn in the settings' kind of adapter, or in the last layers (`freeze`); of other settings those of LoRA.

    DoRA has a length for every output beside LoRA's; AdaLoRA begins with `initial_r` and has a singular value for each rank; (IA)^3
    has a factor for each key, value and inner feature; a prefix has keys and values for each of its tokens, or their embeddings.
    """
    options, target = settings.prefix, settings.lora.target
    match settings.adapter:
        case "full":
            return shape.parameters
        case "freeze":
            lists = [list(m) for m in shape.model.base_model.modules() if isinstance(m, nn.ModuleList)]
            layers = max(lists, key=len)[-settings.freeze.layers :]
            found = sum(p.numel() for layer in layers for p in layer.parameters())
            return found + (shape.head if settings.freeze.head else 0)
        case "dora":
            outs = sum(out for _, out in _sides(shape, target).values())
            return adapter_parameters(shape, settings.lora.r, target) + outs
        case "adalora":
            rank = settings.adalora.initial_r
            return adapter_parameters(shape, rank, target) + rank * len(_sides(shape, target))
        case "ia3":
            keys, inner = ia3_targets(shape.model, target)
            fed = sum(into for into, _ in _sides(shape, inner).values()) if inner else 0
            return fed + (sum(out for _, out in _sides(shape, keys).values()) if keys else 0)
        case "ptuning" | "prompt":
            numbers = shape.key_values if settings.adapter == "ptuning" else shape.width
            if not options.projection:
                return options.tokens * numbers
            middle = options.hidden or shape.width
            return (options.tokens + middle) * shape.width + middle + (middle + 1) * numbers
        case _:
            return adapter_parameters(shape, settings.lora.r, target)


def own_strategy(settings: TrainSettings) -> Strategy:
    """The strategy that a stage's own adapter is."""
    if settings.adapter in ("full", "freeze"):
        return "full" if settings.adapter == "full" else "freeze"
    if settings.adapter in ("ptuning", "prompt"):
        return "prefix"
    return "qlora" if settings.frozen_bits != 16 else "lora"


def stage_memory(
    shape: Shape,
    settings: TrainSettings,
    strategy: Strategy,
    *,
    dtype: str,
    length: int,
    processes: int,
    beside: int = 0,
) -> dict[str, float]:
    """Megabytes of a training stage at its peak, by part, in each process.

    Args:
        beside: reward models that are adapters of the policy's base, and with LoRA stand on its weights.
        dtype: of matrix products.
        length: mean tokens of an item.
        processes: that ZeRO divides over.
    """
    small, cuda = strategy in ("lora", "qlora", "prefix"), torch.cuda.is_available()
    compiled = not cuda and dtype != "float32"
    learnt = {
        "lora": lambda: adapter_parameters(shape, settings.lora.r, settings.lora.target),
        "qlora": lambda: adapter_parameters(shape, settings.lora.r, settings.lora.target),
        "prefix": lambda: PREFIX * shape.key_values,
    }.get(strategy, lambda: shape.parameters)()
    if strategy == own_strategy(settings):
        learnt = learnt_parameters(shape, settings)
    exact, frozen, learners = _models(settings, small=small)
    frozen -= beside if strategy in ("lora", "prefix") and settings.frozen_bits == 16 else 0
    share = {"zero1": (1, 1), "zero2": (1, processes), "zero3": (processes, processes)}.get(strategy, (1, 1))
    packed = 1.02 if settings.frozen_bits == 8 else 0.55  # bytes a number takes with its scale
    quantised = strategy == "qlora" or (strategy == own_strategy(settings) == "prefix" and settings.frozen_bits != 16)
    rested = 2.0 if dtype == "bfloat16" and settings.adapter != "dora" else 4.0  # see `models/resting.py`
    table = shape.head * (4.0 - rested) if shape.config.dtype != torch.bfloat16 else 0.0  # looked up, so not rounded
    whole = shape.tables + shape.experts if quantised else shape.parameters
    base = table + (shape.parameters - whole) * packed + whole * rested
    copies = 2.0 * shape.products if dtype == "bfloat16" and exact else 0.0
    if small:
        # The base; what answers beside packed weights shares them (before a prefix it has a copy); judges are whole models.
        rolls = quantised and isinstance(settings, RolloutSettings)
        copied = base - table if rolls and strategy == "prefix" else 0.0
        weights = base + copied + (frozen - 1 - rolls) * shape.parameters * rested
    else:
        weights = (exact * 4.0 + frozen * rested) * shape.parameters / share[0] + copies
    if isinstance(settings, RolloutSettings):
        weights += table * len(as_models(settings.reward_model))
    gradients = 4.0 * learnt / share[1]
    if isinstance(settings, PpoSettings):
        weights += 4.0 * learnt if settings.ema is not None else 0.0
        gradients *= 2 if settings.ptx is not None else 1  # the policy's stand aside while those of PTX are made
    states = {"adamw": 8.0, "adamw8bit": 2.03, "adamw_offload": 0.0 if torch.cuda.is_available() else 8.0}
    states["natural"] = states["adamw"]  # of the strategies that it does not have
    if settings.optimizer == "natural" and strategy == "full":
        averages = _natural_states(shape) + (learners - 1) * states["adamw"] * learnt
    else:
        averages = learners * states[settings.optimizer] * learnt / (processes if strategy.startswith("zero") else 1)
    step = _step_tokens(settings, length)
    tokens = min(settings.micro_tokens, step)
    more = min(settings.micro_tokens, step - tokens)  # of the step's next micro-batch, which gradients stand beside
    if compiled:
        tokens = rounded(tokens)
    # A card's attention keeps no scores: as if texts were short.
    rank = settings.lora.r if strategy in ("lora", "qlora") else None  # before a prefix layers run as they are
    count = kept(shape, length=min(length, 16) if cuda else length, dtype=dtype, rank=rank)
    layers = count.layer * shape.layers
    if settings.activation_checkpointing:
        layers = 4.0 * shape.width * shape.layers + count.layer
    if isinstance(settings, PpoSettings) and settings.ppo.keep_graphs and strategy not in ("zero2", "zero3"):
        answers = settings.rollout.batch / settings.ppo.minibatches / processes
        tokens = max(tokens, round(2 * answers * (length + settings.rollout.max_new_tokens)))  # of policy and critic
    overhead = OVERHEAD_CUDA if cuda else OVERHEAD_LORA[dtype] if rank is not None else OVERHEAD[dtype]
    token = overhead * (layers + count.rest)
    activations = token * tokens
    # In a backward pass gradients take the place of activations: what comes on top is the embedding's, the last and in one piece,
    # or those of an earlier micro-batch.
    last = 0.0 if small else 4.0 * shape.head / share[1]
    gradients = max(min(gradients, last), gradients + token * more - activations)
    logits = 0.0
    if not isinstance(settings, RewardSettings):
        number = 2 if dtype == "bfloat16" else 4
        entries = CHUNK_ENTRIES_CUDA if cuda else CHUNK_ENTRIES
        logits = number * min(entries, tokens * shape.vocab) + (0.0 if small else 4.0 * shape.head)
    cache = 0.0
    if isinstance(settings, PpoSettings | GrpoSettings):
        cache = _cache(settings, length) * shape.key_values * (2.0 if dtype == "bfloat16" else 4.0)
        cache = min(cache, MOST_CACHE_CUDA if cuda else MOST_CACHE)
        again = 2.0 * shape.products  # the engine's weights once more (`models/prepacked.py`)
        cache += again if dtype == "bfloat16" and not cuda and not quantised and again <= MOST_BYTES else 0.0
    merged = 0.0
    if strategy == "lora" and not cuda:
        # At the end, when engine, judges and activations have gone, the base is read again and the adapter added to it.
        merged = max(0.0, base + 4.0 * shape.parameters - weights - gradients - activations - logits - cache)
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": averages,
        "activations": activations,
        "logits": logits,
        "cache": cache,
        "merged": merged,
    }
    # Answers come by rows of their own numbers, so products are compiled for these, too.
    kinds = compiled * (2 if isinstance(settings, RolloutSettings) else 1)
    return {name: value / MB for name, value in parts.items()} | {"buffers": BUFFERS_MB + kinds * COMPILED_MB}


def _step_tokens(settings: TrainSettings, length: int) -> int:
    """Of an optimizer step: it ends with the item that fills it; a mini-batch of PPO's or GRPO's is a part of a roll-out."""
    if isinstance(settings, PpoSettings):
        return settings.rollout.batch * (length + settings.rollout.max_new_tokens) // settings.ppo.minibatches
    if isinstance(settings, GrpoSettings):  # answers of a group have one prompt
        prompts = settings.rollout.batch // settings.grpo.group_size * length
        return (prompts + settings.rollout.batch * settings.rollout.max_new_tokens) // settings.grpo.minibatches
    return settings.tokens_per_step + length


def _cache(settings: RolloutSettings, length: int) -> int:
    """Positions that the engine has room for: its lanes, which held-out prompts fill at once, and the prompts it remembers."""
    lanes = LANES if settings.eval_fraction or settings.eval_data is not None else min(LANES, settings.rollout.batch)
    return lanes * length + power_of_two(lanes) * arena_length(length + settings.rollout.max_new_tokens)


def _models(settings: TrainSettings, *, small: bool) -> tuple[float, float, int]:
    """Models in memory, by how they are held, and roles that learn: (with exact weights, frozen, learners).

    Adapters share one frozen base; roll-outs have weights of their own.
    """
    judges = 0
    if isinstance(settings, RolloutSettings):
        judges = len([*as_models(settings.reward_model), *as_models(settings.eval_reward_model)])
    if isinstance(settings, PpoSettings):
        return (0, 1 + 1 + judges, 2) if small else (2, 1 + 1 + judges, 2)
    if isinstance(settings, GrpoSettings):
        ref = 0.0 if settings.method == "raft" else REFERENCE[settings.ref_bits]
        return (0, 1 + 1 + judges, 1) if small else (1, ref + 1 + judges, 1)
    if isinstance(settings, DpoSettings) and settings.reference == "online" and not small:
        return 1, REFERENCE[settings.ref_bits], 1
    return (0, 1, 1) if small else (1, 0, 1)
