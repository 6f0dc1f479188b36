"""A tokenizer as llama.cpp reads it: byte-level BPE by the name of its pre-tokenizer, SentencePiece by scores.

llama.cpp has no place for a pre-tokenizer's pattern: it knows a list of names. So the steps of a tokenizer are compared with those
that stand behind a name (`llm_tokenizer_bpe` in its source), and a tokenizer with other steps is refused rather than read wrongly.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from typing import Any, Final

from danlu.exceptions import ModelError
from danlu.text.word_pieces import Core, core_of, nodes, style_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # `gguf.TokenType`
_BYTE_PIECE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The steps of a pre-tokenizer (and whether whole words skip the merges) -> llama.cpp's name for it. Of several names for the same
# steps, the one that leaves spaces before punctuation alone and that old versions know, too.
PRE_TOKENIZERS: Final[dict[tuple[tuple[str, ...], bool], str]] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", "bytes"), False): "qwen2",
    ((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", "bytes"), False): "dbrx",
    ((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", "bytes"), True): "llama-bpe",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: "gpt2" (byte-level BPE), "llama" (SentencePiece BPE) or "t5" (SentencePiece Unigram).
        pre: the name of the pre-tokenizer; "default" for SentencePiece.
        tokens, types, scores: one entry for each id; no scores for "gpt2".
        ids: `bos`, `eos`, `eot`, `unk`, `pad` as far as the tokenizer has them.
        prefix: a space is put before a text. `single_spaces`: several in a row become one.
        notes: where llama.cpp will read a text otherwise, in sentences.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    prefix: bool = False
    single_spaces: bool = False
    charsmap: bytes = b""
    notes: list[str] = field(default_factory=list)


def vocabulary_of(tokenizer: Any, size: int, stop_ids: frozenset[int]) -> Vocabulary:
    """A tokenizer's entries for a GGUF file.

    Args:
        tokenizer: a fast transformers tokenizer.
        size: rows of the model's embeddings; ids that the tokenizer does not have are marked as unused.
        stop_ids: tokens that end an answer.

    Raises:
        ModelError: llama.cpp has no tokenizer that cuts texts in this way.
    """
    core = core_of(tokenizer)
    tokens, types = _tokens(tokenizer, core, size)
    ids = _special_ids(tokenizer, stop_ids)
    add_bos, add_eos = _adds(tokenizer)
    if style_of(core) == "bytes":
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in core["model"]["merges"]]
        ids.setdefault("bos", ids["eos"])  # llama.cpp would take token 11 for it
        notes = _flag_notes(core)
        if any(step["type"] == "NFC" for step in nodes(core["normalizer"])):
            notes.append(
                "llama.cpp does not compose characters (NFC) as this tokenizer does; most texts are composed already"
            )
        return Vocabulary(
            "gpt2", _pre_tokenizer(core), tokens, types, ids, add_bos, add_eos, merges=merges, notes=notes
        )
    kind = core["model"]["type"]
    if style_of(core) != "spaces" or kind not in ("BPE", "Unigram"):
        raise ModelError(
            f"a tokenizer of type {kind} that writes spaces as they are cannot be written as GGUF",
            hint="byte-level BPE and SentencePiece can; danlu export --format hf writes a folder for transformers",
        )
    return _sentencepiece(core, tokens, types, ids, (add_bos, add_eos))


def _tokens(tokenizer: Any, core: Core, size: int) -> tuple[list[str], list[int]]:
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= size:
        raise ModelError(
            f"the tokenizer has {max(by_id) + 1} tokens and the model embeddings for {size}",
            hint="the tokenizer may belong to another model",
        )
    tokens = [by_id.get(i, f"[UNUSED{i}]") for i in range(size)]
    types = [NORMAL if i in by_id else UNUSED for i in range(size)]
    if core["model"].get("byte_fallback"):
        for i, token in by_id.items():
            types[i] = BYTE if _BYTE_PIECE.fullmatch(token) else types[i]
    for added in core["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and style_of(core) != "bytes":
        types[unknown] = UNKNOWN
    return tokens, types


def _special_ids(tokenizer: Any, stop_ids: frozenset[int]) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}
    ids = {key: int(i) for key, name in names.items() if (i := getattr(tokenizer, name, None)) is not None}
    others = sorted(stop_ids - {ids.get("eos")})
    if "eos" not in ids:
        if not others:
            raise ModelError("the tokenizer has no end-of-sequence token, so no answer would ever end")
        ids["eos"] = others[0]
    elif others:
        ids["eot"] = others[0]
    return ids


def _adds(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its first and last token around a text by itself."""
    ids = tokenizer("a")["input_ids"]
    if not ids:
        return False, False
    return (
        tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    )


def _flag_notes(core: Core) -> list[str]:
    swallowing = [t["content"] for t in core["added_tokens"] if t["lstrip"] or t["rstrip"]]
    if not swallowing:
        return []
    return [f"{', '.join(swallowing[:3])} take the spaces beside them here, and not in llama.cpp"]


# -- byte-level BPE ---------------------------------------------------------------------------------------------------------


def _pre_tokenizer(core: Core) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    steps = [_step(step) for step in nodes(core["pre_tokenizer"])]
    ignore_merges = bool(core["model"].get("ignore_merges"))
    normalizers = {step["type"] for step in nodes(core["normalizer"])} - {"NFC"}
    name = PRE_TOKENIZERS.get((tuple(steps), ignore_merges))
    if name is None or normalizers or core["model"].get("dropout"):
        found = " + ".join([*sorted(normalizers), *steps]) or "none"
        raise ModelError(
            f"llama.cpp has no pre-tokenizer that cuts texts as this tokenizer does ({found})",
            hint=f"known: {', '.join(PRE_TOKENIZERS.values())}; danlu's own tokenizers are among them",
        )
    return name


def _step(step: dict[str, Any]) -> str:
    kind = step["type"]
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "gpt2" if step["use_regex"] else "bytes"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        return str(step["pattern"]["Regex"])
    return str(kind)


# -- SentencePiece ----------------------------------------------------------------------------------------------------------


def _sentencepiece(
    core: Core, tokens: list[str], types: list[int], ids: dict[str, int], adds: tuple[bool, bool]
) -> Vocabulary:
    steps = [*nodes(core["normalizer"]), *nodes(core["pre_tokenizer"])]
    prefixes = [s for s in steps if s["type"] == "Prepend" or s.get("prepend_scheme") in ("always", "first")]
    single = any(s["type"] == "Replace" and s["pattern"].get("Regex") == " {2,}" for s in steps)
    charsmap = next((_decoded(s["precompiled_charsmap"]) for s in steps if s["type"] == "Precompiled"), b"")
    notes = _flag_notes(core)
    ids.setdefault("bos", ids["eos"])
    if any(s.get("prepend_scheme") == "first" for s in prefixes):
        notes.append("llama.cpp puts a space after every control token, this tokenizer before the first word only")
    if core["model"]["type"] == "Unigram":
        scores = [0.0] * len(tokens)
        for i, (_, score) in enumerate(core["model"]["vocab"]):
            scores[i] = float(score)
        if core["model"].get("byte_fallback"):
            notes.append("llama.cpp reads a character without a piece of its own as unknown; here it becomes bytes")
        return Vocabulary(
            "t5",
            "default",
            tokens,
            types,
            ids,
            *adds,
            scores=scores,
            prefix=bool(prefixes),
            single_spaces=single,
            charsmap=charsmap,
            notes=notes,
        )
    if charsmap:
        notes.append("llama.cpp does not normalise characters as this tokenizer does")
    if single:
        notes.append("llama.cpp keeps several spaces in a row, this tokenizer makes them one")
    scores = _scores(core, tokens, types)
    return Vocabulary("llama", "default", tokens, types, ids, *adds, scores=scores, prefix=bool(prefixes), notes=notes)


def _decoded(charsmap: str) -> bytes:
    return base64.b64decode(charsmap)


def _scores(core: Core, tokens: list[str], types: list[int]) -> list[float]:
    """Scores by which llama.cpp joins the same neighbours as the merges do: it joins those whose joint piece scores best.

    Raises:
        ModelError: the merges cannot be told by scores of pieces.
    """
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in core["model"]["merges"]]
    order: dict[str, int] = {}
    last = ""
    for left, right in pairs:
        if left + right in order and left + right != last:
            raise _no_scores(f"the ways to make '{left + right}' do not follow each other")
        last = left + right
        order.setdefault(last, len(order))
    usable = {t for t, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    known = set(pairs)
    for piece in order:
        for at in range(1, len(piece)):
            pair = (piece[:at], piece[at:])
            if pair[0] in usable and pair[1] in usable and pair not in known:
                raise _no_scores(f"'{pair[0]}' and '{pair[1]}' are never joined to '{piece}'")
    return [-float(order.get(token, len(order))) for token in tokens]


def _no_scores(reason: str) -> ModelError:
    return ModelError(
        f"the merges of this tokenizer cannot be written as the scores that llama.cpp wants: {reason}",
        hint="a tokenizer made from a SentencePiece model can; danlu export --format hf writes a folder for transformers",
    )
