"""Training tokenizers, the files they come in, and the sample of a stream that they learn from."""

from __future__ import annotations

import contextlib
import gzip
import json
import struct
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from danlu.cli.main import run
from danlu.data.corpus import stream_texts
from danlu.exceptions import DataError, ModelError, SettingsError
from danlu.text import sentencepiece as sp
from danlu.text.chat_template import ChatTemplate
from danlu.text.sample import pieces, sample
from danlu.text.tokenizer import train_tokenizer
from danlu.text.tokenizer_files import has_tokenizer, open_tokenizer
from danlu.text.word_pieces import byte_alphabet
from danlu.train_config import Source

TEXT = ["the furnace is hot\nand the coals glow 1234\n\n    indented", "今天天气很好，我们去公园。\n第二行"] * 30
MODEL_TYPES = ("bpe", "sentencepiece", "sentencepiece-bpe")


@pytest.fixture(scope="module", params=MODEL_TYPES)
def trained(request: pytest.FixtureRequest) -> Any:
    if request.param != "bpe":
        pytest.importorskip("sentencepiece", reason="SENTENCEPIECE NOT TESTED: pip install sentencepiece")
    return train_tokenizer(TEXT, 360, model_type=request.param, context=77)


# -- training -----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda t: "\u2581" not in t))
def test_every_text_comes_back(trained: Any, text: str) -> None:
    ids = trained(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert trained.decode(ids) == text


def test_trained_tokenizers(trained: Any, tmp_path: Path) -> None:
    assert len(trained) <= 360 and trained.model_max_length == 77
    assert (trained.bos_token, trained.pad_token, trained.eos_token) == ("<|endoftext|>", "<|pad|>", "<|im_end|>")
    first = trained.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"])
    assert first == list(range(first[0], first[0] + 4)) and first[0] in (0, 1)
    assert trained.tokenize("1234") == ["1", "2", "3", "4"], "digits stand alone"
    assert len(trained.tokenize("the furnace is hot")) < 18
    text = "a<|im_end|>b"
    assert trained.eos_token_id in trained(text)["input_ids"]
    assert trained.eos_token_id not in trained(text, split_special_tokens=True)["input_ids"]
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "今天 12"}, {"role": "assistant", "content": "好 🙂"}]
    assert loaded.apply_chat_template(messages)["input_ids"] == trained.apply_chat_template(messages)["input_ids"]


@pytest.mark.parametrize("model_type", MODEL_TYPES[1:])
@pytest.mark.parametrize("text", ["<0x41>", "a<0xE4>", "<unk>", "<|pad|>"])
def test_text_never_becomes_a_byte_or_control_piece(model_type: Any, text: str) -> None:
    pytest.importorskip("sentencepiece", reason="SENTENCEPIECE NOT TESTED: pip install sentencepiece")
    tokenizer = train_tokenizer([*TEXT, "<0x41> <|pad|> unk"], 400, model_type=model_type)
    found = tokenizer.tokenize(text, split_special_tokens=True)
    assert text not in found and len(found) > 2


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_another_templates_tokens(model_type: Any) -> None:
    if model_type != "bpe":
        pytest.importorskip("sentencepiece", reason="SENTENCEPIECE NOT TESTED: pip install sentencepiece")
    tokenizer = train_tokenizer(TEXT, 360, model_type=model_type, template="moss")
    assert tokenizer.eos_token == "<eom>" and "<|im_end|>" not in tokenizer.get_vocab()
    seam = ChatTemplate(tokenizer, "moss")
    assert not seam.note, "neither unknown tokens nor another template of its own"
    question: Any = [{"role": "user", "content": "<eoh>"}]
    assert seam.encode_prompt(question).count(tokenizer.convert_tokens_to_ids("<eoh>")) == 1
    assert seam.stop_ids >= {tokenizer.convert_tokens_to_ids("<eom>")}
    with pytest.raises(SettingsError, match="263 are needed"):
        train_tokenizer(TEXT, 262, model_type=model_type, template="moss")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_training_twice_gives_the_same(model_type: Any) -> None:
    if model_type != "bpe":
        pytest.importorskip("sentencepiece", reason="SENTENCEPIECE NOT TESTED: pip install sentencepiece")
    first, second = (train_tokenizer(TEXT, 340, model_type=model_type).get_vocab() for _ in range(2))
    assert first == second


def test_faults_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="at least 260"):
        train_tokenizer(TEXT, 259)
    with pytest.raises(SettingsError, match="characters of this text") as caught:
        pytest.importorskip("sentencepiece", reason="SENTENCEPIECE NOT TESTED: pip install sentencepiece")
        train_tokenizer(TEXT, 270, model_type="sentencepiece")
    assert caught.value.field == "vocab_size"
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 300, model_type="sentencepiece")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(SettingsError, match="sentencepiece package") as caught:
        train_tokenizer(TEXT, 300, model_type="sentencepiece-bpe")
    assert "pip install sentencepiece" in caught.value.hint


# -- the sample ---------------------------------------------------------------------------------------------------------


def test_a_sample_that_fits_is_everything() -> None:
    found = sample(iter(["ab", "", "天", "c"]), 6)
    assert (found.texts, found.seen, found.characters, found.whole) == (["ab", "天", "c"], 3, 4, True)


def test_a_sample_is_even_and_bounded() -> None:
    found = sample((f"{i:04}" for i in range(1000)), 100)
    # 1000 texts of 4 bytes, 25 fit: every 64th is the first power of two with that many.
    assert found.texts == [f"{i:04}" for i in range(0, 1000, 64)] and found.seen == 1000 and not found.whole
    assert sample(["x" * 50], 10).texts == ["x" * 50], "one text is kept in any case"


@settings(deadline=None)
@given(st.lists(st.text(max_size=9), max_size=60), st.integers(1, 80))
def test_samples_keep_the_order_and_the_size(texts: list[str], size: int) -> None:
    found = sample(texts, size)
    filled = [t for t in texts if t]
    assert found.characters == sum(map(len, filled)) and found.seen == len(filled)
    stride = next((s for s in (1, 2, 4, 8, 16, 32, 64) if found.texts == filled[::s]), None)
    assert stride is not None and (stride == 1) == found.whole
    assert len(found.texts) <= 1 or sum(len(t.encode("utf-8", "surrogatepass")) for t in found.texts) <= size


def test_long_texts_are_cut_at_line_ends() -> None:
    line = "x" * 2999 + "\n"
    found = list(pieces([line * 20, "y" * 45_000, "", "z"]))
    assert "".join(found) == line * 20 + "y" * 45_000 + "z" and max(map(len, found)) <= 20_000
    assert [len(p) for p in found] == [18_000] * 3 + [6_000, 20_000, 20_000, 5_000, 1]


def test_memory_is_flat() -> None:
    def stream(count: int) -> Iterator[str]:
        return (f"{i} " * 200 for i in range(count))

    peaks = []
    for count in (2_000, 20_000):
        tracemalloc.start()
        sample(stream(count), 200_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


# -- the text of any data ---------------------------------------------------------------------------------------------------


def test_texts_of_every_kind_of_data(tmp_path: Path) -> None:
    rows = {
        "a": [{"text": "a document"}],
        "b": [{"messages": [*tiny.user("a question"), *tiny.assistant("an answer")]}],
        "c": [{"prompt": tiny.user("which?"), "chosen": tiny.assistant("this"), "rejected": tiny.assistant("that")}],
    }
    for name, content in rows.items():
        tiny.write_rows(tmp_path / f"{name}.jsonl", content)
    with gzip.open(tmp_path / "d.txt.gz", "wt", encoding="utf-8") as file:
        file.write("plain text\n")
    assert list(stream_texts(str(tmp_path))) == [
        *("a document", "a question", "an answer", "which?", "this", "that"),
        "plain text",
    ]


def test_weights_repeat_evenly(tmp_path: Path) -> None:
    file = tiny.write_rows(tmp_path / "a.jsonl", [{"text": c} for c in "abcdef"])

    def of(weight: float) -> str:
        return "".join(stream_texts([Source(path=str(file), weight=weight)]))

    assert (of(1), of(2), of(0.5), of(1.5)) == ("abcdef", "aabbccddeeff", "bdf", "abbcddeff")
    assert list(stream_texts([str(file), str(file)])) == list("abcdef"), "a file named twice is read once"


# -- SentencePiece files --------------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    found = b""
    while True:
        found += bytes([value & 127 | (128 if value > 127 else 0)])
        value >>= 7
        if not value:
            return found


def _field(number: int, value: int | bytes | float) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def model_file(algorithm: int, *, prefix: int = 1, spaces: int = 0, fallback: int = 1, **fields: int) -> bytes:
    """A SentencePiece model with a handful of pieces, written field by field."""
    entries = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    entries += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)] if fallback else []
    entries += [("▁", -1.0, 1), ("a", -2.0, 1), ("b", -3.0, 1), ("ab", -1.5, 1), ("▁a", -1.2, 1), ("天", -4.0, 1)]
    trainer = {3: algorithm, 35: fallback, 43: -1} | {int(k[1:]): v for k, v in fields.items()}
    content = b"".join(
        _field(1, _field(1, text.encode()) + _field(2, score) + (_field(3, kind) if kind != 1 else b""))
        for text, score, kind in entries
    )
    content += _field(2, b"".join(_field(k, v) for k, v in trainer.items()))
    return content + _field(3, _field(1, b"identity") + _field(3, prefix) + _field(4, spaces))


def opened(tmp_path: Path, content: bytes) -> Any:
    (tmp_path / "own.model").write_bytes(content)
    return open_tokenizer(tmp_path / "own.model")


def test_sentencepiece_bpe_by_hand(tmp_path: Path) -> None:
    found = opened(tmp_path, model_file(2))
    assert len(found) == 3 + 256 + 6 and (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")
    # The best score is joined first: ▁a (-1.2) before ab (-1.5).
    assert found.tokenize("ab") == ["▁a", "b"]
    assert found.tokenize("b ab") == ["▁", "b", "▁a", "b"]
    assert found.tokenize("bab") == ["▁", "b", "ab"]
    assert found.tokenize("天好") == ["▁", "天", "<0xE5>", "<0xA5>", "<0xBD>"]
    assert found.tokenize(" a") == ["▁", "▁a"], "a prefix is put although there is a space already"
    for text in ("ab 天好", "  b", "<0x41>"):
        assert found.decode(found(text)["input_ids"]) == text


def test_sentencepiece_unigram_by_hand(tmp_path: Path) -> None:
    found = opened(tmp_path, model_file(1))
    # ▁ + ab costs 2.5, ▁a + b 4.2.
    assert found.tokenize("ab") == ["▁", "ab"] and found.tokenize("aa") == ["▁a", "a"]
    assert found.tokenize("好") == ["▁", "<0xE5>", "<0xA5>", "<0xBD>"]
    assert "<0x41>" not in found.tokenize("<0x41>") and found.decode(found("<0x41>")["input_ids"]) == "<0x41>"
    bare = opened(tmp_path, model_file(1, fallback=0, prefix=0, spaces=1))
    assert bare.tokenize(" a  好 ") == ["a", "▁", "好"] and bare("好")["input_ids"] == [0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no pieces"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no SentencePiece model"),
        (model_file(2)[:-20] + b"", "no SentencePiece model"),
        (model_file(2)[:500], "no SentencePiece model|ends inside"),
        (model_file(3), "algorithm is number 3"),
        (model_file(1, f24=1), "spaces behind words"),
    ],
)
def test_broken_sentencepiece_files(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        opened(tmp_path, content)
    assert caught.value.file == str(tmp_path / "own.model")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400))
def test_no_bytes_crash_the_reader(junk: bytes, at: int) -> None:
    whole = model_file(2, fallback=0)
    for content in (junk, whole[:at] + junk + whole[at:], whole[:at]):
        with contextlib.suppress(ValueError, struct.error):
            sp.parse_model(content)


@pytest.mark.parametrize("name", ["llama/tokenizer.model", "chinese-llama/chinese_sp.model"])
def test_real_sentencepiece_files_cut_as_sentencepiece_does(name: str, shared_data: Path) -> None:
    package = pytest.importorskip("sentencepiece", reason="SENTENCEPIECE NOT TESTED: pip install sentencepiece")
    file = shared_data / "tokenizers" / name
    reference, found = package.SentencePieceProcessor(model_file=str(file)), open_tokenizer(file)
    assert reference.get_piece_size() == len(found)
    novel = gzip.decompress((shared_data / "pretrain-zh/novels/红楼梦.txt.gz").read_bytes()).decode("utf-8")
    english = (shared_data / "pretrain-en/wikitext-2-valid.txt").read_text("utf-8").replace("<unk>", "unk")
    texts = [*novel.split("\n")[:600], *english.split("\n")[:600]]
    differ = [t for t in texts if found(t, add_special_tokens=False)["input_ids"] != reference.encode(t)]
    # Two ways to cut "Lions" score the same to the last digit, and the two programs add in another order.
    assert all("Lions" in text for text in differ) and len(differ) <= 1


# -- other files ----------------------------------------------------------------------------------------------------------


def _byte_level(folder: Path, *, vocabulary: str = "encoder.json", merges: str = "vocab.bpe") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate([*byte_alphabet(), "ab", "Ġab", "<|endoftext|>"])}
    (folder / vocabulary).write_text(json.dumps(ids), "utf-8")
    (folder / merges).write_text("#version: 0.2\na b\nĠ ab\n", "utf-8")
    return folder


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_files(names: tuple[str, str], tmp_path: Path) -> None:
    folder = _byte_level(tmp_path / "gpt2", vocabulary=names[0], merges=names[1])
    for place in (folder, folder / names[0], folder / names[1]):
        assert has_tokenizer(place)
        found = open_tokenizer(place)
        assert found.tokenize("ab ab 天") == ["ab", "Ġab", "Ġ", "å", "¤", "©"] and len(found) == 259
        assert found.eos_token == "<|endoftext|>"


def test_transformers_folders_and_files(tmp_path: Path) -> None:
    folder = tiny.tokenizer_folder()
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "model").symlink_to(folder)
    for place in (folder, folder / "tokenizer.json", stage):
        assert has_tokenizer(place)
        assert open_tokenizer(place).get_vocab() == tiny.tokenizer().get_vocab()
    assert not has_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "opened_as", "said"),
    [
        ("vocab.bpe", "#version: 0.2\na b\nx zz\n", "vocab.bpe", "vocab.bpe:3: found 'x zz'"),
        ("encoder.json", "[1]", "encoder.json", "no object"),
        ("encoder.json", "{", "vocab.bpe", "encoder.json: cannot be read as JSON"),
        ("tokenizer.json", "{}", "tokenizer.json", "no tokenizer.json"),
        ("notes.txt", "x", "notes.txt", "no tokenizer file"),
        ("notes.txt", "x", "nowhere.model", "no such file"),
    ],
)
def test_files_with_faults(name: str, content: str, opened_as: str, said: str, tmp_path: Path) -> None:
    folder = _byte_level(tmp_path / "gpt2")
    (folder / name).write_text(content, "utf-8")
    with pytest.raises(ModelError) as caught:
        open_tokenizer(folder / opened_as)
    assert said in str(caught.value)


def test_folders_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x", "utf-8")
    with pytest.raises(ModelError, match=r"found: notes\.txt"):
        open_tokenizer(tmp_path)
    (_byte_level(tmp_path / "half") / "vocab.bpe").unlink()
    with pytest.raises(ModelError, match="beside it is missing"):
        open_tokenizer(tmp_path / "half" / "encoder.json")


# -- the command ----------------------------------------------------------------------------------------------------------


def train(out: Path, *extra: str) -> int:
    return run(["tokenizer", "train", "--data", str(tiny.data()["documents"]), "--out", str(out), *extra])


def test_train_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "words"
    assert train(out, "--vocab-size", "300") == 0
    assert len(open_tokenizer(out)) == 300
    assert train(out, "--vocab-size", "310") == 1, "another tokenizer is not overwritten"
    assert len(open_tokenizer(out)) == 300
    assert train(out, "--vocab-size", "310", "--force") == 0 and len(open_tokenizer(out)) == 310
    facts = json.loads((out / "manifest.json").read_text("utf-8"))["facts"]
    assert facts["texts"] == facts["texts_learned_from"] == 96 and facts["dropped"] == {}
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine", "utf-8")
    capfd.readouterr()
    assert train(other, "--force") == 1 and "something else" in capfd.readouterr().err
    assert [p.name for p in other.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("model_type", MODEL_TYPES[1:])
def test_train_sentencepiece(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="SENTENCEPIECE NOT TESTED: pip install sentencepiece")
    assert train(tmp_path / "w", "--vocab-size", "340", "--model-type", model_type) == 0
    text = "Note 1: the door is red. 门是红的。"
    found = AutoTokenizer.from_pretrained(tmp_path / "w" / "model")
    assert found.decode(found(text)["input_ids"]) == text and len(found.tokenize("the door is red")) < 15


def test_wrong_requests(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "w", "--model-type", "wordpiece") == 2
    assert train(tmp_path / "w", "--vocab-size", "10") == 2
    assert run(["tokenizer", "train", "--data", str(tmp_path / "x.txt"), "--out", str(tmp_path / "w")]) == 1
    assert run(["tokenizer", "ferment"]) == 2 and "ferment" in capfd.readouterr().err


def test_faulty_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "the furnace"}\n{"text": 3}\n{"text": "is hot"}\n', "utf-8")
    arguments = ["tokenizer", "train", "--data", str(file), "--out", str(tmp_path / "w"), "--vocab-size", "265"]
    assert run(arguments) == 1 and "a.jsonl:2" in capfd.readouterr().err
    assert run([*arguments, "--skip-bad"]) == 0
    facts = json.loads((tmp_path / "w" / "manifest.json").read_text("utf-8"))["facts"]
    assert facts["texts"] == 2 and sum(facts["dropped"].values()) == 1
