"""Tokenizers: train one, load one from a folder or a hub id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from danlu.exceptions import ModelError, SettingsError
from danlu.hub import notice_no_network
from danlu.text.own_tokenizers import tokenizer_class_of

DOCUMENT = "<|endoftext|>"
PAD = "<|pad|>"
TURN_END = "<|im_end|>"
BYTES = 256


def quiet() -> None:
    """Turns transformers' progress bars and load reports off: what matters in them is checked and said by danlu."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


ModelType = Literal["bpe", "sentencepiece", "sentencepiece-bpe"]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    context: int = 2048,
    model_type: ModelType = "bpe",
    template: str = "chatml",
) -> Any:
    """A tokenizer with single digits and chat tokens. Every text in any language comes back from its tokens as it was.

    Documents begin with `<|endoftext|>`. What ends an answer in the template is also the end-of-sequence token; `<|im_end|>`
    in templates that have no token for that.

    Args:
        texts: what to learn from. What is learnt from stays in memory: see `text/sample.py`.
        vocab_size: at least 256 bytes and the special tokens, and with SentencePiece 1 unknown token and the characters.
        context: tokens that a model with it will take.
        model_type: `bpe` over bytes (Sennrich et al. 2016, as GPT-2); `sentencepiece` is its Unigram (Kudo 2018),
            `sentencepiece-bpe` its BPE over characters (as Llama), both with bytes for what has no piece.
        template: a shipped chat template. It is the tokenizer's own then, and its control tokens are tokens.

    Returns:
        A fast transformers tokenizer.

    Raises:
        SettingsError: `vocab_size` is too small for the text, or the sentencepiece package is needed and missing.
        DataError: there is nothing to learn from.
        TemplateError: no template has this name.
    """
    from transformers import PreTrainedTokenizerFast

    from danlu.text import sentencepiece
    from danlu.text.template_registry import named_template

    quiet()
    entry = named_template(template)
    end = entry.stop or TURN_END
    others = [token for token in entry.control_tokens if token != end]
    # Pad and stop are distinct tokens: where they are one, masks made from ids hide the stop token (arXiv 2403.17031).
    special = [DOCUMENT, PAD, *others, end]
    smallest = BYTES + len(special)
    if vocab_size < smallest:
        raise SettingsError(f"vocab_size is {vocab_size}; at least {smallest} are needed", field="vocab_size")
    named = {"bos_token": DOCUMENT, "eos_token": end, "pad_token": PAD}
    if model_type == "bpe":
        core = _train_bytes(texts, vocab_size, special)
    else:
        algorithm: Literal["unigram", "bpe"] = "unigram" if model_type == "sentencepiece" else "bpe"
        core = sentencepiece.train_core(texts, vocab_size, special, algorithm)
        named["unk_token"] = sentencepiece.UNKNOWN
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        **named,
        extra_special_tokens=others,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = entry.source_for(tokenizer)
    return tokenizer


def _train_bytes(texts: Iterable[str], vocab_size: int, special: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return core


def load_tokenizer(model: str | Path, *, local: bool = True) -> Any | None:
    """The tokenizer of a model folder or hub id, or None when there are no tokenizer files.

    `auto_map`, which names code of the folder, is never run, and is left out when the tokenizer is saved.

    Raises:
        ModelError: there are tokenizer files, but they cannot be read.
    """
    tokenizer = _opened(model, local=local)
    if tokenizer is not None:
        tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _opened(model: str | Path, *, local: bool) -> Any | None:
    from transformers import AutoTokenizer

    quiet()
    folder = Path(model)
    own = tokenizer_class_of(folder)
    if own is not None:
        return own(folder)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
    own = mapped_tokenizer(folder) if folder.is_dir() else None
    if own is not None:
        return own
    if folder.is_dir() and not any((folder / n).is_file() for n in names):
        return None
    if not local:
        notice_no_network()
    try:
        return AutoTokenizer.from_pretrained(str(model), local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"the tokenizer cannot be loaded: {first}", file=model) from error


def mapped_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a folder of MOSS or CPM, as published or as danlu saved it; None for every other folder.

    Raises:
        ModelError: its files are damaged.
    """
    from danlu.text import cpm_tokenizers, moss_tokenizer

    if moss_tokenizer.is_moss(folder):
        return moss_tokenizer.moss_tokenizer(folder)
    return cpm_tokenizers.cpm_tokenizer(folder) if cpm_tokenizers.is_cpm(folder) else None


def unknown_share(tokenizer: Any, texts: Sequence[str]) -> float:
    """Share of the tokens of some texts that stand for what a tokenizer does not know: 0 to 1.

    A text of which no token is left counts as an unknown one.
    """
    tokens = unknown = 0
    for text in texts:
        plain = text.strip().encode("utf-8", "replace").decode("utf-8")
        if not plain:
            continue
        ids = tokenizer.encode(plain, add_special_tokens=False)
        tokens += len(ids) or 1
        unknown += sum(i == tokenizer.unk_token_id for i in ids) if ids else 1
    return unknown / tokens if tokens else 0.0


def document_end(tokenizer: Any) -> int | None:
    """The token after a document: the one that separates documents if there is one, else the end of a sequence."""
    known = DOCUMENT in tokenizer.get_vocab()
    end: int | None = tokenizer.convert_tokens_to_ids(DOCUMENT) if known else tokenizer.eos_token_id
    return end


def document_windows(tokenizer: Any, texts: Sequence[str], max_length: int) -> Iterator[list[int]]:
    """Texts as windows of at most `max_length` ids: of each document start, text, document end.

    A long text is cut into windows that each begin with the last id of the window before, so that no token goes unpredicted.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    end = document_end(tokenizer)
    step = max(max_length - 1, 1)
    for found in tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []:
        ids = ([start] if start is not None else []) + found + ([end] if end is not None else [])
        yield from (ids[i : i + max_length] for i in range(0, max(len(ids) - 1, 1), step))
