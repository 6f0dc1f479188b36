"""Folders for others: what a model must be so that plain transformers opens it, in which precision, in files of which size."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn

from danlu.exceptions import ModelError, SettingsError
from danlu.models.load import load_model
from danlu.models.places import is_adapter
from danlu.models.quantize import bits_of, is_quantized, load_quantized
from danlu.models.quantized_layers import dense_layer, dense_weight, forget_packing

ExportType = Literal["bf16", "f16", "f32"]
DTYPES: Final[dict[ExportType, torch.dtype]] = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Families whose models vLLM serves from an ordinary folder (its page "Supported Models"), by transformers' model_type.
VLLM_FAMILIES: Final = frozenset(
    {
        "bloom",
        "cohere2",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_neox",
        "gptj",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "stablelm",
    }
)
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])i?B", re.IGNORECASE)
_HEADER_BYTES: Final = 1 << 20  # configuration, card and the like


def is_scalar(folder: str | Path) -> bool:
    """Whether a folder holds a model, or an adapter, with a one-number head (a reward model)."""
    if is_adapter(folder):
        return bool(_adapter_info(folder).scalar)
    config = Path(folder) / "config.json"
    if not config.is_file():
        return False
    names = json.loads(config.read_text("utf-8")).get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def load_exact(name: str, *, dequantize: bool) -> Any:
    """A model with ordinary weights in 32 bits.

    Raises:
        ModelError: the folder holds quantised weights and `dequantize` is false, or a prefix, which is no part of any weights; or
            it cannot be loaded.
    """
    if is_adapter(name) and not (info := _adapter_info(name)).mergeable:
        raise ModelError(
            f"this is an adapter of kind {info.kind}, which is read before every text and cannot be put into a model's weights",
            file=name,
            hint=f"share the folder as it is: PEFT opens it on {info.base or 'its base'}, and danlu chat and serve take it",
        )
    if not is_quantized(name):
        return load_model(name, scalar=is_scalar(name)).eval()
    if not dequantize:
        raise ModelError(
            f"this folder holds {bits_of(name)}-bit weights in a packed layout, which an export does not copy",
            file=name,
            hint="export the model it was made from, or --dequantize to export the rounded weights as ordinary ones; for vLLM: "
            "danlu quantize --layout gptq",
        )
    return dequantized(load_quantized(name)).eval()


def _adapter_info(folder: str | Path) -> Any:
    from danlu.models.adapter_files import read_info  # PEFT is slow to import, and few exports need it

    return read_info(folder)


def dequantized(model: Any) -> Any:
    """Replaces quantised linear layers by ordinary ones with the values that they compute with, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) or not hasattr(module, "in_features") or list(module.children()):
            continue
        replaced = dense_layer(module, dense_weight(module))
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], replaced)
    forget_packing(model.config)
    return model


def cast(model: Any, dtype: torch.dtype) -> None:
    """Parameters in another dtype, in place. Buffers stay: rotary frequencies are not stored, and must not be rounded here."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def refuse_foreign(model: Any) -> None:
    """Ends with a sentence where plain transformers does not know the family.

    Raises:
        ModelError: the model's class is danlu's own.
    """
    if not type(model).__module__.startswith("transformers."):
        raise ModelError(
            f"'{model.config.model_type}' is a family of danlu's own, which plain transformers does not know",
            hint="danlu chat and danlu serve read this folder as it is",
        )


def folder_bytes(model: Any, kind: ExportType) -> int:
    """Bytes that the weights take in a folder; tied ones are stored once."""
    size = torch.empty((), dtype=DTYPES[kind]).element_size()
    return int(sum(p.numel() for p in model.parameters()) * size) + _HEADER_BYTES


def need_disk(folder: Path, wanted: int) -> None:
    """Ends with a sentence before anything is written that the disk cannot hold.

    Raises:
        ModelError: less than `wanted` bytes are free where `folder` is or will be.
    """
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if free < wanted:
        raise ModelError(
            f"the export takes {wanted / 2**20:,.1f} MB, and {free / 2**20:,.1f} MB are free on this disk",
            file=folder,
            hint="free some space, or give --out on another disk",
        )


def shard_size(text: str) -> int:
    """Bytes of a size such as "5GB" or "500MB" (powers of ten, as transformers counts).

    Raises:
        SettingsError: it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise SettingsError(f"'{text}' is no size", field="max_shard_size", hint='"5GB" or "500MB"')
    return max(int(float(found[1]) * 1000 ** ("KMGT".index(found[2].upper()) + 1)), 1)


def write_folder(
    folder: Path,
    model: Any,
    tokenizer: Any | None,
    kind: ExportType,
    *,
    stop_ids: frozenset[int],
    sampling: dict[str, float],
    max_shard_size: str = "5GB",
) -> None:
    """Writes weights, configuration, generation settings and tokenizer. It is the caller's to give a temporary folder.

    The model is converted in place. Generation settings get the stop tokens and the sampling defaults, so that transformers and
    vLLM stop where danlu does.

    Args:
        stop_ids: tokens that end an answer.
    """
    cast(model, DTYPES[kind])
    model.config.dtype = DTYPES[kind]
    generation = getattr(model, "generation_config", None)
    if generation is not None and tokenizer is not None:
        generation.update(do_sample=True, **sampling)
        generation._from_model_config = False  # else transformers makes it anew from config.json
        if stop_ids:
            first = tokenizer.eos_token_id
            generation.eos_token_id = sorted(stop_ids, key=lambda i: (i != first, i))
        if tokenizer.pad_token_id is not None:
            generation.pad_token_id = tokenizer.pad_token_id
        if tokenizer.bos_token_id is not None:
            generation.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(folder, max_shard_size=shard_size(max_shard_size))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in folder.iterdir():  # safetensors makes files for their owner alone
        shutil.copymode(folder / "config.json", file)
