"""What model classes of danlu's own share: published folders and rank files into a model, and special ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu.models.chatglm_quantized import unpack_nibbles
from danlu.models.heads import SCALAR_HEADS
from danlu.models.megatron import Join, columns, joined, replicated, rows, whole_state
from danlu.models.weights import build, check_weights, checked, weight_files
from danlu.text.tokenizer import quiet


def load_own(
    model_class: Any,
    config: Any,
    folder: Path,
    dtype: torch.dtype,
    *,
    blocks: Mapping[str, int],
    rename: Callable[[str], str] | None = None,
) -> Any:
    """A model of a class of danlu's own from safetensors, `.bin` (sharded or not) or the training code's rank files.

    A head for numbers or classes may be absent (`load_model` makes it 0). Weights in 8 or 4 bits (`quantization_bit`) are
    made whole while they are read.

    Args:
        blocks: for the merge of rank files: see `splits_of`.
        rename: our name of a parameter of the files, where they have other names.

    Raises:
        ModelError: parameters are missing or have other shapes than the configuration says, or a file is damaged.
    """
    quiet()
    bits = int(getattr(config, "quantization_bit", 0) or 0)
    if weight_files(folder) and not bits and rename is None:
        check_weights(folder)
        return checked(
            lambda: model_class.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the shapes can be told
                attn_implementation="eager",
            ),
            folder,
            absent=_is_head,
        )
    config.quantization_bit = 0
    state = joined([_whole(shard, bits) for shard in whole_state(folder)], splits_of(blocks))
    named = {rename(name): tensor for name, tensor in state.items()} if rename else state
    with torch.device("meta"):
        own = model_class(config).state_dict().keys()
    trunk = str(model_class.base_model_prefix)
    full = {f"{trunk}.{n}" if f"{trunk}.{n}" in own else n: t for n, t in named.items()}
    return build(model_class, config, full, dtype, folder, absent=_is_head, leftovers=False)


def _is_head(name: str) -> bool:
    return name.split(".")[0] in SCALAR_HEADS


def _whole(state: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Tensors in `bits` bits (8 or 4) times their rows' scales, in the scales' dtype; all others as they are."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        scale = state.get(f"{name}_scale")
        if name.endswith("_scale") and name.removesuffix("_scale") in state:
            continue
        if scale is not None:
            numbers = value.to(torch.int8)
            value = (unpack_nibbles(numbers) if bits == 4 else numbers).to(scale.dtype) * scale[:, None]
        found[name] = value
    return found


def splits_of(blocks: Mapping[str, int]) -> list[tuple[str, Join]]:
    """How the ranks of Megatron-like training code share GLM's tensors, by the end of their names.

    Args:
        blocks: of a layer's rows that belong together over ranks (3 where the fused projection is q, k, v; 2 where the two
            halves of a gated layer are), where that is more than one.
    """
    by_rows = ("word_embeddings", "query_key_value", "dense_h_to_4h")
    shared = [(f"{n}.{kind}", rows(blocks.get(n, 1))) for n in by_rows for kind in ("weight", "bias")]
    return [*shared, ("attention.dense.weight", columns), ("dense_4h_to_h.weight", columns), ("", replicated)]


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


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return found


def own_keys(config: Mapping[str, Any], *drop: str) -> dict[str, Any]:
    """A published configuration's keys without those that speak of remote code and classes."""
    left_out = {"auto_map", "architectures", "model_type", "_name_or_path", "transformers_version", *drop}
    return {key: value for key, value in config.items() if key not in left_out}
