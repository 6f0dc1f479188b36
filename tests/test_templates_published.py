"""Every shipped template against the published format, written out once more in Python, and against recorded prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_chat_template import a, byte_tokenizer, s, u
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from danlu.exceptions import TemplateError
from danlu.text.chat_template import ChatTemplate
from danlu.text.template_registry import TEMPLATES, fitting_template, shipped_template
from danlu.types import Message

Pair = tuple[str, str]
Builder = Callable[[str, list[Pair], str], str]  # system, finished exchanges, the question that is asked
B, E = "<s>", "</s>"


def with_all_tokens(name: str) -> Any:
    """A tokenizer that knows all the control tokens of a format."""
    entry = TEMPLATES[name]
    tokens = [B, E, entry.stop, *entry.tokens, *(t for _, mark in entry.marks for t in mark)]
    return byte_tokenizer(sorted({t for t in tokens if t}), bos_token=B, eos_token=E)


# --- the formats once more --------------------------------------------------------------------------------------------

BELOW = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def chatml(system: str, done: list[Pair], ask: str) -> str:
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    for question, answer in done:
        text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    return text + f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n"


def qwen(system: str, done: list[Pair], ask: str) -> str:
    return chatml(system or "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", done, ask)


def plain(system: str, done: list[Pair], ask: str) -> str:
    text = f"{system}\n\n" if system else ""
    for question, answer in done:
        text += f"Human: {question}\n\nAssistant: {answer}{E}\n\n"
    return text + f"Human: {ask}\n\nAssistant: "


def hh(system: str, done: list[Pair], ask: str) -> str:
    middle = "".join(f"\n\nHuman: {question}\n\nAssistant: {answer}{E}" for question, answer in done)
    return f"{system}{middle}\n\nHuman: {ask}\n\nAssistant:"


def alpaca(system: str, done: list[Pair], ask: str) -> str:
    text = f"{system or BELOW}\n\n"
    for question, answer in done:
        text += f"### Instruction:\n{question}\n\n### Response:{answer}{E}\n\n"
    return text + f"### Instruction:\n{ask}\n\n### Response:"


def dolly(system: str, done: list[Pair], ask: str) -> str:
    text = f"{system or BELOW}\n\n"
    for question, answer in done:
        text += f"### Instruction:\n{question}\n\n### Response:\n{answer}\n\n### End\n\n"
    return text + f"### Instruction:\n{ask}\n\n### Response:\n"


def vicuna(system: str, done: list[Pair], ask: str) -> str:
    system = system or (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    return system + " " + "".join(f"USER: {q} ASSISTANT: {r}</s>" for q, r in done) + f"USER: {ask} ASSISTANT:"


def llama2(system: str, done: list[Pair], ask: str) -> str:
    head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    text = ""
    for question, answer in done:
        text += f"<s>[INST] {(head + question).strip()} [/INST] {answer.strip()} </s>"
        head = ""
    return text + f"<s>[INST] {(head + ask).strip()} [/INST]"


def llama3(system: str, done: list[Pair], ask: str) -> str:
    def turn(role: str, content: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}<|eot_id|>"

    text = B + (turn("system", system) if system else "")
    text += "".join(turn("user", q) + turn("assistant", r) for q, r in done)
    return text + turn("user", ask) + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def chatglm(system: str, done: list[Pair], ask: str) -> str:
    head = f"{system}\n" if system else ""
    if not done:
        return f"{head}{ask}[gMASK]<sop>"
    rounds = "".join(f"[Round {i}]\n问：{q}\n答：{r}\n" for i, (q, r) in enumerate(done))
    return f"{head}{rounds}[Round {len(done)}]\n问：{ask}\n答：[gMASK]<sop>"


def chatglm2(system: str, done: list[Pair], ask: str) -> str:
    rounds = "".join(f"[Round {i}]\n\n问：{q}\n\n答：{r}\n\n" for i, (q, r) in enumerate(done, 1))
    return f"[gMASK]sop{system}{chr(10) * 2 if system else ''}{rounds}[Round {len(done) + 1}]\n\n问：{ask}\n\n答："


def chatglm3(system: str, done: list[Pair], ask: str) -> str:
    turns = [("system", system)] if system else []
    for question, answer in done:
        turns += [("user", question), ("assistant", answer)]
    turns.append(("user", ask))
    return "[gMASK]sop" + "".join(f"<|{role}|>\n {content}" for role, content in turns) + "<|assistant|>"


def moss(system: str, done: list[Pair], ask: str) -> str:
    text = f"{system}\n" if system and not system.endswith("\n") else system
    text += "".join(f"<|Human|>: {q}<eoh>\n<|MOSS|>: {r}<eom>\n" for q, r in done)
    return text + f"<|Human|>: {ask}<eoh>\n<|MOSS|>:"


def belle(system: str, done: list[Pair], ask: str) -> str:
    text = f"{system}\n\n" if system else ""
    text += "".join(f"Human: \n{q}\n\nAssistant: \n{r}{E}" for q, r in done)
    return text + f"Human: \n{ask}\n\nAssistant: \n"


def huatuo(system: str, done: list[Pair], ask: str) -> str:
    text = system or "下面是一个问题，运用医学知识来正确回答提问."
    text += "".join(f"\n### 问题:\n{q}\n### 回答:\n{r}{E}" for q, r in done)
    return text + f"\n### 问题:\n{ask}\n### 回答:\n"


def chatdoctor(system: str, done: list[Pair], ask: str) -> str:
    first = system or "If you are a doctor, please answer the medical questions based on the patient's description. "
    parts = [first, "ChatDoctor: I am ChatDoctor, what medical questions do you have?"]
    for question, answer in done:
        parts += [f"Patient: {question}", f"ChatDoctor: {answer}{E}"]
    return "\n\n".join([*parts, f"Patient: {ask}", "ChatDoctor: "])


def baichuan(system: str, done: list[Pair], ask: str, user: str = "102", assistant: str = "103") -> str:
    text = system + "".join(f"<reserved_{user}>{q}<reserved_{assistant}>{r}" for q, r in done)
    return text + f"<reserved_{user}>{ask}<reserved_{assistant}>"


def baichuan2(system: str, done: list[Pair], ask: str) -> str:
    return baichuan(system, done, ask, "106", "107")


def deepseek(system: str, done: list[Pair], ask: str) -> str:
    text = B + (f"{system}\n\n" if system else "")
    return text + "".join(f"User: {q}\n\nAssistant: {r}{E}" for q, r in done) + f"User: {ask}\n\nAssistant:"


def deepseek3(system: str, done: list[Pair], ask: str) -> str:
    return (
        B + system + "".join(f"<｜User｜>{q}<｜Assistant｜>{r}{E}" for q, r in done) + f"<｜User｜>{ask}<｜Assistant｜>"
    )


def text2text(system: str, done: list[Pair], ask: str) -> str:
    return "".join(f"{text}\n" for text in [*([system] if system else []), *(t for pair in done for t in pair), ask])


BUILDERS: dict[str, Builder] = {
    f.__name__: f
    for f in (
        *(chatml, plain, hh, alpaca, vicuna, llama2, llama3, chatglm, chatglm2, chatglm3, moss, belle, dolly, huatuo),
        *(chatdoctor, baichuan, baichuan2, qwen, deepseek, deepseek3, text2text),
    )
}
# What follows an answer, up to its stop token. ChatGLM3 writes nothing: the seam adds the end of the sequence.
ENDS = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>", "moss": "<eom>", "chatglm3": ""}
ENDS |= {"dolly": "\n\n### End", "llama2": " </s>"}
SPACED = {"hh", "vicuna", "moss", "deepseek", "llama2"}  # a space between the prompt and the answer's text


def test_every_template_has_its_format_written_out_here() -> None:
    assert set(BUILDERS) == set(TEMPLATES)


TALKS: list[tuple[str, list[Pair], str]] = [
    ("", [], "Hello"),
    ("Be kind.", [], "How are you?\nTell me."),
    ("", [("One?", "Yes."), ("Two?", "  No.\n")], "Three? "),
    ("Talk\nlike a pirate.", [("你好", "你好！")], " 今天天气怎么样？"),
    ("", [("", "")], ""),
]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", BUILDERS)
def test_prompts_are_the_published_ones(name: str, talk: tuple[str, list[Pair], str]) -> None:
    template = ChatTemplate(with_all_tokens(name), name)
    system, done, ask = talk
    messages = [s(system)] if system else []
    for question, answer in done:
        messages += [u(question), a(answer)]
    expected = BUILDERS[name](system, done, ask)
    assert template.render([*messages, u(ask)], add_generation_prompt=True) == expected
    ids = template.encode_prompt([*messages, u(ask)])
    assert template.tokenizer.decode(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize("name", BUILDERS)
def test_answers_end_as_published(name: str) -> None:
    template = ChatTemplate(with_all_tokens(name), name)
    prompt = BUILDERS[name]("", [("One?", "Yes.")], "Two?")
    shown = (" " if name in SPACED else "\n " if name == "chatglm3" else "") + "No."
    text = template.render([u("One?"), a("Yes."), u("Two?"), a("No.")])
    assert text.rstrip("\n") == prompt + shown + ENDS.get(name, E)


@pytest.mark.parametrize("name", TEMPLATES)
def test_plain_transformers_renders_the_same(name: str) -> None:
    """What is saved with a model needs nothing of danlu."""
    tokenizer = with_all_tokens(name)
    template = ChatTemplate(tokenizer, name)
    talk: list[Any] = [s("Be kind."), u("Hi"), a("Hello!"), u("你好")]
    assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == template.render(
        talk, add_generation_prompt=True
    )


def test_tools_as_qwen_has_them() -> None:
    template = ChatTemplate(with_all_tokens("qwen"), "qwen")
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    call: Any = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
    talk: list[Message] = [
        *(u("天气？"), {"role": "assistant", "content": "", "tool_calls": [call, call]}),
        *({"role": "tool", "content": "sunny"}, {"role": "tool", "content": "warm"}),
        *(a("Sunny."), u("Sure?"), {"role": "assistant", "content": "I ask.", "tool_calls": [call]}),
    ]
    shown = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert template.render(talk, tools=(tool,)) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}\n'
        "</tools>\n\nFor each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        f"<|im_start|>user\n天气？<|im_end|>\n<|im_start|>assistant\n{shown}\n{shown}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwarm\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nSunny.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        f"<|im_start|>assistant\nI ask.\n{shown}<|im_end|>\n"
    )


# --- what depends on the tokenizer ------------------------------------------------------------------------------------


def test_marks_that_a_tokenizer_does_not_know() -> None:
    tokenizer = byte_tokenizer([B, E], bos_token=B, eos_token=E)
    glm = ChatTemplate(tokenizer, "chatglm2")
    assert glm.render([u("x")], add_generation_prompt=True) == "[Round 1]\n\n问：x\n\n答："
    assert glm.note == ""
    assert ChatTemplate(tokenizer, "chatglm").render([u("x"), a("y")]) == "xy</s>"
    # Where the format's stop is no token, the end of the sequence stops.
    for name in ("chatml", "dolly", "llama3", "moss", "qwen"):
        template = ChatTemplate(byte_tokenizer([B, E], bos_token=B, eos_token=E), name)
        encoded = template.encode([u("x"), a("y")])
        assert encoded.answers[0].stops and template.stop_ids == {template.tokenizer.eos_token_id}
        assert encoded.ids[-1] == template.tokenizer.eos_token_id
        assert template.decode(encoded.ids[encoded.answers[0].start :]) == "y"
    llama = ChatTemplate(byte_tokenizer([B, E], bos_token=B, eos_token=E), "llama3")
    assert "does not know <|start_header_id|>, <|end_header_id|>" in llama.note


def with_bos(name: str) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer = with_all_tokens(name)
    bos = tokenizer.bos_token_id
    core = tokenizer.backend_tokenizer
    core.post_processor = TemplateProcessing(single=f"{B} $A", special_tokens=[(B, bos)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=B, eos_token=E, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_begin_as_the_tokenizer_begins_them(name: str) -> None:
    expected = BUILDERS[name]("", [], "Hello")
    bos = "" if TEMPLATES[name].bos != "tokenizer" else B
    assert ChatTemplate(with_bos(name), name).render([u("Hello")], add_generation_prompt=True) == bos + expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "chatglm", "chatglm2", "chatglm3", "moss"])
def test_a_tokenizer_without_a_template_gets_the_one_of_its_tokens(name: str) -> None:
    tokenizer = with_all_tokens(name)
    if name in ("chatglm", "chatglm2"):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<eop>", "eop"]})
    assert fitting_template(tokenizer) == name
    assert ChatTemplate(tokenizer).name == name
    assert tokenizer.chat_template.endswith(shipped_template(name))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_registry_says_what_formats_have_for_tools(name: str) -> None:
    can = ChatTemplate(with_all_tokens(name), name)._renderer.can
    has = {"tools": can.tools, "calls": can.calls, "results": can.results, "thoughts": can.thoughts}
    said = TEMPLATES[name].tools
    assert has == {word: word in said.removesuffix("the rest as text") for word in has}
    assert can.system and can.kept_tags and (can.kept_thoughts or not can.thoughts)


def test_a_template_that_differs_from_the_tokenizers_own_is_reported() -> None:
    tokenizer = with_all_tokens("chatml")
    tokenizer.chat_template = shipped_template("chatml")
    assert ChatTemplate(tokenizer).note == ""
    assert ChatTemplate(tokenizer, "chatml").note == ""
    named = ChatTemplate(tokenizer, "vicuna")
    assert "'vicuna' was asked for and differs from the tokenizer's own" in named.note
    assert "'Be brief. USER: Hello AS'" in named.note and "'<|im_start|>system\\nBe br'" in named.note


def test_of_several_own_templates_the_default_and_the_one_for_tools_are_used() -> None:
    tokenizer = with_all_tokens("chatml")
    tokenizer.chat_template = {
        "rag": "{{ 'rag' }}",
        "default": shipped_template("chatml"),
        "tool_use": shipped_template("qwen"),
    }
    template = ChatTemplate(tokenizer)
    assert template.source == shipped_template("chatml")
    tools = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    assert "# Tools" in template.render([u("x")], tools=tools, add_generation_prompt=True)
    assert "# Tools" not in template.render([u("x")], add_generation_prompt=True)


def test_roles_that_a_format_lacks_are_refused_by_the_saved_source() -> None:
    """danlu tells such turns as text; another library must not drop them silently."""
    tokenizer = with_all_tokens("alpaca")
    ChatTemplate(tokenizer, "alpaca")
    with pytest.raises(Exception, match="no place here for the role tool"):
        tokenizer.apply_chat_template([u("x"), {"role": "tool", "content": "y"}], tokenize=False)
    with pytest.raises(TemplateError, match="no template is named 'x'"):
        ChatTemplate(tokenizer, "x")


# --- recorded prompts -------------------------------------------------------------------------------------------------


class SentencePieceStandIn(PreTrainedTokenizer):
    """A recorded SentencePiece model as the original tokenizers use it: control tokens apart, the text between encoded alone."""

    def __init__(self, model: Path, control: dict[str, int], *, newline: str = "", eos: str, **names: Any) -> None:
        import sentencepiece

        self.model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.newline = newline
        self.control = control
        super().__init__(eos_token=eos, **names)
        self.add_tokens([AddedToken(t, special=True, normalized=False) for t in control])
        for token, number in control.items():
            assert self.convert_tokens_to_ids(token) == number

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_piece_size())

    def get_vocab(self) -> dict[str, int]:
        pieces = {self.model.id_to_piece(i): i for i in range(self.vocab_size)}
        return pieces | self.control | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        shown = text.replace("\n", self.newline) if self.newline else text
        return [self.model.id_to_piece(i) for i in self.model.encode(shown)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.control.get(token, int(self.model.piece_to_id(token)))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.model.id_to_piece(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return str(self.model.decode_pieces(tokens))


@pytest.fixture(scope="session")
def recorded(shared_data: Path) -> Path:
    """The folder of prompts and ids recorded from the original ChatGLM and MOSS code."""
    folder = shared_data.parent / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"RECORDED PROMPTS NOT TESTED: {folder} is missing")
    return folder


def cases(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "cases.json").read_text("utf-8"))
    return found


def asked(case: dict[str, Any]) -> list[Message]:
    messages = [m for q, r in case["history"] for m in (u(q), a(r))]
    return [*messages, u(case["query"])]


@pytest.mark.parametrize("folder", ["chatglm_v1", "chatglm2"])
def test_recorded_rounds(recorded: Path, folder: str) -> None:
    found = cases(recorded / folder)
    special = found["special_ids"]
    if folder == "chatglm_v1":
        control = {"[gMASK]": special["gmask"], "<sop>": special["bos"], "<eop>": special["eos"]}
        model, name, options = "ice_text.model", "chatglm", {"newline": "<n>", "eos": "<eop>"}
        before, after = "", "[gMASK]<sop>"
    else:
        control = {t: special[t] for t in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")}
        model, name, options = "tokenizer.model", "chatglm2", {"eos": "</s>"}
        before, after = "[gMASK]sop", ""
    tokenizer = SentencePieceStandIn(recorded / folder / model, control, **options)
    template = ChatTemplate(tokenizer)
    assert template.name == name
    assert len(found["prompts"]) == 3
    for case in found["prompts"]:
        text = template.render(asked(case), add_generation_prompt=True)
        assert text == before + case["prompt"] + after
        assert template.encode_prompt(asked(case)) == case["ids"]


def test_recorded_pair_of_chatglm(recorded: Path) -> None:
    """The original fine-tuning layout: prompt, [gMASK], <sop>, answer, <eop>."""
    found = cases(recorded / "chatglm_v1")
    special = found["special_ids"]
    control = {"[gMASK]": special["gmask"], "<sop>": special["bos"], "<eop>": special["eos"]}
    model = recorded / "chatglm_v1" / "ice_text.model"
    template = ChatTemplate(SentencePieceStandIn(model, control, newline="<n>", eos="<eop>"))
    pair = found["tokenizer_pair"]
    encoded = template.encode([u(pair["a"]), a(pair["b"])])
    assert encoded.ids == pair["ids"]
    assert encoded.loss_weights == [0, 0, 0, 0, 1, 1, 1, 1, 1]


def test_recorded_roles_and_tools_of_chatglm3(recorded: Path) -> None:
    found = cases(recorded / "chatglm3")
    control = {t: i for t, i in found["special_ids"].items() if t not in ("bos", "eos", "pad")}
    tokenizer = SentencePieceStandIn(recorded / "chatglm3" / "tokenizer.model", control, eos="</s>")
    template = ChatTemplate(tokenizer)
    assert template.name == "chatglm3"
    assert template.stop_ids == {2, control["<|user|>"], control["<|observation|>"]}
    assert len(found["chat_inputs"]) == 4
    for case in found["chat_inputs"]:
        messages: list[Message] = []
        tools: list[dict[str, Any]] = []
        for turn in case["history"]:
            if turn.get("metadata"):
                call = {"name": turn["metadata"], "arguments": {"city": "北京"}}
                messages.append(
                    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
                )
            else:
                messages.append({"role": turn["role"], "content": turn["content"]})
            tools += [{"type": "function", "function": t} for t in turn.get("tools", [])]
        role = "tool" if case["role"] == "observation" else case["role"]
        messages.append({"role": role, "content": case["query"]})
        assert template.encode_prompt(messages, tools=tuple(tools)) == case["ids"]


def moss_tokenizer(folder: Path) -> Any:
    """GPT-2's algorithm; the original added tokens swallow the space around them."""
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    added = json.loads((folder / "added_tokens.json").read_text("utf-8"))
    core.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    swallowing = [
        AddedToken(t, lstrip=True, rstrip=True, special=True) for t, _ in sorted(added.items(), key=lambda x: x[1])
    ]
    core.add_special_tokens(swallowing)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eom>", bos_token="<|endoftext|>")
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in added} == added
    return tokenizer


def test_recorded_prompts_of_moss(recorded: Path) -> None:
    template = ChatTemplate(moss_tokenizer(recorded / "moss"))
    assert template.name == "moss"
    prompts = cases(recorded / "moss")["prompts"]
    assert len(prompts) == 3
    meta = prompts[0]["prompt"].split("<|Human|>")[0]
    plugins = prompts[2]["prompt"].split("<|Human|>")[0]
    talks: list[list[Message]] = [
        [s(meta), u("Hi there")],
        [s(meta), u("Hi there"), a("Hello!"), u("推荐五部电影")],
        [s(plugins), u("黑暗荣耀的主演有谁")],
    ]
    for case, messages in zip(prompts, talks, strict=True):
        assert template.render(messages, add_generation_prompt=True) == case["prompt"]
        assert template.encode_prompt(messages) == case["ids"]


def test_recorded_training_sample_of_moss(recorded: Path) -> None:
    template = ChatTemplate(moss_tokenizer(recorded / "moss"))
    sample = cases(recorded / "moss")["sft_sample"]
    # The recorded meta instruction enables nothing, and still there are thoughts: offering the tool enables them.
    plugins = "- Inner thoughts: enabled.\n- Calculator: enabled. API: Calculator(expression)\n"
    messages: list[Message] = [
        s(sample["meta_instruction"] + plugins),
        u("1+1?"),
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "需要计算",
            "tool_calls": [
                {"type": "function", "function": {"name": "Calculator", "arguments": {"expression": "1+1"}}}
            ],
        },
        {"role": "tool", "content": 'Calculator("1+1") =>\n2'},
        a("答案是2。"),
    ]
    turns = sample["chat"]["turn_1"]
    assert template.render(messages) == sample["meta_instruction"] + plugins + "".join(turns.values())
    encoded = template.encode(messages)
    said = [template.tokenizer.decode(encoded.ids[x.start : x.end]) for x in encoded.answers]
    assert [x.replace("\n", "") for x in said] == [
        '<|Inner Thoughts|>: 需要计算<eot><|Commands|>: Calculator("1+1")<eoc>',
        "<|MOSS|>: 答案是2。<eom>",
    ]
    assert all(x.stops for x in encoded.answers)
    bare = len(template.tokenizer(sample["meta_instruction"])["input_ids"])
    longer = len(template.tokenizer(sample["meta_instruction"] + plugins)["input_ids"])
    assert encoded.ids[longer:] == sample["input_ids"][bare:]


def test_published_plugin_rows_are_rendered_back(shared_data: Path) -> None:
    """MOSS's own training text from what the reader made of it. The rest of the rows have typing errors that are not kept."""
    import zipfile

    from danlu.data.read import scan
    from danlu.types import Conversation

    archive = shared_data / "moss-sft" / "SFT_data.zip"
    template = ChatTemplate(with_all_tokens("moss"), "moss")
    same = plugins = 0
    with zipfile.ZipFile(archive) as file:
        for _, record in scan(str(archive)):
            if (
                not isinstance(record, Conversation)
                or record.origin is None
                or "with_plugins" not in record.origin.file
            ):
                continue
            row = json.loads(file.read(record.origin.file.split(f"{archive.name}/")[-1]))
            expected = row["meta_instruction"] + "".join(v for turn in row["chat"].values() for v in turn.values())
            plugins += 1
            same += template.render(record.messages, tools=record.tools) == expected
    assert plugins == 449 and same == 349
