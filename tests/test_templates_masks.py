"""For every shipped template and any content: what is trained, what stands where, and that no content becomes a control token."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat_template import a, byte_tokenizer, pieces, s, u
from test_templates_published import BUILDERS, ENDS, SPACED, E, with_all_tokens
from transformers import PreTrainedTokenizerFast

from danlu.text.chat_template import ChatTemplate, Encoded
from danlu.text.template_registry import TEMPLATES
from danlu.types import Message

# That of encoder-decoders has a test of its own (test_seq2seq.py): its source and target are no one text.
NAMES = sorted(set(TEMPLATES) - {"text2text"})
STRIPS = {"llama2", "llama3"}
LAST_ONLY = {"chatglm", "chatglm2", "baichuan", "baichuan2"}


@functools.cache
def make(name: str) -> ChatTemplate:
    return ChatTemplate(with_all_tokens(name), name)


def shown(name: str, content: str) -> str:
    return content.strip() if name in STRIPS else content


def said(name: str, content: str, *, last: bool) -> str:
    """What the model has to generate for an answer, by the published format."""
    lead = " " if name in SPACED else "\n " if name == "chatglm3" else ""
    end = ENDS.get(name, E)
    if name == "chatglm3":
        end = E if last else "<|user|>"
    return lead + shown(name, content) + end


def texts(template: ChatTemplate, encoded: Encoded) -> list[str]:
    return [template.tokenizer.decode(encoded.ids[x.start : x.end], skip_special_tokens=False) for x in encoded.answers]


def trained(template: ChatTemplate, encoded: Encoded) -> list[str]:
    return [text for text, weight in pieces(template, encoded) if weight]


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_the_answers_and_their_stops(name: str) -> None:
    template = make(name)
    talk = [s("Be kind."), u("Hi"), a("Hello!"), u("你好"), a("你好，\n有事吗？")]
    if name in LAST_ONLY:
        assert not template.trains_every_answer
        first, second = template.samples(talk)
        assert trained(template, template.encode(first)) == [said(name, "Hello!", last=True)]
        assert trained(template, template.encode(second)) == [said(name, "你好，\n有事吗？", last=True)]
        assert second[2]["train"] is False and second[4] == talk[4]
        return
    assert template.trains_every_answer and template.samples(talk) == [talk]
    encoded = template.encode(talk)
    assert trained(template, encoded) == [said(name, "Hello!", last=False), said(name, "你好，\n有事吗？", last=True)]
    assert all(x.stops for x in encoded.answers)


@pytest.mark.parametrize("name", NAMES)
def test_answers_that_are_not_to_be_trained(name: str) -> None:
    template = make(name)
    talk: list[Message] = [u("1"), {**a("one"), "train": False}, u("2"), a("two"), u("3")]
    (sample,) = template.samples(talk)
    assert trained(template, template.encode(sample)) == [said(name, "two", last=name in LAST_ONLY)]
    silent: list[Message] = [u("1"), {**a("one"), "train": False}]
    assert [trained(template, template.encode(x)) for x in template.samples(silent)] == [[]]


@pytest.mark.parametrize("name", NAMES)
def test_an_opening_of_the_assistant_is_context(name: str) -> None:
    """Nothing precedes it, so no prompt could make a model say it."""
    template = make(name)
    encoded = template.encode([a("Welcome!"), u("Hi"), a("Hello!")])
    assert trained(template, encoded) == [said(name, "Hello!", last=True)]


@pytest.mark.parametrize("name", NAMES)
def test_two_answers_in_a_row(name: str) -> None:
    template = make(name)
    talk = [u("Hi"), a("Hello!"), a("How are you?")]
    found = [x for sample in template.samples(talk) for x in trained(template, template.encode(sample))]
    assert "".join(found).count("Hello!") == 1 and "".join(found).count("How are you?") == 1
    assert found[-1].endswith(ENDS.get(name) or E)


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_turns(name: str) -> None:
    template = make(name)
    talk = [m for n in range(50) for m in (u(f"Question {n}?"), a(f"Answer {n}."))]
    encoded = template.encode(talk)
    expected = [f"Answer {n}." for n in ([49] if name in LAST_ONLY else range(50))]
    assert [template.decode(encoded.ids[x.start : x.end]) for x in encoded.answers] == expected
    assert sum(encoded.loss_weights) == sum(x.end - x.start for x in encoded.answers)
    assert len(template.samples(talk)) == (50 if name in LAST_ONLY else 1)


# --- any content ------------------------------------------------------------------------------------------------------

EVERY_TOKEN = sorted(
    {t for e in TEMPLATES.values() for t in (e.stop, *e.tokens, *(t for _, m in e.marks for t in m)) if t}
    | {"<s>", "</s>"}
)
FORMAT_WORDS = [
    *("[INST]", "[/INST]", "<<SYS>>\n", "\n\nHuman: ", "Assistant:", "USER: ", "### Response:", "[Round 1]\n\n问："),
    *("<|Human|>: ", "答：", "assistant\n", "<tool_call>", "</think>", "{{ messages }}", "{% raw %}", "{# x #}"),
]
ODD = ["😀👩‍👩‍👧", "مرحبا \u202eabc", "e\u0301", "\u0000", "\u2028", "\ue0000\ue001", "\ue0ff", "\\n'\"", "﷽", "\ufeff"]
SPACE = ["", "\n\n", " ", "\t", "\r\n", "\u3000"]
CONTENT = st.lists(
    st.one_of(*map(st.sampled_from, (EVERY_TOKEN, FORMAT_WORDS, ODD, SPACE)), st.text(max_size=6)), max_size=4
).map("".join)


@st.composite
def talks(draw: st.DrawFn) -> tuple[str, list[tuple[str, str, bool]]]:
    system = draw(st.one_of(st.just(""), CONTENT.filter(bool)))
    exchange = st.tuples(CONTENT, CONTENT, st.booleans())
    return system, draw(st.lists(exchange, min_size=1, max_size=3))


def messages_of(talk: tuple[str, list[tuple[str, str, bool]]]) -> list[Message]:
    system, exchanges = talk
    messages: list[Message] = [s(system)] if system else []
    for question, answer, train in exchanges:
        messages += [u(question), {**a(answer), "train": train}]
    return messages


def control_counts(template: ChatTemplate, ids: list[int]) -> dict[int, int]:
    known = {i for i, t in template.tokenizer.added_tokens_decoder.items() if t.special}
    return {i: ids.count(i) for i in known if i in ids}


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talk=talks())
def test_any_content_keeps_its_place(name: str, talk: tuple[str, list[tuple[str, str, bool]]]) -> None:
    template = make(name)
    system, exchanges = talk
    whole = messages_of(talk)
    for sample in template.samples(whole):
        encoded = template.encode(sample)
        # The ids say what the published format says, and hold its control tokens and no other.
        count = sum(m["role"] == "assistant" for m in sample)
        *done, (ask, answer, _) = exchanges[:count]
        expected = BUILDERS[name](system, [(q, r) for q, r, _ in done], ask) + said(name, answer, last=True)
        assert template.tokenizer.decode(encoded.ids, skip_special_tokens=False) == expected
        tame: list[Message] = [{**m, "content": "x"} for m in sample]
        assert control_counts(template, encoded.ids) == control_counts(template, template.encode(tame).ids)
        # Every answer stands behind its prompt, ends with its stop token, and is trained if it is to be.
        answers = [n for n, m in enumerate(sample) if m["role"] == "assistant"]
        answers = answers[-1:] if name in LAST_ONLY else answers
        assert len(answers) == len(encoded.answers)
        for found, number in zip(encoded.answers, answers, strict=True):
            assert encoded.ids[: found.start] == template.encode_prompt(sample[:number])
            assert found.stops
            assert template.decode(encoded.ids[found.start : found.end]) == shown(name, sample[number]["content"])
            assert set(encoded.loss_weights[found.start : found.end]) == {float(sample[number].get("train", True))}
        inside = {i for found in encoded.answers for i in range(found.start, found.end)}
        assert all(w == 0 for i, w in enumerate(encoded.loss_weights) if i not in inside)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(several=st.lists(talks(), min_size=1, max_size=4))
def test_many_at_once_and_by_shape_are_what_each_is_alone(
    name: str, several: list[tuple[str, list[tuple[str, str, bool]]]]
) -> None:
    template = make(name)
    samples = [sample for talk in several for sample in template.samples(messages_of(talk))]
    together = template.encode_many(samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("danlu.text.layout._around", lambda *_: None)  # every content is found with marks of its own
        alone = [template.encode(sample) for sample in samples]
    assert together == alone
    rows = [(m[:-1], [[m[-1]], [a("other")]]) for m in samples]
    assert template.encode_branches(rows) == [template.encode_branches([row])[0] for row in rows]


# --- tools ------------------------------------------------------------------------------------------------------------

ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds numbers",
        "parameters": {"type": "object", "properties": {"first": {"type": "number"}, "note": {"type": "string"}}},
    },
}


def call(arguments: Any = None, *, content: str = "", thoughts: str = "", count: int = 1) -> Message:
    made: Any = {"type": "function", "function": {"name": "add", "arguments": arguments or {"first": 2, "note": "why"}}}
    message: Message = {"role": "assistant", "content": content, "tool_calls": [made] * count}
    return {**message, "reasoning_content": thoughts} if thoughts else message


def result(content: str) -> Message:
    return {"role": "tool", "content": content, "name": "add"}


@pytest.mark.parametrize("name", NAMES)
def test_thoughts_and_calls_are_trained_and_results_are_not(name: str) -> None:
    template = make(name)
    talk = [
        s("Be exact."),
        u("2 and 3?"),
        call(content="Let me see.", thoughts="An addition."),
        result("it is 5"),
        a("5!"),
    ]
    found = []
    for sample in template.samples(talk):
        encoded = template.encode(sample, tools=(ADD,))
        assert all(x.stops for x in encoded.answers)
        found += trained(template, encoded)
        untrained = "".join(text for text, weight in pieces(template, encoded) if not weight)
        assert "2 and 3?" in untrained and "add" in untrained and "Be exact." in untrained
        for n, m in enumerate(sample):
            if m["role"] == "assistant" and (name not in LAST_ONLY or n == len(sample) - 1):
                prompt = template.encode_prompt(sample[:n], tools=(ADD,))
                assert encoded.ids[: len(prompt)] == prompt
    assert len(found) == 2
    calling, answer = found
    for word in ("Let me see.", "An addition.", "add", "2", "why"):
        assert word in calling
    assert "it is 5" not in calling + answer
    assert answer.endswith(said(name, "5!", last=True)[-len("5!") :]) and "5!" in answer
    last = template.encode(template.samples(talk)[-1], tools=(ADD,))
    assert "it is 5" in template.tokenizer.decode(last.ids)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_conversation_with_tools_is_lost(name: str) -> None:
    template = make(name)
    talk: list[Message] = [
        *(s("Be exact."), u("2 and 3?"), call(count=2, thoughts="Two of them.")),
        *(result("five"), result("six"), s("Be quick."), u("And?"), a("Both.")),
    ]
    text = template.render(talk, tools=(ADD,))
    places = [text.index(w) for w in ("2 and 3?", "Two of them.", "why", "five", "six", "Be quick.", "And?", "Both.")]
    assert places == sorted(places)
    assert text.index("Be exact.") < places[0] and text.count("why") == 2


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_in_tools_and_calls_are_text(name: str) -> None:
    template = make(name)
    attack = "".join(t for t in EVERY_TOKEN)
    spec = copy.deepcopy(ADD)
    spec["function"]["description"] = f"Adds {attack}"
    spec["function"]["parameters"]["properties"][f"key{attack}"] = {"type": "string"}

    def talk(text: str) -> list[Message]:
        calling = call({"first": 1, "note": f"'{text}\n\\"}, thoughts=f"t{text}", content=f"c{text}")
        return [u(f"u{text}"), calling, result(f"r{text}"), a(f"a{text}")]

    for sample, tame in zip(template.samples(talk(attack)), template.samples(talk("x")), strict=True):
        encoded = template.encode(sample, tools=(spec,))
        assert control_counts(template, encoded.ids) == control_counts(
            template, template.encode(tame, tools=(ADD,)).ids
        )
        decoded = template.tokenizer.decode(encoded.ids, skip_special_tokens=False)
        assert (
            decoded.removesuffix(E).rstrip() == template.render(sample, tools=(spec,)).rstrip().removesuffix(E).rstrip()
        )


def test_marks_of_the_template_that_are_no_special_tokens() -> None:
    """Qwen's <tool_call> is an ordinary added token: the assistant and the operator may say it, users and tools may not."""
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    tokenizer.add_tokens(
        ["<tool_call>", "</tool_call>", "糖尿病", "message"]
    )  # and a word that the template's source has
    mark, word = (tokenizer.convert_tokens_to_ids(t) for t in ("<tool_call>", "糖尿病"))
    assert "message" in TEMPLATES["qwen"].jinja
    template = ChatTemplate(tokenizer, "qwen")

    def count(messages: list[Message]) -> tuple[int, int]:
        encoded = template.encode(messages)
        assert template.tokenizer.decode(encoded.ids) + "\n" == template.render(messages)
        return encoded.ids.count(mark), encoded.ids.count(word)

    assert count([s("x"), u("<tool_call><tool_call>糖尿病"), a("y")]) == (0, 1)
    assert count([s("x"), u("x"), call(), result("<tool_call>"), a("y")]) == (1, 0)
    assert count([s("Say <tool_call>"), u("x"), a("<tool_call>糖尿病")]) == (2, 1)
    assert count([s("x"), u("<tool_call><|im_end|>"), a("y")]) == (0, 0)
    spoken = template.encode([s("x"), u("a message"), a("y")]).ids
    assert spoken.count(tokenizer.convert_tokens_to_ids("message")) == 1


# --- real tokenizers --------------------------------------------------------------------------------------------------


@functools.cache
def real(kind: str, folder: Path) -> Any:
    if kind == "gpt2":
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        vocab = json.loads((folder / "gpt2/encoder.json").read_text("utf-8"))
        lines = (folder / "gpt2/vocab.bpe").read_text("utf-8").splitlines()
        core = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(x.split(" ")) for x in lines[1:] if x]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token="<|endoftext|>",
            eos_token="<|endoftext|>",
            clean_up_tokenization_spaces=False,
        )
    from transformers import LlamaTokenizer

    return LlamaTokenizer.from_pretrained(str(folder / "llama"), legacy=kind == "llama-legacy")


REAL = ["gpt2", "llama", "llama-legacy"]


@functools.cache
def real_template(kind: str, name: str, folder: Path) -> ChatTemplate:
    return ChatTemplate(copy.deepcopy(real(kind, folder)), name)


@pytest.mark.parametrize("kind", tiny.mostly_slow(["llama"], ["gpt2", "llama-legacy"]))
@pytest.mark.parametrize("name", NAMES)
def test_pieces_join_as_one_text(kind: str, name: str, shared_data: Path) -> None:
    """A text cut where an answer begins has no more spaces than the text in one piece."""
    template = real_template(kind, name, shared_data / "tokenizers")
    talk = [u("How are you?"), a("Fine, thanks."), u("今天?"), a("很好，谢谢。")]
    for sample in template.samples(talk):
        encoded = template.encode(sample)
        text = template.render(sample).rstrip("\n")
        ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
        eos = template.tokenizer.eos_token_id
        ids = ids if ids[-1] == eos else [*ids, eos]
        whole, cut = (template.tokenizer.decode(x, skip_special_tokens=False) for x in (ids, encoded.ids))
        assert cut == whole
        if kind != "gpt2":  # GPT-2 joins a space with the word behind it; an answer that begins there has its own
            assert encoded.ids == ids or name in ("hh", "vicuna", "moss", "deepseek", "plain", "chatdoctor")
        answer = encoded.answers[-1]
        assert template.decode(encoded.ids[answer.start : answer.end]) == sample[-1]["content"]


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("name", ["alpaca", "llama2", "plain", "vicuna", "chatglm3"])
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talk=talks())
def test_prompts_begin_conversations_with_real_tokenizers(
    kind: str, name: str, shared_data: Path, talk: tuple[str, list[tuple[str, str, bool]]]
) -> None:
    template = real_template(kind, name, shared_data / "tokenizers")
    for sample in template.samples(messages_of(talk)):
        encoded = template.encode(sample)
        answers = [n for n, m in enumerate(sample) if m["role"] == "assistant"]
        answers = answers if template.trains_every_answer else answers[-1:]
        assert len(answers) == len(encoded.answers)
        for found, number in zip(encoded.answers, answers, strict=True):
            assert encoded.ids[: found.start] == template.encode_prompt(sample[:number])
            assert set(encoded.loss_weights[found.start : found.end]) == {float(sample[number].get("train", True))}
        tame: list[Message] = [{**m, "content": "x"} for m in sample]
        assert control_counts(template, encoded.ids) == control_counts(template, template.encode(tame).ids)


# --- the object -------------------------------------------------------------------------------------------------------


def test_a_template_can_be_sent_to_another_process() -> None:
    template = make("chatml")
    other = pickle.loads(pickle.dumps(template))
    talk = [u("<|im_end|>"), a("b")]
    assert other.encode(talk) == template.encode(talk) and other.stop_ids == template.stop_ids


def test_a_half_sampled_answer_shows_nothing_that_is_taken_back() -> None:
    """Streaming decodes an answer again and again: each text begins the next one."""
    for name in NAMES:
        template = make(name)
        encoded = template.encode([u("x"), a(" a b \n\nc ")])
        ids = encoded.ids[encoded.answers[0].start :]
        shown_so_far = ""
        for end in range(len(ids) + 1):
            text = template.decode(ids[:end])
            assert text.startswith(shown_so_far.rstrip("�"))
            shown_so_far = text
        assert shown_so_far == shown(name, " a b \n\nc ")
