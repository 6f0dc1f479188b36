"""Tokenizers that transformers lacks, by what a folder's files say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from danlu.exceptions import ModelError

FIRST_FILE, LATER_FILE, GLM_FILE = "ice_text.model", "tokenizer.model", "cog-pretrain.model"
NAMES = ("ChatGLMTokenizer", "ChatGLM2Tokenizer")


def tokenizer_class_of(folder: str | Path) -> Callable[[Path], Any] | None:
    """What opens the tokenizer in a folder, or None: transformers itself.

    GLM's Chinese one is told by its file; ChatGLM's by its class in tokenizer_config.json, or by config.json beside its
    SentencePiece file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    if (folder / FIRST_FILE).is_file():
        from danlu.text.chatglm_tokenizers import open_first

        return open_first
    if (folder / GLM_FILE).is_file() and not (folder / "tokenizer.json").is_file():
        from danlu.text.glm_tokenizer import open_glm

        return open_glm
    named = _entry(folder / "tokenizer_config.json", "tokenizer_class")
    if named not in NAMES and (named is not None or _entry(folder / "config.json", "model_type") != "chatglm"):
        return None
    if not (folder / LATER_FILE).is_file():
        if named is None:
            return None  # a model without a tokenizer
        raise ModelError(
            f"ChatGLM's tokenizer needs {FIRST_FILE} (ChatGLM-6B) or {LATER_FILE} (its successors), and neither is here",
            file=folder,
        )
    from danlu.text.chatglm_tokenizers import open_later

    return open_later


def _entry(file: Path, key: str) -> Any:
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None  # whoever opens the tokenizer says what is wrong with the file
    return found.get(key) if isinstance(found, dict) else None
