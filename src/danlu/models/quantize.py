"""Weight-only quantisation of whole models: rounding, saving, and loading without ever holding the 16-bit weights.

Linear layers of the trunk become packed ones (`packed.py`); norms stay as they are, and so do embedding and head in files and where
a model may learn; those of a model that answers can be packed while it is loaded (`packed_tables.py`). On disk: ordinary
safetensors, `danlu_quantization` in config.json, and of packed layers the tensors that `packed_layouts.py` lists.
Files are read by `filling.py`; a calibrated method is in `gptq.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from danlu.exceptions import ModelError
from danlu.models import nf4, packed_layouts
from danlu.models.filling import Filling
from danlu.models.fingerprint import HASH, fingerprint_of
from danlu.models.load import is_encoder_decoder, load_model, raw_config
from danlu.models.packed import Int4Linear, Int8Linear, PackedLinear, pack, quantize_rows
from danlu.models.packed_layouts import DANLU, KEY, layout_of
from danlu.models.packed_tables import PackedEmbedding, pack_tables
from danlu.models.places import resolve
from danlu.models.quantized_layers import linear_layers, replace, weight_of
from danlu.models.registry import family_of
from danlu.models.stored_tensors import WHOLE as FILE
from danlu.models.stored_tensors import require_space, write_tensors

__all__ = [
    "FILE",
    "KEY",
    "Int4Linear",
    "Int8Linear",
    "PackedLinear",
    "bits_of",
    "is_quantized",
    "load_in_bits",
    "load_quantized",
    "quantize_model",
    "quantize_rows",
    "refuse_encoder_decoder",
    "save_quantized",
]
Written = Literal["danlu", "gptq"]
GROUP_SIZE = 64
# Of config.json: what was true of the model before, and where it was.
NOT_WRITTEN = (KEY, "quantization_config", "quantization_bit", "_name_or_path")


# -- in memory --------------------------------------------------------------------------------------------------------------


def refuse_encoder_decoder(config: Any, name: str) -> None:
    """Raises ModelError for a model that reads a source and writes a target: packed layers are tested in decoders only.

    Args:
        config: or config.json as a mapping.
    """
    if is_encoder_decoder(config):
        raise ModelError(
            "an encoder-decoder cannot be quantised: packed weights are for decoders (Llama, Qwen, GPT-2, GLM and their like)",
            file=name,
            hint="it runs in 16 bits, without --bits",
        )


def quantize_model(model: Any, bits: int = 8, *, group_size: int = GROUP_SIZE, symmetric: bool = False) -> Any:
    """Replaces the linear layers of the trunk by packed ones, rounded to nearest, in place.

    Args:
        bits: 8 (one scale a row) or 4 (by groups).
        group_size: of 4 bits, see `packed.pack`; symmetric: of 4 bits, without zeros.

    Raises:
        ModelError: there is nothing to quantise, it is quantised already, other bits, or an encoder-decoder.
    """
    refuse_encoder_decoder(model.config, str(getattr(model, "name_or_path", "") or type(model).__name__))
    for name, linear in linear_layers(model).items():
        bias = linear.bias.detach() if linear.bias is not None else None  # type: ignore[operator]
        layer = pack(weight_of(linear), bias, bits, group_size=group_size, symmetric=symmetric)
        replace(model, name, layer)
    return model


def packed_layers(model: Any) -> dict[str, PackedLinear]:
    """The packed layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


# -- on disk ----------------------------------------------------------------------------------------------------------------


def _config_of(folder: str | Path) -> dict[str, Any]:
    return dict(raw_config(str(folder), True)) if (Path(folder) / "config.json").is_file() else {}


def is_quantized(folder: str | Path) -> bool:
    """Whether a folder holds packed weights that `load_quantized` reads: danlu's, ChatGLM's, GPTQ, AWQ, compressed-tensors."""
    return layout_of(_config_of(folder)) is not None


def bits_of(folder: str | Path) -> int:
    """Bits of the packed weights of a folder; 16 where they are not packed."""
    layout = layout_of(_config_of(folder))
    return 16 if layout is None else layout.bits


def save_quantized(
    model: Any,
    tokenizer: Any | None,
    folder: Path,
    *,
    max_shard: int | None = None,
    layout: Written = "danlu",
    rest: torch.dtype | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a quantised model, under a temporary name first.

    Args:
        max_shard: bytes of a file at most; None: one file.
        layout: danlu's own, or GPTQ's, which vLLM and transformers read (symmetric weights only).
        rest: dtype of matrices that are not packed and are float32 now (embeddings, head); None: as they are.
        facts: kept beside the layout in config.json, as `{"method": "gptq"}`.

    Raises:
        ModelError: the disk is too small, the layout cannot hold these weights, or the model was loaded to answer, with embedding
            and head packed; nothing is written then.
    """
    if isinstance(model.get_input_embeddings(), PackedEmbedding):
        raise ModelError(
            "embedding and head of this model were packed while it was loaded, and files have them whole",
            hint="danlu quantize; or load_in_bits(...), which leaves them as they are",
        )
    layers = packed_layers(model)
    state = _state(model, layers, layout)
    config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_WRITTEN}
    if layout == "gptq":
        config["quantization_config"] = packed_layouts.gptq_config(layers, facts or {})
    else:
        config[KEY] = _described(layers) | dict(facts or {})
    if rest is not None:
        plain = (n for n, t in state.items() if t.dtype == torch.float32 and t.dim() > 1)
        state |= {n: state[n].to(rest) for n in list(plain) if n.rpartition(".")[0] not in layers}
    require_space(folder, sum(t.numel() * t.element_size() for t in state.values()))
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_tensors(temporary, state, max_shard)
        (temporary / "config.json").write_text(json.dumps(config, indent=2, default=str), "utf-8")
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return folder


def _state(model: Any, layers: Mapping[str, PackedLinear], layout: Written) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    inside = tuple(f"{name}." for name in layers)
    for name, tensor in model.state_dict().items():
        if layout == "gptq" and name.startswith(inside):
            continue
        if tensor.numel() and tensor.untyped_storage().data_ptr() == tensor.data_ptr() and tensor.data_ptr() in seen:
            continue  # tied weights are stored once and tied again on loading
        seen.add(tensor.data_ptr())
        state[name] = tensor.detach().contiguous()
    for name, layer in layers.items() if layout == "gptq" else ():
        state |= packed_layouts.to_gptq(name, layer)
    return state


def _described(layers: Mapping[str, PackedLinear]) -> dict[str, Any]:
    four = [layer for layer in layers.values() if isinstance(layer, Int4Linear)]
    if not four:
        return {"bits": 8, "layout": "per-row symmetric", "layers": "linear"}
    return {
        "bits": 4,
        "layout": "by groups of columns, two codes a byte, even column low; weight = scale * (code - zero), zero 8 if absent",
        "layers": "linear",
        "group_size": max(layer.in_features // layer.scale.shape[1] for layer in four),
        "symmetric": all(layer.zero is None for layer in four),
    }


def load_quantized(folder: str | Path, *, dtype: torch.dtype = torch.float32, tables: bool = False) -> Any:
    """Loads packed weights: what `save_quantized` wrote, or others' (`packed_layouts.py`); 16-bit weights are never made.

    Args:
        dtype: of everything that is not packed, and so of the computation.
        tables: embedding and head in 8 bits, too (`packed_tables.py`), for a model that answers and does not learn. Those in the
            folders of others stay as they are: so their makers measured them.

    Raises:
        ModelError: weights and configuration do not fit.
    """
    place = Path(folder)
    layout = layout_of(_config_of(place))
    if layout is None:
        raise ModelError("this folder holds no packed weights that are known here", file=place)
    family = family_of(_config_of(place))
    if layout.name == "chatglm" and family is not None:
        return family.load(place, dtype, False)  # keeps its own layout, and applies a saved prefix
    model = _skeleton(place)
    if model is None:
        raise ModelError("the family of this model is not known", file=place)
    Filling(model, place, dtype, tables and layout.name == DANLU).packed(layout)
    return model


def load_in_bits(
    model: str | Path,
    bits: int,
    *,
    dtype: torch.dtype = torch.float32,
    group_size: int = GROUP_SIZE,
    symmetric: bool = False,
    layout: str = "rounded",
    tables: bool = False,
) -> Any:
    """Loads a model in 8 or 4 bits: packed weights as they are, others rounded to nearest tensor by tensor as they are read.

    Only families whose weight files transformers renames or fuses on loading are loaded whole first.

    Args:
        layout: "rounded", or "nf4" (of 4 bits, by bitsandbytes).
        tables: see `load_quantized`.

    Raises:
        ModelError: see `load_model`; or the folder holds weights of other bits; or the model is an encoder-decoder; or
            bitsandbytes is needed and cannot be used.
    """
    if bits not in (8, 4):
        raise ModelError(f"weights of {bits} bits are not available", hint="use 8 or 4")
    name, local = resolve(model)
    if local and is_quantized(name):
        if bits_of(name) != bits:
            raise ModelError(
                f"this folder holds {bits_of(name)}-bit weights; quantising them again to {bits} bits would add both errors",
                file=name,
                hint="load it without bits, or quantise the model it was made from",
            )
        return load_quantized(name, dtype=dtype, tables=tables)
    folder = Path(name) if local else _downloaded(name)
    refuse_encoder_decoder(_config_of(folder), str(model))
    if layout == "nf4":
        nf4.library()  # before anything is read
    skeleton = _skeleton(folder)
    packer = partial(pack, bits=bits, group_size=group_size, symmetric=symmetric)
    filled = skeleton is not None and Filling(skeleton, folder, dtype, tables)
    if filled and filled.rounded(nf4.pack_nf4 if layout == "nf4" else packer):
        return skeleton
    whole = load_model(model, dtype=dtype)
    setattr(whole, HASH, fingerprint_of(whole))
    if layout == "nf4":
        nf4.quantize_nf4(whole)
    else:
        quantize_model(whole, bits, group_size=group_size, symmetric=symmetric)
    if tables:
        pack_tables(whole)
    return whole


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.bin"]))
    return folder


def fetched_if_packed(name: str, local: bool) -> tuple[str, bool]:
    """A hub model whose weights are packed becomes the folder that it is downloaded to; others stay what they are."""
    if local or layout_of(raw_config(name, local)) is None:
        return name, local
    return str(_downloaded(name)), True


def _skeleton(folder: Path) -> Any | None:
    """The model of a folder without weights, in evaluation mode; None for a family that transformers does not know."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    family_of(_config_of(folder))  # registers danlu's own
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # danlu unpacks
        if hasattr(config, "attn_pdrop"):
            config.attn_pdrop = 0.0  # as `load_model` has it
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return model
