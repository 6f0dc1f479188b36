"""Conversations in published shapes: tools, MOSS, older OpenAI rows, role lists, text with marks."""

from __future__ import annotations

from typing import Any

import pytest

from danlu.data.formats import moss
from danlu.data.formats.base import RowDropped
from danlu.data.formats.moss import split_commands, split_results
from danlu.data.formats.registry import by_name, detect
from danlu.exceptions import DataError
from danlu.types import Conversation, Message, Origin, Prompt, Record

ORIGIN = Origin("data.jsonl", 3)


def u(content: str) -> Message:
    return {"role": "user", "content": content}


def a(content: str) -> Message:
    return {"role": "assistant", "content": content}


def s(content: str) -> Message:
    return {"role": "system", "content": content}


def parse(row: dict[str, Any], name: str) -> list[Record]:
    """The records of a row that must be recognised as the format of that name."""
    entry = detect(row)
    assert entry is not None and entry.name == name
    return entry.parse(row, ORIGIN)


def talk(row: dict[str, Any], name: str) -> Conversation:
    [record] = parse(row, name)
    assert isinstance(record, Conversation)
    return record


def fails(row: dict[str, Any], name: str, field: str) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(row, name)
    assert (caught.value.file, caught.value.line, caught.value.field) == ("data.jsonl", 3, field)
    return caught.value


# --- ShareGPT with tools ----------------------------------------------------------------------------------------------

CALL = {"from": "function_call", "value": '{"name": "multiply", "arguments": {"a": 6, "b": 7}}'}
TOOLS = '[{"name": "multiply", "description": "Multiplies.", "parameters": {"type": "object"}}]'


def test_calls_and_results_become_structured_turns() -> None:
    row = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "6 times 7?"},
            CALL,
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "42."},
        ],
        "tools": TOOLS,
    }
    found = talk(row, "sharegpt-tools")
    assert found.messages == [
        s("Be brief."),
        u("6 times 7?"),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "multiply", "arguments": {"a": 6, "b": 7}}}],
        },
        {"role": "tool", "content": "42", "name": "multiply"},
        a("42."),
    ]
    assert [tool["name"] for tool in found.tools] == ["multiply"]


def test_several_calls_at_once_and_calls_without_a_tools_key() -> None:
    both = {"from": "function_call", "value": '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{}"}]'}
    turns = [{"from": "human", "value": "Q"}, both, {"from": "observation", "value": ""}, {"from": "gpt", "value": "A"}]
    found = talk({"conversations": turns}, "sharegpt-tools")
    assert [call["function"]["name"] for call in found.messages[1]["tool_calls"]] == ["f", "g"]
    assert [call["function"]["arguments"] for call in found.messages[1]["tool_calls"]] == [{}, {}]
    assert found.messages[2] == {"role": "tool", "content": ""}, "two calls: nobody knows whose result it is"
    assert found.tools == ()


def test_an_empty_list_of_tools_is_none_and_rows_without_tools_stay_sharegpt() -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert talk({"conversations": turns, "tools": "[]"}, "sharegpt-tools").tools == ()
    assert talk({"conversations": turns}, "sharegpt").messages == [u("Q"), a("A")]


@pytest.mark.parametrize(
    ("value", "message"),
    [("multiply(6, 7)", "no JSON"), ('"multiply"', "found text"), ('{"name": "f", "arguments": 3}', "found a number")],
)
def test_a_call_that_is_none_is_named_with_its_place(value: str, message: str) -> None:
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": value}], "tools": "[]"}
    assert message in fails(row, "sharegpt-tools", "conversations[1].value").message


def test_broken_tools_are_named() -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    fails({"conversations": turns, "tools": "[{"}, "sharegpt-tools", "tools")


# --- OpenAI's older calls ---------------------------------------------------------------------------------------------


def test_old_function_calls_become_tool_calls() -> None:
    row = {
        "messages": [
            u("Q"),
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "name": "f", "content": "2"},
            a("A"),
        ],
        "functions": [{"name": "f", "parameters": {}}],
    }
    found = talk(row, "messages-functions")
    assert found.messages == [
        u("Q"),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "2", "name": "f"},
        a("A"),
    ]
    assert found.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    row["messages"][1]["function_call"] = "f(1)"
    fails(row, "messages-functions", "messages[1].function_call")


# --- role lists -------------------------------------------------------------------------------------------------------


def test_messages_under_other_names() -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert talk({"conversations": turns}, "conversation-roles").messages == [u("Q"), a("A")]
    told = [{"role": "developer", "content": "S"}, *turns]
    assert talk({"conversation": told, "model": "m"}, "conversation-roles").messages == [s("S"), u("Q"), a("A")]
    rounds = [{"human": "Q", "assistant": "A"}, {"human": "R", "assistant": "B"}]
    assert talk({"conversation": rounds}, "conversation-rounds").messages == [u("Q"), a("A"), u("R"), a("B")]
    fails({"conversation": [{"human": "Q"}]}, "conversation-rounds", "conversation[0].assistant")
    bad = [{"role": "narrator", "content": "Q"}]
    assert "narrator" in fails({"conversations": bad}, "conversation-roles", "conversations[0].role").message


def test_prompt_completion_trains_the_completion_only() -> None:
    assert talk({"prompt": "Q", "completion": "A"}, "prompt-completion").messages == [u("Q"), a("A")]
    row = {"prompt": [u("Q"), a("A"), u("R")], "completion": [a("B")]}
    assert talk(row, "prompt-completion").messages == [u("Q"), {**a("A"), "train": False}, u("R"), a("B")]
    assert "train" not in row["prompt"][1], "the row itself is left alone"


# --- MOSS -------------------------------------------------------------------------------------------------------------

META = "You are MOSS.\n- Web search: enabled. API: Search(words)\n"


def moss_turn(human: str, thoughts: str, commands: str, results: str, answer: str) -> dict[str, str]:
    return {
        "Human": f"<|Human|>: {human}<eoh>\n",
        "Inner Thoughts": f"<|Inner Thoughts|>: {thoughts}<eot>\n",
        "Commands": f"<|Commands|>: {commands}<eoc>\n",
        "Tool Responses": f"<|Results|>:\n{results}\n<eor>\n",
        "MOSS": f"<|MOSS|>: {answer}<eom>\n",
    }


def moss_row(*turns: dict[str, str]) -> dict[str, Any]:
    chat = {f"turn_{i}": turn for i, turn in reversed(list(enumerate(turns, start=1)))}
    return {"conversation_id": 1, "meta_instruction": META, "num_turns": len(turns), "chat": chat}


def test_a_round_with_tools_is_a_call_its_results_and_an_answer() -> None:
    results = 'Search("a (b") =>\n<|1|>: "x"\nCalculate("1+(2)") => 3'
    row = moss_row(moss_turn("Q", "Think.", 'Search("a (b"), Calculate("1+(2)")', results, "A<sup><|1|></sup>"))
    assert talk(row, "moss").messages == [
        s(META.strip()),
        u("Q"),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "Search", "arguments": {"words": "a (b"}}},
                {"type": "function", "function": {"name": "Calculate", "arguments": {"expression": "1+(2)"}}},
            ],
            "reasoning_content": "Think.",
        },
        {"role": "tool", "content": 'Search("a (b") =>\n<|1|>: "x"', "name": "Search"},
        {"role": "tool", "content": 'Calculate("1+(2)") => 3', "name": "Calculate"},
        a("A<sup><|1|></sup>"),
    ]


def test_rounds_without_tools_and_turns_in_their_number_s_order() -> None:
    turns = [moss_turn(f"Q{i}", "None", "None", "None", f"A{i}") for i in range(1, 12)]
    messages = talk(moss_row(*turns), "moss").messages
    assert [m["content"] for m in messages[1:]] == [f"{who}{i}" for i in range(1, 12) for who in "QA"]
    assert all("reasoning_content" not in m and "tool_calls" not in m for m in messages)
    [_, _, answer] = talk(moss_row(moss_turn("Q", "Think.", "None", "None", "A")), "moss").messages
    assert answer == {**a("A"), "reasoning_content": "Think."}


def test_a_command_without_results_did_not_run() -> None:
    for commands in ("None.", "None. Let x be the length", "Non", 'Calculate("None")'):
        messages = talk(moss_row(moss_turn("Q", "None", commands, "None", "A")), "moss").messages
        assert messages[1:] == [u("Q"), a("A")]


def test_results_of_something_else_than_calls_are_counted_noise() -> None:
    for commands in ("None", 'Calculate("1") = 0, Solve("x")', 'Search("a'):
        with pytest.raises(RowDropped, match="results of a command that is no call"):
            parse(moss_row(moss_turn("Q", "None", commands, "Something.", "A")), "moss")


def test_results_that_do_not_repeat_the_calls_stay_one_turn() -> None:
    one = talk(moss_row(moss_turn("Q", "None", 'Text2Image("a fox")', "Image made.", "A")), "moss").messages
    assert one[3] == {"role": "tool", "content": "Image made.", "name": "Text2Image"}
    two = talk(
        moss_row(moss_turn("Q", "None", 'Search("a"), Solve("x", "y")', 'Search("a") => b', "A")), "moss"
    ).messages
    assert two[3] == {"role": "tool", "content": 'Search("a") => b'}
    assert two[2]["tool_calls"][1]["function"]["arguments"] == '"x", "y"', "no parameter for two values: the text stays"


def test_commands_and_results_are_split_where_they_should_be() -> None:
    assert split_commands('F("a"), None, \nG(1+(2)),') == [moss.Call("F", '"a"'), moss.Call("G", "1+(2)")]
    assert split_commands('F("\\")")') == [moss.Call("F", '"\\")"')]
    assert split_commands("") == [] and split_commands("F(") is None and split_commands("F() and more") is None
    calls = [moss.Call("F", '"a"'), moss.Call("F", '"a"')]
    assert split_results('F("a") => 1\nF("a") => 2', calls) == ['F("a") => 1', 'F("a") => 2']
    assert split_results('See F("a") => 1\nF("a") => 2', calls) is None
    assert split_results('F("a") => 1 as F("a") => 2', calls) is None


def test_moss_faults_are_named() -> None:
    row = moss_row(moss_turn("Q", "None", "None", "None", "A"))
    del row["chat"]["turn_1"]["MOSS"]
    fails(row, "moss", "chat.turn_1.MOSS")
    row["chat"]["turn_1"] |= {"MOSS": "A", "Commands": 3}
    fails(row, "moss", "chat.turn_1.Commands")
    fails({"meta_instruction": "M", "chat": []}, "moss", "chat")


def test_moss_plain_text_with_old_and_new_marks() -> None:
    old = {"plain_text": "[Human]: Q<eoh> [MOSS]: A<eoa>\n[Human]: R<eoh> [MOSS]: B<eoa>", "num_turns": 2}
    assert talk(old, "moss-plain").messages == [u("Q"), a("A"), u("R"), a("B")]
    new = f'{META}<|Human|>: Q<eoh>\n<|Inner Thoughts|>: T<eot>\n<|Commands|>: Search("x")<eoc>\n<|Results|>:\n'
    new += 'Search("x") => y\n<eor>\n<|MOSS|>: A<eom>\n'
    found = talk({"plain_text": new}, "moss-plain").messages
    assert [m["role"] for m in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert found[2]["reasoning_content"] == "T" and found[3]["content"] == 'Search("x") => y'
    for text, reason in [("[MOSS]: A<eoa>", "starts with an assistant turn"), ("nothing", "no turns")]:
        with pytest.raises(RowDropped, match=reason):
            parse({"plain_text": text}, "moss-plain")
    with pytest.raises(RowDropped, match="does not end with an assistant turn"):
        parse({"plain_text": "[Human]: Q<eoh>"}, "moss-plain")


def test_moss_user_prompts() -> None:
    [prompt] = parse({"user_prompt": "Q"}, "moss-prompt")
    assert isinstance(prompt, Prompt) and prompt.prompt == [u("Q")]


# --- text with marks --------------------------------------------------------------------------------------------------


def test_a_template_around_the_text_comes_off() -> None:
    body = "### Instruction:\nSay it.\n\n### Input:\nHi\n\n### Response:\nHo\n### not a mark\nEND\n"
    expected = [u("Say it.\nHi"), a("Ho\n### not a mark")]
    assert talk({"text": body}, "instruction-text").messages == expected
    preamble = "Below is an instruction that describes a task, paired with an input. Write a response.\n\n"
    assert talk({"text": preamble + body}, "instruction-text").messages == expected
    for answer in ("THE END", "THE END</s>", "THE END\nEND\n"):
        film = {"text": f"### Instruction:\nQ\n\n### Response: {answer}"}
        assert talk(film, "instruction-text").messages == [u("Q"), a("THE END")]
    with pytest.raises(RowDropped, match="no response"):
        parse({"text": "### Instruction:\nQ"}, "instruction-text")
    entry = detect({"text": "About ### Instruction: marks."})
    assert entry is not None and entry.name == "document", "a text that speaks of marks stays a text"


def test_guanaco_turns() -> None:
    row = {"text": "### Human: Q### Assistant: A### Human: R\n### Assistant: B"}
    assert talk(row, "guanaco").messages == [u("Q"), a("A"), u("R"), a("B")]


def test_a_dialogue_in_an_instruction_is_split() -> None:
    row = {"instruction": " <user>: Q <bot>: A<b>x <user>: R", "input": "", "output": "B"}
    assert talk(row, "flattened-dialogue").messages == [u("Q"), a("A<b>x"), u("R"), a("B")]
    belle = {"instruction": "Human:Q\nAssistant:A\nHuman:R\nAssistant:\n", "input": "", "output": "B"}
    assert talk(belle, "flattened-dialogue").messages == [u("Q"), a("A"), u("R"), a("B")]
    plain = {"instruction": "Human: a species?", "input": "", "output": "Yes."}
    assert talk(plain, "alpaca").messages == [u("Human: a species?"), a("Yes.")]


def test_a_forced_format_says_what_it_misses() -> None:
    with pytest.raises(DataError, match="no dialogue"):
        by_name("flattened-dialogue").parse({"instruction": "Q", "output": "A"}, ORIGIN)


# --- Alpaca's relatives and column pairs ------------------------------------------------------------------------------


def test_alpaca_s_relatives() -> None:
    dolly = {"instruction": "Q", "context": "P", "response": "A", "category": "closed_qa"}
    assert talk(dolly, "dolly").messages == [u("Q\nP"), a("A")]
    fails({**dolly, "response": None}, "dolly", "response")
    seeds = {"instruction": "Q", "instances": [{"input": "x", "output": "A"}, {"input": "", "output": "B"}]}
    both = parse(seeds, "seed-tasks")
    assert [record.messages for record in both if isinstance(record, Conversation)] == [
        [u("Q\nx"), a("A")],
        [u("Q"), a("B")],
    ]
    fails({"instruction": "Q", "instances": [{"input": "x"}]}, "seed-tasks", "instances[0].output")
    translated = {"instruction": "Q", "output": "A", "trans_instruction": "问", "trans_input": "", "trans_output": "答"}
    assert talk(translated, "coig-translated").messages == [u("问"), a("答")]


def test_coig_exams_and_rounds() -> None:
    exam = {"textbox_q_instruction": "I", "textbox_q_context": "", "textbox_question": "Q", "textbox_answer": "B"}
    assert talk({**exam, "textbox_answer_analysis": "Why."}, "coig-exam").messages == [u("I\nQ"), a("B\nWhy.")]
    rounds = {f"round_{i}": {"response": f'```json\n{{"Q": "Q{i}", "A": "A{i}"}}\n```'} for i in (10, 0, 2)}
    expected = [turn for i in (0, 2, 10) for turn in (u(f"Q{i}"), a(f"A{i}"))]
    assert talk(rounds, "coig-rounds").messages == expected
    for response in ("I cannot.", '{"Q": "Q"}', "[]"):
        with pytest.raises(RowDropped, match="a round"):
            parse({"round_0": {"response": response}}, "coig-rounds")


def test_a_bilingual_row_is_read_in_the_language_that_was_asked_for() -> None:
    row = {f"{c}_{f}": f"{c} {f}" for c in ("en", "zh") for f in ("instruction", "input", "output")} | {"metadata": {}}
    with pytest.raises(DataError, match="in Chinese and in English") as caught:
        parse(row, "alpaca-bilingual")
    assert "--as alpaca-zh" in caught.value.hint and "--as alpaca-en" in caught.value.hint
    for language in ("zh", "en"):
        [found] = by_name(f"alpaca-{language}").parse(row, ORIGIN)
        assert isinstance(found, Conversation)
        assert found.messages == [u(f"{language} instruction\n{language} input"), a(f"{language} output")]
        [plain] = by_name(f"alpaca-{language}").parse({"instruction": "Q", "output": "A"}, ORIGIN)
        assert isinstance(plain, Conversation) and plain.messages == [u("Q"), a("A")]


def test_column_pairs_and_what_they_leave_alone() -> None:
    assert talk({"content": "Q", "summary": "A"}, "adgen").messages == [u("Q"), a("A")]
    assert talk({"kind": "k", "input": "Q", "target": "A"}, "firefly").messages == [u("Q"), a("A")]
    assert talk({"query": "Q", "response": "A", "type": "t"}, "query-response").messages == [u("Q"), a("A")]
    assert talk({"question": "Q", "answer": "A", "id": 3}, "questions").messages == [u("Q"), a("A")]
    orca = {"id": "1", "system_prompt": "S", "question": "Q", "response": "A"}
    assert talk(orca, "openorca").messages == [s("S"), u("Q"), a("A")]
    fails({"content": "Q", "summary": 3}, "adgen", "summary")
    assert detect({"question": "Q", "context": "P", "answer": "A"}) is None, "the passage would be lost"


@pytest.mark.parametrize(
    ("context", "question"),
    [
        ("问题：头疼怎么办？\n回答: ", "头疼怎么办？"),
        ("Instruction: Add.\nInput: 2, 3\nAnswer: ", "Add.\n2, 3"),
        ("Instruction: Say hi.\nAnswer: ", "Say hi."),
        ("No template", "No template"),
    ],
)
def test_context_and_target(context: str, question: str) -> None:
    assert talk({"context": context, "target": "A"}, "context-target").messages == [u(question), a("A")]
