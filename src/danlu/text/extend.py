"""New words for an existing tokenizer: its own ids stay, and text without the new words is cut as before.

A word becomes an added token, which is found in the text before the tokenizer's own algorithm sees it: the longest from
left to right, by one automaton for all. So merges need no intermediate tokens, and nothing but the words can change. A
Unigram vocabulary takes words as pieces, with the mean score of their old pieces: more than these have together.

Many tokenizers put a space before every stretch of text between added tokens. Behind a new word that would invent one, so
for those the space is moved to where the whole text is seen (`_prefix_moved`).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from danlu.exceptions import DataError, ModelError
from danlu.text.scripts import UNSPACED
from danlu.text.word_pieces import Core, WordPieces, byte_alphabet, nodes

Way = Literal["token", "moved", "piece"]
LONGEST: Final = 64
CONFIG: Final = "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class NewToken:
    """A word that became a token.

    Attributes:
        text: as it stands in a text, with the space before it if it has one.
        id: its new id.
        pieces: the ids it was cut into before.
    """

    text: str
    id: int
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Extension:
    """A tokenizer with new words.

    Attributes:
        tokenizer: the new one; the old one is as it was.
        tokens: what was added, in the order of the ids.
        skipped: words that were not, and why.
    """

    tokenizer: Any
    tokens: list[NewToken]
    skipped: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Form:
    """How a word is entered: as it stands in a text, as the token is written, and whether it must stand alone."""

    text: str
    content: str
    single_word: bool = False


def read_words(file: str | Path) -> list[str]:
    """The words of a file, one in each line.

    Raises:
        DataError: the file is missing, no UTF-8, or has no words, or a line that is too long for a word.
    """
    try:
        lines = Path(file).read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=file) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8: {error.reason} at byte {error.start}", file=file, hint="save it as UTF-8"
        ) from error
    words: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if len(word) > LONGEST:
            raise DataError(
                f"found {len(word)} characters, expected one word of at most {LONGEST}",
                file=file,
                line=number,
                hint="write one word in each line",
            )
        if word:
            words[word] = None
    if not words:
        raise DataError("the file has no words", file=file, hint="write one word in each line")
    return list(words)


def extend_tokenizer(tokenizer: Any, words: Iterable[str], *, config: Any = None) -> Extension:
    """Adds words to a fast tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer; it is not changed.
        words: a leading space means "only behind a space". Words of scripts with spaces are otherwise added twice where
            the tokenizer tells the two apart: behind a space, and alone.
        config: the configuration of the model it belongs to: transformers looks into it when it chooses a tokenizer class.

    Raises:
        ModelError: this kind of tokenizer cannot be extended without changing how other text is cut.
    """
    pieces = WordPieces(tokenizer)
    way = _way(pieces.core)
    skipped: dict[str, str] = {}
    forms = _forms(pieces, words, way, skipped)
    old = pieces.ids([form.text for form in forms])
    special = set(tokenizer.all_special_ids)
    kept: list[tuple[_Form, tuple[int, ...]]] = []
    for form, ids in zip(forms, old, strict=True):
        if pieces.is_one_token(ids):
            skipped[form.text] = "is one token already"
        elif pieces.has(form.content):
            skipped[form.text] = "is in the vocabulary, although it is cut to pieces"
        elif not ids or (special - {pieces.unknown}) & set(ids):
            skipped[form.text] = "holds a special token"
        else:
            kept.append((form, tuple(ids)))
    first = 1 + max(tokenizer.get_vocab().values())
    tokens = [NewToken(form.text, first + number, ids) for number, (form, ids) in enumerate(kept)]
    if not tokens:
        return Extension(tokenizer, [], skipped)
    core = _entered(pieces, way, kept)
    extended = _as_transformers(tokenizer, core, config)
    _check(tokenizer, extended, [form.content for form, _ in kept], tokens)
    return Extension(extended, tokens, skipped)


# -- which way, and which words -------------------------------------------------------------------------------------------


def _way(core: Core) -> Way:
    """How this tokenizer takes new words."""
    last = max((token["id"] for token in core["added_tokens"]), default=-1)
    # Ids of Unigram pieces are their places: where added tokens come behind them, no piece can follow.
    if core["model"]["type"] == "Unigram" and last < len(core["model"]["vocab"]):
        return "piece"
    return "moved" if _repeats_prefix(core) else "token"


def _repeats_prefix(core: Core) -> bool:
    """Whether every stretch of text between added tokens gets a space before it."""
    return any(
        step["type"] == "Prepend" or step.get("prepend_scheme") == "always" or step.get("add_prefix_space") is True
        for step in [*nodes(core["normalizer"]), *nodes(core["pre_tokenizer"])]
    )


def _forms(pieces: WordPieces, words: Iterable[str], way: Way, skipped: dict[str, str]) -> list[_Form]:
    forms: dict[str, _Form] = {}
    for word in words:
        bare = word.strip()
        if not bare:
            continue
        for form in _forms_of(pieces, bare, way, behind_space=word.startswith(" ")):
            if pieces.style == "bytes" and not form.text.isascii() and all(c in byte_alphabet() for c in form.content):
                skipped[form.text] = "a byte-level tokenizer would write these letters as other bytes"
            else:
                forms.setdefault(form.content, form)
    return list(forms.values())


def _forms_of(pieces: WordPieces, word: str, way: Way, *, behind_space: bool) -> list[_Form]:
    def content(text: str) -> str:
        return text if way == "token" else pieces.written(text)

    if UNSPACED.match(word) or not word[0].isalpha():
        return [_Form(word, content(word))]
    if pieces.style == "plain":
        return [_Form(word, content(word), single_word=way != "piece")]
    behind = _Form(f" {word}", content(f" {word}"))
    # SentencePiece puts a space before a text's first word too: there the form behind a space is the only one.
    if behind_space or (pieces.style == "spaces" and way != "token"):
        return [behind]
    return [behind, _Form(word, content(word), single_word=True)]


# -- entering them ----------------------------------------------------------------------------------------------------------


def _entered(pieces: WordPieces, way: Way, kept: Sequence[tuple[_Form, tuple[int, ...]]]) -> Any:
    from tokenizers import AddedToken, Tokenizer

    core: Core = json.loads(json.dumps(pieces.core))
    core["truncation"] = core["padding"] = None
    if way == "piece":
        vocabulary = core["model"]["vocab"]
        scores = [score for _, score in vocabulary]
        core["model"]["vocab"] = vocabulary + [
            [form.content, sum(scores[i] for i in ids) / len(ids)] for form, ids in kept
        ]
        return Tokenizer.from_str(json.dumps(core))
    if way == "moved":
        core = _prefix_moved(core, [form.content for form, _ in kept])
    found = Tokenizer.from_str(json.dumps(core))
    found.add_tokens(
        [AddedToken(form.content, normalized=way == "moved", single_word=form.single_word) for form, _ in kept]
    )
    return found


def _prefix_moved(core: Core, contents: Sequence[str]) -> Core:
    """The same tokenizer with its space put before the whole text by the normalizer, except before the words themselves.

    Tokens with `normalized=True` are looked for in the normalised text, so it is not touched again behind them. But what
    is looked for is normalised as well, and must not get a space: a last step takes it away from exactly these words.

    Raises:
        ModelError: the space is put by a step that cannot be moved.
    """
    steps = list(nodes(core["normalizer"]))
    words = "|".join(re.escape(content) for content in sorted(contents, key=len, reverse=True))
    before = list(nodes(core["pre_tokenizer"]))
    at = next((i for i, step in enumerate(steps) if step["type"] == "Prepend"), None)
    if at is not None and not _repeats_prefix({"normalizer": None, "pre_tokenizer": core["pre_tokenizer"]}):
        steps.insert(at + 1, _taken_away(steps[at]["prepend"], f"(?:{words})\\z"))
        return {**core, "normalizer": {"type": "Sequence", "normalizers": steps}}
    if at is not None or len(before) != 1 or any(token["normalized"] for token in core["added_tokens"]):
        raise ModelError(
            "this tokenizer puts a space before every stretch of text by steps that danlu cannot rearrange",
            hint=f"its pre-tokenizer is {', '.join(step['type'] for step in before) or 'none'}; choose another base",
        )
    (step,) = before
    if step["type"] == "Metaspace":
        mark = step["replacement"]
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": mark})
        moved: Core = {**step, "prepend_scheme": "never"}
    else:
        mark, moved = " ", {**step, "add_prefix_space": False}
    # Both steps put no second space before a text that begins with one.
    steps += [{"type": "Prepend", "prepend": mark}, _taken_away(mark, f"{mark}|(?:{words})\\z")]
    return {**core, "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": moved}


def _taken_away(mark: str, ahead: str) -> Core:
    return {"type": "Replace", "pattern": {"Regex": f"\\A{mark}(?={ahead})"}, "content": ""}


# -- as transformers loads it -----------------------------------------------------------------------------------------------


def _as_transformers(tokenizer: Any, core: Any, config: Any) -> Any:
    """A transformers tokenizer that a reader of its folder gets too.

    Some classes build their steps anew instead of reading them from tokenizer.json. If what comes back from disk is not
    what was written, the general class is named in its place.
    """
    from transformers import AutoTokenizer

    wanted = _compared(core)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(core.to_str(), "utf-8")
        if config is not None:
            config.save_pretrained(folder)
        for change in (lambda settings: settings, _general_class):
            _rewrite(folder / CONFIG, change)
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if _compared(found.backend_tokenizer) == wanted:
                found.name_or_path = tokenizer.name_or_path
                found.init_kwargs.pop("name_or_path", None)
                return found
    raise ModelError(
        f"what {type(tokenizer).__name__} saves is not what it loads, so new words cannot be kept",
        hint="save its tokenizer.json with a newer transformers first",
    )


def _compared(core: Any) -> Core:
    """What decides how text is cut and put together again."""
    found: Core = json.loads(core.to_str())
    return {key: found[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")}


def _rewrite(file: Path, change: Callable[[Core], Core]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text("utf-8"))), ensure_ascii=False, indent=2), "utf-8")


def _general_class(settings: Core) -> Core:
    dropped = (
        "legacy",
        "add_prefix_space",
        "sp_model_kwargs",
        "use_default_system_prompt",
        "vocab_file",
        "merges_file",
    )
    return {k: v for k, v in settings.items() if k not in dropped} | {"tokenizer_class": "PreTrainedTokenizerFast"}


def _check(old: Any, new: Any, contents: Sequence[str], tokens: Sequence[NewToken]) -> None:
    """The ids are what they should be: a vocabulary with holes in its ids would be filled up by the library."""
    vocabulary = new.get_vocab()
    moved = [token for token, index in old.get_vocab().items() if vocabulary.get(token) != index]
    wrong = [content for content, token in zip(contents, tokens, strict=True) if vocabulary.get(content) != token.id]
    if moved or wrong:
        raise ModelError(
            f"the ids of {len(moved)} old and {len(wrong)} new tokens would not be right, the first is {[*moved, *wrong][0]!r}",
            hint="the vocabulary has holes in its ids: danlu cannot extend it",
        )
