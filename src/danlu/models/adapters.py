"""Kinds of adapters: from the settings to a PEFT configuration and to the roles that it makes on one base.

Everything but P-Tuning and prompt tuning is PEFT's: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024),
AdaLoRA (Zhang et al. 2023), (IA)^3 (Liu et al. 2022), and LoRA on a quantised base (Dettmers et al. 2023). Saving and loading:
`adapter_files.py`; one model of several adapters: `merging.py`.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from danlu.exceptions import ModelError
from danlu.models.fingerprint import HASH, fingerprint_of
from danlu.models.heads import SCALAR_HEADS
from danlu.models.nf4 import library, quantize_nf4
from danlu.models.quantize import quantize_model
from danlu.models.quantized_layers import is_quantized_layer, quantized_kinds
from danlu.models.roles import AdapterRoles
from danlu.models.root import RoleName
from danlu.train_config import AdaLora, Freeze, TrainSettings

PREFIX_KINDS: Final = ("ptuning", "prompt")
PREFIX: Final = "danlu.models.prefix"
ALL_LINEAR: Final = ("auto", "all-linear")
# (IA)^3 scales keys, values and what goes into the second feed-forward product. The families' names for them:
IA3_KEYS: Final = ("k_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn")
IA3_INNER: Final = ("down_proj", "dense_4h_to_h", "fc2", "fc_out", "mlp.c_proj")
MOST_ALLOCATIONS_APART: Final = 0.1  # of the updates in which ranks fall


def adapter_roles(
    base: Any,
    roles: Sequence[RoleName],
    settings: TrainSettings,
    *,
    trained: Sequence[RoleName] | None = None,
    seed: int = 0,
    updates: int = 1,
    embeddings: bool = False,
) -> nn.Module:
    """All roles on one base through adapters of the settings' kind; the base is quantised first where they say so.

    Args:
        base: a causal language model; it is changed in place.
        trained: roles that learn; default: all but ref and reward.
        seed: for the adapters' and heads' first weights.
        updates: that the run plans for each trained role (AdaLoRA's schedule is made of it).
        embeddings: whether embeddings and output head learn, too.

    Raises:
        ModelError: the family has no layers that the adapter could stand on.
    """
    base_hash, name = fingerprint(base), str(base.name_or_path)
    if settings.frozen_bits != 16:
        quantize_base(base, settings.frozen_bits, settings.base_format)
    learning = list(trained) if trained is not None else [r for r in roles if r not in ("ref", "reward")]
    if settings.adapter in PREFIX_KINDS:
        options = settings.prefix
        found: nn.Module = importlib.import_module(PREFIX).PrefixRoles(
            base,
            roles,
            tokens=options.tokens,
            projection=options.projection,
            hidden=options.hidden,
            kind=settings.adapter,
            trained=learning,
            seed=seed,
        )
    else:
        configs = peft_config(base, settings, updates=updates, embeddings=embeddings)
        pissa = settings.lora.init == "pissa" and settings.adapter in ("lora", "rslora")
        found = AdapterRoles(base, roles, config=configs, pissa=pissa, trained=learning, seed=seed)
    noted = {"kind": settings.adapter, "base": str(Path(name).resolve()) if name and Path(name).is_dir() else name}
    noted_in: Any = found
    bits = {"base_bits": settings.frozen_bits, "base_format": settings.base_format}
    noted_in.danlu_adapter = {**noted, "base_hash": base_hash, **bits}
    return found


def copy_of(model: Any, dtype: torch.dtype) -> Any:
    """A model with weights of its own, in `dtype`; buffers stay as they are, for the angles of positions need their digits."""
    weights = {id(p): nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, weights)


def engine_model(
    base: Any, settings: TrainSettings, *, embeddings: bool = False, dtype: torch.dtype = torch.float32
) -> Any:
    """A model for the engine beside a policy that is about to be adapted: the policy's weights as they are now, in `dtype`.

    An adapter on a quantised base is not merged: there the engine has an adapter, too, on the very same packed weights, which
    compute in fp32.
    """
    if settings.frozen_bits == 16:
        return copy_of(base, dtype)
    if settings.adapter in PREFIX_KINDS:
        return copy.deepcopy(base)
    quantize_base(base, settings.frozen_bits, settings.base_format)
    tensors = [*base.parameters(), *base.buffers()]
    shared = copy.deepcopy(base, {id(t): t for t in tensors})
    config = peft_config(shared, settings, updates=1, embeddings=embeddings)
    return AdapterRoles(shared, ["policy"], config=config).base


def quantize_base(model: Any, bits: int, layout: str = "rounded") -> Any:
    """The linear layers of a model in 8 or 4 bits, in place.

    Args:
        layout: "rounded", or "nf4" (of 4 bits, by bitsandbytes).

    Raises:
        ModelError: there are none, or bitsandbytes is needed and cannot be used.
    """
    if any(is_quantized_layer(m) for m in model.modules()):
        return model  # a base that was loaded quantised stays as it is
    if layout == "nf4":
        library()  # before anything is changed
    setattr(model, HASH, fingerprint(model))
    heads = {n: getattr(model, n) for n in SCALAR_HEADS if isinstance(getattr(model, n, None), nn.Linear)}
    for name in heads:  # one number is what the whole model comes to: it stays exact
        setattr(model, name, nn.Identity())
    if layout == "nf4":
        quantize_nf4(model)
    else:
        quantize_model(model, bits)
    for name, head in heads.items():
        setattr(model, name, head)
    return model


def peft_config(base: Any, settings: TrainSettings, *, updates: int, embeddings: bool) -> Any:
    """The PEFT configuration of an adapter kind (not of the prefix kinds) for a model.

    Raises:
        ModelError: the family has none of the layers that the kind needs; AdaLoRA: the run is too short to let ranks fall.
    """
    import peft

    options = settings.lora
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": is_transposed(base),
        "modules_to_save": embedding_modules(base) if embeddings else None,
    }
    if settings.adapter == "ia3":
        keys, inner = ia3_targets(base, options.target)
        return peft.IA3Config(target_modules=[*keys, *inner], feedforward_modules=inner, **common)
    common |= {"lora_alpha": _plain(options.alpha), "lora_dropout": options.dropout}
    common["target_modules"] = targets_of(base, options.target)
    if settings.adapter == "adalora":
        return peft.AdaLoraConfig(**common, **adalora_schedule(settings.adalora, updates))
    config = peft.LoraConfig(
        r=options.r, use_rslora=settings.adapter == "rslora", use_dora=settings.adapter == "dora", **common
    )
    if kinds := quantized_kinds(base):
        from danlu.models.quantized_lora import QuantizedLora

        config._register_custom_module(dict.fromkeys(kinds, QuantizedLora))
    return config


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def adalora_schedule(options: AdaLora, updates: int) -> dict[str, Any]:
    """PEFT's names and numbers of steps for a run of so many updates.

    Raises:
        ModelError: no update is left in which ranks could fall.
    """
    warmup, final = int(options.warmup * updates), int(options.final * updates)
    if updates - warmup - final < 1:
        raise ModelError(
            f"adalora: {updates} updates leave none in which ranks fall (warm-up {warmup}, final {final})",
            hint="train for longer, or lower adalora.warmup and adalora.final",
        )
    falling = updates - warmup - final
    return {
        "init_r": options.initial_r,
        "target_r": options.target_r,
        "tinit": warmup,
        "tfinal": final,
        "deltaT": min(options.every, max(1, round(MOST_ALLOCATIONS_APART * falling))),
        "beta1": options.beta,
        "beta2": options.beta,
        "orth_reg_weight": options.orthogonality,
        "total_step": updates,
    }


# -- which layers -------------------------------------------------------------------------------------------------------


def is_transposed(base: Any) -> bool:
    """Whether the family keeps its weights as `[in, out]` (GPT-2)."""
    return any(isinstance(m, Conv1D) for m in base.modules())


def _linear_names(base: Any) -> list[str]:
    """Full names of the linear layers of the trunk, quantised or not."""
    head = base.get_output_embeddings()
    inside = {id(m) for m in base.base_model.modules()}
    return [
        name
        for name, m in base.named_modules()
        if id(m) in inside and m is not head and (isinstance(m, nn.Linear | Conv1D) or is_quantized_layer(m))
    ]


def targets_of(base: Any, target: str | Sequence[str]) -> list[str]:
    """Names of the modules that get an adapter: the last parts of the names of all linear layers of the trunk, or those given.

    Raises:
        ModelError: the model has no such modules.
    """
    found = sorted({name.rpartition(".")[2] for name in _linear_names(base)})
    if isinstance(target, str) and target in ALL_LINEAR:
        if not found:
            raise ModelError(f"{type(base).__name__} has no linear layers that an adapter could stand on")
        return found
    wanted = [target] if isinstance(target, str) else list(target)
    modules = [name for name, _ in base.named_modules()]
    unknown = [w for w in wanted if not any(n == w or n.endswith(f".{w}") for n in modules)]
    if unknown:
        raise ModelError(
            f"lora.target: {type(base).__name__} has no module named {unknown[0]}",
            hint=f"auto, or some of: {', '.join(found)}",
        )
    return wanted


def ia3_targets(base: Any, target: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the modules whose output is scaled (keys, values), and of those whose input is (feed-forward).

    Raises:
        ModelError: the family's names are not known.
    """
    names = _linear_names(base)

    def there(wanted: Sequence[str]) -> list[str]:
        return [w for w in wanted if any(n.endswith(f".{w}") for n in names)]

    if not (isinstance(target, str) and target in ALL_LINEAR):
        wanted = targets_of(base, target)
        return [w for w in wanted if w not in IA3_INNER], [w for w in wanted if w in IA3_INNER]
    keys, inner = there(IA3_KEYS), there(IA3_INNER)
    if not keys or not inner:
        raise ModelError(
            f"which layers of {type(base).__name__} (IA)^3 scales is not known",
            hint="name them: lora.target: [key, value, second feed-forward layer]",
        )
    return keys, inner


def embedding_modules(base: Any) -> list[str]:
    """Names of the input embedding and of the output head."""
    wanted = (base.get_input_embeddings(), base.get_output_embeddings())
    return [name for name, module in base.named_modules() if any(module is w for w in wanted)]


def teaches_a_new_end(base: Any, stop_ids: Sequence[int] | frozenset[int]) -> bool:
    """Whether answers end with a token that the model does not end its texts with: then its row has something to learn."""
    known: set[int] = set()
    for config in (base.config, getattr(base, "generation_config", None)):
        end = getattr(config, "eos_token_id", None)
        known |= set(end) if isinstance(end, list | tuple) else {end} if end is not None else set()
    return not set(stop_ids) <= known


def freeze_parts(model: Any, options: Freeze) -> None:
    """Lets the last layers (what stands behind them too) of a model learn, with the head if asked for, and nothing else.

    A scalar head always learns.

    Raises:
        ModelError: the model's layers cannot be found.
    """
    trunk = model.base_model
    lists = [m for m in trunk.modules() if isinstance(m, nn.ModuleList)]
    layers = max(lists, key=len, default=None)
    if layers is None:
        raise ModelError(f"the layers of {type(model).__name__} cannot be found", hint="adapter: full or lora")
    model.requires_grad_(False)
    for layer in list(layers)[-options.layers :]:
        layer.requires_grad_(True)
    inside = {id(p) for p in layers.parameters()}
    for name, module in trunk.named_modules():
        if (name.endswith("norm") and "embedding" not in name) or name in (
            "ln_f",
            "final_layer_norm",
            "final_layernorm",
        ):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(parameter.requires_grad or id(parameter) not in inside)
    for name in SCALAR_HEADS:
        if isinstance(getattr(model, name, None), nn.Module):
            getattr(model, name).requires_grad_(True)
    head = model.get_output_embeddings()
    if options.head and head is not None:
        head.requires_grad_(True)


# -- which base ---------------------------------------------------------------------------------------------------------


def fingerprint(model: Any) -> str:
    """Of a model's weights: a hash of some numbers of every tensor as bf16, so that the dtype it was loaded in does not matter.

    Of a model that was made small in memory or while loading it is that from before; empty for another quantised one, whose weights
    it cannot see.
    """
    if any(is_quantized_layer(m) for m in model.modules()):
        return str(getattr(model, HASH, ""))
    return fingerprint_of(model)
