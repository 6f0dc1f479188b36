"""Answers read back: the message that was encoded is the message that its ids are, for every template and any content."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_template import a, byte_tokenizer, u
from test_templates_masks import ADD, EVERY_TOKEN, NAMES, STRIPS, call, make, result

from danlu.text.calls import CALLS_AS_TEXT, CallForm, ThoughtForm, split_calls, split_thoughts
from danlu.text.chat_template import ChatTemplate
from danlu.types import Message

# MOSS writes the values of arguments without their names, so its calls are text.
WITHOUT_CALLS = {"moss"}
CALLING = [n for n in NAMES if n not in WITHOUT_CALLS]

# Qwen3's, Llama 3.1's, Mistral's and DeepSeek-R1's ways, cut down to what answers look like.
QWEN3 = """{%- if tools %}<|im_start|>system
{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>
{% endif -%}
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|im_start|>assistant
{% if loop.last or m.reasoning_content %}<think>
{{ (m.reasoning_content or '').strip('\n') }}
</think>

{% endif %}{{ m.content.lstrip('\n') }}
{%- for c in m.tool_calls or [] %}{{ '\\n' if m.content or not loop.first else '' }}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = """{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}
{%- if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' ~ m.tool_calls[0].function.name ~ '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson ~ '}<|eom_id|>' }}
{%- else %}{%- set role = 'ipython' if m.role == 'tool' else m.role %}
{{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' ~ m.content ~ '<|eot_id|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ '[/INST]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}
{{- '{"name": "' ~ c.function.name ~ '", "arguments": ' ~ c.function.arguments | tojson ~ ', "id": "' ~ c.id ~ '"}' }}
{{- '' if loop.last else ', ' }}{% endfor %}{{ ']' ~ eos_token }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' ~ m.content ~ '[/TOOL_RESULTS]' }}
{%- else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}"""
R1 = """{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n' ~ (m.reasoning_content or '') ~ '\n</think>\n\n' }}{% endif %}
{{- m.content ~ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""
STYLES = {
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>"], CallForm("<tool_call>", "</tool_call>", "\n")),
    "llama3": (
        LLAMA3,
        ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"],
        CallForm("", "", ""),
    ),
    "mistral": (
        MISTRAL,
        ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
        None,
    ),
}


@functools.cache
def styled(name: str) -> ChatTemplate:
    source, tokens, _ = STYLES[name]
    eos = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}[name]
    tokenizer = byte_tokenizer(tokens, eos_token=eos, bos_token=tokens[0])
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


def read_back(template: ChatTemplate, message: Message) -> Message:
    """The message that the ids of an answer are, in a conversation that goes on after it where the template allows that."""
    if template.trains_every_answer:
        talk: list[Message] = [u("2 and 3?"), message]
        talk += [result("five")] * len(message.get("tool_calls", ())) or [u("And now?")]
        encoded = template.encode([*talk, a("Good.")], tools=(ADD,))
        answer = encoded.ids[encoded.answers[0].start : encoded.answers[0].end]
    else:
        _, answer = template.encode_answer([u("2 and 3?")], [message], tools=(ADD,))
    found = copy.deepcopy(template.decode_message(answer))
    for made in found.get("tool_calls", []):
        made.pop("id", None)  # templates that want ids get ones of danlu's
    return found


MESSAGES = {
    "text": a("It is 5."),
    "call": call(),
    "text and call": call(content="Let me see."),
    "two calls": call(count=2),
    "thoughts and call": call(thoughts="An addition."),
    "all": call(content="Let me see.\n\nYes.", thoughts="Hm.\nAh, so.", count=3),
    "thoughts": {**a("It is 5."), "reasoning_content": "2 + 3\n\n= 5"},
    "nested": call({"first": {"a": [1, 2.5, None, True], "b": {"}": '"{'}}, "note": "你好 \\ \"'\n\t</tool_call>"}),
    "no arguments": {**a(""), "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]},
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
@pytest.mark.parametrize("name", CALLING)
def test_shipped_templates_give_the_message_back(name: str, message: Message) -> None:
    assert read_back(make(name), message) == message


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
@pytest.mark.parametrize("name", STYLES)
def test_other_templates_give_the_message_back(name: str, message: Message) -> None:
    template = styled(name)
    assert template._renderer.can.calls
    if name == "qwen3" and "reasoning_content" not in message:
        # Thoughts are in front of last answers only; the empty ones are no thoughts.
        _, answer = template.encode_answer([u("2 and 3?")], [message], tools=(ADD,))
        assert "<think>\n\n</think>" in template.tokenizer.decode(answer)
        assert template.decode_message(answer) == message
    else:
        assert read_back(template, message) == message


def test_the_forms_are_found_by_probing() -> None:
    assert styled("qwen3")._reader._calls == [CALLS_AS_TEXT]
    assert styled("llama3")._reader._calls[0] == STYLES["llama3"][2]
    native = styled("mistral")._reader._calls[0]
    assert (len(native.opening), native.closing) == (1, "")  # one special token
    assert make("qwen")._reader._calls == [CALLS_AS_TEXT]


WORDS = st.text(st.characters(blacklist_categories=("Cs", "Co", "Cc")), min_size=1, max_size=12)
CONTENT = st.builds(lambda words: "\n".join(w.strip() or "x" for w in words), st.lists(WORDS, min_size=1, max_size=3))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | WORDS | st.sampled_from(EVERY_TOKEN),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([("shipped", n) for n in CALLING if n not in STRIPS | {"chatglm3"}] + [("own", n) for n in STYLES]),
    CONTENT,
    CONTENT | st.just(""),
    st.lists(st.dictionaries(WORDS, VALUES, max_size=3), min_size=1, max_size=2),
)
def test_any_message_comes_back(
    which: tuple[str, str], content: str, thoughts: str, arguments: list[dict[str, Any]]
) -> None:
    kind, name = which
    template = make(name) if kind == "shipped" else styled(name)
    message: Message = {"role": "assistant", "content": content}
    if thoughts and "</think>" not in thoughts:
        message["reasoning_content"] = thoughts
    message["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": x}} for x in arguments]
    if name == "qwen3" and "reasoning_content" not in message:
        message["reasoning_content"] = "Hm."
    assert read_back(template, message) == message


MALFORMED = {
    "cut": '<tool_call>\n{"name": "add", "arguments": {"first": 2',
    "no closing": '<tool_call>\n{"name": "add", "arguments": {"first": 2}}',
    "no json": "<tool_call>\nadd(2)\n</tool_call>",
    "no name": '<tool_call>\n{"arguments": {"first": 2}}\n</tool_call>',
    "empty name": '<tool_call>\n{"name": "", "arguments": {"first": 2}}\n</tool_call>',
    "name is a number": '<tool_call>\n{"name": 3, "arguments": {"first": 2}}\n</tool_call>',
    "no arguments": '<tool_call>\n{"name": "add"}\n</tool_call>',
    "a list of arguments": '<tool_call>\n{"name": "add", "arguments": [2]}\n</tool_call>',
    "text behind": '<tool_call>\n{"name": "add", "arguments": {"first": 2}}\n</tool_call>\nthat is it',
    "second one cut": '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name":',
    "thoughts cut": "<think>\nhm",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("name", ["chatml", "qwen", "plain"])
def test_what_is_not_whole_stays_text(name: str, text: str) -> None:
    template = make(name)
    ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert template.decode_message(ids) == {"role": "assistant", "content": template.decode(ids)} == a(text)


def test_a_model_may_write_a_call_in_its_own_spacing() -> None:
    template = make("chatml")
    text = 'So:\n<tool_call>{"arguments":{"first":2},"name":"add"}</tool_call>\n\n'
    text += '<tool_call> {"name":"now","arguments":"{}"} </tool_call>\n'
    found = template.decode_message(template.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert found["content"] == "So:"
    assert [c["function"] for c in found["tool_calls"]] == [
        {"name": "add", "arguments": {"first": 2}},
        {"name": "now", "arguments": {}},
    ]


def test_a_token_and_its_text_are_two_things() -> None:
    """Where a special token opens a call, a text that looks like it does not."""
    template = styled("mistral")
    body = ' [{"name": "add", "arguments": {"first": 2}}]'
    token = template.tokenizer("[TOOL_CALLS]" + body, add_special_tokens=False)["input_ids"]
    plain = template.tokenizer("[TOOL_CALLS]" + body, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [c["function"]["name"] for c in template.decode_message(token)["tool_calls"]] == ["add"]
    assert template.decode_message(plain) == a("[TOOL_CALLS]" + body)


def test_json_that_is_no_call_is_an_answer_where_calls_are_bare_json() -> None:
    template = styled("llama3")
    for text in ('{"name": "Ada", "age": 36}', '{"name": "add", "parameters": {"first": 2}} is a call', "[1, 2]", ""):
        assert template.decode_message(template.tokenizer(text, add_special_tokens=False)["input_ids"]) == a(text)


def test_thoughts_whose_beginning_is_in_the_prompt() -> None:
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    tokenizer.chat_template = R1
    template = ChatTemplate(tokenizer)
    message: Message = {**a("5."), "reasoning_content": "2 + 3"}
    prompt, answer = template.encode_answer([u("2 and 3?")], [message])
    assert tokenizer.decode(prompt).endswith("<think>\n") and tokenizer.decode(answer).startswith("2 + 3")
    assert template.decode_message(answer) == message
    cut = tokenizer("2 + 3 is", add_special_tokens=False)["input_ids"]
    assert template.decode_message(cut) == a("2 + 3 is")


def test_templates_that_write_thoughts_in_their_own_way() -> None:
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>", "<|inner|>"], eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}: "
        "{% if m.reasoning_content %}<|inner|>{{ m.reasoning_content }}<|inner|> {% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    template = ChatTemplate(tokenizer)
    message: Message = {**a("5."), "reasoning_content": "2 + 3"}
    _, answer = template.encode_answer([u("2 and 3?")], [message])
    assert template.decode_message(answer) == message
    plain = tokenizer("<|inner|>2<|inner|> 5", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert template.decode_message(plain) == a("<|inner|>2<|inner|> 5")


@given(st.text("ab\n <>", max_size=8), st.text("ab\n <>", max_size=8))
def test_split_thoughts_undoes_joining(thoughts: str, text: str) -> None:
    form = ThoughtForm("<think>\n", "\n</think>\n\n")
    found = split_thoughts(form.opening + thoughts + form.closing + text, form)
    assert found == (thoughts.strip("\n"), text)
    assert split_thoughts(text, form) is None


@given(st.text(max_size=20), st.lists(st.dictionaries(st.text(max_size=3), st.integers()), min_size=1, max_size=3))
def test_split_calls_undoes_joining(text: str, arguments: list[dict[str, int]]) -> None:
    bodies = [json.dumps({"name": "f", "arguments": x}) for x in arguments]
    written = "\n".join([text, *(f"<tool_call>\n{b}\n</tool_call>" for b in bodies)])
    found = split_calls(written, CALLS_AS_TEXT)
    assert found is not None and found[0] == text
    assert [c["function"]["arguments"] for c in found[1]] == arguments
