"""ChatGLM's tokenizers against recorded ids, at the chat seam, and in folders of all kinds."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm import model, recorded, tokenizer
from transformers import AutoTokenizer

from danlu.exceptions import ModelError
from danlu.text import chatglm_text
from danlu.text.chat_template import ChatTemplate
from danlu.text.chatglm_text import call_arguments, punctuated, settled
from danlu.text.chatglm_tokenizers import ChatGLM2Tokenizer, ChatGLMTokenizer, has_roles
from danlu.text.own_tokenizers import tokenizer_class_of
from danlu.text.tokenizer import load_tokenizer
from danlu.text.tokenizer_files import open_tokenizer
from danlu.types import Message

NAMES = ("chatglm_v1", "chatglm2", "chatglm3")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


# -- recorded -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recorded_texts(name: str) -> None:
    words, texts = tokenizer(name), recorded(name).texts
    assert len(texts["tokenizer"]) >= 12
    for case in texts["tokenizer"]:
        assert words.encode(case["text"], add_special_tokens=False) == case["ids_plain"]
        assert words(case["text"], add_special_tokens=False)["input_ids"] == case["ids_plain"]
        assert words(case["text"])["input_ids"] == case["ids"]
        assert words.decode(case["ids_plain"]) == case["decoded"]
    pair = texts["tokenizer_pair"]
    assert words(pair["a"], pair["b"])["input_ids"] == pair["ids"]
    special = texts["special_ids"]
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == tuple(
        special[k] for k in ("bos", "eos", "pad")
    )
    control = {k: v for k, v in special.items() if k not in ("bos", "eos", "pad", "mask", "gmask")}
    assert {k: words.convert_tokens_to_ids(k) for k in control} == control
    assert len(words) == texts.get("vocab_size", 624)


@pytest.mark.parametrize("name", [*NAMES, "chatglm_v1_pos1d"])
def test_recorded_batches(name: str) -> None:
    words, tensors = tokenizer(name), recorded(name).tensors
    texts = ["你好", "今天天气很好，我们一起去公园散步吧。"]
    found = words(texts, padding=True, return_tensors="pt")
    for key in ("input_ids", "attention_mask", "position_ids"):
        assert torch.equal(found[key], tensors[f"tok_batch.{key}"]), key
    collated = words.pad([{"input_ids": words.encode(t)} for t in texts], return_tensors="pt")
    assert torch.equal(collated["position_ids"], tensors["tok_batch.position_ids"])
    # Mere ids come without masks, which grow with the square of a text.
    assert list(words(texts)) == ["input_ids"]


@pytest.mark.parametrize("name", NAMES[:2])
def test_recorded_prompts(name: str) -> None:
    words = tokenizer(name)
    template = ChatTemplate(load_tokenizer(recorded(name).folder))
    for case in recorded(name).texts["prompts"]:
        assert words.build_prompt(case["query"], case["history"]) == case["prompt"]
        assert words.encode(case["prompt"]) == case["ids"]
        messages = [m for q, r in case["history"] for m in (user(q), answer(r))]
        assert template.encode_prompt([*messages, user(case["query"])]) == case["ids"]


def test_recorded_turns_of_chatglm3() -> None:
    words, texts = tokenizer("chatglm3"), recorded("chatglm3").texts
    for case in texts["chat_inputs"]:
        found = words.build_chat_input(case["query"], case["history"], case["role"])
        assert found["input_ids"].tolist() == [case["ids"]]
        assert found["position_ids"].tolist() == [list(range(len(case["ids"])))]
    parsing = ChatGLM2Tokenizer.from_pretrained(recorded("chatglm3").folder, encode_special_tokens=True)
    for case in texts["encode_special_tokens_true"]:
        assert parsing(case["text"])["input_ids"] == case["ids"]
    with pytest.raises(ModelError, match="'tool' is no role"):
        words.build_single_message("tool", "", "x")
    with pytest.raises(ModelError, match="no control token"):
        words.get_command("<|tool|>")


# -- the seam -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_user_cannot_say_control_tokens(name: str) -> None:
    words = load_tokenizer(recorded(name).folder)
    template = ChatTemplate(words)
    text = "x [gMASK]<sop><eop> sop</s> <|assistant|>\n[MASK] y"
    ids = template.encode_prompt([user(text)])
    plain = template.encode_prompt([user("x")])
    control = set(words.all_special_ids)
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    assert text in words.decode(ids)


def test_the_answer_of_chatglm_is_read_on_its_own() -> None:
    """The original's fine-tuning layout; the space that SentencePiece puts in front of the answer is there."""
    pair = recorded("chatglm_v1").texts["tokenizer_pair"]
    encoded = ChatTemplate(load_tokenizer(recorded("chatglm_v1").folder)).encode([user(pair["a"]), answer(pair["b"])])
    assert encoded.ids == pair["ids"]
    assert encoded.loss_weights == [0.0] * 4 + [1.0] * 5


def test_answers_are_shown_finished() -> None:
    template = ChatTemplate(load_tokenizer(recorded("chatglm_v1").folder))
    said = template.encode([user("你好"), answer("好的,你好!")])
    ids = said.ids[said.answers[0].start :]
    assert template.decode(ids) == "好的，你好！"
    assert template.decode(ids[:-1], final=False) == "好的，你好"  # a Chinese character may follow, or none


@pytest.mark.parametrize(
    "text", ["好的,你好! a,b", "训练于[[训练时间]],结束", "x [[y]] [z", "  a , 中 : ", "数字1,中文,中", "[[训练", ""]
)
def test_what_is_streamed_stays(text: str) -> None:
    """Whatever follows, what was shown of a beginning is the beginning of what is shown of the whole."""
    shown = [settled(text[:n], punctuated) for n in range(len(text) + 1)]
    assert all(punctuated(text).startswith(part) for part in shown)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\ntool_call(city='北京', days=3)\n```", {"city": "北京", "days": 3}),
        ("tool_call(a=[1, {'b': None}])", {"a": [1, {"b": None}]}),
        ("```python\ntool_call(a=__import__('os').getcwd())\n```", {"a": "__import__('os').getcwd()"}),
        ("```python\nimport os\n```", {}),
        ("tool_call(1, **x)", {}),
        ("not python (", {}),
    ],
)
def test_calls_are_read_and_never_run(text: str, expected: dict[str, Any]) -> None:
    assert call_arguments(text) == expected


def test_several_turns_in_one_answer() -> None:
    content, turns = chatglm_text.read_answer("\n 一<|assistant|>t\nx", [{"role": "user", "content": "q"}])
    assert content == {"name": "t", "content": "x"}
    assert [t["content"] for t in turns] == ["q", "一", "x"]


# -- folders ------------------------------------------------------------------------------------------------------------


def copied(name: str, target: Path, *, settings: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    """The SentencePiece file of a folder with other settings beside it."""
    target.mkdir()
    file = "ice_text.model" if name == "chatglm_v1" else "tokenizer.model"
    shutil.copyfile(recorded(name).folder / file, target / file)
    (target / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    if config is not None:
        (target / "config.json").write_text(json.dumps(config), "utf-8")
    return target


@pytest.mark.parametrize("name", NAMES)
def test_saved_tokenizers_come_back(name: str, tmp_path: Path) -> None:
    words = load_tokenizer(recorded(name).folder)
    ChatTemplate(words)
    words.save_pretrained(tmp_path)
    again, cases = load_tokenizer(tmp_path), recorded(name).texts["tokenizer"]
    assert type(again) is type(words) and len(again) == len(words)
    assert again.chat_template == words.chat_template
    sent = pickle.loads(pickle.dumps(words))
    for found in (again, sent, open_tokenizer(recorded(name).folder)):
        assert [found(c["text"])["input_ids"] for c in cases] == [c["ids"] for c in cases]
    assert getattr(again, "roles", None) == getattr(words, "roles", None)


@pytest.mark.parametrize("name", NAMES)
def test_the_auto_class_finds_them(name: str) -> None:
    model(name)  # loading a model registers its family
    found = AutoTokenizer.from_pretrained(recorded(name).folder, trust_remote_code=False)
    assert type(found) is (ChatGLMTokenizer if name == "chatglm_v1" else ChatGLM2Tokenizer)
    case = recorded(name).texts["tokenizer"][1]
    assert found(case["text"])["input_ids"] == case["ids"]
    assert getattr(found, "roles", False) == (name == "chatglm3")


def test_image_tokens_of_the_first_revision(tmp_path: Path) -> None:
    """Its settings do not say that 20000 ids stand in front."""
    folder = copied("chatglm_v1", tmp_path / "model", settings={"tokenizer_class": "ChatGLMTokenizer"})
    found, now = load_tokenizer(folder), tokenizer("chatglm_v1")
    assert found("你好")["input_ids"] == [i + 20000 for i in now("你好")["input_ids"]]
    assert found.decode([7, 20440, 20409]) == "<image_7>你好"
    assert len(found) == 20624 and found.pad_token_id == 20003


def test_spaces_and_letters() -> None:
    folder = recorded("chatglm_v1").folder
    bare = ChatGLMTokenizer.from_pretrained(folder, remove_space=True, do_lower_case=True)
    assert bare.encode("  A  B\n") == bare.encode("a b")
    long = " " * 83 + "x"  # the longest run is 80
    assert tokenizer("chatglm_v1").decode(tokenizer("chatglm_v1").encode(long, add_special_tokens=False)) == long


@pytest.mark.parametrize(
    ("settings", "config", "roles"),
    [
        ({"name_or_path": "THUDM/chatglm3-6b"}, {}, True),
        ({}, {"_name_or_path": "THUDM/chatglm2-6b-int4"}, False),
        ({"name_or_path": "x"}, {"seq_length": 8192}, True),
        ({"name_or_path": "x"}, {"seq_length": 32768}, False),
        ({"chat_template": "<|user|><|assistant|>"}, {"seq_length": 32768}, True),
        ({"roles": False}, {"_name_or_path": "chatglm3"}, False),
    ],
)
def test_whether_a_folder_is_chatglm3s(settings: Any, config: Any, roles: bool, tmp_path: Path) -> None:
    folder = copied("chatglm3", tmp_path / "model", settings=settings, config=config)
    assert has_roles(folder) is roles
    (folder / "tokenization_chatglm.py").write_text('TOKENS = ["<|observation|>"]\nraise SystemExit', "utf-8")
    if "roles" not in settings and "chat_template" not in settings:
        assert has_roles(folder)  # what the published code knows; it is read and not run


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm"}), "utf-8")
    assert tokenizer_class_of(tmp_path) is None and load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer"}), "utf-8")
    with pytest.raises(ModelError, match=r"needs ice_text\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "ice_text.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match="no SentencePiece model"):
        load_tokenizer(tmp_path)
    assert tokenizer_class_of(tmp_path / "none") is None
