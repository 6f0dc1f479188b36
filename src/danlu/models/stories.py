"""Models of llama2.c (https://github.com/karpathy/llama2.c) as LLaMA: its `.bin` with weights, and its `.bin` of tokens.

The file is what llama2.c's `legacy_export` writes: seven int32, then fp32 arrays, little-endian. Rotary pairs are neighbours there
(Meta's layout) and halves in transformers, so rows of queries and keys change places.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from danlu.exceptions import ModelError
from danlu.models.weights import build
from danlu.text.sentencepiece import SPACE, Piece, SentencePieceModel, core_of

NEWER: Final = 0x616B3432  # "ak42": later formats begin with it
NAMES: Final = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
BPE, NORMAL, UNKNOWN, CONTROL, BYTE = 2, 1, 2, 3, 6


@dataclass(frozen=True)
class Shape:
    """The seven numbers of the head; `shared` says whether the head is the embedding (their sign says so in the file)."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    shared: bool

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.dim // self.n_heads


def is_stories(path: Path) -> bool:
    """Whether a file (or the one `.bin` of a folder beside `tok*.bin`) is a model of llama2.c."""
    try:
        _shape(model_file(path))
    except (ModelError, OSError):
        return False
    return True


def model_file(path: Path) -> Path:
    """The weights: the file itself, or the only `.bin` of a folder that holds no tokens.

    Raises:
        ModelError: there is none, or more than one.
    """
    if path.is_file():
        return path
    found = [file for file in sorted(path.glob("*.bin")) if not file.name.startswith("tok")]
    if len(found) != 1:
        raise ModelError(f"found {len(found)} models of llama2.c (*.bin)", file=path, hint="give the file itself")
    return found[0]


def _shape(file: Path) -> Shape:
    with file.open("rb") as opened:
        head = opened.read(28)
    if len(head) < 28:
        raise ModelError("the file is cut short", file=file)
    numbers = struct.unpack("<7i", head)
    if numbers[0] == NEWER:
        raise ModelError(
            f"this is version {numbers[1]} of llama2.c's format; danlu reads the first",
            file=file,
            hint="export it with llama2.c's export.py --version 0",
        )
    dim, hidden, layers, heads, key_heads, vocabulary, length = numbers
    shape = Shape(dim, hidden, layers, heads, key_heads, abs(vocabulary), length, shared=vocabulary > 0)
    whole = all(n > 0 for n in (*numbers[:5], shape.vocab_size, shape.seq_len)) and max(numbers[:5]) < 1 << 20
    if not whole or shape.dim % shape.n_heads or shape.n_heads % shape.n_kv_heads:
        said = ", ".join(f"{name} {value}" for name, value in zip(NAMES, numbers, strict=True))
        raise ModelError(f"this is no model of llama2.c (found {said})", file=file)
    return shape


def load(path: Path, dtype: torch.dtype) -> Any:
    """The model as a transformers LLaMA.

    Raises:
        ModelError: the file is damaged, or of another format.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    file = model_file(path)
    shape = _shape(file)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden_dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=shape.shared,
        bos_token_id=1,
        eos_token_id=2,
    )
    return build(LlamaForCausalLM, config, _state(file, shape), dtype, file)


def _state(file: Path, s: Shape) -> dict[str, Tensor]:
    layers, narrow, pairs = s.n_layers, s.n_kv_heads * s.head, s.head // 2
    arrays: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (s.vocab_size, s.dim)),
        ("input_layernorm", (layers, s.dim)),
        ("self_attn.q_proj", (layers, s.dim, s.dim)),
        ("self_attn.k_proj", (layers, narrow, s.dim)),
        ("self_attn.v_proj", (layers, narrow, s.dim)),
        ("self_attn.o_proj", (layers, s.dim, s.dim)),
        ("post_attention_layernorm", (layers, s.dim)),
        ("mlp.gate_proj", (layers, s.hidden_dim, s.dim)),
        ("mlp.down_proj", (layers, s.dim, s.hidden_dim)),
        ("mlp.up_proj", (layers, s.hidden_dim, s.dim)),
        ("model.norm.weight", (s.dim,)),
        ("cos", (s.seq_len, pairs)),  # tables of rotary angles, which are made anew
        ("sin", (s.seq_len, pairs)),
    ]
    arrays += [] if s.shared else [("lm_head.weight", (s.vocab_size, s.dim))]
    wanted = 28 + 4 * sum(int(np.prod(size)) for _, size in arrays)
    if file.stat().st_size < wanted:
        raise ModelError(
            f"the file is cut short: {file.stat().st_size:,} bytes of {wanted:,}",
            file=file,
            hint="download it once more",
        )
    numbers = np.fromfile(file, dtype="<f4", offset=28)
    state: dict[str, Tensor] = {}
    at = 0
    for name, size in arrays:
        count = int(np.prod(size))
        tensor = torch.from_numpy(numbers[at : at + count].astype(np.float32).reshape(size))
        at += count
        if name in ("cos", "sin"):
            continue
        if name.endswith(".weight"):
            state[name] = tensor
            continue
        for layer in range(layers):
            weight = tensor[layer].clone()
            if name.endswith(("q_proj", "k_proj")):
                weight = weight.view(-1, pairs, 2, s.dim).transpose(1, 2).reshape(weight.shape)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    return state


def tokenizer(path: Path, vocabulary: int | None = None) -> Any | None:
    """The tokenizer of `tok*.bin` beside a model, None if there is none: SentencePiece's BPE, as LLaMA's.

    Args:
        path: the model, its folder, or the file of tokens.
        vocabulary: tokens in the file; None: as many as the model's embedding has rows.

    Raises:
        ModelError: the file is damaged.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    file = path if path.is_file() and path.name.startswith("tok") else _tokens_beside(path)
    if file is None:
        return None
    pieces = _pieces(file, vocabulary or _shape(model_file(path)).vocab_size)
    # As LLaMA's model file says: a space is put in front of a text, nothing is normalised, and what has no piece becomes bytes.
    core = core_of(
        SentencePieceModel(
            pieces, algorithm=BPE, unknown=0, byte_fallback=True, charsmap=b"", prefix=True, single_spaces=False
        )
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def _tokens_beside(path: Path) -> Path | None:
    folder = path if path.is_dir() else path.parent
    return next(iter(sorted(folder.glob("tok*.bin"))), None)


def _pieces(file: Path, count: int) -> list[Piece]:
    content = file.read_bytes()
    pieces: list[Piece] = []
    at = 4  # the length of the longest token comes first
    for number in range(count):
        if at + 8 > len(content):
            raise ModelError(
                f"the file ends after {number} of {count} tokens", file=file, hint="it is of another model"
            )
        score, length = struct.unpack_from("<fi", content, at)
        text = content[at + 8 : at + 8 + length].decode("utf-8", "replace").replace(" ", SPACE)
        at += 8 + length
        kind = UNKNOWN if number == 0 else CONTROL if number < 3 else BYTE if number < 259 else NORMAL
        pieces.append(Piece(("<unk>", "<s>", "</s>")[number] if number < 3 else text, score, kind))
    return pieces
