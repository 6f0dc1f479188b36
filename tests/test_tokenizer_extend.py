"""New words for existing tokenizers and models: old ids and old text stay as they are, whatever kind of tokenizer it is."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

import danlu
from danlu.cli.main import run
from danlu.exceptions import DataError, ModelError
from danlu.models.embeddings import grow_embeddings, stored_dtype
from danlu.text.extend import Extension, extend_tokenizer, read_words
from danlu.text.new_words import find_words
from danlu.text.tokenizer import train_tokenizer
from danlu.text.tokenizer_files import open_tokenizer
from danlu.text.word_pieces import WordPieces

TEXT = [
    "the furnace is hot and the coals glow; a cup of tea, please.",
    "今天天气很好，我们一起去公园散步。明天再来。",
    "The lamp is on the table (and the table is old).",
] * 4
WORDS = ["头孢", "头孢克肟", "园天", "amoxicillin", "βlactam"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


# -- one tokenizer of every kind ----------------------------------------------------------------------------------------


def _learned(size: int = 120) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of a BPE over characters, with U+2581 for spaces."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Replace(" ", "▁")
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    model = json.loads(core.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(pair) for pair in model["merges"]]


def _llama(**options: Any) -> Any:
    tokens, merges = _learned()
    names = ["<unk>", "<s>", "</s>", *BYTES, *tokens]
    return LlamaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=merges, **options)


def _llama_file() -> Any:
    """As the tokenizer.json of the first Llama is: its normalizer puts the space."""
    core = _llama().backend_tokenizer
    core.pre_tokenizer = None
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _bytes(*, prefix: bool) -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    core.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def _unigram(*, bytes_: bool = False, split: bool = False, behind: bool = False) -> Any:
    letters = sorted({c for text in TEXT for c in text if c != " "})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((b, -200.0) for b in BYTES if bytes_)]
    pieces += [
        ("▁", -3.0),
        ("▁the", -4.0),
        ("今天", -5.0),
        ("table", -6.5),
        *((c, -7.0 - i / 50) for i, c in enumerate(letters)),
    ]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=bytes_))
    steps: list[Any] = [pre_tokenizers.WhitespaceSplit()] if split else []
    scheme = "always" if split else "first"
    steps.append(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps) if split else steps[0]
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if behind:
        core.add_tokens([AddedToken("<later>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _word_piece() -> Any:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "<s>", "</s>"], show_progress=False)
    core.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")


KINDS: dict[str, Callable[[], Any]] = {
    "danlu": lambda: train_tokenizer(TEXT, 330),
    "bytes": lambda: _bytes(prefix=False),
    "bytes behind a space": lambda: _bytes(prefix=True),
    "llama": _llama,
    "llama, legacy": lambda: _llama(legacy=True),
    "llama, normalizer": _llama_file,
    "unigram": _unigram,
    "unigram with bytes": lambda: _unigram(bytes_=True),
    "unigram, split": lambda: _unigram(split=True),
    "unigram, tokens behind": lambda: _unigram(bytes_=True, behind=True),
    "word pieces": _word_piece,
}
# What comes out of these is what went in, so new words must not change that.
LOSSLESS = [
    name for name in KINDS if name.startswith(("danlu", "bytes", "llama")) or "bytes" in name or "behind" in name
]

INVENTS_SPACES = ["bytes behind a space", "llama, legacy", "llama, normalizer"]


@functools.cache
def base(kind: str) -> Any:
    return KINDS[kind]()


@functools.cache
def extension(kind: str) -> Extension:
    return extend_tokenizer(base(kind), WORDS)


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text)["input_ids"]
    return found


def back(tokenizer: Any, text: str) -> str:
    found: str = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


# -- what must hold for every kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_stay_and_new_ones_follow(kind: str) -> None:
    old, new = base(kind), extension(kind).tokenizer
    assert {t: i for t, i in new.get_vocab().items() if t in old.get_vocab()} == old.get_vocab()
    tokens = extension(kind).tokens
    assert [t.id for t in tokens] == list(range(len(old), len(new)))
    assert len(new) == len(old) + len(tokens) and {"头孢克肟", "园天"} <= {t.text for t in tokens}
    assert new.all_special_ids == old.all_special_ids and new.chat_template == old.chat_template
    assert "头孢" not in old.get_vocab(), "the base is not changed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["头孢克肟", "我们头孢克肟，明天", "园天 and amoxicillin now", "take amoxicillin"])
def test_new_words_are_one_token(kind: str, text: str) -> None:
    found = ids(extension(kind).tokenizer, text)
    wanted = [t for t in extension(kind).tokens if t.text.strip() in text and t.text.strip() != "头孢"]
    words = {t.text.strip() for t in wanted}
    assert words and {t.text.strip() for t in wanted if t.id in found} == words
    before = ids(base(kind), text)
    unknown = base(kind).unk_token_id
    assert (len(found), found.count(unknown)) < (len(before), before.count(unknown))


ALPHABET = st.sampled_from(
    [
        *"头孢克肟园今天很好我the amoxicillin β()；。１2\n",
        " ",
        "  ",
        "▁",
        "é",
        "🙂",
        "▁amoxi",
        "<s>",
        "</s>",
        "amoxicilli",
    ]
)
PLAIN = st.lists(ALPHABET, max_size=12).map("".join)
WITH_WORDS = st.lists(st.one_of(ALPHABET, st.sampled_from(WORDS)), max_size=12).map("".join)
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(text=PLAIN)
def test_other_text_is_cut_as_before(kind: str, text: str) -> None:
    if not any(word in text for word in WORDS):
        assert ids(extension(kind).tokenizer, text) == ids(base(kind), text)


@pytest.mark.parametrize("kind", LOSSLESS)
@QUICK
@given(text=WITH_WORDS)
def test_text_with_new_words_comes_back_as_before(kind: str, text: str) -> None:
    new, old = back(extension(kind).tokenizer, text), back(base(kind), text)
    if kind in INVENTS_SPACES:  # but not before a word that stands alone: the base's invented space is not missed
        new, old = (re.sub("(^|</?s>) ", r"\1", found) for found in (new, old))
    assert new == old


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_extension(kind: str) -> None:
    once = extension(kind).tokenizer
    twice = extend_tokenizer(once, ["头孢", "公园散步", "once more"]).tokenizer
    assert {t: i for t, i in twice.get_vocab().items() if t in once.get_vocab()} == once.get_vocab()
    for text in ("我头孢克肟 amoxicillin 了", "今天 the table", " amoxicillin"):
        assert ids(twice, text) == ids(once, text)
    assert ids(twice, "我们公园散步")[-1] == ids(twice, "公园散步")[-1] >= len(once)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_by_transformers(kind: str, tmp_path: Path) -> None:
    new = extension(kind).tokenizer
    new.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("我头孢克肟 amoxicillin 了 <s> x", "the table", "  园天"):
        assert ids(loaded, text) == ids(new, text)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert "/tmp" not in json.dumps(config), "no trace of where it was made"


# -- by hand ------------------------------------------------------------------------------------------------------------


def test_pieces_by_hand() -> None:
    # Two characters that the little Llama has not, of three bytes each; the bytes begin at id 3. 园 and 天 it has.
    found = {t.text: t.pieces for t in extension("llama").tokens}
    old = base("llama").convert_tokens_to_ids
    assert found["头孢"] == tuple(3 + byte for byte in "头孢".encode())
    assert found["园天"] == (old("园"), old("天"))
    spaced, bare = found[" amoxicillin"], found["amoxicillin"]
    names = base("llama").convert_ids_to_tokens
    assert [names(s[0])[0] for s in (list(spaced), list(bare))] == ["▁", "a"], "a piece behind a space, and one without"


def test_the_score_of_a_unigram_piece_is_the_mean_of_its_old_ones() -> None:
    grown = extend_tokenizer(_unigram(), ["table园天"])
    pieces = json.loads(grown.tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    scores = dict(map(tuple, pieces))
    assert pieces[-1][0] == "▁table园天"
    assert pieces[-1][1] == pytest.approx((scores["▁"] + scores["table"] + scores["园"] + scores["天"]) / 4)


def test_words_of_scripts_with_spaces_have_two_forms() -> None:
    tokenizer = extension("bytes").tokenizer
    assert tokenizer.tokenize("x amoxicillin (amoxicillin)")[-4:] == [" amoxicillin", "Ġ(", "amoxicillin", ")"]
    assert "amoxicillin" not in tokenizer.tokenize("xamoxicilliny"), "the bare form stands alone"
    only_behind = extend_tokenizer(base("bytes"), [" amoxicillin"])
    assert [t.text for t in only_behind.tokens] == [" amoxicillin"]


def test_what_is_not_added() -> None:
    found = extend_tokenizer(base("bytes"), ["the", "<s>", "x<s>", "café", "头孢", "头孢", "  "])
    assert [t.text for t in found.tokens] == [" café", "头孢"]
    assert "already" in found.skipped[" the"] and "special" in found.skipped["x<s>"]
    assert "bytes" in found.skipped["café"] and "already" in found.skipped["<s>"]
    assert back(found.tokenizer, "a café, café") == "a café, café"


def test_nothing_to_add_gives_the_same_tokenizer() -> None:
    found = extend_tokenizer(base("bytes"), ["the"])
    assert found.tokens == [] and found.tokenizer is base("bytes")


def test_a_prefix_that_cannot_be_moved() -> None:
    core = _bytes(prefix=True).backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    with pytest.raises(ModelError, match="cannot rearrange") as caught:
        extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=core), ["头孢"])
    assert "Digits, ByteLevel" in caught.value.hint


def test_a_vocabulary_with_holes() -> None:
    ids_ = {"a": 0, "b": 1, "ab": 7}
    core = Tokenizer(models.BPE(ids_, [("a", "b")]))
    with pytest.raises(ModelError, match="holes"):
        extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=core), ["abab"])


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        name_or_path = "somewhere"

    with pytest.raises(ModelError, match="not a fast tokenizer"):
        extend_tokenizer(Slow(), ["头孢"])


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b"", None, "no words"),
        (b"\n \n", None, "no words"),
        ("词\n".encode() + b"a" * 65, 2, "65 characters"),
        ("词".encode("gb18030"), None, "UTF-8"),
        (None, None, "cannot be read"),
    ],
)
def test_word_files_with_faults(content: bytes | None, line: int | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        read_words(file)
    assert caught.value.file == str(file) and caught.value.line == line


def test_word_files(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes("\ufeff头孢\r\n\n 散步 \n头孢\n".encode())
    assert read_words(file) == ["头孢", "散步"]


# -- words found in a text ----------------------------------------------------------------------------------------------


def test_words_that_save_most_come_first() -> None:
    # 头孢: six bytes, six times. " mofa" and "mofa": some letters, five times each. 丙: three bytes, three times.
    texts = ["mofa mofa，头孢、"] * 5 + ["头孢"] + ["丙。"] * 3 + ["丁"] * 2
    pieces = WordPieces(base("bytes"))
    found = find_words(pieces, texts, 10, min_count=3)
    assert {(w.text, w.count) for w in found} == {("头孢", 6), (" mofa", 5), ("mofa", 5), ("丙", 3)}
    savings = [
        w.count * (len(found_ids) - 1) for w, found_ids in zip(found, pieces.ids([w.text for w in found]), strict=True)
    ]
    assert savings == sorted(savings, reverse=True)
    assert [w.text for w in find_words(pieces, texts, 1, min_count=3)] == ["头孢"]
    assert find_words(pieces, texts, 10, min_count=7) == [] == find_words(pieces, [], 10)


def test_parts_of_words_are_not_taken_for_words() -> None:
    """头孢克肟 always stands whole, so none of its parts is of use beside it."""
    texts = [f"{a}头孢克肟{b}" for a, b in zip("今明后天前昨早", "月年日时分秒里", strict=True)]
    assert [w.text for w in find_words(WordPieces(base("bytes")), texts, 1, min_count=3)] == ["头孢克肟"]
    assert [w.text for w in find_words(WordPieces(base("bytes")), texts, 9, min_count=3)] == ["头孢克肟"]


def test_the_same_text_gives_the_same_words() -> None:
    first = find_words(WordPieces(base("llama")), [*TEXT, "头孢 amoxicillin"] * 3, 20, min_count=2)
    assert first == find_words(WordPieces(base("llama")), [*TEXT, "头孢 amoxicillin"] * 3, 20, min_count=2) != []


# -- rows of the model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "codegen"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_means(family: str, tied: bool, tiny: Callable[..., Any]) -> None:
    model = tiny(family, vocab_size=40, tie_word_embeddings=tied)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grow_embeddings(model, {40: [3, 5, 5], 41: [7]})
    rows, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert model.config.vocab_size == len(rows) == len(head.weight) == 42
    assert (head.weight is rows) == tied
    name = next(k for k, v in before.items() if v.shape == (40, 32) and "lm_head" not in k)
    old, old_head = before[name], before[name] if tied else before["lm_head.weight"]
    assert torch.equal(rows[:40], old) and torch.equal(head.weight[:40], old_head)
    assert torch.allclose(rows[40], (old[3] + 2 * old[5]) / 3) and torch.equal(rows[41], old[7])
    assert torch.allclose(head.weight[40], (old_head[3] + 2 * old_head[5]) / 3)
    if head.bias is not None:
        bias = before["lm_head.bias"]
        assert torch.allclose(head.bias[40], (bias[3] + 2 * bias[5]) / 3) and torch.equal(head.bias[:40], bias)


def test_spare_rows_are_used_first(tiny: Callable[..., Any]) -> None:
    model = tiny("llama", vocab_size=48)
    old = model.get_input_embeddings().weight.clone()
    grow_embeddings(model, {40: [0, 1]})
    assert model.config.vocab_size == 48 and torch.equal(model.get_input_embeddings().weight[41:], old[41:])
    assert torch.allclose(model.get_input_embeddings().weight[40], (old[0] + old[1]) / 2)


def test_a_tokenizer_of_another_model(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="token 60 has no row"):
        grow_embeddings(tiny("llama", vocab_size=48), {100: [3, 60]})


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({}, torch.float32),
        ({"dtype": "int8"}, torch.float32),
    ],
)
def test_the_dtype_is_kept(config: dict[str, str], dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert stored_dtype(tmp_path) == dtype


# -- the command --------------------------------------------------------------------------------------------------------


def extended(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capfd.readouterr()
    assert run(["tokenizer", "extend", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def failed(arguments: list[str], status: int, capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert run(["tokenizer", "extend", *arguments]) == status
    captured = capfd.readouterr()
    assert captured.out == "" and "bug" not in captured.err
    return captured.err


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return tiny.write_rows(
        tmp_path / "data" / "t.jsonl", [{"text": f"{c}头孢克肟，好。"} for c in "今明后天前昨早晚夜"]
    )


def test_a_model_with_new_words(tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = tmp_path / "w.txt"
    words.write_text("丹炉\n", "utf-8")
    told = extended(
        [str(tiny.model()), "--text", str(corpus), "--new", "3", "--words", str(words), "--out", str(out)], capfd
    )
    old, new = AutoTokenizer.from_pretrained(tiny.model()), AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny.model()).get_input_embeddings().weight
    assert told["vocab_size"] == len(new) == model.config.vocab_size == told["embedding_rows"] == len(old) + 3
    assert [a["text"] for a in told["added"]][:2] == ["丹炉", "头孢克肟"] and told["added"][1]["count"] == 9
    for added in told["added"]:
        row = model.get_input_embeddings().weight[added["id"]]
        assert torch.allclose(row, before[old.convert_tokens_to_ids(added["pieces"])].mean(dim=0), atol=1e-6)
    assert told["tokens_per_character"]["after"] < told["tokens_per_character"]["before"] / 2
    inputs = new("吃头孢克肟", return_tensors="pt")
    assert new.convert_tokens_to_ids("头孢克肟") in inputs["input_ids"][0]
    assert model.generate(input_ids=inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[1] > 2
    answer = danlu.load(out)
    assert answer.template is not None and answer.tokenizer.chat_template == old.chat_template
    assert not list(tmp_path.glob("*.partial"))


def test_a_bare_tokenizer_is_extended_too(tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [str(tiny.tokenizer_folder()), "--text", str(corpus), "--new", "2", "--out", str(out)]
    assert extended(arguments, capfd)["embedding_rows"] is None
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in tiny.tokenizer_folder().iterdir())
    assert "exists already" in failed(arguments, 1, capfd)
    assert run(["tokenizer", "extend", *arguments, "--force"]) == 0
    said = capfd.readouterr().err
    assert "头孢克肟" in said and "only the tokenizer" in said and f"written to {out}" in said


def test_wrong_requests(tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, out = str(tiny.model()), str(tmp_path / "out")
    text = ["--text", str(corpus)]
    assert "nothing to add" in failed([model, "--out", out], 2, capfd)
    assert "go together" in failed([model, "--new", "5", "--out", out], 2, capfd)
    assert "go together" in failed([model, *text, "--words", str(corpus), "--out", out], 2, capfd)
    assert "--out" in failed([model, *text, "--new", "5"], 2, capfd)
    assert "no such model" in failed([str(tmp_path / "nowhere"), *text, "--new", "5", "--out", out], 1, capfd)
    assert "the base itself" in failed([model, *text, "--new", "5", "--out", model, "--force"], 1, capfd)
    other = tmp_path / "data"
    assert "something else" in failed([model, *text, "--new", "5", "--out", str(other), "--force"], 1, capfd)
    assert "99 times" in failed([model, *text, "--new", "5", "--min-count", "99", "--out", out], 1, capfd)
    assert "does not exist" in failed([model, "--text", str(tmp_path / "x.txt"), "--new", "5", "--out", out], 1, capfd)
    assert not Path(out).exists() and corpus.is_file()


def test_quantised_models_are_refused(tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    assert run(["quantize", "--model", str(tiny.model()), "--out", str(small)]) == 0
    said = failed([str(small / "model"), "--text", str(corpus), "--new", "1", "--out", str(tmp_path / "out")], 1, capfd)
    assert "quantised" in said


# -- real tokenizers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "chinese-llama"])
def test_real_tokenizers(name: str, shared_data: Path) -> None:
    old = open_tokenizer(shared_data / "tokenizers" / name)
    poems = json.loads((shared_data / "pretrain-zh/poetry/全唐诗/poet.tang.0.json").read_text("utf-8"))
    texts = ["".join(poem["paragraphs"]) for poem in poems[:600]]
    train, heldout = texts[:500], texts[500:]
    found = find_words(WordPieces(old), train, 300, min_count=4)
    new = extend_tokenizer(old, [*(w.text for w in found), "头孢克肟"]).tokenizer
    assert {t: i for t, i in new.get_vocab().items() if i < len(old)} == old.get_vocab()

    def tokens(tokenizer: Any) -> int:
        return sum(len(t) for t in tokenizer(heldout, add_special_tokens=False)["input_ids"])

    # On poems that it has not seen; a tokenizer of 20,000 Chinese pieces has less to gain.
    assert tokens(new) < tokens(old) * (0.85 if name != "chinese-llama" else 0.99)
    english = (shared_data / "pretrain-en/tinyshakespeare.txt").read_text("utf-8").split("\n\n")[:300]
    assert [ids(new, text) for text in english] == [ids(old, text) for text in english]
    if name != "chinese-llama":  # its normalisation is not undone, and new characters were unknown before
        assert all(back(new, text) == text for text in heldout)


@pytest.mark.slow
def test_a_real_gpt2_learns_chinese(shared_data: Path, tmp_path: Path, tiny: Callable[..., Any]) -> None:
    tokenizer = open_tokenizer(shared_data / "tokenizers/gpt2")
    model = tiny("gpt2", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    novel = str(shared_data / "pretrain-zh/novels/三国演义.txt.gz")
    arguments = [
        str(tmp_path / "base"),
        "--text",
        novel,
        "--new",
        "300",
        "--sample-mb",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert run(["tokenizer", "extend", *arguments]) == 0
    new, grown = AutoTokenizer.from_pretrained(tmp_path / "out"), danlu.load(tmp_path / "out").model
    assert type(new).__name__ == "GPT2Tokenizer" and grown.config.vocab_size == len(new) == 50_557
    text = "玄德曰：“孔明乃当世之大贤。”"
    assert len(ids(new, text)) < 0.75 * len(ids(tokenizer, text)) and back(new, text) == text
