"""Opening a tokenizer, whatever files it comes in: a transformers folder, GPT-2's two files, or a SentencePiece model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from danlu.exceptions import ModelError
from danlu.text.own_tokenizers import tokenizer_class_of
from danlu.text.sentencepiece import open_model
from danlu.text.tokenizer import load_tokenizer, quiet

VOCABULARIES: Final = ("encoder.json", "vocab.json")
MERGES: Final = ("vocab.bpe", "merges.txt")
KNOWN: Final = "tokenizer.json, encoder.json with vocab.bpe, vocab.json with merges.txt, or a SentencePiece *.model"


def open_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a folder or file, as a fast transformers tokenizer.

    Args:
        path: a folder with tokenizer files (or whose `model` folder has some), `tokenizer.json`, one of GPT-2's files
            beside the other, or a SentencePiece model.

    Raises:
        ModelError: there are no such files, or they are damaged.
    """
    quiet()
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    if not path.exists():
        raise ModelError("no such file or folder", file=path, hint=f"known: {KNOWN}")
    if path.suffix == ".model":
        return open_model(path)
    if path.name in (*VOCABULARIES, *MERGES):
        found = _byte_level_files(path.parent)
        if found is None:
            raise ModelError(f"the file beside it is missing: {MERGES[0]} or {VOCABULARIES[0]}", file=path)
        return _byte_level(*found)
    if path.suffix == ".json":
        return _from_json(path)
    raise ModelError("this is no tokenizer file", file=path, hint=f"known: {KNOWN}")


def has_tokenizer(path: Path) -> bool:
    """Whether `open_tokenizer` would find files there."""
    if path.is_file():
        return True
    inner = path / "model"
    return _is_transformers(path) or _raw(path) is not None or _is_transformers(inner) or _raw(inner) is not None


def _is_transformers(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _raw(folder: Path) -> tuple[Path, ...] | None:
    found = _byte_level_files(folder)
    if found is not None:
        return found
    models = sorted(folder.glob("*.model"))
    return (models[0],) if len(models) == 1 else None


def _byte_level_files(folder: Path) -> tuple[Path, Path] | None:
    for vocabulary, merges in zip(VOCABULARIES, MERGES, strict=True):
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return folder / vocabulary, folder / merges
    return None


def _from_folder(folder: Path) -> Any:
    for place in (folder, folder / "model"):
        own = tokenizer_class_of(place)
        if own is not None:
            return own(place)
        raw = _raw(place)
        if _is_transformers(place):
            if not (place / "tokenizer.json").is_file() and raw is not None and len(raw) == 1:
                return open_model(raw[0])  # transformers would need two more packages for it
            return load_tokenizer(place)
        if raw is not None:
            return open_model(raw[0]) if len(raw) == 1 else _byte_level(raw[0], raw[1])
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    raise ModelError(f"no tokenizer files in this folder (found: {found})", file=folder, hint=f"known: {KNOWN}")


def _from_json(path: Path) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        core = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"this is no tokenizer.json: {error}", file=path, hint=f"known: {KNOWN}") from error
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def _byte_level(vocabulary: Path, merges: Path) -> Any:
    from transformers import GPT2Tokenizer

    try:
        ids = json.loads(vocabulary.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"cannot be read as JSON: {error}", file=vocabulary) from error
    if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()):
        raise ModelError("found no object of tokens and their ids", file=vocabulary)
    pairs: list[tuple[str, str]] = []
    try:
        # Split at \n only: merges hold characters that other functions take for line ends.
        lines = merges.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot be read as text: {error}", file=merges) from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not right or left not in ids or right not in ids or left + right not in ids:
            raise ModelError(
                f"found {line!r}, expected two tokens of {vocabulary.name} that make a third", file=merges, line=number
            )
        pairs.append((left, right))
    end = "<|endoftext|>" if "<|endoftext|>" in ids else None
    return GPT2Tokenizer(vocab=ids, merges=pairs, unk_token=end, bos_token=end, eos_token=end)
