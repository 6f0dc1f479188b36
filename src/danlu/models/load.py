"""Loading and saving of models and tokenizers: local folders first, the hub only when a hub id is given, remote code never."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from danlu.exceptions import ModelError
from danlu.models.places import resolve
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
