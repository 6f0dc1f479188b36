"""From what a file holds to what a stage needs: which comparisons a ranking gives, what is dropped and why."""

from __future__ import annotations

import pytest
from rows import a, s, u

from danlu.data.formats.base import RowDropped
from danlu.data.kinds import Pairs, as_kind, pool_singles
from danlu.exceptions import DataError
from danlu.types import Comparison, Conversation, Document, Message, Origin, Prompt, Ranking, Record, Unpaired

HERE = Origin("f.jsonl", 3)
Q = [u("Q")]


def ranking(*scored: tuple[str, float]) -> Ranking:
    return Ranking(Q, [[a(text)] for text, _ in scored], [score for _, score in scored], HERE)


def pairs_of(record: Record, pairs: Pairs, margin: bool = False) -> list[tuple[str, str, float]]:
    found = as_kind(record, "comparison", pairs=pairs, margin=margin)
    assert all(isinstance(pair, Comparison) and pair.origin == HERE for pair in found)
    return [(p.chosen[0]["content"], p.rejected[0]["content"], p.margin) for p in found if isinstance(p, Comparison)]


def test_which_pairs_a_ranking_gives() -> None:
    # Sorted: d 5, b 3, c 3, a 1. Ties give no pair; of equal answers the first wins.
    record = ranking(("a", 1), ("b", 3), ("c", 3), ("d", 5))
    assert pairs_of(record, "best-worst") == [("d", "a", 0)]
    assert pairs_of(record, "all", margin=True) == [
        ("d", "b", 2),
        ("d", "c", 2),
        ("d", "a", 4),
        ("b", "a", 2),
        ("c", "a", 2),
    ]
    assert pairs_of(record, "adjacent") == [("d", "b", 0), ("c", "a", 0)]
    # Empty answers are no answers, and an answer is not better than itself.
    assert pairs_of(ranking(("a", 2), (" ", 9), ("b", 1)), "best-worst") == [("a", "b", 0)]
    assert pairs_of(ranking(("a", 3), ("a", 2), ("b", 1)), "adjacent") == [("a", "b", 0)]


@pytest.mark.parametrize(
    ("record", "kind", "reason"),
    [
        (ranking(("a", 1)), "comparison", "only one answer to this prompt"),
        (ranking(("a", 1), ("b", 1)), "comparison", "all scores equal"),
        (ranking(("a", 1), ("a", 2)), "comparison", "chosen equals rejected"),
        (ranking((" ", 1)), "ranking", "empty answer"),
        (Comparison(Q, [a("x")], [a("x")]), "comparison", "chosen equals rejected"),
        (Comparison(Q, [a("x")], [a("")]), "ranking", "empty answer"),
        (Comparison(Q, [a("")], [a("x")]), "conversation", "empty answer"),
        (Conversation([*Q, a("\n")]), "conversation", "empty answer"),
        (Conversation([s("S"), a("x")]), "prompt", "no question before the answer"),
        (Conversation([*Q, a("x")], tools=({"name": "f"},)), "prompt", "a prompt cannot hold its tools"),
        (Unpaired(Q, [a("x")], False), "conversation", "an answer that was not liked"),
        (Unpaired(Q, [a("")], True), "unpaired", "empty answer"),
    ],
)
def test_what_is_dropped(record: Record, kind: str, reason: str) -> None:
    with pytest.raises(RowDropped, match=reason):
        as_kind(record, kind)  # type: ignore[arg-type]


def test_only_what_a_kind_uses_is_judged() -> None:
    spoiled: list[Record] = [
        Comparison(Q, [a("x")], [a("x")], origin=HERE),
        Conversation([*Q, a("")], HERE),
        ranking(("", 1)),
        Unpaired(Q, [a("")], False, HERE),
    ]
    assert [as_kind(record, "prompt") for record in spoiled] == [[Prompt(Q, origin=HERE)]] * 4
    calls: Message = {**a(""), "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    conversation = Conversation([*Q, calls])
    assert as_kind(conversation, "conversation") == [conversation]


def test_comparisons_serve_rankings_and_labels() -> None:
    pair = Comparison(Q, [a("x")], [a("y")], 1.0, HERE)
    assert as_kind(pair, "ranking") == [Ranking(Q, [[a("x")], [a("y")]], [-1.0, -2.0], HERE)]
    assert as_kind(pair, "unpaired") == [Unpaired(Q, [a("x")], True, HERE), Unpaired(Q, [a("y")], False, HERE)]
    assert as_kind(ranking(("bad", 0), ("good", 1)), "conversation") == [Conversation([*Q, a("good")], HERE)]


def test_another_kind_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match="found plain text, but this stage needs comparisons") as caught:
        as_kind(Document("x", HERE), "comparison")
    assert (caught.value.file, caught.value.line) == ("f.jsonl", 3)


def test_single_scored_answers_are_pooled_by_prompt() -> None:
    other = Ranking([u("R")], [[a("r")]], [2.0], HERE)
    several = ranking(("p", 1), ("q", 2))
    singles = [ranking(("a", 1)), other, several, ranking(("b", 4)), ranking(("a", 3))]
    assert pool_singles(singles) == [ranking(("a", 1), ("b", 4), ("a", 3)), other, several]
    assert singles[0] == ranking(("a", 1)), "what was given does not change"
