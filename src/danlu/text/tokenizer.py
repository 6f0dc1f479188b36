"""Tokenizers: train a byte-level BPE, load one from a folder or a hub id."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from danlu.exceptions import ModelError, SettingsError

DOCUMENT = "<|endoftext|>"
PAD = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
# Pad and stop are distinct tokens: where they are one, masks made from ids hide the stop token (arXiv 2403.17031).
SPECIAL_TOKENS = [DOCUMENT, PAD, TURN_START, TURN_END]
BYTES = 256


def quiet() -> None:
    """Turns transformers' progress bars and load reports off: what matters in them is checked and said by danlu."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, context: int = 2048) -> Any:
    """A byte-level BPE (Sennrich et al. 2016 over bytes, as GPT-2) with single digits and chat tokens.

    Every text in any language can be encoded and decoded without loss. Documents begin with `<|endoftext|>`; a turn of a
    chat ends with `<|im_end|>`, which is also the end-of-sequence token.

    Args:
        texts: what to learn merges from.
        vocab_size: at least 256 bytes + 4 special tokens.

    Returns:
        A transformers tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from danlu.text.chat_template import shipped_template

    quiet()
    smallest = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise SettingsError(f"vocab_size is {vocab_size}; at least {smallest} are needed", field="vocab_size")
    core = Tokenizer(models.BPE())
    # use_regex splits at words and keeps a space with the word after it; digits stand alone, so that numbers compose.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=DOCUMENT,
        eos_token=TURN_END,
        pad_token=PAD,
        extra_special_tokens=[TURN_START],
        chat_template=shipped_template("chatml"),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(model: str | Path, *, local: bool = True) -> Any | None:
    """The tokenizer of a model folder or hub id, or None when there are no tokenizer files.

    Raises:
        ModelError: there are tokenizer files, but they cannot be read.
    """
    from transformers import AutoTokenizer

    quiet()
    folder = Path(model)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
    if folder.is_dir() and not any((folder / n).is_file() for n in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(model), local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"the tokenizer cannot be loaded: {first}", file=model) from error


def encode_document(tokenizer: Any, text: str, max_length: int) -> list[list[int]]:
    """A text as windows of at most `max_length` ids: document start, text, document end.

    A long text is cut into windows that each begin with the last id of the window before, so that no token goes unpredicted.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    end = tokenizer.convert_tokens_to_ids(DOCUMENT) if DOCUMENT in tokenizer.get_vocab() else tokenizer.eos_token_id
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = ([start] if start is not None else []) + ids + ([end] if end is not None else [])
    step = max(max_length - 1, 1)
    return [ids[i : i + max_length] for i in range(0, max(len(ids) - 1, 1), step)]
