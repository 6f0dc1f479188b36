"""Adapters on disk: folders as PEFT writes and reads them, with what danlu wants to know of their base beside them.

`danlu_adapter.json` names the kind, the base with a hash of its weights, the bits it had, and the role. A folder that PEFT wrote
without it is taken, too; then shapes alone say whether the base is the right one.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from danlu.exceptions import ModelError
from danlu.models.adapters import PREFIX, fingerprint, quantize_base
from danlu.models.families import TESTED
from danlu.models.fingerprint import UNPATCHED
from danlu.models.packed_tables import unpack_tables
from danlu.models.places import ADAPTER_CONFIG, base_of, is_adapter, resolve, tokenizer_place
from danlu.models.quantize import is_quantized, load_in_bits, load_quantized
from danlu.models.quantized_layers import (
    dense_layer,
    dense_weight,
    forget_packing,
    is_quantized_layer,
    quantized_kinds,
    shown_to_peft,
)
from danlu.models.roles import SCALAR_ROLES, START, AdapterRoles
from danlu.models.root import RoleName
from danlu.models.scalar import scalar_class
from danlu.models.weights import check_file
from danlu.text.tokenizer import load_tokenizer

INFO: Final = "danlu_adapter.json"
WEIGHTS: Final = "adapter_model.safetensors"
SCHEMA: Final = 1
SCORE: Final = "score.weight"  # of a reward model, in a role's gathered weights too
MERGEABLE: Final = ("LORA", "ADALORA", "IA3")
PREFIXES: Final = ("PREFIX_TUNING", "PROMPT_TUNING")
NAME: Final = "default"  # of the one adapter on a loaded model


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter folder says of itself.

    kind: danlu's name, or PEFT's in lower case; base: as the folder names it; base_hash: "" where nobody noted it;
    base_bits, base_format: which the base had under it; scalar: it ends in one number; config: values of the model's configuration
    that belong to the adapter.
    """

    folder: Path
    kind: str
    peft_type: str
    base: str
    base_hash: str = ""
    base_bits: int = 16
    base_format: str = "rounded"
    config: dict[str, Any] = field(default_factory=dict)
    scalar: bool = False

    @property
    def mergeable(self) -> bool:
        """Whether its update can become a part of the weights (where these are not packed)."""
        return self.peft_type in MERGEABLE


def read_info(folder: str | Path) -> AdapterInfo:
    """What an adapter folder says of itself.

    Raises:
        ModelError: its files cannot be read, or are of a newer danlu.
    """
    path = Path(folder)
    try:
        peft: dict[str, Any] = json.loads((path / ADAPTER_CONFIG).read_text("utf-8"))
        own: dict[str, Any] = json.loads((path / INFO).read_text("utf-8")) if (path / INFO).is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read as an adapter: {error}", file=path, hint="give a PEFT folder") from error
    if own.get("schema", SCHEMA) > SCHEMA:
        raise ModelError(f"the adapter has schema {own['schema']}, this danlu knows up to {SCHEMA}", file=path)
    kind = str(peft.get("peft_type", ""))
    return AdapterInfo(
        path,
        str(own.get("kind", kind.lower())),
        kind,
        base_of(path),
        str(own.get("base_hash", "")),
        int(own.get("base_bits", 16)),
        str(own.get("base_format", "rounded")),
        dict(own.get("config", {})),
        peft.get("task_type") == "SEQ_CLS",
    )


# -- saving -------------------------------------------------------------------------------------------------------------


def save_adapter(
    roles: nn.Module,
    role: RoleName,
    folder: Path,
    tokenizer: Any | None,
    weights: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a role's adapter as a folder that plain PEFT loads, under a temporary name first.

    Args:
        roles: `AdapterRoles` or `PrefixRoles` that `adapter_roles` made.
        weights: `AdapterRoles.weights` where they had to be gathered first; None: as they are.
        config: values of the model's configuration that belong to the adapter (a reward model's normaliser).
    """
    adapted: Any = roles
    noted: dict[str, Any] = dict(adapted.danlu_adapter)
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if isinstance(roles, AdapterRoles):
        _write_peft(roles, role, temporary, noted["base"], roles.weights(role) if weights is None else weights)
    else:
        importlib.import_module(PREFIX).save_prefix(roles, role, temporary, noted["base"])
    known = bool(noted["base"]) and Path(noted["base"]).is_dir()
    relative = os.path.relpath(noted["base"], folder) if known else ""
    about = {"schema": SCHEMA, **noted, "base_relative": relative, "role": role, "config": dict(config or {})}
    (temporary / INFO).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
    base = adapted.base
    if base.generation_config is not None:
        base.generation_config.save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return folder


def _write_peft(roles: AdapterRoles, role: RoleName, folder: Path, base: str, weights: Mapping[str, Tensor]) -> None:
    from peft import get_peft_model_state_dict

    config = copy.deepcopy(roles.peft.peft_config[role])
    named = {f"base_model.model.{name}": value.detach() for name, value in weights.items() if name != SCORE}
    found: dict[str, Tensor] = get_peft_model_state_dict(
        roles.peft, state_dict=named, adapter_name=role, save_embedding_layers=False
    )
    if roles.peft_type == "ADALORA":  # by names without the role's, as PEFT just made them
        config.rank_pattern = roles.peft.peft_config[role].rank_pattern
    if roles.pissa:
        start = {f"base_model.model.{n}": w.detach() for n, w in roles.weights(START).items()}
        found = _with_start(found, start)
        # The scale stays what it was: alpha / r, or alpha / sqrt(r).
        config.lora_alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
        config.r = 2 * config.r
    if role in SCALAR_ROLES:
        head = next(n for n, m in roles.base.named_modules() if m is roles.base.get_output_embeddings())
        found = {n: w for n, w in found.items() if not n.startswith(f"base_model.model.{head}.")}
        found[f"base_model.model.{SCORE}"] = weights.get(SCORE, roles.head(role).weight).detach()
        config.task_type = "SEQ_CLS"
        config.modules_to_save = [*(n for n in config.modules_to_save or () if n != head), "score"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    save_file({n: w.detach().cpu().clone().contiguous() for n, w in found.items()}, folder / WEIGHTS, {"format": "pt"})
    config.save_pretrained(folder)


def _with_start(found: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PiSSA as plain LoRA of twice the rank: what was learnt, and its first weights taken off."""
    joined = {}
    for name, value in found.items():
        if ".lora_A." in name or ".lora_B." in name:
            letter = "A" if ".lora_A." in name else "B"
            first = start[name.replace(f".lora_{letter}.", f".lora_{letter}.{START}.")]
            value = torch.cat([value, first.to(value.device)], dim=0 if letter == "A" else 1)
        joined[name] = value
    return joined


# -- loading ------------------------------------------------------------------------------------------------------------


def load_adapted(
    folder: str | Path, *, scalar: bool = False, dtype: torch.dtype = torch.float32, dense: bool = True
) -> Any:
    """The model of an adapter folder: its base, which may have an adapter of its own, with the adapter in it.

    Args:
        scalar: with a one-number head, see `load_model`.
        dense: put the adapter of a quantised base into dense weights (of the same values); else the base stays packed with
            the adapter beside it.

    Raises:
        ModelError: the base is missing, or another than that which the adapter was trained on.
    """
    info = read_info(folder)
    if not info.base:
        raise ModelError(
            "this adapter does not name its base", file=info.folder, hint="danlu chat BASE --adapter NAME=FOLDER"
        )
    try:
        resolve(info.base)
    except ModelError as error:
        raise ModelError(
            f"this folder is an adapter, and its base is not there: {info.base}",
            file=info.folder,
            hint="put the base where it was, or danlu chat BASE --adapter NAME=FOLDER",
        ) from error
    model = load_base(info, scalar=scalar, dtype=dtype)
    return finish(put_on(model, info), info, dense=dense)


def load_base(info: AdapterInfo, *, scalar: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The model that an adapter stands on, without it: in the bits that it had, which are rounded as they are read."""
    from danlu.models.load import load_model

    place, local = resolve(info.base)
    whole = not local or not is_adapter(place)
    if whole and local and not scalar and is_quantized(place):
        return load_quantized(place, dtype=dtype)
    if whole and info.base_bits != 16 and not scalar:
        return load_in_bits(info.base, info.base_bits, dtype=dtype, layout=info.base_format)
    return load_model(info.base, scalar=scalar, dtype=dtype)


def finish(model: Any, info: AdapterInfo, *, dense: bool) -> Any:
    """A model that `put_on` returned, with the adapter in its weights where that can be, and the adapter's settings."""
    if info.mergeable and (dense or not any(is_quantized_layer(m) for m in model.modules())):
        model = merge_into(model)
    return settle(model, info)


def settle(model: Any, info: AdapterInfo) -> Any:
    """Gives a model the settings that belong to an adapter: its configuration's, and how it generates."""
    for name, value in info.config.items():
        setattr(model.config, name, value)
    if (info.folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(info.folder)
    return model


def put_on(model: Any, info: AdapterInfo, *, named: str = "") -> Any:
    """Puts an adapter beside the weights of its base, unmerged, in place; a quantised one on the base in its bits.

    Args:
        named: how to call the model in errors; default: the adapter's base.

    Raises:
        ModelError: the model is not the adapter's base, or the weights do not fit.
    """
    shown = named or info.base
    packed = any(is_quantized_layer(m) for m in model.modules())
    own_hash = getattr(model, UNPATCHED, "") or fingerprint(model)
    if info.base_hash and own_hash and own_hash != info.base_hash:
        raise ModelError(
            f"this adapter was trained on {info.base} as it was then, and {shown} has other weights",
            file=info.folder,
            hint="give the base that it was trained on",
        )
    if info.base_bits != 16 and not packed:
        quantize_base(model, info.base_bits, info.base_format)
    if info.peft_type in PREFIXES:
        importlib.import_module(PREFIX).load_prefix(info.folder, model)
        return model
    if not info.mergeable:
        raise ModelError(
            f"PEFT's '{info.peft_type}' adapters are not supported",
            file=info.folder,
            hint=f"known: {', '.join((*MERGEABLE, *PREFIXES))}",
        )
    return _inject(model, info, shown)


def reads_beside(model: Any, info: AdapterInfo) -> bool:
    """Whether an adapter with a head of one number can stand on a causal model that is in memory already (`scalar_beside`)."""
    same = bool(info.base_hash) and info.base_hash == fingerprint(model)
    return info.scalar and info.mergeable and info.base_bits == 16 and same and model.config.model_type in TESTED


def scalar_beside(model: Any, info: AdapterInfo) -> Any:
    """A model with a head of one number whose trunk has the very weights of a causal model, and the adapter beside them.

    The weights are frozen by that; whatever becomes of their dtype and device becomes of both. See `reads_beside`.
    """
    tensors = [*model.parameters(), *model.buffers()]
    trunk = copy.deepcopy(model.base_model, {id(t): t for t in tensors})
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):
        made = scalar_class(config)(config)
    setattr(made, made.base_model_prefix, trunk)
    width = model.get_output_embeddings().in_features
    made.score = nn.Linear(width, 1, bias=False, device=model.get_output_embeddings().weight.device)
    judge = settle(put_on(made.eval(), info), info)
    if hasattr(judge.score, "modules_to_save"):
        judge.score = judge.score.modules_to_save[NAME]
    return judge


def _inject(model: Any, info: AdapterInfo, shown: str) -> Any:
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    prepared = getattr(model.base_model, "danlu_fast_path", None)
    config: Any = PeftConfig.from_pretrained(str(info.folder))
    config.task_type, config.base_model_name_or_path, config.inference_mode = None, None, True
    names = {name for name, _ in model.named_modules()}
    saved = [m for m in config.modules_to_save or () if any(n == m or n.endswith(f".{m}") for n in names)]
    config.modules_to_save = saved or None
    if getattr(config, "trainable_token_indices", None):
        raise ModelError(
            "this adapter trains single tokens of the embedding (trainable_token_indices), which is not supported",
            file=info.folder,
            hint="merge it with PEFT (merge_and_unload), and give the merged model",
        )
    kinds = quantized_kinds(model)
    if kinds and (info.peft_type != "LORA" or config.use_dora):
        raise ModelError(
            f"an adapter of kind {info.kind} does not stand on a quantised base", file=info.folder, hint="use 16 bits"
        )
    if kinds:
        from danlu.models.quantized_lora import QuantizedLora

        config._register_custom_module(dict.fromkeys(kinds, QuantizedLora))
    if (info.folder / WEIGHTS).is_file():
        check_file(info.folder / WEIGHTS)
    try:
        tensors = load_file(info.folder / WEIGHTS)
        unpack_tables(model, tensors)
        with warnings.catch_warnings(), shown_to_peft(model):
            warnings.filterwarnings("ignore", ".*tie_word_embeddings=True`", UserWarning)
            # peft 0.21 reads an attribute that transformers 5.23 renamed, and AdaLoRA's ranks as LoRA's.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            peft = PeftModel(model, config, adapter_name=NAME)
            found = set_peft_model_state_dict(peft, tensors, adapter_name=NAME)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise ModelError(
            f"this adapter (of {info.base or 'a base it does not name'}) does not fit {shown}: {first}",
            file=info.folder,
            hint="give the base that it was trained on",
        ) from error
    known = (*(f"base_model.model.{m}." for m in ("score", "lm_head", "embed_out")),)
    odd = [name for name in found.unexpected_keys if not name.startswith(known)]
    if odd:
        raise ModelError(
            f"this adapter (of {info.base or 'a base it does not name'}) has weights for {odd[0]}, and {shown} has no such part",
            file=info.folder,
            hint="give the base that it was trained on",
        )
    made = peft.get_base_model()
    made.requires_grad_(False)
    if prepared is not None:
        made.base_model.danlu_fast_path = prepared
    return made


@torch.no_grad()
def merge_into(model: Any) -> Any:
    """Makes the adapters of `put_on` a part of the weights, in place; packed layers become dense ones with the same values."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    from danlu.models.quantized_lora import QuantizedLora

    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    tied = last is not None and _inner(first).weight is _inner(last).weight
    if tied and isinstance(first, BaseTunerLayer) != isinstance(last, BaseTunerLayer):
        # What one of them learnt is not the other's.
        _inner(last).weight = nn.Parameter(_inner(last).weight.detach().clone())
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLora):
            packed: Any = module.get_base_layer()
            _replace(model, name, _dense(packed, dense_weight(packed) + module.get_delta_weight(NAME), first))
        elif isinstance(module, ModulesToSaveWrapper):
            _replace(model, name, module.modules_to_save[NAME])
        elif isinstance(module, BaseTunerLayer):
            module.merge(adapter_names=[NAME])
            _replace(model, name, module.get_base_layer())
    for name, module in list(model.named_modules()):  # what the adapter did not stand on
        if is_quantized_layer(module):
            _replace(model, name, _dense(module, dense_weight(module), first))
    forget_packing(model.config)
    if tied:
        same = torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        model.config.tie_word_embeddings = same
        if same:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    return model.requires_grad_(True)


def _dense(packed: Any, weight: Tensor, like: Any) -> nn.Module:
    """`dense_layer` in the dtype of the embeddings."""
    return dense_layer(packed, weight).to(_inner(like).weight.device, _inner(like).weight.dtype)


def _inner(module: Any) -> Any:
    return getattr(module, "original_module", getattr(module, "base_layer", module))


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def tokenizer_for(name: str, *, local: bool) -> Any | None:
    """The tokenizer of a model; with an adapter that brings none, that of its base.

    Raises:
        ModelError: it cannot be read; of an adapter, naming its base.
    """
    where = tokenizer_place(name)
    if where == name:
        return load_tokenizer(name, local=local)
    try:
        return load_tokenizer(where, local=Path(where).is_dir())
    except ModelError as error:
        raise ModelError(
            f"this is an adapter of '{where}', whose tokenizer cannot be read: {error.message}",
            file=name,
            hint="put the base where it was, or copy its tokenizer files beside the adapter",
        ) from error
