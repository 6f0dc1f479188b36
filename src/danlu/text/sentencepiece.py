"""SentencePiece: its model files as fast tokenizers, read without its package; and training, for which the package is needed.

Fast tokenizers find a piece by its text alone, so pieces that must never come out of text (bytes, control tokens) are kept
out of the merges (BPE), or the text is cut inside them before pieces are looked for (Unigram).
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from danlu.exceptions import DataError, ModelError, SettingsError

SPACE: Final = "\u2581"
UNKNOWN: Final = "<unk>"
CHARACTER_COVERAGE: Final = 0.9995  # the share of the text's characters that get a piece of their own, if need be
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_UNIGRAM, _BPE = 1, 2
_BYTE_PIECE: Final = re.compile(r"<0x[0-9A-F]{2}>")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """An entry of the vocabulary: kind 1 is normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 a byte."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a `.model` file says."""

    pieces: list[Piece]
    algorithm: int
    unknown: int
    byte_fallback: bool
    charsmap: bytes
    prefix: bool
    single_spaces: bool

    def token(self, kind: int, names: Sequence[str]) -> str | None:
        """The first of these names that is a piece of this kind."""
        return next((n for n in names if any(p.text == n and p.kind == kind for p in self.pieces)), None)


# -- reading ------------------------------------------------------------------------------------------------------------


def read_model(file: str | Path) -> SentencePieceModel:
    """A SentencePiece model file.

    Raises:
        ModelError: it is missing, damaged, or of another kind.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", file=file) from error
    try:
        return parse_model(content)
    except (ValueError, struct.error) as error:
        raise ModelError(
            f"this is no SentencePiece model: {error}",
            file=file,
            hint="the download may be incomplete or a pointer file",
        ) from error


def parse_model(content: bytes) -> SentencePieceModel:
    """The model in the bytes of a `.model` file (sentencepiece_model.proto); `ValueError` if it is none."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(content):
        if number == 1:
            piece = _record(value)
            (score,) = struct.unpack("<f", _value(piece, 2, bytes(4)))
            pieces.append(Piece(_value(piece, 1, b"").decode("utf-8"), score, _value(piece, 3, _NORMAL)))
        elif number == 2:
            trainer = _record(value)
        elif number == 3:
            normalizer = _record(value)
    algorithm, unknown = _value(trainer, 3, _UNIGRAM), _value(trainer, 40, 0)
    if not pieces:
        raise ValueError("it has no pieces")
    if algorithm not in (_UNIGRAM, _BPE):
        raise ValueError(f"its algorithm is number {algorithm}; Unigram (1) and BPE (2) are known")
    if _value(trainer, 24, 0):
        raise ValueError("it writes spaces behind words, which fast tokenizers do not")
    if unknown >= len(pieces):
        raise ValueError(f"its unknown piece is number {unknown}, and it has {len(pieces)} pieces")
    if len({piece.text for piece in pieces}) < len(pieces):
        raise ValueError("it has a piece twice")
    return SentencePieceModel(
        pieces=pieces,
        algorithm=algorithm,
        unknown=unknown,
        byte_fallback=bool(_value(trainer, 35, 0)),
        charsmap=_value(normalizer, 2, b""),
        prefix=bool(_value(normalizer, 3, 1)),
        single_spaces=bool(_value(normalizer, 4, 1)),
    )


def _record(value: Any) -> dict[int, Any]:
    if not isinstance(value, bytes):
        raise ValueError("found a number where a record is expected")
    return dict(_fields(value))


def _value(record: Mapping[int, Any], number: int, default: T) -> T:
    found = record.get(number, default)
    if not isinstance(found, type(default)):
        raise ValueError(f"field {number} is of another type than expected")
    return found


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: numbers as int, everything else as bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(content, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {at} is no field of a protocol buffer")
        if at + length > len(content):
            raise ValueError(f"it ends inside a field that begins at byte {at}")
        yield key >> 3, content[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(content):
            raise ValueError(f"it ends inside a number at byte {at}")
        byte = content[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7


# -- as a fast tokenizer ------------------------------------------------------------------------------------------------


def core_of(model: SentencePieceModel) -> Any:
    """A `tokenizers.Tokenizer` that cuts as SentencePiece itself does."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if model.algorithm == _BPE:
        core = Tokenizer(_bpe(model, models))
    else:
        core = Tokenizer(_unigram(model, models))
        if pattern := _cut_inside(model):
            core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.single_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.prefix:
        steps.append(normalizers.Prepend(SPACE))
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if model.prefix else undo)
    core.add_tokens(
        [
            AddedToken(p.text, normalized=False, special=p.kind == _CONTROL)
            for p in model.pieces
            if p.kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return core


def _unigram(model: SentencePieceModel, models: Any) -> Any:
    vocabulary = [(p.text, p.score) for p in model.pieces]
    return models.Unigram(vocabulary, unk_id=model.unknown, byte_fallback=model.byte_fallback)


def _cut_inside(model: SentencePieceModel) -> str:
    """A pattern for the first character of everything that looks like a byte or control piece; empty if there is none."""
    hidden = [p.text for p in model.pieces if p.kind not in (_NORMAL, _USER_DEFINED) and len(p.text) > 1]
    patterns = [f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in hidden if not _BYTE_PIECE.fullmatch(t)]
    if len(patterns) < len(hidden):
        patterns.append("<(?=0x[0-9A-F]{2}>)")
    return "|".join(patterns)


def _bpe(model: SentencePieceModel, models: Any) -> Any:
    """SentencePiece joins the neighbours whose joint piece has the best score: every way to split a piece is a merge."""
    ids = {p.text: i for i, p in enumerate(model.pieces)}
    usable = {p.text for p in model.pieces if p.kind in (_NORMAL, _USER_DEFINED)}
    ranked = sorted(
        (-piece.score, index, at)
        for index, piece in enumerate(model.pieces)
        if piece.kind == _NORMAL
        for at in range(1, len(piece.text))
        if piece.text[:at] in usable and piece.text[at:] in usable
    )
    texts = ((model.pieces[index].text, at) for _, index, at in ranked)
    return models.BPE(
        ids,
        [(text[:at], text[at:]) for text, at in texts],
        unk_token=model.pieces[model.unknown].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def open_model(file: str | Path) -> Any:
    """A SentencePiece model file as a transformers tokenizer."""
    from transformers import PreTrainedTokenizerFast

    model = read_model(file)
    named = {
        "bos_token": model.token(_CONTROL, ("<s>", "<bos>", "<|startoftext|>")),
        "eos_token": model.token(_CONTROL, ("</s>", "<eos>", "<eod>", "<|endoftext|>")),
        "pad_token": model.token(_CONTROL, ("<pad>", "<|pad|>")),
        "unk_token": model.pieces[model.unknown].text,
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=core_of(model),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if token},
    )


# -- training -----------------------------------------------------------------------------------------------------------


def train_core(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str], algorithm: Literal["unigram", "bpe"]
) -> Any:
    """Trains with the sentencepiece package, and returns a `tokenizers.Tokenizer`.

    Nothing is normalised, no space is put before a text, single digits stand alone, and what has no piece becomes bytes:
    every text comes back as it was. Ids: `<unk>`, the special tokens, 256 bytes, then the learned pieces.

    Raises:
        SettingsError: the package is missing, or `vocab_size` cannot hold the text's characters.
        DataError: there is no text.
    """
    try:
        import sentencepiece
    except ImportError:
        raise SettingsError(
            "training a SentencePiece tokenizer needs the sentencepiece package",
            field="model_type",
            hint="pip install sentencepiece, or take model_type bpe, which needs nothing",
        ) from None
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=written,
            vocab_size=vocab_size,
            model_type=algorithm,
            byte_fallback=True,
            character_coverage=CHARACTER_COVERAGE,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            control_symbols=list(special_tokens),
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            hard_vocab_limit=False,
            max_sentence_length=1 << 20,
            num_threads=1,  # more would make the result depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _reason(str(error), vocab_size) from error
    return core_of(parse_model(written.getvalue()))


def _reason(said: str, vocab_size: int) -> SettingsError | DataError:
    """The trainer's complaint in danlu's words."""
    if found := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", said):
        return SettingsError(
            f"vocab_size is {vocab_size}, but the characters of this text and 256 bytes alone need {found[2]}",
            field="vocab_size",
            hint=f"set it to {2 * int(found[2])} or more, or take model_type bpe, which can do with 260",
        )
    if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", said):
        return SettingsError(
            f"vocab_size is {vocab_size}, but this text gives only {found[1]} pieces", field="vocab_size"
        )
    if "sentences_.empty()" in said:
        return DataError("there is no text to train a tokenizer on")
    return DataError(f"SentencePiece cannot train on this text: {said.strip()[-200:]}")
