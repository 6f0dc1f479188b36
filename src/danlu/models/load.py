"""Loading and saving of models and tokenizers: local folders first, the hub only when a hub id is given, remote code never."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from danlu.exceptions import ModelError
from danlu.models.places import resolve
from danlu.models.registry import family_of
from danlu.text.tokenizer import quiet


def load_model(model: str | Path, *, scalar: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model, or (scalar) the same trunk with a one-number head for rewards and values.

    A scalar head that the folder does not hold starts at zero.

    Raises:
        ModelError: the folder is incomplete, its family unknown, or its weights do not fit its configuration.
    """
    import transformers

    quiet()
    name, local = resolve(model)
    # Without a match, too, this registers danlu's own classes with transformers.
    family = family_of(json.loads((Path(name) / "config.json").read_text("utf-8")) if local else {})
    if family is not None:
        return family.load(Path(name), dtype, scalar)
    auto = transformers.AutoModelForSequenceClassification if scalar else transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"num_labels": 1} if scalar else {}
    try:
        loaded, info = auto.from_pretrained(
            name,
            dtype=dtype,
            local_files_only=local,
            trust_remote_code=False,
            output_loading_info=True,
            attn_implementation="eager",
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot be loaded: {first}", file=name, hint="check config.json and the weight files"
        ) from error
    missing = [k for k in info["missing_keys"] if not (scalar and k.split(".")[0] in ("score", "classifier"))]
    if missing:
        raise ModelError(
            f"{len(missing)} parameters are missing from the weights, the first is {sorted(missing)[0]}",
            file=name,
            hint="the download may be incomplete, or the configuration of another model",
        )
    if scalar and info["missing_keys"]:
        nn.init.zeros_(loaded.get_parameter(sorted(info["missing_keys"])[0]))
    return loaded


def starter(
    vocab_size: int,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    context: int,
    seed: int,
    ids: dict[str, int],
) -> Any:
    """A small Llama with fresh weights, a function of its shape and seed alone (not of transformers' initialisation).

    Normal(0, 0.02); projections back into the residual stream are divided by sqrt(2 * layers) (Radford et al. 2019).

    Args:
        hidden_size: a multiple of heads; the MLP is 8/3 of it, rounded up to 32.
        ids: `bos_token_id`, `eos_token_id`, `pad_token_id` of the tokenizer.
    """
    from transformers import LlamaForCausalLM

    config = starter_config(
        vocab_size, hidden_size=hidden_size, layers=layers, heads=heads, kv_heads=kv_heads, context=context, ids=ids
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() < 2:
                parameter.fill_(1.0)
                continue
            std = 0.02 / (2 * layers) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            parameter.normal_(0.0, std, generator=generator)
    return model


def starter_config(
    vocab_size: int, *, hidden_size: int, layers: int, heads: int, kv_heads: int, context: int, ids: dict[str, int]
) -> Any:
    """The configuration of `starter`, with its arguments."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 3 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        attn_implementation="eager",
        **ids,
    )


def save_model(model: Any, tokenizer: Any | None, folder: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """Writes an ordinary transformers folder (safetensors), under a temporary name first.

    Args:
        state: weights to write in place of the model's own (a merged adapter).
    """
    quiet()
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return folder
