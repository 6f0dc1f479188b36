"""Published comparisons, rankings and labels: which answer is the better one, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest

from danlu.data.formats.base import RowDropped
from danlu.data.formats.preference_messages import split_at_common
from danlu.data.formats.registry import detect
from danlu.data.kinds import as_kind, pool_singles
from danlu.exceptions import DataError
from danlu.types import Comparison, Conversation, Message, Origin, Prompt, Ranking, Record, Unpaired

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


def pair(row: dict[str, Any], name: str) -> tuple[list[Message], list[Message], list[Message]]:
    [record] = parse(row, name)
    assert isinstance(record, Comparison)
    return record.prompt, record.chosen, record.rejected


def ranking(row: dict[str, Any], name: str) -> tuple[list[Message], list[str], list[float]]:
    [record] = parse(row, name)
    assert isinstance(record, Ranking)
    return record.prompt, [response[0]["content"] for response in record.responses], record.scores


def fails(row: dict[str, Any], name: str, field: str | None) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(row, name)
    assert (caught.value.file, caught.value.line, caught.value.field) == ("data.jsonl", 3, field)
    return caught.value


def drops(row: dict[str, Any], name: str, reason: str) -> None:
    with pytest.raises(RowDropped, match=reason):
        parse(row, name)


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_whole_conversations_share_their_prompt() -> None:
    chosen, rejected = [u("Q"), a("A"), u("R"), a("good")], [u("Q"), a("A"), u("R"), a("bad")]
    expected = ([u("Q"), a("A"), u("R")], [a("good")], [a("bad")])
    assert pair({"chosen": chosen, "rejected": rejected}, "preference-messages") == expected
    # UltraFeedback's binarised rows repeat the prompt as text.
    row = {"prompt": "Q", "chosen": chosen, "rejected": rejected, "score_chosen": 8.0}
    assert pair(row, "preference-messages") == expected
    # After the first difference the conversations may go on differently.
    longer = [u("Q"), a("other"), u("X"), a("bad")]
    assert pair({"chosen": chosen, "rejected": longer}, "preference-messages") == ([u("Q")], chosen[1:], longer[1:])
    drops({"chosen": chosen, "rejected": [u("X"), a("bad")]}, "preference-messages", "no common prompt")
    drops({"chosen": chosen, "rejected": [u("Q")]}, "preference-messages", "does not end with an assistant turn")


def test_where_two_conversations_part() -> None:
    same = [u("Q"), a("A")]
    assert split_at_common(same, same) == 1, "equal pairs keep an answer, so that they can be counted as equal"
    assert split_at_common([s("S"), *same], [s("S"), u("Q"), a("B")]) == 2
    assert split_at_common([u("Q"), a("A"), u("R"), a("B")], [u("Q"), a("A"), u("S"), a("B")]) == 1
    assert split_at_common([a("A")], [a("B")]) == 0


def test_prompts_and_answers_in_mixed_types() -> None:
    answers = {"chosen": [a("good")], "rejected": [a("bad")]}
    assert pair({"prompt": "Q", "system": "S", **answers}, "preference-messages")[0] == [s("S"), u("Q")]
    row = {"prompt": [u("Q")], "chosen": "good", "rejected": "bad", "margin": 2}
    assert pair(row, "preference-messages") == ([u("Q")], [a("good")], [a("bad")])
    [record] = parse(row, "preference-messages")
    assert isinstance(record, Comparison) and record.margin == 2.0
    assert pair({"prompt": [u("Q")], **answers}, "comparison") == ([u("Q")], [a("good")], [a("bad")])
    assert pair({"prompt": "Q", "chosen": "good", "rejected": "bad"}, "preference-text")[0] == [u("Q")]
    orca = {"system": "S", "question": "Q", "chosen": "good", "rejected": "bad"}
    assert pair(orca, "preference-question") == ([s("S"), u("Q")], [a("good")], [a("bad")])
    drops(
        {"prompt": [u("Q"), a("A")], "chosen": "x", "rejected": "y"},
        "preference-messages",
        "prompt ends with an assist",
    )
    fails({"chosen": [u("Q"), a("x")], "rejected": 3}, "preference-messages", "rejected")
    fails({**orca, "question": 3}, "preference-question", "question")


def test_llama_factory_pairs() -> None:
    turns = [{"from": "human", "value": "Q"}]
    good, bad = {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}
    row = {"system": "S", "conversations": turns, "chosen": good, "rejected": bad}
    assert pair(row, "sharegpt-preference") == ([s("S"), u("Q")], [a("good")], [a("bad")])
    as_roles = {"messages": [u("Q")], "chosen": a("good"), "rejected": a("bad")}
    assert pair(as_roles, "sharegpt-preference") == ([u("Q")], [a("good")], [a("bad")])
    drops({**row, "conversations": [*turns, good]}, "sharegpt-preference", "prompt ends with an assistant turn")
    fails({**row, "rejected": {"from": "human", "value": "bad"}}, "sharegpt-preference", "rejected")
    fails({"conversations": turns, "chosen": good}, "sharegpt-preference", "rejected")
    alpaca = {"instruction": "Q", "input": "x", "chosen": "good", "rejected": "bad", "history": [["P", "O"]]}
    assert pair(alpaca, "alpaca-preference") == ([u("P"), a("O"), u("Q\nx")], [a("good")], [a("bad")])
    fails({"instruction": "Q", "chosen": "good", "rejected": None}, "alpaca-preference", "rejected")


def test_two_texts_without_a_prompt_are_not_guessed_at() -> None:
    error = fails({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "preference-bare", None)
    assert "preference-text" in error.hint and "hh-rlhf" in error.hint
    hh = {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"}
    assert pair(hh, "hh-rlhf") == ([u("Q")], [a("good")], [a("bad")])


def test_alpaca_eval_preferences() -> None:
    row = {"instruction": "Q", "output_1": "x", "output_2": "y"}
    for preference, better in [(1, "x"), (2.0, "y"), (1.2, "x"), (1.8, "y"), ("2", "y")]:
        assert pair({**row, "preference": preference}, "alpaca-eval")[1] == [a(better)]
    for preference, reason in [
        (0, "tie"),
        (0.0, "tie"),
        (1.5, "tie"),
        (None, "annotator"),
        (float("nan"), "annotator"),
    ]:
        drops({**row, "preference": preference}, "alpaca-eval", reason)
    for preference in (3, -1, 0.5, True, "x", []):
        fails({**row, "preference": preference}, "alpaca-eval", "preference")
    fails(row, "alpaca-eval", "preference")
    fails({**row, "output_2": None, "preference": 1}, "alpaca-eval", "output_2")


def test_shp_labels_name_the_better_comment() -> None:
    row = {"history": "Q", "human_ref_A": "x", "human_ref_B": "y", "score_A": 1, "score_B": 9}
    assert pair({**row, "labels": 1}, "shp") == ([u("Q")], [a("x")], [a("y")])
    assert pair({**row, "labels": "0"}, "shp") == ([u("Q")], [a("y")], [a("x")])
    fails({**row, "labels": 2}, "shp", "labels")
    fails({key: value for key, value in {**row, "labels": 1}.items() if key != "history"}, "shp", "history")


# --- rankings ---------------------------------------------------------------------------------------------------------


def test_ranked_and_scored_answers() -> None:
    listed = {"instruction": "Q", "input": "x", "output": ["best", "worst"], "history": [["P", "O"]]}
    expected = ([u("P"), a("O"), u("Q\nx")], ["best", "worst"], [-1.0, -2.0])
    assert ranking(listed, "ranked-outputs") == expected
    gpt4 = {"user_input": "Q", "responses_and_scores": [{"response": "x", "score": "3"}, {"response": "y", "score": 8}]}
    assert ranking(gpt4, "gpt4-comparison") == ([u("Q")], ["x", "y"], [3.0, 8.0])
    completions = [{"response": "x", "overall_score": 7.5}, {"response": "y", "overall_score": None}]
    assert ranking({"instruction": "Q", "completions": completions}, "ultrafeedback") == ([u("Q")], ["x"], [7.5])
    nectar = {
        "prompt": "\n\nHuman: Q\n\nAssistant: ",
        "answers": [{"answer": "x", "rank": 2}, {"answer": "y", "rank": 1}],
    }
    assert ranking(nectar, "nectar") == ([u("Q")], ["x", "y"], [-2.0, -1.0])
    ranks = {"prompt": "Q", "responses": ["x", "y"], "ranks": [2, 1]}
    assert ranking(ranks, "scored") == ([u("Q")], ["x", "y"], [-2.0, -1.0])


def test_faulty_rankings_are_named() -> None:
    fails({"instruction": "Q", "output": ["x", 3]}, "ranked-outputs", "output[1]")
    fails({"instruction": "Q", "output": []}, "ranked-outputs", "output")
    fails(
        {"user_input": "Q", "responses_and_scores": [{"response": "x"}]},
        "gpt4-comparison",
        "responses_and_scores[0].score",
    )
    bad = {"user_input": "Q", "responses_and_scores": [{"response": 1, "score": 1}]}
    fails(bad, "gpt4-comparison", "responses_and_scores[0].response")
    fails({"prompt": "Q", "answers": [{"answer": "x", "rank": "first"}]}, "nectar", "answers[0].rank")
    drops({"instruction": "Q", "completions": [{"response": "x", "overall_score": None}]}, "ultrafeedback", "no score")
    error = fails({"prompt": "Q", "responses": ["x", "y"], "ranking": [1, 0]}, "responses-ranking", None)
    assert "`ranks`" in error.hint and "`scores`" in error.hint


def test_chatllama_s_three_files() -> None:
    rows = [{"user_input": "Q", "completion": c, "score": score} for c, score in [("x", 1), ("y", 4.5), ("z", None)]]
    drops(rows.pop(), "chatllama-reward", "no score")
    pooled = pool_singles([record for row in rows for record in parse(row, "chatllama-reward")])
    [comparison] = as_kind(pooled[0], "comparison")
    assert isinstance(comparison, Comparison) and (comparison.chosen, comparison.rejected) == ([a("y")], [a("x")])
    fails({"user_input": "Q", "completion": "x", "score": "good"}, "chatllama-reward", "score")
    [actor] = parse({"user_input": "Q", "completion": "A"}, "chatllama-actor")
    assert isinstance(actor, Conversation) and actor.messages == [u("Q"), a("A")]
    [rlhf] = parse({"user_input": "Q"}, "chatllama-rlhf")
    assert isinstance(rlhf, Prompt) and rlhf.prompt == [u("Q")]
    drops({"user_input": " "}, "chatllama-rlhf", "empty question")


# --- OpenAssistant's trees --------------------------------------------------------------------------------------------


def node(text: str, role: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text": text, "role": role, "replies": list(replies), **more}


def tree(*replies: dict[str, Any]) -> dict[str, Any]:
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": node("Q", "prompter", *replies)}


def test_every_question_of_a_tree_is_a_ranking() -> None:
    follow_up = node("R", "prompter", node("B", "assistant"))
    row = tree(node("bad", "assistant", follow_up, rank=1), node("good", "assistant", rank=0))
    first, second = parse(row, "oasst-tree")
    assert isinstance(first, Ranking) and isinstance(second, Ranking)
    assert first.prompt == [u("Q")]
    assert [r[0]["content"] for r in first.responses] == ["bad", "good"] and first.scores == [-2.0, -1.0]
    # The answer that ranked low is context here, and nobody shall imitate it.
    assert second.prompt == [u("Q"), {**a("bad"), "train": False}, u("R")]
    assert second.responses == [[a("B")]]
    [imitated] = as_kind(first, "conversation")
    assert isinstance(imitated, Conversation) and imitated.messages == [u("Q"), a("good")]


def test_unranked_and_removed_replies() -> None:
    ranked = tree(node("x", "assistant", rank=0), node("y", "assistant"), node("z", "assistant", rank=1))
    assert ranking(ranked, "oasst-tree")[1] == ["x", "z"], "nobody said where y belongs"
    alone = parse(tree(node("x", "assistant"), node("y", "assistant", rank=None)), "oasst-tree")
    assert [record.responses for record in alone if isinstance(record, Ranking)] == [[[a("x")]], [[a("y")]]]
    below = node("R", "prompter", node("B", "assistant"))
    removed = tree(
        node("x", "assistant", below, deleted=True), node("y", "assistant", review_result=False), node("z", "assistant")
    )
    assert ranking(removed, "oasst-tree")[1] == ["z"]
    drops(tree(), "oasst-tree", "a tree without replies")


def test_faulty_trees_are_named() -> None:
    fails(tree({"role": "assistant"}), "oasst-tree", "prompt.replies[0].text")
    fails(tree(node("x", "narrator")), "oasst-tree", "prompt.replies[0].role")
    fails(tree(node("x", "assistant", rank="best")), "oasst-tree", "prompt.replies[0].rank")
    fails({"prompt": {"role": "prompter", "text": "Q", "replies": "none"}}, "oasst-tree", "prompt.replies")
    flat = {"message_id": "2", "parent_id": "1", "text": "x", "role": "assistant", "lang": "en"}
    assert "whole trees" in fails(flat, "oasst-messages", None).hint


def test_a_deep_tree_is_no_problem() -> None:
    deep = node("end", "assistant")
    for i in range(3000):
        deep = node(f"{i}", "prompter" if i % 2 == 0 else "assistant", deep)
    assert len(parse(tree(deep), "oasst-tree")) == 1501


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "Q", "completion": "A", "label": True}, "unpaired-text"),
        ({"prompt": "Q", "response": "A", "kto_tag": "true"}, "unpaired-text"),
        ({"messages": [u("Q"), a("A")], "label": 1}, "unpaired-conversation"),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "kto_tag": True},
            "unpaired-conversation",
        ),
        ({"instruction": "Q", "input": "", "output": "A", "kto_tag": True}, "unpaired-alpaca"),
        ({"instruction": "Q", "output": "A", "label": True}, "unpaired-alpaca"),
        ({"prompt": [u("Q")], "completion": [a("A")], "label": True}, "unpaired"),
    ],
)
def test_labels_in_every_shape(row: dict[str, Any], name: str) -> None:
    field = "kto_tag" if "kto_tag" in row else "label"
    for value, label in [(row[field], True), (False, False)]:
        [record] = parse({**row, field: value}, name)
        assert isinstance(record, Unpaired)
        assert (record.prompt, record.completion, record.label) == ([u("Q")], [a("A")], label)


def test_faulty_labels_are_named() -> None:
    assert (
        "'positive'" in fails({"prompt": "Q", "completion": "A", "label": "positive"}, "unpaired-text", "label").message
    )
    fails({"messages": [u("Q"), a("A")], "label": "x"}, "unpaired-conversation", "label")
    fails({"instruction": "Q", "output": "A", "kto_tag": None}, "unpaired-alpaca", "kto_tag")
    drops({"messages": [u("Q")], "label": True}, "unpaired-conversation", "does not end with an assistant turn")
