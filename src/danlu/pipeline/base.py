"""What a base model is chosen by: `danlu base MODEL... --text FILES`, and the published models of `--known`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml

from danlu.evals.perplexity import per_character
from danlu.models.families import context_of
from danlu.models.load import check_vocabulary, is_encoder_decoder, load_model, raw_config
from danlu.models.quantize import is_quantized, load_quantized
from danlu.models.registry import family_of
from danlu.models.weights import read_weights, weight_files
from danlu.pipeline.footprint import (
    MB,
    WEIGHT_BYTES,
    Shape,
    adapter_parameters,
    inference_memory,
    kept,
    shape_of_folder,
)
from danlu.text.coverage import coverage, plain_own, plain_rates
from danlu.text.tokenizer import load_tokenizer
from danlu.text.word_pieces import WordPieces

GB: Final = 1e9
BITS: Final = (16, 8, 4)
LENGTH: Final = 512  # tokens of a training row for the LoRA figure
CACHED: Final = 2048  # tokens in the cache for the inference figure, or the context if that is less
RANK: Final = 8
SHORT: Final = 200_000  # characters that perplexity is measured on
CHINESE: Final = [chr(code) for code in range(0x4E00, 0x9FA6)]  # the 20,902 unified ideographs of Unicode 1.1


@dataclass(frozen=True)
class Base:
    """One model. What cannot be told is None.

    inference_gb, lora_gb: by bits of the weights; perplexity: per character of the text, exp of its negative log-likelihood over
    its characters; own_chinese: Chinese characters that are one token.
    """

    model: str
    family: str
    parameters: int | None
    context: int | None
    licence: str | None
    languages: list[str]
    vocabulary: int | None
    tokens_per_character: dict[str, float]
    own_chinese: int | None
    inference_gb: dict[int, float]
    lora_gb: dict[int, float]
    perplexity_per_character: float | None


def bases(models: Sequence[str], texts: Iterable[str] = ()) -> list[Base]:
    """Measures model folders.

    Args:
        texts: what tokens and perplexity are measured on; empty: neither is.

    Raises:
        ModelError: a folder is none of a model.
    """
    read = list(texts)
    return [_base(model, read) for model in models]


def _base(model: str, texts: Sequence[str]) -> Base:
    folder = Path(model)
    raw = raw_config(model, True)
    own = family_of(raw)
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        check_vocabulary(raw, tokenizer, folder)
    shape = shape_of_folder(model) if not is_encoder_decoder(raw) else None
    # Packed weights are no parameters, and the files of danlu's own families hold more than parameters.
    counted = shape is not None and bool(weight_files(folder)) and (own is not None or is_quantized(folder))
    count = shape.parameters if counted and shape is not None else _parameters(folder)
    licence, languages = stated(folder)
    return Base(
        model=model,
        family=own.name if own is not None else str(raw.get("model_type", "?")),
        parameters=count,
        context=_context(raw),
        licence=licence,
        languages=languages,
        vocabulary=len(tokenizer) if tokenizer is not None else None,
        tokens_per_character=_rates(tokenizer, texts) if tokenizer is not None and texts else {},
        own_chinese=own_chinese(tokenizer) if tokenizer is not None else None,
        inference_gb=_inference(shape, count),
        lora_gb=_lora(shape),
        perplexity_per_character=_perplexity(folder, tokenizer, texts) if count and texts and tokenizer else None,
    )


def _parameters(folder: Path) -> int | None:
    files = weight_files(folder)
    return sum(t.numel() for _, t in read_weights(files) if t.is_floating_point()) if files else None


def _context(raw: Any) -> int | None:
    names = ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "n_ctx", "max_seq_len")
    found = [raw[name] for name in names if isinstance(raw.get(name), int)]
    return found[0] if found else None


def stated(folder: Path) -> tuple[str | None, list[str]]:
    """Licence and languages that the front matter of README.md states; else the first line of LICENSE, and no language."""
    readme, licence = folder / "README.md", folder / "LICENSE"
    head: Any = {}
    if readme.is_file():
        parts = readme.read_text("utf-8", "replace").split("---", 2)
        if len(parts) == 3 and not parts[0].strip():
            try:
                head = yaml.safe_load(parts[1])
            except yaml.YAMLError:
                head = {}  # a model card that is no YAML states nothing
    head = head if isinstance(head, dict) else {}
    named = head.get("license_name") or head.get("license")
    if not named and licence.is_file():
        named = next(
            (line.strip() for line in licence.read_text("utf-8", "replace").splitlines() if line.strip()), None
        )
    languages = head.get("language") or []
    return (str(named) if named else None), [
        str(x) for x in (languages if isinstance(languages, list) else [languages])
    ]


def _is_fast(tokenizer: Any) -> bool:
    return getattr(tokenizer, "backend_tokenizer", None) is not None


def _rates(tokenizer: Any, texts: Sequence[str]) -> dict[str, float]:
    if _is_fast(tokenizer):
        found = {n: c.tokens_per_character for n, c in coverage([tokenizer], texts)[0].languages.items()}
    else:
        found = plain_rates(tokenizer, texts)
    return {name: rate for name, rate in found.items() if name in ("zh", "en")}


def own_chinese(tokenizer: Any) -> int:
    """How many of the 20,902 common Chinese characters are one token; LLaMA's tokenizer has about 700."""
    if not _is_fast(tokenizer):
        return plain_own(tokenizer, CHINESE)
    words = WordPieces(tokenizer)
    return sum(words.is_one_token(ids) for ids in words.ids(CHINESE))


def _inference(shape: Shape | None, parameters: int | None) -> dict[int, float]:
    """Weights and the cache of one conversation, as `danlu plan` has them."""
    if shape is None:
        return {b: round(parameters * WEIGHT_BYTES[b] / GB, 3) for b in BITS} if parameters else {}
    positions = min(CACHED, getattr(shape.config, "max_position_embeddings", CACHED))
    found = {b: inference_memory(shape, b, positions=positions) for b in BITS}
    return {b: round((parts["weights"] + parts["cache"]) * MB / GB, 3) for b, parts in found.items()}


def _lora(shape: Shape | None) -> dict[int, float]:
    """Frozen weights, adapters with gradients and AdamW's averages in fp32, and what one row of LENGTH tokens keeps."""
    if shape is None:
        return {}
    adapters = 16.0 * adapter_parameters(shape, RANK)
    length = min(LENGTH, getattr(shape.config, "max_position_embeddings", LENGTH))
    count = kept(shape, length=length, dtype="bfloat16", rank=RANK)
    row = length * (count.layer * shape.layers + count.rest)
    whole = shape.tables + shape.experts
    frozen = {b: (shape.parameters - whole) * WEIGHT_BYTES[b] + 2.0 * whole for b in BITS}
    return {b: round((frozen[b] + adapters + row) / GB, 3) for b in BITS}


def _perplexity(folder: Path, tokenizer: Any, texts: Sequence[str]) -> float | None:
    """Per character, on the first texts; None for encoder-decoders."""
    model = load_quantized(folder) if is_quantized(folder) else load_model(folder)
    if model.config.is_encoder_decoder:
        return None
    taken: list[str] = []
    for text in texts:
        if sum(map(len, taken)) >= SHORT:
            break
        taken.append(text)
    return per_character(model, tokenizer, taken, min(context_of(model.config), 1024))


def known() -> list[dict[str, str]]:
    """The published base and tuned models: name, kind, base, size, tokens, language, licence, commercial, source."""
    found: list[dict[str, str]] = json.loads(
        resources.files("danlu.pipeline").joinpath("known_models.json").read_text("utf-8")
    )
    return found


def page(rows: Sequence[Base], listed: Sequence[dict[str, str]]) -> str:
    """One HTML file with both tables; nothing is loaded from elsewhere."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("danlu.pipeline", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("base_page.html.jinja").render(rows=rows, known=listed, bits=BITS)
