"""What is too long: which turns go, what is cut and what never is, and that G-TRUNC hears of every answer that lost tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_template import a, byte_tokenizer, s, u
from test_templates_masks import make

from danlu.data.collate import encode_comparisons, encode_conversations, encode_prompts
from danlu.data.truncate import (
    Limits,
    fit_conversation,
    fit_prompt,
    newest_exchanges,
    split_conversation,
    without_left_end,
)
from danlu.exceptions import DataError
from danlu.text.chat_template import ChatTemplate
from danlu.types import Comparison, Conversation, Message, Origin, Prompt

# One token a byte: lengths can be worked by hand. A turn is its content and 4 more: <q> ... <a> ... <e>
SOURCE = (
    "{% for m in messages %}{{ {'system': '<s>', 'user': '<q>', 'assistant': '<a>'}[m.role] }}{{ m.content }}"
    "{% if m.role == 'assistant' %}<e>{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def template() -> ChatTemplate:
    tokenizer = byte_tokenizer(["<s>", "<q>", "<a>", "<e>"], eos_token="<e>")
    tokenizer.chat_template = SOURCE
    return ChatTemplate(tokenizer)


T = template()
TALK = [s("SYS"), u("111"), a("one"), u("222"), a("two"), u("333"), a("three")]
# <s>SYS 4, then <q>111<a>one<e> 9, 9 and <q>333<a>three<e> 11: 33 in all
ORIGIN = Origin("rows.jsonl", 7)


def text(ids: list[int]) -> str:
    return str(T.tokenizer.decode(ids, skip_special_tokens=False))


def fit(messages: list[Message], total: int, **more: Any) -> tuple[str, str, int]:
    """The text that is left, the trained part of it, and the answers that were lost."""
    found = fit_conversation(messages, T, Limits(total, **more), origin=ORIGIN)
    if found.encoded is None:
        return found.reason, "", found.lost
    ids, weights = found.encoded.ids, found.encoded.loss_weights
    assert len(ids) == len(weights)
    return text(ids), text([i for i, w in zip(ids, weights, strict=True) if w]), found.lost


def test_the_oldest_exchanges_go_and_the_system_text_stays() -> None:
    assert fit(TALK, 33) == ("<s>SYS<q>111<a>one<e><q>222<a>two<e><q>333<a>three<e>", "one<e>two<e>three<e>", 0)
    assert fit(TALK, 32) == ("<s>SYS<q>222<a>two<e><q>333<a>three<e>", "two<e>three<e>", 1)
    assert fit(TALK, 23) == ("<s>SYS<q>333<a>three<e>", "three<e>", 2)
    assert fit(TALK, 15) == ("<s>SYS<q>333<a>three<e>", "three<e>", 2)
    assert fit(TALK, 14) == ("longer than max_length", "", 3)


def test_answers_that_are_not_trained_are_not_lost() -> None:
    quiet = [{**m, "train": False} if m["content"] == "one" else m for m in TALK]
    assert fit(quiet, 32) == ("<s>SYS<q>222<a>two<e><q>333<a>three<e>", "two<e>three<e>", 0)  # type: ignore[arg-type]


def test_a_system_text_on_the_way_goes_with_its_question() -> None:
    talk = [u("111"), a("one"), s("NEW"), u("222"), a("two")]
    assert fit(talk, 21)[0] == "<s>NEW<q>222<a>two<e>"


def split(messages: list[Message], total: int) -> tuple[list[str], int]:
    """The texts that a conversation is split into, and the answers that were lost."""
    parts = list(split_conversation(messages, T, Limits(total, overlength="split"), origin=ORIGIN))
    return [text(p.encoded.ids) if p.encoded else p.reason for p in parts], sum(p.lost for p in parts)


def test_old_exchanges_become_a_conversation_of_their_own() -> None:
    one, two, three = "<q>111<a>one<e>", "<q>222<a>two<e>", "<q>333<a>three<e>"
    assert split(TALK, 33) == ([f"<s>SYS{one}{two}{three}"], 0)
    assert split(TALK, 32) == ([f"<s>SYS{two}{three}", f"<s>SYS{one}"], 0)
    assert split(TALK, 23) == ([f"<s>SYS{three}", f"<s>SYS{one}{two}"], 0)
    # Only what is too long by itself is lost, and what stands before it is not.
    assert split(TALK, 14) == (["longer than max_length", f"<s>SYS{two}", f"<s>SYS{one}"], 1)
    assert split(TALK[1:], 18) == ([three, f"{one}{two}"], 0), "without a system text"
    quiet = [{**m, "train": False} if m["content"] == "one" else m for m in TALK]
    assert split(quiet, 32) == ([f"<s>SYS{two}{three}"], 0), "nothing would be trained in the rest"  # type: ignore[arg-type]


def test_split_conversations_are_counted_once() -> None:
    trees = encode_conversations([Conversation(TALK, origin=ORIGIN)], T, Limits(14, overlength="split"))
    assert (trees.answers, trees.answers_cut, trees.answers_with_stop, len(trees.items)) == (3, 1, 2, 2)


def test_a_limit_of_the_prompt() -> None:
    # Before the last answer stand 4 + 9 + 9 + 5 tokens.
    assert fit(TALK, 99, prompt=27)[2] == 0
    assert fit(TALK, 99, prompt=26) == ("<s>SYS<q>222<a>two<e><q>333<a>three<e>", "two<e>three<e>", 1)
    assert fit(TALK, 99, prompt=9)[0] == "<s>SYS<q>333<a>three<e>"
    assert fit(TALK, 99, prompt=8) == ("longer than max_length or max_prompt_tokens", "", 3)
    assert fit(TALK, 99, prompt=8, overlength="truncate") == ("<s>SYS<q>33<a>three<e>", "three<e>", 2)
    assert fit(TALK, 99, prompt=5, overlength="truncate")[2] == 3, "the system text is not cut"


def test_a_limit_of_answers() -> None:
    whole = "<s>SYS<q>111<a>one<e><q>222<a>two<e><q>333<a>three<e>"
    assert fit(TALK, 99, answer=6) == (whole, "one<e>two<e>three<e>", 0)
    assert fit(TALK, 99, answer=5) == (whole, "one<e>two<e>", 1), "context, without loss"
    assert fit(TALK, 99, answer=3) == ("answers longer than max_answer_tokens", "", 3)
    assert fit(TALK, 99, answer=5, overlength="truncate") == (whole[: -len("<e>")], "one<e>two<e>three", 1)
    # A half answer ends the conversation: nobody goes on after half a sentence.
    assert fit(TALK, 99, answer=2, overlength="truncate") == ("<s>SYS<q>111<a>on", "on", 3)


def test_truncation_cuts_the_question_before_the_answer() -> None:
    talk = [s("SYS"), u("0123456789"), a("ab")]  # 4 + 12 + 3
    assert fit(talk, 18) == ("longer than max_length", "", 1)
    assert fit(talk, 18, overlength="truncate") == ("<s>SYS<q>123456789<a>ab<e>", "ab<e>", 0)
    assert fit(talk, 10, overlength="truncate") == ("<s>SYS<q>9<a>ab<e>", "ab<e>", 0)
    assert fit(talk, 9, overlength="truncate") == ("<s>SYS<q><a>ab<e>", "ab<e>", 0)
    assert fit(talk, 8, overlength="truncate") == ("longer than max_length", "", 1)
    # A long answer to a short question loses its right end, and its stop token with it.
    assert fit([u("12"), a("0123456789")], 12, overlength="truncate") == ("<q>12<a>01234567", "01234567", 1)
    # Both too long: half each.
    both = [u("0123456789"), a("abcdefghij")]
    assert fit(both, 12, overlength="truncate") == ("<q>6789<a>abcdef", "abcdef", 1)


def test_an_untrained_answer_is_cut_too() -> None:
    talk: list[Message] = [u("12"), {**a("0123456789"), "train": False}]
    assert fit(talk, 12, overlength="truncate") == ("<q>12<a>01234567", "", 0)


def test_an_error_names_the_row() -> None:
    assert fit(TALK, 33, overlength="error")[2] == 0
    for limits, said in (
        ({"total": 32}, "this conversation has 33 tokens, 32 are allowed"),
        ({"total": 99, "prompt": 26}, "what stands before the last answer has 27 tokens"),
        ({"total": 99, "answer": 5}, "an answer has 6 tokens, 5 are allowed"),
    ):
        with pytest.raises(DataError, match=rf"rows\.jsonl:7: {said}"):
            fit(TALK, overlength="error", **limits)  # type: ignore[arg-type]


def test_what_tools_say_is_shortened_like_a_question() -> None:
    messages: list[Message] = [u("abc"), {"role": "tool", "content": "0123456789"}]

    def size(candidate: list[Message]) -> int:
        return sum(len(m["content"]) for m in candidate)

    assert without_left_end(messages, size, 12) == [u("bc"), messages[1]]
    cut = without_left_end(messages, size, 4)
    assert cut is not None and [m["content"] for m in cut] == ["", "6789"]
    assert messages[0]["content"] == "abc"
    assert without_left_end([s("long")], size, 3) is None


# --- prompts of reinforcement learning --------------------------------------------------------------------------------


def test_prompts_lose_old_turns_and_then_their_left_end() -> None:
    def kept(total: int, **more: Any) -> str | None:
        found = fit_prompt(TALK[:-1], T, Limits(total, **more), origin=ORIGIN)
        return None if found is None else text(T.encode_prompt(found))

    assert kept(27) == "<s>SYS<q>111<a>one<e><q>222<a>two<e><q>333<a>"
    assert kept(26) == "<s>SYS<q>222<a>two<e><q>333<a>"
    assert kept(99, prompt=9) == "<s>SYS<q>333<a>"
    assert kept(8) is None
    assert kept(8, overlength="truncate") == "<s>SYS<q>33<a>"
    assert kept(6, overlength="truncate") == "<s>SYS<q><a>"
    assert kept(5, overlength="truncate") is None
    with pytest.raises(DataError, match=r"rows\.jsonl:7: this prompt has 27 tokens, 26 are allowed"):
        kept(26, overlength="error")


def test_encoded_prompts_are_what_their_messages_render() -> None:
    records = [Prompt(TALK[:-1]), Prompt([u("x" * 40)]), Prompt([u("ok")])]
    found, dropped = encode_prompts(records, T, 12)
    assert [text(p.ids) for p in found] == ["<s>SYS<q>333<a>", "<q>ok<a>"] and dropped == 1
    found, dropped = encode_prompts(records, T, Limits(12, overlength="truncate"))
    assert [text(p.ids) for p in found][1] == "<q>" + 10 * "x" + "<a>" and dropped == 0
    assert all(T.encode_prompt(p.messages) == p.ids for p in found)


# --- what the trainers count ------------------------------------------------------------------------------------------


def test_counts_for_the_gates() -> None:
    records = [Conversation(TALK), Conversation([u("x" * 40), a("y")]), Conversation([u("1"), a("z" * 30)])]
    trees = encode_conversations(records, T, 33)
    assert (trees.answers, trees.answers_cut, trees.answers_with_stop) == (5, 2, 3)
    assert trees.dropped == {"longer than max_length": 2} and len(trees.items) == 1
    trees = encode_conversations(records, T, Limits(33, overlength="truncate"))
    # The long question is cut and its answer is whole; the long answer loses its stop token.
    assert (trees.answers, trees.answers_cut, trees.answers_with_stop) == (5, 1, 4)
    assert trees.dropped == {} and max(trees.lengths) <= 33


def test_counts_where_every_answer_is_a_conversation() -> None:
    glm = make("chatglm2")
    talk = [u("1"), a("one"), u("2"), {**a("two"), "train": False}, u("3"), a("three")]
    trees = encode_conversations([Conversation(talk)], glm, 500)  # type: ignore[arg-type]
    assert (trees.answers, trees.answers_cut, trees.answers_with_stop, len(trees.items)) == (2, 0, 2, 2)


def test_conversations_with_tools_are_encoded_with_them() -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {}}}
    qwen = make("qwen")
    messages = [u("2 and 3?"), a("5")]
    trees = encode_conversations([Conversation(messages, tools=(tool,))], qwen, 5000)
    assert list(trees.items[0][0].ids) == qwen.encode(messages, tools=(tool,)).ids


def test_pairs() -> None:
    def pair(prompt: list[Message], chosen: str, rejected: str) -> Comparison:
        return Comparison(prompt, [a(chosen)], [a(rejected)], origin=ORIGIN)

    def nodes(record: Comparison, limits: int | Limits) -> tuple[list[str], int, dict[str, int]]:
        trees = encode_comparisons([record], T, limits)
        return [text(list(n.ids)) for item in trees.items for n in item], trees.answers_cut, trees.dropped

    talk = pair(TALK[:-1], "three", "tree")
    whole = "<s>SYS<q>111<a>one<e><q>222<a>two<e><q>333<a>"
    assert nodes(talk, 33) == ([whole, "three<e>", "tree<e>"], 0, {})
    assert nodes(talk, 32) == (["<s>SYS<q>222<a>two<e><q>333<a>", "three<e>", "tree<e>"], 0, {})
    assert nodes(talk, 14) == ([], 2, {"longer than max_length": 1})
    assert nodes(talk, Limits(14, overlength="truncate")) == (["<s>SYS<q>33<a>", "three<e>", "tree<e>"], 0, {})
    assert nodes(talk, Limits(99, answer=5)) == ([], 2, {"answers longer than max_answer_tokens": 1})
    cut = nodes(talk, Limits(99, answer=5, overlength="truncate"))
    assert cut == ([whole, "three", "tree<e>"], 1, {})
    alone = pair([u("123456789")], "three", "tree")
    assert nodes(alone, Limits(14, overlength="truncate")) == (["<q>456789<a>", "three<e>", "tree<e>"], 0, {})
    same = pair([u("1")], "abcX", "abcY")
    assert nodes(same, Limits(99, answer=3, overlength="truncate")) == ([], 2, {"equal or empty answers": 1})
    with pytest.raises(DataError, match=r"rows\.jsonl:7: this prompt with an answer has 33 tokens, 32 are allowed"):
        nodes(talk, Limits(32, overlength="error"))


# --- any lengths ------------------------------------------------------------------------------------------------------

WORD = st.text(st.sampled_from("ab é"), max_size=12)


@settings(deadline=None, max_examples=150)
@given(
    system=WORD,
    exchanges=st.lists(st.tuples(WORD, WORD, st.booleans()), min_size=1, max_size=5),
    total=st.integers(4, 60),
    prompt=st.none() | st.integers(1, 40),
    answer=st.none() | st.integers(1, 20),
    overlength=st.sampled_from(["drop", "truncate"]),
)
def test_what_is_left_is_within_the_limits(
    system: str,
    exchanges: list[tuple[str, str, bool]],
    total: int,
    prompt: int | None,
    answer: int | None,
    overlength: Any,
) -> None:
    messages: list[Message] = [s(system)] if system else []
    for question, reply, train in exchanges:
        messages += [u(question), {**a(reply), "train": train}]
    before = copy.deepcopy(messages)
    limits = Limits(total, prompt, answer, overlength)
    found = fit_conversation(messages, T, limits)
    assert messages == before
    wanted = sum(train for _, _, train in exchanges)
    if found.encoded is None:
        assert found.lost == wanted and found.reason
        return
    encoded = found.encoded
    assert len(encoded.ids) == len(encoded.loss_weights) <= total
    if system:
        assert found.messages[0] == messages[0]
    trained = [x for x in encoded.answers if encoded.loss_weights[x.start]]
    whole = sum(x.stops for x in trained)
    assert whole + found.lost == wanted
    if prompt is not None and encoded.answers:
        assert encoded.answers[-1].start <= prompt
    if answer is not None:
        assert all(x.end - x.start <= answer for x in trained)
    if overlength == "drop":
        assert whole == len(trained), "never half an answer"
        assert found.messages[-1] == messages[-1]


@given(count=st.integers(1, 30), keep=st.integers(0, 30))
def test_as_few_exchanges_go_as_will_do(count: int, keep: int) -> None:
    messages = [m for n in range(count) for m in (u(str(n)), a(str(n)))]
    kept = newest_exchanges(messages, lambda m: len(m) <= 2 * keep)
    assert (kept is None) == (keep == 0)
    if kept is not None:
        assert kept == messages[-2 * min(keep, count) :]
