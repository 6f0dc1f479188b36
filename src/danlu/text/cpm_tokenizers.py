"""Tokenizers of CPM-1 and CPM-2: text is cut into words by jieba first, and its spaces and line ends are written as blocks.

CPM-1 joins the words by spaces and gives them to SentencePiece, so that a space between words is no space of the text; CPM-2
looks for the longest pieces of each word in a list. Both need the jieba package (extra `zh`), and the ids are the published ones
with its version 0.42.1.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizer

from danlu.exceptions import ModelError
from danlu.text.sentencepiece import SPACE, core_of, read_model

BLOCKS: Final = str.maketrans(" \n", "\u2582\u2583")
UNBLOCKS: Final = str.maketrans("\u2582\u2583", " \n")
PIECES: Final = ("chinese_vocab.model", "spiece.model")
LIST: Final = "vocab.txt"
# Half-width forms of the full-width characters, but for the punctuation that Chinese text keeps.
HALF: Final = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code) not in "，。！（）？、；："} | {
    0x3000: 0x20
}


def words(text: str) -> list[str]:
    """jieba's words of a text.

    Raises:
        ModelError: the package is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba 0.42 uses what Python and setuptools advise against
            import jieba
    except ImportError:
        raise ModelError("CPM's tokenizers need the jieba package", hint="pip install 'danlu[zh]'") from None
    jieba.setLogLevel("ERROR")
    return list(jieba.cut(text, cut_all=False))


class CpmTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """CPM-1's: jieba, then SentencePiece."""

    vocab_files_names: Final = {"vocab_file": PIECES[1]}
    model_input_names: Final = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **named: Any) -> None:
        model = read_model(vocab_file)
        self.vocab_file = vocab_file
        self._core = core_of(model)
        self._pieces = [piece.text for piece in model.pieces]
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        for name, token in (("eos_token", "<eod>"), ("bos_token", "<eod>"), ("pad_token", "<pad>")):
            if token in self._ids:
                named.setdefault(name, token)
        named.setdefault("unk_token", self._pieces[model.unknown])
        named.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(vocab_file=vocab_file, **named)

    @property
    def vocab_size(self) -> int:
        """Pieces."""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        """Pieces and their ids."""
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        joined = " ".join(word.translate(BLOCKS) for word in words(text))
        return list(self._core.encode(joined, add_special_tokens=False).tokens)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids[str(self.unk_token)])

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index] if index < len(self._pieces) else str(self.unk_token)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Spaces between words go, the blocks become spaces and line ends again."""
        text = "".join(tokens).replace(SPACE, " ")
        return text.replace(" ", "").translate(UNBLOCKS)

    def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
        """Nothing is put around a text."""
        return first + (second or [])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copies the SentencePiece model."""
        target = Path(save_directory) / PIECES[1]
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


class Cpm2Tokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """CPM-2's: half-width forms, jieba, then the longest pieces of a list from the left."""

    vocab_files_names: Final = {"vocab_file": LIST}
    model_input_names: Final = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **named: Any) -> None:
        # Split at \n only: pieces hold characters that other functions take for line ends.
        lines = Path(vocab_file).read_text("utf-8").split("\n")
        self.vocab_file = vocab_file
        self._pieces = [line.strip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        self._longest = max(map(len, self._pieces))
        for name, tokens in (
            ("bos_token", ("<s>",)),
            ("eos_token", ("<eod>", "</s>")),
            ("pad_token", ("<pad>",)),
            ("unk_token", ("<unk>", "[UNK]")),
            ("sep_token", ("<sep>",)),
            ("mask_token", ("<mask>",)),
        ):
            known = next((t for t in tokens if t in self._ids), None)
            if known is not None:
                named.setdefault(name, known)
        named.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(vocab_file=vocab_file, **named)

    @property
    def vocab_size(self) -> int:
        """Lines of the list."""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        """Pieces and their ids."""
        return {**self._ids, **self.added_tokens_encoder}

    def sentinel(self, number: int) -> int:
        """The id of `<s_number>`, which stands for a hidden span.

        Raises:
            KeyError: the list has none of this number.
        """
        return self._ids[f"<s_{number}>"]

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        found: list[str] = []
        for word in words(text.translate(HALF)):
            found += self._cut(word.translate(BLOCKS))
        return found

    def _cut(self, word: str) -> list[str]:
        parts: list[str] = []
        start = 0
        while start < len(word):
            ends = range(min(len(word), start + self._longest), start, -1)
            end = next((e for e in ends if word[start:e] in self._ids), None)
            parts.append(str(self.unk_token) if end is None else word[start:end])
            start = start + 1 if end is None else end
        return parts

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids.get(str(self.unk_token), 0))

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index] if index < len(self._pieces) else str(self.unk_token)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The blocks become spaces and line ends again."""
        return "".join(tokens).replace(" ", "").translate(UNBLOCKS)

    def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
        """Nothing is put around a text."""
        return first + (second or [])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copies the list."""
        target = Path(save_directory) / LIST
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


def is_cpm(folder: Path) -> bool:
    """Whether the tokenizer files of a folder are CPM's: as published beside a config.json of theirs, or as danlu saved them."""
    config, settings = _json(folder / "config.json"), _json(folder / "tokenizer_config.json")
    named = settings.get("tokenizer_class") in ("CpmTokenizer", "Cpm2Tokenizer")
    kind = config.get("model_type")
    ours = kind in ("cpm", "cpm1", "cpm2") or config.get("danlu_family") == "cpm2"
    return (named or ours) and any((folder / name).is_file() for name in (*PIECES, LIST))


def cpm_tokenizer(folder: Path) -> Any:
    """The tokenizer of a CPM folder, by the file it holds.

    Raises:
        ModelError: there is neither a SentencePiece model nor a list.
    """
    settings = _json(folder / "tokenizer_config.json")
    keep = ("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length", "chat_template")
    named = {k: v["content"] if isinstance(v, dict) else v for k, v in settings.items() if k in keep and v is not None}
    written = folder / "chat_template.jinja"
    if written.is_file():
        named["chat_template"] = written.read_text("utf-8")
    for name in PIECES:
        if (folder / name).is_file():
            return CpmTokenizer(str(folder / name), **named)
    if (folder / LIST).is_file():
        return Cpm2Tokenizer(str(folder / LIST), **named)
    raise ModelError(
        "found no tokenizer of CPM", file=folder, hint=f"copy {PIECES[0]} (CPM-1) or {LIST} (CPM-2) beside config.json"
    )


def _json(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"cannot be read as JSON: {error}", file=file) from error
    return found if isinstance(found, dict) else {}
