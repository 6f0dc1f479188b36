"""Any model that danlu loads, written as an ordinary transformers folder: safetensors, its tokenizer and a plain configuration."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from danlu.exceptions import ModelError
from danlu.models import stories
from danlu.models.load import check_tokenizer, load_model, raw_config
from danlu.models.packed_layouts import layout_of
from danlu.models.places import resolve
from danlu.models.registry import family_of
from danlu.models.weights import read_weights, weight_files
from danlu.text.chat_template import ChatTemplate
from danlu.text.template_registry import fitting_template
from danlu.text.tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Converted:
    """What was written: `family` as it came, `model_type` as transformers knows it (`plain`: whether it does)."""

    folder: Path
    family: str
    model_type: str
    plain: bool
    dtype: str
    parameters: int
    size: int
    files: list[str]


def convert(source: str | Path, target: Path, *, dtype: str | None = None, max_shard_size: str = "5GB") -> Converted:
    """Loads a model and writes it anew; nothing stays of it if that fails half-way.

    ChatGLM's published int8 and int4 weights stay packed as they were published; those of GLM-130B and MOSS become whole.

    Args:
        source: a folder, a hub id, or a `.bin` of llama2.c (or the folder that it lies in).
        target: a folder that does not exist yet, or is empty.
        dtype: of `DTYPES`; None keeps that of the source.
        max_shard_size: of a weight file, as `2GB`.

    Raises:
        ModelError: the source cannot be loaded, the target is taken, or the disk has no room for it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError("there is something already", file=target, hint="choose a folder that does not exist yet")
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype '{dtype}' is not known", hint=f"one of {', '.join(DTYPES)}")
    model, tokenizer, family = _opened(source, DTYPES[dtype] if dtype else None)
    if tokenizer is not None:
        check_tokenizer(model, tokenizer, source)
        if not tokenizer.chat_template and fitting_template(tokenizer) != "plain":
            ChatTemplate(tokenizer)  # sets the format that it belongs to, which is saved with it
    _check_room(model, target)
    temporary = target.with_name(target.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return _told(model, target, family)


def _opened(source: str | Path, dtype: torch.dtype | None) -> tuple[Any, Any, str]:
    """Model, tokenizer and the family's name."""
    path = Path(source)
    alone = path.is_file() or (path.is_dir() and not (path / "config.json").is_file())
    if alone and path.suffix in ("", ".bin") and stories.is_stories(path):
        return stories.load(path, dtype or torch.float32), stories.tokenizer(path), "llama2.c"
    name, local = resolve(source)
    raw = raw_config(name, local)
    layout = layout_of(raw)
    if layout is not None and layout.name != "chatglm":  # whose own classes write their published layout again
        raise ModelError("this folder holds quantised weights", file=name, hint="convert the model it was made from")
    family = family_of(raw)
    model = load_model(source, dtype=dtype or _dtype_of(raw, Path(name) if local else None))
    return model, load_tokenizer(name, local=local), family.name if family is not None else str(raw["model_type"])


def _dtype_of(raw: Any, folder: Path | None) -> torch.dtype:
    """What config.json says, else what the first weights are."""
    named = raw.get("dtype") or raw.get("torch_dtype")
    if named in DTYPES:
        return DTYPES[named]
    files = weight_files(folder) if folder is not None else []
    found = next((t.dtype for _, t in read_weights(files[:1]) if t.is_floating_point()), torch.float32)
    return found if found in DTYPES.values() else torch.float32


def _check_room(model: Any, target: Path) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    place = next(p for p in (target, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ModelError(
            f"the weights need {needed / 2**30:,.1f} GiB and the disk has {free / 2**30:,.1f} GiB free",
            file=target,
            hint="make room, or choose a smaller --dtype",
        )


def _told(model: Any, folder: Path, family: str) -> Converted:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = model.config.model_type
    files = sorted(folder.glob("*.safetensors"))
    return Converted(
        folder,
        family,
        kind,
        plain=kind in CONFIG_MAPPING_NAMES,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in model.parameters()),
        size=sum(f.stat().st_size for f in files),
        files=[f.name for f in files],
    )
