"""Templates that tokenizers bring: what danlu finds out about them, and what it tells as text where they have no place for it.

The templates here are invented, each with a habit of a well-known one.
"""

from __future__ import annotations

from typing import Any

import pytest
from test_chat_template import a, byte_tokenizer, pieces, s, u
from test_templates_masks import ADD, call, result, trained

from danlu.exceptions import TemplateError
from danlu.text.chat_template import ChatTemplate
from danlu.text.tool_text import parsed_arguments
from danlu.types import Message

TOKENS = ["<s>", "</s>", "<|user|>", "<|bot|>", "<|tool|>", "<|sep|>", "<|end|>"]


def own(source: str) -> ChatTemplate:
    tokenizer = byte_tokenizer(TOKENS, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


def stops(template: ChatTemplate) -> set[str]:
    return set(template.tokenizer.convert_ids_to_tokens(sorted(template.stop_ids)))


# Nothing ends the last answer; the token of the next role ends the others (GLM-4).
NEXT_ROLE = (
    "{% for m in messages %}{{ {'user': '<|user|>', 'assistant': '<|bot|>', 'tool': '<|tool|>', 'system': ''}[m.role] }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + '\\n' + c.function.arguments | tojson }}{% endfor %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)
# A token follows answers in the middle that does not end them; the last one ends properly.
SEPARATED = (
    "{% for m in messages %}{{ m.role + ':' + m.content }}"
    "{{ eos_token if loop.last and m.role == 'assistant' else '<|sep|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CLOSED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[Q] ' + m.content + ' [/Q]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_the_next_roles_token_stops_where_nothing_else_does() -> None:
    template = own(NEXT_ROLE)
    assert stops(template) == {"</s>", "<|user|>", "<|tool|>"}
    assert pieces(template, template.encode([u("1"), a("one"), u("2"), a("two")])) == [
        ("<|user|>1<|bot|>", False),
        ("one<|user|>", True),
        ("2<|bot|>", False),
        ("two</s>", True),  # the end of the sequence, which this template leaves to others
    ]
    talk = [u("2 and 3?"), call({"first": 2}), result("5"), a("It is 5.")]
    # It has no place for tools on offer, so they are told as text; calls and results it has.
    encoded = template.encode(talk, tools=(ADD,))
    assert trained(template, encoded) == ['add\n{"first": 2}<|tool|>', "It is 5.</s>"]


def test_a_token_after_an_answer_is_not_a_stop_because_it_is_special() -> None:
    template = own(SEPARATED)
    assert stops(template) == {"</s>"} and not template.trains_every_answer
    talk = [u("1"), a("one"), u("2"), a("two")]
    assert [trained(template, template.encode(x)) for x in template.samples(talk)] == [["one</s>"], ["two</s>"]]
    assert pieces(template, template.encode(talk)) == [
        ("user:1<|sep|>assistant:one<|sep|>user:2<|sep|>assistant:", False),
        ("two</s>", True),
    ]


@pytest.mark.parametrize("begin", ["", "{{ bos_token if m.role == 'user' }}"])
def test_a_template_without_any_stop(begin: str) -> None:
    """A token that begins the next turn as it begins a text is no stop."""
    template = own(NO_STOP.replace("{{ m.role", begin + "{{ m.role", 1))
    assert stops(template) == {"</s>"}
    (first, second) = template.samples([u("1"), a("one"), u("2"), a("two")])
    assert trained(template, template.encode(first)) == ["one</s>"]
    assert trained(template, template.encode(second)) == ["two</s>"]


def test_the_space_around_answers_belongs_to_the_template() -> None:
    template = own(CLOSED)
    encoded = template.encode([u("1"), a("one two")])
    answer = encoded.ids[encoded.answers[0].start :]
    assert template.tokenizer.decode(answer) == " one two </s>"
    assert template.decode(answer) == "one two"
    assert [template.decode(answer[:n]) for n in range(6)] == ["", "", "o", "on", "one", "one"]


# --- thoughts ---------------------------------------------------------------------------------------------------------

# Thoughts of the last turn only (Qwen3).
LAST_THOUGHTS = (
    "{% for m in messages %}{{ '<|' + ('bot' if m.role == 'assistant' else 'user') + '|>' }}"
    "{% if m.reasoning_content and loop.last %}{{ '(' + m.reasoning_content + ')' }}{% endif %}"
    "{{ m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def thinking(thoughts: str, content: str) -> Message:
    return {"role": "assistant", "content": content, "reasoning_content": thoughts}


def test_thoughts_that_a_template_forgets_are_trained_one_answer_at_a_time() -> None:
    template = own(LAST_THOUGHTS)
    assert template.trains_every_answer
    talk = [u("1"), thinking("hm", "one"), u("2"), thinking("ha", "two")]
    assert [trained(template, template.encode(x)) for x in template.samples(talk)] == [
        ["(hm)one<|end|>"],
        ["(ha)two<|end|>"],
    ]
    assert len(template.samples([u("1"), a("one"), u("2"), thinking("ha", "two")])) == 1


def test_thoughts_in_tags_are_thoughts_where_a_template_has_a_place_for_them() -> None:
    template = own(LAST_THOUGHTS)
    tagged = a("<think>\nhm\n</think>\n\none")
    assert trained(template, template.encode([u("1"), tagged])) == ["(hm)one<|end|>"]
    assert len(template.samples([u("1"), tagged, u("2"), a("two")])) == 2
    assert template.render([u("1"), tagged]) == template.render([u("1"), thinking("hm", "one")])


def test_thoughts_without_a_place() -> None:
    template = own(CLOSED)
    assert trained(template, template.encode([u("1"), thinking("hm", "one")])) == [" <think>\nhm\n</think>\n\none </s>"]


# --- system texts -----------------------------------------------------------------------------------------------------

# Refuses a system text and insists that roles alternate (Gemma, early Mistral).
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{{ ('<|user|>' if m.role == 'user' else '<|bot|>') + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def test_a_system_text_without_a_place_goes_before_the_question() -> None:
    template = own(STRICT)
    assert template.render([s("Be kind."), u("Hi")]) == "<|user|>Be kind.\n\nHi<|end|>"
    late = [u("1"), a("one"), s("Be brief."), u("2"), a("two")]
    assert template.render(late) == "<|user|>1<|end|><|bot|>one<|end|><|user|>Be brief.\n\n2<|end|><|bot|>two<|end|>"
    assert trained(template, template.encode(late)) == ["one<|end|>", "two<|end|>"]
    assert trained(template, template.encode([s("Greet."), a("Hi!")])) == ["Hi!<|end|>"]


def test_tools_in_a_template_that_wants_roles_to_alternate() -> None:
    template = own(STRICT)
    talk = [u("2 and 3?"), call({"first": 2}), result("5"), result("6"), u("Well?"), a("5.")]
    encoded = template.encode(talk, tools=(ADD,))
    assert trained(template, encoded) == [
        '<tool_call>\n{"name": "add", "arguments": {"first": 2}}\n</tool_call><|end|>',
        "5.<|end|>",
    ]
    middle = pieces(template, encoded)[2][0]
    first, second = (f"<tool_response>\n{n}\n</tool_response>" for n in (5, 6))
    assert middle == f"<|user|>{first}\n\n{second}\n\nWell?<|end|><|bot|>"
    assert pieces(template, encoded)[0][0].startswith("<|user|>You may use these tools.")


# --- calls ------------------------------------------------------------------------------------------------------------


def with_calls(body: str) -> str:
    return (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
        "{% elif m.role == 'tool' %}<|tool|>{{ m.content }}<|end|>"
        "{% elif m.tool_calls %}" + body + "{% else %}<|bot|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|bot|>{% endif %}"
    )


# Joins the arguments as text (DeepSeek-V3): an object would raise.
TEXT_ARGUMENTS = with_calls(
    "<|bot|>{{ m.content }}{% for c in m.tool_calls %}"
    "{{ '[' + c.function.name + ' ' + c.function.arguments + ']' }}{% endfor %}<|end|>"
)
# One call a turn, and the text beside it is dropped (Llama 3.1).
SINGLE = with_calls(
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    "<|bot|>{{ m.tool_calls[0].function | tojson }}<|end|>"
)
# Ids of nine characters on calls and results (Mistral).
IDS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('no id') }}{% endif %}"
    "<|tool|>{{ m.tool_call_id + '=' + m.content }}<|end|>"
    "{% elif m.tool_calls %}<|bot|>{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('no id') }}{% endif %}"
    "{{ c.id + ':' + c.function.arguments | tojson + c.function.name }}{% endfor %}<|end|>"
    "{% else %}<|bot|>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def test_a_control_token_that_closes_a_call_does_not_end_the_turn() -> None:
    template = own(with_calls("<|bot|>{{ m.tool_calls[0].function | tojson }}<|sep|>{{ eos_token }}"))
    assert stops(template) == {"</s>", "<|end|>"}
    said = trained(template, template.encode([u("x"), call({"n": 2}), result("5"), a("5")]))
    assert said == ['{"name": "add", "arguments": {"n": 2}}<|sep|></s>', "5<|end|>"]


def test_arguments_as_text() -> None:
    template = own(TEXT_ARGUMENTS)
    for arguments in ({"first": 2}, '{"first": 2}'):
        talk = [u("x"), call(arguments, content="See: ", count=2), result("5"), a("5")]
        made = '[add {"first": 2}]'
        assert trained(template, template.encode(talk)) == [f"See: {made}{made}<|end|>", "5<|end|>"]


def test_what_a_template_would_drop_or_refuse_is_told_as_text() -> None:
    template = own(SINGLE)
    made = '{"name": "add", "arguments": {"first": 2}}'
    told = f"<tool_call>\n{made}\n</tool_call>"

    def said(message: Message) -> str:
        return trained(template, template.encode([u("x"), message, result("5")]))[0]

    assert said(call({"first": 2})) == f"{made}<|end|>"
    assert said(call({"first": 2}, content="See:")) == f"See:\n{told}<|end|>"
    assert said(call({"first": 2}, count=2)) == f"{told}\n{told}<|end|>"


def test_calls_and_results_get_the_ids_that_a_template_wants() -> None:
    template = own(IDS)
    first: Any = {"type": "function", "id": "a", "function": {"name": "add", "arguments": {"n": 1}}}
    second: Any = {"type": "function", "id": "b", "function": {"name": "add", "arguments": {"n": 2}}}
    caller: Message = {"role": "assistant", "content": "", "tool_calls": [first, second]}
    named: list[Message] = [
        {"role": "tool", "content": "two", "tool_call_id": "b"},
        {"role": "tool", "content": "one", "tool_call_id": "a"},
    ]
    text = template.render([u("x"), call({"n": 0}), result("zero"), caller, *named])
    for part in ("call00000=zero", "call00002=two", "call00001=one", 'call00001:{"n": 1}add'):
        assert part in text
    text = template.render([u("x"), caller, result("one"), result("two")])
    assert "call00000=one" in text and "call00001=two" in text


def test_arguments_that_are_no_object() -> None:
    assert parsed_arguments('{"a": 1}') == {"a": 1}
    assert parsed_arguments('"a"') == '"a"' and parsed_arguments("1 + 1") == "1 + 1"
    assert parsed_arguments({"a": 1}) == {"a": 1}


# --- templates that look into contents --------------------------------------------------------------------------------

# Cuts thoughts out of contents (Qwen3, DeepSeek-R1), so a mark in a content's place changes more than that place.
CUTS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
    "{% else %}<|bot|>{{ m.content.split('</think>')[-1].strip() if not loop.last else m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def test_a_template_that_cuts_thoughts_out_of_contents() -> None:
    template = own(CUTS)
    talk = [u("1</think>"), a("<think>x</think> one"), u("2"), a("two")]
    with pytest.raises(TemplateError, match="turn 2: the template does not render the answer's text"):
        template.encode(talk)
    assert [trained(template, template.encode(x)) for x in template.samples(talk)] == [
        ["<think>x</think> one<|end|>"],
        ["two<|end|>"],
    ]
    prompt = template.encode_prompt(talk[:3])
    assert template.tokenizer.decode(prompt) == "<|user|>1</think><|end|><|bot|>one<|end|><|user|>2<|end|><|bot|>"
    assert template.encode(template.samples(talk)[1]).ids[: len(prompt)] == prompt
    kept = [u("1"), a("one"), u("2 <|end|>"), a("two <|end|>")]
    assert trained(template, template.encode(kept)) == ["one<|end|>", "two <|end|><|end|>"]


def test_an_untrained_answer_that_a_template_changes_is_context() -> None:
    template = own(CUTS)
    talk: list[Message] = [u("1"), {**a("<think>x</think> one"), "train": False}, u("2"), a("two")]
    assert trained(template, template.encode(talk)) == ["two<|end|>"]
