"""What model classes of danlu's own share: published folders and rank files into a model, special ids, the loss of a head."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from danlu.exceptions import ModelError
from danlu.text.tokenizer import quiet

RANKS = "mp_rank_*_model_states.pt"
HEADS = ("score", "classifier")


def load_own(
    model_class: Any,
    config: Any,
    folder: Path,
    dtype: torch.dtype,
    *,
    parts: Mapping[str, int],
    rename: Callable[[str], str] | None = None,
) -> Any:
    """A model of a class of danlu's own from safetensors, `.bin` (sharded or not) or the training code's rank files.

    A head for numbers or classes that the folder does not hold starts at zero. Weights in 8 or 4 bits (`quantization_bit`) are
    made whole while they are read.

    Args:
        parts: for the merge of rank files, by parameter suffix: into how many blocks each rank's rows are divided.
        rename: our name of a parameter of the files, where they have other names.

    Raises:
        ModelError: parameters are missing or have other shapes than the configuration says.
    """
    quiet()
    ranks = sorted(folder.glob(RANKS))
    ordinary = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    bits = int(getattr(config, "quantization_bit", 0) or 0)
    config._attn_implementation = "eager"
    try:
        if (ordinary or not ranks) and not bits and rename is None:
            model, info = model_class.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            missing = sorted(info["missing_keys"])
        else:
            config.quantization_bit = 0
            model = model_class(config).to(dtype).eval()
            states = [_whole(_rank(path), bits) for path in ranks] if ranks else [_whole(_plain(folder), bits)]
            merged = merge_ranks(states, parts)
            missing = _take(model, {rename(k): v for k, v in merged.items()} if rename else merged, folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot be loaded: {first}", file=folder, hint="check config.json and the weight files"
        ) from error
    absent = [name for name in missing if name.split(".")[0] not in HEADS]
    if absent:
        raise ModelError(
            f"{len(absent)} parameters are missing from the weights, the first is {absent[0]}",
            file=folder,
            hint="the download may be incomplete, or the configuration of another model",
        )
    for name in missing:
        nn.init.zeros_(model.get_parameter(name))
    return model


def _rank(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            "this file holds more than tensors and is not opened", file=path, hint="get the weights as safetensors"
        ) from error
    module: dict[str, Tensor] = found.get("module", found)
    return module


def _plain(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    for path in sorted(folder.glob("pytorch_model*.bin")) if not found else ():
        found |= _rank(path)
    return found


def _whole(state: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Tensors in `bits` bits (8 or 4) times their rows' scales, in the scales' dtype; all others as they are.

    Of two columns in one byte the even one has the high four bits; both are two's complements.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        scale = state.get(f"{name}_scale")
        if name.endswith("_scale") and name.removesuffix("_scale") in state:
            continue
        if scale is None:
            found[name] = value
            continue
        numbers = value.to(torch.int8)
        if bits == 4:
            high, low = numbers >> 4, (numbers << 4) >> 4
            numbers = torch.stack([high, low], dim=-1).flatten(1)
        found[name] = numbers.to(scale.dtype) * scale[:, None]
    return found


def _take(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Puts a rank file's tensors into the model, with or without its trunk's prefix; returns what was missing."""
    own = dict(model.named_parameters())
    prefix = str(getattr(model, "base_model_prefix", ""))
    found = {name: state[key] for name in own for key in (name, name.removeprefix(f"{prefix}.")) if key in state}
    for name, value in found.items():
        if own[name].shape != value.shape:
            raise ModelError(
                f"{name} is {list(value.shape)} in the weights and {list(own[name].shape)} by config.json", file=folder
            )
        own[name].data.copy_(value)
    return sorted(set(own) - set(found))


def merge_ranks(states: Sequence[Mapping[str, Tensor]], parts: Mapping[str, int]) -> dict[str, Tensor]:
    """One state of the tensor-parallel parts that Megatron-like training code saves.

    Rows of embeddings and of column-parallel layers are put one after the other, columns of row-parallel layers
    (`attention.dense`, `mlp.dense_4h_to_h`) side by side; everything else is the same on every rank.

    Args:
        parts: by suffix: the blocks of a rank's rows that belong together over ranks (q, k, v; the halves of a gated layer).
    """
    if len(states) == 1:
        return dict(states[0])
    merged: dict[str, Tensor] = {}
    for name, first in states[0].items():
        all_ranks = [state[name] for state in states]
        stem, _, kind = name.rpartition(".")
        if stem.endswith(("attention.dense", "dense_4h_to_h")):
            merged[name] = torch.cat(all_ranks, dim=1) if kind == "weight" else first
        elif stem.endswith(("word_embeddings", "query_key_value", "dense_h_to_4h")):
            count = next((n for suffix, n in parts.items() if stem.endswith(suffix)), 1)
            blocks = zip(*(rank.chunk(count) for rank in all_ranks), strict=True)
            merged[name] = torch.cat([torch.cat(block) for block in blocks])
        else:
            merged[name] = first
    return merged


def token_ids(folder: Path) -> dict[str, int]:
    """Added tokens of a model folder by their text, from the tokenizer files that name them."""
    found: dict[str, int] = {}
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        path = folder / name
        if not path.is_file():
            continue
        data = json.loads(path.read_text("utf-8"))
        if name == "tokenizer.json":
            found |= {t["content"]: int(t["id"]) for t in data.get("added_tokens", [])}
        elif name == "tokenizer_config.json":
            found |= {t["content"]: int(i) for i, t in data.get("added_tokens_decoder", {}).items()}
        else:
            found |= {text: int(i) for text, i in data.items()}
    return found


def classify_loss(logits: Tensor, labels: Tensor | None, config: Any) -> SequenceClassifierOutput:
    """Logits with their loss: cross entropy over classes (labels of -100 carry none), squared error for one number."""
    loss = None
    if labels is not None and config.num_labels == 1:
        loss = functional.mse_loss(logits.squeeze(-1).float(), labels.float())
    elif labels is not None:
        loss = functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100)
    return SequenceClassifierOutput(loss=loss, logits=logits)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return found


def own_keys(config: Mapping[str, Any], *drop: str) -> dict[str, Any]:
    """A published configuration's keys without those that speak of remote code and classes."""
    left_out = {"auto_map", "architectures", "model_type", "_name_or_path", "transformers_version", *drop}
    return {key: value for key, value in config.items() if key not in left_out}
