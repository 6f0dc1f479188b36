"""Which tokenizer fits a text: the table's figures worked by hand on small strings, and on real tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from danlu.cli.main import run
from danlu.text.coverage import Coverage, LanguageCount, coverage
from danlu.text.scripts import language, runs
from danlu.text.tokenizer_files import open_tokenizer
from danlu.text.word_pieces import WordPieces, byte_alphabet

TIAN = ("å", "¤", "©")  # the bytes of 天 (E5 A4 A9) as byte-level tokenizers write them


def byte_level(*more: tuple[str, ...]) -> Any:
    """256 bytes, and tokens joined from them step by step."""
    tokens, merges = [*byte_alphabet()], []
    for parts in more:
        for at in range(1, len(parts)):
            pair = ("".join(parts[:at]), parts[at])
            if "".join(pair) not in tokens:
                tokens.append("".join(pair))
                merges.append(pair)
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def with_unknown() -> Any:
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -2.0), ("a", -1.0), ("天", -3.0)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def measured(tokenizer: Any, *texts: str) -> Coverage:
    (found,) = coverage([tokenizer], texts)
    return found


# -- by hand --------------------------------------------------------------------------------------------------------------


def test_bytes_by_hand() -> None:
    # 天 is one token, 好 (E5 A5 BD) three; "ab" one, " ab" two (Ġ and ab), "，" (EF BC 8C) three.
    found = measured(byte_level(TIAN, ("a", "b")), "天好，ab ab")
    assert found.languages == {"zh": LanguageCount(3, 1 + 3 + 3), "en": LanguageCount(5, 1 + 1 + 1)}
    assert (found.characters, found.tokens, found.vocab_size) == (8, 10, 256 + 3)
    assert found.languages["zh"].tokens_per_character == pytest.approx(7 / 3)
    assert (found.chinese_characters, found.own_token) == (2, 0.5)
    assert found.byte_fallback == pytest.approx(6 / 10), "the bytes of 好 and of the comma; Ġ is a whole character"
    assert found.unknown == 0 and found.unchanged == 1 and found.seconds_per_mb > 0


def test_own_tokens_in_the_text_count_as_often_as_they_occur() -> None:
    found = measured(byte_level(TIAN), "天天", "天好")
    assert found.own_token == 1 / 2 and found.own_token_in_text == 3 / 4


def test_a_token_of_parts_of_two_characters_is_a_part() -> None:
    # A9, the last byte of 天, joins the E5 of the next character first; E5 A4 is a token too.
    tokenizer = byte_level(("©", "å"), ("å", "¤"))
    found = measured(tokenizer, "天天")
    assert tokenizer.tokenize("天天") == ["å¤", "©å", "¤", "©"]
    assert found.byte_fallback == 1.0 and found.languages == {"zh": LanguageCount(2, 4)}
    partial = WordPieces(tokenizer).partial
    assert len(partial) == 128 + 2 and tokenizer.convert_tokens_to_ids("a") not in partial


def test_unknown_by_hand() -> None:
    # ▁ 天 unk, then a, for 天 好 a: 好 has no piece.
    found = measured(with_unknown(), "天好a")
    assert found.tokens == 4 and found.unknown == 1 / 4 and found.unchanged == 0 and found.byte_fallback == 0
    assert (found.own_token, found.own_token_in_text) == (0.5, 0.5)
    assert measured(with_unknown(), "天a a").unchanged == 1


def test_byte_pieces_by_hand() -> None:
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "天"]
    core = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    found = measured(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), "天好a")
    # ▁, 天, three bytes, a; the text comes back with the space that stands before it.
    assert (found.tokens, found.byte_fallback, found.unknown, found.unchanged) == (6, 3 / 6, 0, 1)


def test_text_without_chinese() -> None:
    found = measured(byte_level(), "ab", "12")
    assert found.own_token is found.own_token_in_text is None and found.chinese_characters == 0
    assert found.languages == {"en": LanguageCount(2, 2), "other": LanguageCount(2, 2)}


def test_control_tokens_in_the_text_are_text() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    assert measured(tokenizer, "a</s>").tokens == 5


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="天好a, 1é の한я\n\U0001f642\ud800", min_size=1), min_size=1))
def test_parts_make_the_whole(texts: list[str]) -> None:
    found = measured(byte_level(TIAN), *texts)
    assert sum(c.characters for c in found.languages.values()) == found.characters == sum(map(len, texts))
    assert sum(c.tokens for c in found.languages.values()) == found.tokens
    assert found.unchanged == 1


def test_languages() -> None:
    assert [language(c) for c in "天a你éのゲ한яω1 ，🙂ａ"] == [
        *("zh", "en", "zh", "en", "kana", "kana", "hangul", "cyrillic", "greek"),
        *("", "", "", "", ""),
    ]
    assert list(runs(" 1天，好 ab, c の")) == [(0, "zh"), (6, "en"), (12, "kana")]
    assert list(runs("12 ")) == [(0, "other")] and list(runs("")) == []


# -- the command ------------------------------------------------------------------------------------------------------------


def document(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> Any:
    capfd.readouterr()
    assert run(["tokenizer", "coverage", *arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tiny.write_rows(tmp_path / "t.jsonl", [{"text": "天气"}, {"text": "the door"}])
    folder, file = str(tiny.tokenizer_folder()), str(tiny.model())
    found = document([folder, file, "--text", str(text)], capfd)
    assert [row["model"] for row in found] == [folder, file]
    assert found[0]["languages"]["zh"] == {"characters": 2, "tokens": 6, "tokens_per_character": 3.0}
    assert found[0]["own_token"] == 0.0 and found[0]["vocab_size"] == len(tiny.tokenizer())
    timeless = [{k: v for k, v in row.items() if k not in ("model", "seconds_per_mb")} for row in found]
    assert timeless[0] == timeless[1]
    (first,) = document([folder, "--text", str(text), "--limit", "1"], capfd)
    assert first["characters"] == 2
    assert run(["tokenizer", "coverage", folder, "--text", str(text)]) == 0
    said = capfd.readouterr()
    assert said.out == "" and "3.000" in said.err and "2 different Chinese characters" in said.err


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["{model}"], 2, "--text"),
        (["--text", "{text}"], 2, "MODEL"),
        (["{model}", "nowhere", "--text", "{text}"], 1, "nowhere"),
        (["{model}", "--text", "nowhere.txt"], 1, "nowhere.txt"),
        (["{text}", "--text", "{text}"], 1, "no tokenizer file"),
        (["{model}", "--text", "{empty}"], 1, "empty"),
    ],
)
def test_wrong_requests(arguments: list[str], status: int, said: str, tmp_path: Path, capfd: Any) -> None:
    names = {"model": str(tiny.tokenizer_folder()), "text": str(tmp_path / "t.txt"), "empty": str(tmp_path / "e.jsonl")}
    (tmp_path / "t.txt").write_text("天气很好。", "utf-8")
    tiny.write_rows(tmp_path / "e.jsonl", [{"text": ""}])
    capfd.readouterr()
    assert run(["tokenizer", "coverage", *(a.format(**names) for a in arguments)]) == status
    captured = capfd.readouterr()
    assert captured.out == "" and said in captured.err and "bug" not in captured.err


# -- real tokenizers --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_tokenizers(shared_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ["gpt2", "llama/tokenizer.model", "chinese-llama"]
    folders = [str(shared_data / "tokenizers" / name) for name in names]
    texts = [
        str(shared_data / "pretrain-zh/poetry/全唐诗/poet.tang.0.json"),
        str(shared_data / "pretrain-en/c4_demo.jsonl"),
    ]
    found = document([*folders, "--text", texts[0], "--text", texts[1], "--limit", "400"], capfd)
    gpt2, llama, chinese = found
    rates = [row["languages"]["zh"]["tokens_per_character"] for row in found]
    assert rates[0] > rates[1] > rates[2], "GPT-2, Llama, a tokenizer made for Chinese"
    assert gpt2["own_token"] < llama["own_token"] < chinese["own_token"]
    assert (gpt2["unknown"], llama["unknown"], chinese["byte_fallback"]) == (0, 0, 0) and chinese["unknown"] > 0
    assert gpt2["unchanged"] == llama["unchanged"] == 1 > chinese["unchanged"]


def test_real_figures_by_hand(shared_data: Path) -> None:
    # GPT-2 has bytes for 你 (2 tokens) and 好 (2 tokens), whole words for the rest.
    tokenizer = open_tokenizer(shared_data / "tokenizers/gpt2")
    assert tokenizer.tokenize("你好 hello, world") == ["ä½", "ł", "å¥", "½", "Ġhello", ",", "Ġworld"]
    found = measured(tokenizer, "你好 hello, world")
    assert found.languages == {"en": LanguageCount(12, 3), "zh": LanguageCount(3, 4)}
    assert found.byte_fallback == 4 / 7 and found.own_token == 0
