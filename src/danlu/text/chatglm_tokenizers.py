"""ChatGLM's tokenizers over their SentencePiece files (needs the sentencepiece package).

By default text is read as the originals read it. The chat seam asks otherwise: `split_special_tokens=False` reads control tokens
in a text as tokens, with the text between them read on its own; `True` reads text that looks like one as plain text.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizer
from transformers.utils import PaddingStrategy

from danlu.exceptions import ModelError
from danlu.text import chatglm_text
from danlu.text.chatglm_text import Pairs, Turn

FIRST_FILE, LATER_FILE = "ice_text.model", "tokenizer.model"
FRONT = "\ue0ff"  # ordinary text that no piece goes across
BLANKS = range(80, 1, -1)
FIRST_CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>", "</s>")
LATER_CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


class _SentencePieceTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """Pieces of one SentencePiece file; ids of pieces are moved by `offset`."""

    padding_side = "left"
    model_input_names = ("input_ids", "attention_mask", "position_ids")
    offset = 0

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own. The published generations call their classes alike: a folder's files say which it is."""
        folder, kind = Path(str(pretrained_model_name_or_path)), cls
        if folder.is_dir():
            if (folder / FIRST_FILE).is_file():
                kind = ChatGLMTokenizer
            elif (folder / LATER_FILE).is_file():
                kind = ChatGLM2Tokenizer
                kwargs.setdefault("roles", has_roles(folder))
        return super(_SentencePieceTokenizer, kind).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _open(self, vocab_file: str | Path) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise ModelError(
                "ChatGLM's tokenizer needs the sentencepiece package", hint="pip install 'danlu[sentencepiece]'"
            ) from None
        self.vocab_file = str(vocab_file)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=self.vocab_file)
        except (OSError, RuntimeError) as error:
            raise ModelError(
                f"this is no SentencePiece model: {error}",
                file=self.vocab_file,
                hint="the download may be incomplete or a pointer file",
            ) from error
        self.pieces = int(self.model.get_piece_size())
        self._vocabulary = {str(self.model.id_to_piece(n)): n + self.offset for n in range(self.pieces)}

    @property
    def vocab_size(self) -> int:
        """Ids that the file and the control tokens take."""
        return self.pieces + self.offset

    def get_vocab(self) -> dict[str, int]:
        return {**self._vocabulary, **self._added_tokens_encoder}

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Pieces of a text; see the module for `split_special_tokens`."""
        split = kwargs.get("split_special_tokens")
        if split is None:
            return self._as_published(text)
        if split:
            return self._plain(text)
        return self._apart(text, self._control)

    def _as_published(self, text: str) -> list[str]:
        return self._tokenize(text)

    def _plain(self, text: str) -> list[str]:
        return self._tokenize(text)

    def _apart(self, text: str, control: re.Pattern[str]) -> list[str]:
        found: list[str] = []
        cursor = 0
        for hit in control.finditer(text):
            found += [*self._tokenize(text[cursor : hit.start()]), hit.group()]
            cursor = hit.end()
        return found + self._tokenize(text[cursor:])

    @property
    def _control(self) -> re.Pattern[str]:
        tokens = sorted(self._added_tokens_encoder, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)))

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(self.model.encode(text, out_type=str)) if text else []

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocabulary.get(token, int(self.model.unk_id()) + self.offset)

    def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
        """Masks are large here: they are made where tensors or padding are asked for, as for a model, and not for mere ids."""
        wanted = kwargs.get("return_tensors") is not None
        wanted = wanted or kwargs.get("padding_strategy", PaddingStrategy.DO_NOT_PAD) != PaddingStrategy.DO_NOT_PAD
        if kwargs.get("return_attention_mask") is None and not wanted:
            kwargs["return_attention_mask"] = False
        return super()._encode_plus(*args, **kwargs)

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        """Pads one text's ids on the left (or the side asked for), with mask and positions."""
        given: Mapping[str, Any] = encoded_inputs
        ids = list(given["input_ids"])
        length = len(ids)
        if padding_strategy == PaddingStrategy.MAX_LENGTH and max_length is not None:
            length = max_length
        elif padding_strategy == PaddingStrategy.LONGEST:
            length = max_length if max_length is not None else len(ids)
        if pad_to_multiple_of and padding_strategy != PaddingStrategy.DO_NOT_PAD:
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        missing = max(length - len(ids), 0)
        left = (padding_side or self.padding_side) == "left"
        before, after = (missing, 0) if left else (0, missing)
        result: dict[str, Any] = dict(given)
        result["input_ids"] = [self.pad_token_id] * before + ids + [self.pad_token_id] * after
        if return_attention_mask is not False:
            mask, positions = self._mask_and_positions(ids, before, after)
            result.setdefault("attention_mask", mask)
            result.setdefault("position_ids", positions)
        return result

    def _mask_and_positions(self, ids: Sequence[int], before: int, after: int) -> tuple[Any, Any]:
        raise NotImplementedError

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copies the SentencePiece file."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / f"{prefix}{self.vocab_files_names['vocab_file']}"
        if target.resolve() != Path(self.vocab_file).resolve():
            if Path(self.vocab_file).is_file():
                shutil.copyfile(self.vocab_file, target)
            else:
                target.write_bytes(self.model.serialized_model_proto())
        return (str(target),)


class ChatGLMTokenizer(_SentencePieceTokenizer):
    """ChatGLM-6B's. Line ends, tabs and runs of spaces are pieces of their own; an input ends with `[gMASK] <sop>`.

    Args:
        num_image_tokens: ids in front of the file's; 20000 in the first revision, whose configuration does not say so.
        remove_space, do_lower_case: what is done to a text before it is read.
    """

    vocab_files_names = {"vocab_file": FIRST_FILE}  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | Path,
        do_lower_case: bool = False,
        remove_space: bool = False,
        num_image_tokens: int = 20000,
        **kwargs: Any,
    ) -> None:
        self.do_lower_case, self.remove_space, self.num_image_tokens = do_lower_case, remove_space, num_image_tokens
        self.offset = num_image_tokens
        self._open(vocab_file)
        self._vocabulary |= {f"<image_{n}>": n for n in range(num_image_tokens)}
        for name in ("gmask_token", "end_token"):
            kwargs.pop(name, None)
        named = {"bos_token": "<sop>", "eos_token": "<eop>", "mask_token": "[MASK]"}
        named |= {"pad_token": "<pad>", "unk_token": "<unk>"}
        control = [t for t in FIRST_CONTROL if t in self._vocabulary and t not in named.values()]
        kwargs.setdefault("extra_special_tokens", control)
        kwargs.setdefault("padding_side", "left")
        super().__init__(
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            num_image_tokens=num_image_tokens,
            **(named | kwargs),
        )
        self.split_special_tokens = None  # a call that does not say reads as published

    @property
    def gmask_token_id(self) -> int:
        """The id of `[gMASK]`."""
        return self._vocabulary["[gMASK]"]

    @property
    def end_token_id(self) -> int:
        """The id of `</s>`."""
        return self._vocabulary["</s>"]

    def _prepared(self, text: str) -> str:
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for count in BLANKS:
            text = text.replace(" " * count, f"<|blank_{count}|>")
        return text

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return super()._tokenize(self._prepared(text))

    def _plain(self, text: str) -> list[str]:
        """The file itself knows the control tokens, so that a text is cut inside them, and its parts are read on."""
        found: list[str] = []
        cursor = 0
        front = self._tokenize(FRONT)
        cuts = [hit.start() + 1 for hit in self._control.finditer(text)]
        for end in [*cuts, len(text)]:
            part = text[cursor:end]
            found += self._tokenize(FRONT + part)[len(front) :] if cursor else self._tokenize(part)
            cursor = end
        return found

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.offset:
            return f"<image_{index}>"
        return str(self.model.id_to_piece(index - self.offset)) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        parts: list[str] = []
        known: list[int] = []
        for token in [*tokens, None]:
            if token is not None and self._vocabulary.get(token, -1) >= self.offset:
                known.append(self._vocabulary[token] - self.offset)
                continue
            parts.append(str(self.model.decode(known)) if known else "")
            parts.append(token or "")
            known = []
        text = "".join(parts).replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d\d?)\|>", lambda hit: " " * int(hit.group(1)), text)

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        kept = [i for i in ids if i != self.pad_token_id]
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(kept, skip_special_tokens=skip_special_tokens))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        ids = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def _mask_and_positions(self, ids: Sequence[int], before: int, after: int) -> tuple[Any, Any]:
        """Bool `[1, T, T]`, True where a key is hidden, and positions `[2, T]`, with padding hidden and at position 0."""
        count, total = len(ids), before + len(ids) + after
        context = ids.index(self.bos_token_id) if self.bos_token_id in ids else count
        hidden = np.triu(np.ones((count, count), dtype=bool), k=1)
        hidden[:, :context] = False
        mask = np.ones((1, total, total), dtype=bool)
        mask[0, before : before + count, before : before + count] = hidden
        positions = np.zeros((2, total), dtype=np.int64)
        positions[0, before : before + count] = np.arange(count)
        marks = [token for token in (self.mask_token_id, self.gmask_token_id) if token in ids]
        if marks:
            positions[0, before + context : before + count] = ids.index(marks[0])
        positions[1, before + context : before + count] = np.arange(1, count - context + 1)
        return mask, positions

    def build_prompt(self, query: str, history: Pairs | None = None) -> str:
        """The text that a question is asked in."""
        return chatglm_text.rounds_from_0(query, history or [])

    def process_response(self, response: str) -> str:
        """An answer as it is shown."""
        return chatglm_text.punctuated(response)


class ChatGLM2Tokenizer(_SentencePieceTokenizer):
    """ChatGLM2-6B's and, with the tokens of roles, ChatGLM3-6B's. An input begins with `[gMASK] sop`.

    Control tokens stand behind the file's pieces, and no text is read as one of them.

    Args:
        roles: whether there are tokens of roles: ChatGLM3.
        encode_special_tokens: read the tokens of roles in a text as such (ChatGLM3's own setting).
    """

    vocab_files_names = {"vocab_file": LATER_FILE}  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | Path,
        roles: bool = False,
        encode_special_tokens: bool = False,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> None:
        self._open(vocab_file)
        self.roles, self.encode_special_tokens = roles, encode_special_tokens
        names = LATER_CONTROL + (ROLES if roles else ())
        self.special_tokens = {name: self.pieces + n for n, name in enumerate(names)}
        self._texts = {number: name for name, number in self.special_tokens.items()}
        self._vocabulary |= self.special_tokens
        named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
        for name in (*named, "additional_special_tokens", "extra_special_tokens"):
            kwargs.pop(name, None)
        super().__init__(
            roles=roles,
            encode_special_tokens=encode_special_tokens,
            padding_side=padding_side,
            extra_special_tokens=list(names),
            **named,
            **kwargs,
        )
        self.split_special_tokens = None  # a call that does not say reads as published

    @property
    def vocab_size(self) -> int:
        """Pieces and control tokens."""
        return self.pieces + len(self.special_tokens)

    def get_command(self, token: str) -> int:
        """The id of a control token, as the original's method."""
        named = {"<bos>": self.bos_token_id, "<eos>": self.eos_token_id, "<pad>": self.pad_token_id}
        if token not in named and token not in self.special_tokens:
            raise ModelError(
                f"'{token}' is no control token of this tokenizer", hint=f"known: {', '.join(self._texts.values())}"
            )
        return int(named[token] if token in named else self.special_tokens[token])

    def _as_published(self, text: str) -> list[str]:
        if not (self.encode_special_tokens and self.roles):
            return self._tokenize(text)
        return self._apart(text, re.compile("|".join(map(re.escape, ROLES))))

    def _convert_id_to_token(self, index: int) -> str:
        if index in self._texts:
            return self._texts[index]
        return str(self.model.id_to_piece(index)) if 0 <= index < self.pieces else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Control tokens of ChatGLM3 are shown, as its original shows them; ChatGLM2's are not."""
        parts: list[str] = []
        known: list[int] = []
        silent = (self.bos_token, self.eos_token, self.pad_token)
        for token in [*tokens, None]:
            if token is not None and token not in self.special_tokens:
                if token in self._vocabulary and token not in silent:
                    known.append(self._vocabulary[token])
                continue
            parts.append(str(self.model.decode(known)) if known else "")
            parts.append((token or "") if self.roles else "")
            known = []
        return "".join(parts)

    def get_prefix_tokens(self) -> list[int]:
        """What every input begins with."""
        return [self.special_tokens["[gMASK]"], self.special_tokens["sop"]]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        ids = [*self.get_prefix_tokens(), *token_ids_0]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, int(self.eos_token_id)]

    def _mask_and_positions(self, ids: Sequence[int], before: int, after: int) -> tuple[Any, Any]:
        """1 at tokens and 0 at padding; positions of tokens begin at 0."""
        mask = [0] * before + [1] * len(ids) + [0] * after
        return mask, [0] * before + list(range(len(ids))) + [0] * after

    def build_prompt(self, query: str, history: Pairs | None = None) -> str:
        """The text that ChatGLM2 is asked in."""
        return chatglm_text.rounds_from_1(query, history or [])

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """Ids of one of ChatGLM3's turns."""
        if f"<|{role}|>" not in ROLES:
            raise ModelError(f"'{role}' is no role", hint="system, user, assistant or observation")
        head = self._ids(f"{metadata}\n")
        return [self.get_command(f"<|{role}|>"), *head, *self._ids(message)]

    def chat_input_ids(self, query: str, history: Sequence[Turn] | None = None, role: str = "user") -> list[int]:
        """Ids of ChatGLM3's prompt: turns, a new one, and the assistant's token."""
        ids = self.get_prefix_tokens()
        for turn in history or []:
            ids += self.build_single_message(turn["role"], turn.get("metadata", ""), chatglm_text.content_of(turn))
        return [*ids, *self.build_single_message(role, "", query), self.get_command("<|assistant|>")]

    def build_chat_input(self, query: str, history: Sequence[Turn] | None = None, role: str = "user") -> Any:
        """`chat_input_ids` as tensors with mask and positions."""
        ids = self.chat_input_ids(query, history, role)
        return self.pad({"input_ids": [ids]}, return_tensors="pt")

    def process_response(self, response: str) -> str:
        """An answer as it is shown."""
        return chatglm_text.dated(response)

    def _ids(self, text: str) -> list[int]:
        return [int(i) for i in self.model.encode(text)]


# -- opening ------------------------------------------------------------------------------------------------------------


def has_roles(folder: Path) -> bool:
    """Whether a folder with a `tokenizer.model` is ChatGLM3's and not ChatGLM2's, whose files look alike.

    In this order: what danlu or a published chat template says, what the published code (read, never run) knows, the name that
    the model has in its files, the length it was made for.
    """
    config, settings = _json(folder / "config.json"), _json(folder / "tokenizer_config.json")
    if isinstance(settings.get("roles"), bool):
        return bool(settings["roles"])
    if "<|observation|>" in json.dumps(settings) or "<|assistant|>" in json.dumps(settings):
        return True
    code = folder / "tokenization_chatglm.py"
    if code.is_file():
        return "<|observation|>" in code.read_text("utf-8", errors="replace")
    names = [settings.get("name_or_path"), config.get("_name_or_path"), folder.name]
    for name in names:
        found = re.search(r"(?:chatglm|codegeex)-?([23])", str(name).lower())
        if found:
            return found.group(1) == "3" and "chatglm" in str(name).lower()
    return config.get("seq_length") == 8192


def open_first(folder: Path) -> ChatGLMTokenizer:
    """ChatGLM-6B's tokenizer in a folder."""
    return ChatGLMTokenizer.from_pretrained(str(folder), local_files_only=True)  # type: ignore[no-any-return]


def open_later(folder: Path) -> ChatGLM2Tokenizer:
    """ChatGLM2-6B's or ChatGLM3-6B's tokenizer in a folder."""
    return ChatGLM2Tokenizer.from_pretrained(str(folder), local_files_only=True)  # type: ignore[no-any-return]


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"cannot be read as JSON: {error}", file=file) from error
    return found if isinstance(found, dict) else {}
