"""Models as GGUF files for llama.cpp and Ollama: F16, Q8_0 or Q4_0, with the tokenizer and the chat template inside.

Weights are converted and written one after the other, so that a file takes no more memory than the model and its largest tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from danlu.exceptions import ModelError, SettingsError
from danlu.models.gguf_layout import Value, Weight, architecture_of, shape_of, weights_of
from danlu.models.gguf_vocab import Vocabulary

GgufType = Literal["f16", "q8_0", "q4_0"]
TYPES: Final[tuple[GgufType, ...]] = ("f16", "q8_0", "q4_0")
BLOCK: Final = 32  # weights that share a scale in Q8_0 and Q4_0
F16_LARGEST: Final = 65504.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be written: tensors with their GGML types, and the bytes they take together (without the header)."""

    weights: list[tuple[Weight, Any]]
    bytes: int


def library() -> Any:
    """The `gguf` package.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise SettingsError("writing GGUF needs the gguf package", hint="pip install 'danlu[gguf]'") from None
    return gguf


def plan(model: Any, kind: GgufType) -> Plan:
    """The tensors of a file and their types: matrices as asked, everything else in 32 bits.

    In Q4_0 embeddings and head keep 8 bits, which costs little and spares the words that are rare. A matrix whose rows are no
    multiple of 32 stays in F16.

    Raises:
        ModelError: the family has no place in GGUF.
    """
    gguf = library()
    types = gguf.GGMLQuantizationType
    asked = {"f16": types.F16, "q8_0": types.Q8_0, "q4_0": types.Q4_0}[kind]
    found = []
    for weight in weights_of(model):
        chosen = asked
        if weight.exact:
            chosen = types.F32
        elif kind != "f16" and weight.shape[-1] % BLOCK:
            chosen = types.F16
        elif kind == "q4_0" and weight.name in ("token_embd.weight", "output.weight"):
            chosen = types.Q8_0
        found.append((weight, chosen))
    return Plan(found, sum(_bytes(gguf, w.shape, t) for w, t in found))


def _bytes(gguf: Any, shape: tuple[int, ...], kind: Any) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // int(block) * int(size)


def write(
    path: Path,
    model: Any,
    vocabulary: Vocabulary,
    kind: GgufType,
    *,
    name: str,
    chat_template: str = "",
    facts: Mapping[str, Value] | None = None,
) -> None:
    """Writes a file. It is the caller's to give a temporary path: an error leaves what was written so far.

    Args:
        model: a transformers model of a family in `gguf_layout`, in any dtype.
        chat_template: Jinja source, or "".
        facts: more keys of the file, such as `general.license`.

    Raises:
        ModelError: the family has no place in GGUF, or a weight is too large for it.
    """
    gguf = library()
    architecture = architecture_of(model.config)
    planned = plan(model, kind)
    writer = gguf.GGUFWriter(str(path), architecture)
    try:
        file_types = gguf.LlamaFileType
        asked = {"f16": file_types.MOSTLY_F16, "q8_0": file_types.MOSTLY_Q8_0, "q4_0": file_types.MOSTLY_Q4_0}
        writer.add_name(name)
        writer.add_file_type(asked[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in {f"{architecture}.{k}": v for k, v in shape_of(model.config).items()}.items():
            _add(writer, key, value)
        for key, value in (facts or {}).items():
            _add(writer, key, value)
        _add_vocabulary(writer, vocabulary, chat_template)
        for weight, chosen in planned.weights:
            shape, dtype, raw = _stored(gguf, weight.shape, chosen)
            writer.add_tensor_info(weight.name, shape, np.dtype(dtype), _bytes(gguf, weight.shape, chosen), raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, chosen in planned.weights:
            writer.write_tensor_data(converted(weight.read(), chosen, weight.name))
    finally:
        writer.close()


def _stored(gguf: Any, shape: tuple[int, ...], kind: Any) -> tuple[tuple[int, ...], type, Any]:
    """Shape, dtype and GGML type as the writer wants them: packed tensors are bytes to it."""
    types = gguf.GGMLQuantizationType
    if kind in (types.F32, types.F16):
        return shape, np.float32 if kind == types.F32 else np.float16, None
    return tuple(gguf.quant_shape_to_byte_shape(shape, kind)), np.uint8, kind


def converted(tensor: Tensor, kind: Any, name: str) -> Any:
    """A tensor's values in a GGML type, as numpy array.

    Raises:
        ModelError: a value is not finite, or too large for half precision.
    """
    gguf = library()
    values = tensor.to(torch.float32).contiguous().cpu().numpy()
    largest = float(np.abs(values).max(initial=0.0))
    if not np.isfinite(largest):
        raise ModelError(f"the weights '{name}' hold values that are no numbers")
    if kind == gguf.GGMLQuantizationType.F32:
        return values
    if largest > F16_LARGEST:
        raise ModelError(f"the weights '{name}' reach {largest:.3g}; half precision ends at {F16_LARGEST:.0f}")
    if kind == gguf.GGMLQuantizationType.F16:
        return values.astype(np.float16)
    return gguf.quants.quantize(values, kind)


def _add(writer: Any, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, chat_template: str) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.prefix)
        writer.add_remove_extra_whitespaces(vocabulary.single_spaces)
        if vocabulary.model == "t5" and vocabulary.charsmap:
            writer.add_precompiled_charsmap(vocabulary.charsmap)
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "eot": writer.add_eot_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for key, token in vocabulary.ids.items():
        add[key](token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if chat_template:
        writer.add_chat_template(chat_template)


def read_back(path: Path, model: Any) -> dict[str, Tensor]:
    """The weights of a file by transformers' names, in 32 bits: what a quantised file really holds.

    Args:
        model: a model of the same shape.
    """
    gguf = library()
    stored = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}
    found: dict[str, Tensor] = {}
    for weight in weights_of(model):
        if weight.source:
            tensor = stored[weight.name]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found[weight.source] = weight.restore(torch.from_numpy(np.array(values, np.float32)).reshape(weight.shape))
    return found
