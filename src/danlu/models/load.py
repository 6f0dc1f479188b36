"""Loading and saving of models and tokenizers: local folders first, the hub only when a hub id is given, remote code never."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danlu.exceptions import ModelError
from danlu.models import cpm2
from danlu.models.heads import SCALAR_HEADS
from danlu.models.packed_layouts import layout_of
from danlu.models.places import is_adapter, resolve
from danlu.models.registry import families, family_of
from danlu.models.scalar import scalar_class
from danlu.models.weights import check_weights, checked
from danlu.text.tokenizer import quiet

# What a family is called in the sentence that says what can be loaded.
TRANSFORMERS = (
    "LLaMA, OPT, BLOOM, GPT-2, GPT-J, GPT-NeoX, StableLM, CodeGen, Falcon, Qwen, GLM-4, Mistral, Gemma, Phi, "
    "T5, mT5, BART"
)


def load_model(model: str | Path, *, scalar: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A language model (decoder or encoder-decoder), or (scalar) the same trunk with a one-number head for rewards and values.

    A scalar head that the folder does not hold starts at zero. Nothing in a model folder is run: families that transformers
    lacks are danlu's own classes (`models/registry.py`). An adapter folder is its base with the adapter in it.

    Raises:
        ModelError: the folder is incomplete or damaged, its family unknown, or its weights do not fit its configuration.
    """
    quiet()
    name, local = resolve(model)
    if local and is_adapter(name):
        from danlu.models.adapter_files import load_adapted

        return load_adapted(name, scalar=scalar, dtype=dtype)
    raw = raw_config(name, local)
    family = family_of(raw)
    _note_code(name, "auto_map" in raw)
    if family is not None:
        folder = Path(name) if local else _fetched(name)
        loaded = family.load(folder, dtype, scalar)
        # Weights that are rewritten while they are read do not come by from_pretrained, which would note the place;
        # adapters name their base by it.
        loaded.name_or_path = loaded.config.name_or_path = str(folder)
    else:
        _check_family(raw, name)
        if (layout := layout_of(raw)) is not None:
            raise ModelError(
                f"this folder holds {layout.bits}-bit weights only ({layout.name}), and ordinary ones are needed",
                file=name,
                hint="give the model it was made from; or danlu export --format hf --dequantize makes ordinary weights of these",
            )
        if local:
            check_weights(Path(name))
        loaded = _from_transformers(name, local, scalar=scalar, dtype=dtype)
    if scalar:
        for head in (n for n in getattr(loaded, "danlu_missing", ()) if n.split(".")[0] in SCALAR_HEADS):
            nn.init.zeros_(loaded.get_parameter(head))
    return loaded


def _from_transformers(name: str, local: bool, *, scalar: bool, dtype: torch.dtype) -> Any:
    import transformers

    where: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    config = _config(name, local)
    if hasattr(config, "attn_pdrop"):
        config.attn_pdrop = 0.0  # published ones have 0.1, and token trees know no dropout of attention
    if scalar:
        config.num_labels = 1
    kind = _class_of(config, name, scalar=scalar)
    transformers.utils.logging.set_verbosity_error()
    return checked(
        lambda: kind.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the shapes can be told
            attn_implementation="eager",
            **where,
        ),
        name,
        absent=lambda parameter: scalar and parameter.split(".")[0] in SCALAR_HEADS,
    )


def _config(name: str, local: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"config.json cannot be used: {first}", file=name, hint="check config.json") from error


def _class_of(config: Any, name: str, *, scalar: bool) -> Any:
    """The transformers class that reads these weights."""
    import transformers

    kind = config.model_type
    if is_encoder_decoder(config):
        if scalar:
            raise ModelError(
                f"'{kind}' is an encoder-decoder; reward models and critics are decoders",
                file=name,
                hint="take a decoder (LLaMA, GPT-2, ...) for this stage",
            )
        known = transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    else:
        known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if hasattr(config, "vision_config"):
        text = getattr(config.get_text_config(), "model_type", "its text model")
        raise ModelError(
            f"'{kind}' reads pictures, too; danlu loads models of text alone",
            file=name,
            hint=f"take the '{text}' model that it was built on",
        )
    if type(config) not in known:
        raise ModelError(
            f"'{kind}' is no language model that answers in text", file=name, hint=f"danlu loads {supported()}"
        )
    return scalar_class(config) if scalar else known[type(config)]


def is_encoder_decoder(config: Any) -> bool:
    """Whether a configuration (or a config.json as a mapping) is of a model that reads a source and writes a target."""
    if isinstance(config, Mapping):
        return bool(config.get("is_encoder_decoder")) or cpm2.says(config)
    return bool(config.is_encoder_decoder)


def raw_config(name: str, local: bool) -> Mapping[str, Any]:
    """config.json as a mapping, of a folder or a hub id.

    Raises:
        ModelError: it cannot be read, or the folder is an adapter.
    """
    if local and is_adapter(name):
        raise ModelError(
            "this folder is an adapter, and a whole model is needed",
            file=name,
            hint=f"danlu merge {name} --into MODEL, and give MODEL; or give the model that it was trained on",
        )
    try:
        if local:
            found = json.loads((Path(name) / "config.json").read_text("utf-8"))
        else:
            from transformers import PreTrainedConfig

            found, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        hint = "copy it from the model" if local else "check the name; a folder with the model needs no network"
        raise ModelError(f"config.json cannot be read: {first}", file=name, hint=hint) from error
    if not isinstance(found, dict):
        raise ModelError("config.json holds no object", file=name, hint="copy it from the model once more")
    return found


def _check_family(raw: Mapping[str, Any], name: str) -> None:
    """Refuses what neither danlu nor transformers has a class for.

    Raises:
        ModelError: with the family's name and what is supported.
    """
    from transformers import CONFIG_MAPPING

    kind = raw.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if not kind:
        raise ModelError(
            "config.json has no model_type", file=name, field="model_type", hint=f"danlu loads {supported()}"
        )
    code = "; its folder wants to run code of its own, which danlu never does" if "auto_map" in raw else ""
    raise ModelError(
        f"'{kind}' is a family that neither danlu nor transformers knows{code}",
        file=name,
        field="model_type",
        hint=f"danlu loads {supported()}",
    )


def supported() -> str:
    """The families that can be loaded, for a sentence."""
    return ", ".join([TRANSFORMERS, *(family.name for family in families())])


@functools.cache
def _note_code(name: str, named: bool) -> None:
    """Says once that code which a folder names is not run."""
    if named:
        print(
            f"danlu: {name}: config.json names code of its own (auto_map), which is not run: danlu's and transformers' "
            "classes are used",
            file=sys.stderr,
        )


def _fetched(name: str) -> Path:
    """The folder of a hub model of one of danlu's own families; its code is not fetched."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, ignore_patterns=["*.py"]))


def check_tokenizer(model: Any, tokenizer: Any, name: str | Path) -> None:
    """Refuses a tokenizer whose ids the embedding has no rows for.

    Raises:
        ModelError: with both numbers.
    """
    check_rows(model.get_input_embeddings().weight.shape[0], tokenizer, name)


def check_vocabulary(raw: Mapping[str, Any], tokenizer: Any, name: str | Path) -> None:
    """`check_tokenizer` by config.json, before the weights are read.

    Raises:
        ModelError: with both numbers.
    """
    sizes = [raw.get(key) for key in ("vocab_size", "padded_vocab_size")]
    rows = max((size for size in sizes if isinstance(size, int)), default=0)
    if rows:
        check_rows(rows, tokenizer, name)


def check_rows(rows: int, tokenizer: Any, name: str | Path) -> None:
    """See `check_tokenizer`."""
    ids = max(tokenizer.get_vocab().values(), default=0) + 1
    if ids > rows:
        raise ModelError(
            f"the tokenizer has {ids} tokens and the model's embedding {rows} rows",
            file=name,
            hint="the tokenizer is of another model; copy the files that came with this one",
        )


def save_model(
    model: Any,
    tokenizer: Any | None,
    folder: Path,
    state: dict[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Writes an ordinary transformers folder (safetensors), under a temporary name first.

    Args:
        state: weights to write in place of the model's own (a merged adapter).
        max_shard_size: of a weight file, in bytes or as transformers writes it.
    """
    quiet()
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=state, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return folder
