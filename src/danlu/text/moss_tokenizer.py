"""MOSS's tokenizer: GPT-2's bytes and merges, and a few tokens of its own that take the space beside them along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from danlu.exceptions import ModelError

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class MossTokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Ids as the original's. Texts have a space around its own tokens, where the original's `decode` puts one."""

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        own = {i for i, token in self.added_tokens_decoder.items() if token.rstrip}
        special = set(self.all_special_ids) if skip_special_tokens else set()
        parts: list[str] = []
        run: list[int] = []
        for i in [*(i for i in ids if i not in special), None]:
            if i is not None and i not in own:
                run.append(i)
                continue
            if run:
                parts.append(super()._decode(run, skip_special_tokens=skip_special_tokens, **options))
            run = []
            if i is not None:
                parts.append(self.convert_ids_to_tokens(i))
        return " ".join(parts)


def is_moss(folder: Path) -> bool:
    """Whether the tokenizer files of a folder are MOSS's as published, or as danlu saved them."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("tokenizer_class")
    except (OSError, ValueError):
        return False
    return bool(named == "MossTokenizer")


def moss_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder with `vocab.json`, `merges.txt` and `added_tokens.json`, or with a `tokenizer.json`.

    Raises:
        ModelError: a file is missing or damaged.
    """
    settings = _read(folder / "tokenizer_config.json", {})
    named = {name: settings[name] for name in NAMED if settings.get(name)}
    named = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    more = {
        "model_max_length": settings.get("model_max_length", 2048),
        "clean_up_tokenization_spaces": False,
        "chat_template": _template(folder, settings),
    }
    if (folder / "tokenizer.json").is_file():
        core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return MossTokenizer(tokenizer_object=core, **named, **more)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    ids = _read(vocabulary)
    if not merges.is_file():
        raise ModelError("the merges of the tokenizer are missing", file=merges, hint="copy merges.txt of the model")
    # Split at \n only: merges hold characters that other functions take for line ends.
    lines = merges.read_text("utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines[lines[0].startswith("#version") :] if line.strip()]
    core = Tokenizer(models.BPE(vocab=ids, merges=pairs))  # type: ignore[arg-type]
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    special = set(named.values())
    own = sorted(_read(folder / "added_tokens.json", {}).items(), key=lambda item: int(item[1]))
    for token, number in own:
        core.add_tokens([AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=token in special)])
        if core.token_to_id(token) != number:
            raise ModelError(
                f"'{token}' has the id {number}, and the vocabulary ends at {core.token_to_id(token)}",
                file=folder / "added_tokens.json",
                hint="vocab.json and added_tokens.json are of different models",
            )
    core.add_special_tokens([AddedToken(t, normalized=False) for t in special if t in ids])
    return MossTokenizer(tokenizer_object=core, **named, **more)


def _template(folder: Path, settings: dict[str, Any]) -> Any:
    written = folder / "chat_template.jinja"
    return written.read_text("utf-8") if written.is_file() else settings.get("chat_template")


def _read(file: Path, default: Any = None) -> Any:
    if default is not None and not file.is_file():
        return default
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(
            f"cannot be read as JSON: {error}", file=file, hint="copy it from the model once more"
        ) from error
