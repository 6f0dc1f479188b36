"""From what a file holds to what a stage needs: a comparison is also a conversation to imitate, a ranking also pairs, ..."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import combinations, pairwise
from typing import Final, cast

from danlu.data.formats.base import RowDropped
from danlu.data.formats.turns import before_answer, is_blank
from danlu.data.problems import RowError
from danlu.train_config import Pairs
from danlu.types import Comparison, Conversation, Message, Origin, Prompt, Ranking, Record, RecordKind, Unpaired

SERVED_BY: Final[dict[RecordKind, frozenset[RecordKind]]] = {
    "conversation": frozenset({"conversation", "comparison", "ranking", "unpaired"}),
    "comparison": frozenset({"comparison", "ranking"}),
    "prompt": frozenset({"conversation", "comparison", "prompt", "ranking", "unpaired"}),
    "document": frozenset({"document"}),
    "ranking": frozenset({"ranking", "comparison"}),
    "unpaired": frozenset({"unpaired", "comparison"}),
}
"""Which kinds of content can serve a stage that needs the key."""

_PLURAL: Final[dict[RecordKind, str]] = {
    "conversation": "conversations",
    "comparison": "comparisons",
    "prompt": "prompts without answers",
    "document": "plain text",
    "ranking": "ranked or scored answers",
    "unpaired": "answers with a label",
}
_EXAMPLE: Final[dict[RecordKind, str]] = {
    "conversation": '{"messages": [...]}',
    "comparison": '{"prompt": [...], "chosen": [...], "rejected": [...]}',
    "prompt": '{"prompt": [...]}',
    "document": '{"text": "..."} or a .txt file',
    "ranking": '{"prompt": [...], "responses": [...], "scores": [...]}',
    "unpaired": '{"prompt": [...], "completion": [...], "label": true}',
}


def kind_of(record: Record) -> RecordKind:
    """The natural kind of a record."""
    return cast(RecordKind, type(record).__name__.lower())


def serves(holds: RecordKind, kind: RecordKind) -> bool:
    """Whether records of the kind `holds` can be turned into `kind`."""
    return holds in SERVED_BY[kind]


def wrong_kind(holds: RecordKind, kind: RecordKind, origin: Origin | None, format: str = "") -> RowError:
    """The error for content that cannot serve what a stage needs."""
    named = f" (format '{format}')" if format else ""
    return RowError(
        f"found {_PLURAL[holds]}{named}, but this stage needs {_PLURAL[kind]}",
        code="wrong-kind",
        hint=f"Give a file with rows like {_EXAMPLE[kind]}.",
        file=origin.file if origin else None,
        line=origin.line if origin else None,
    )


def as_kind(record: Record, kind: RecordKind, *, pairs: Pairs = "best-worst", margin: bool = False) -> list[Record]:
    """A record as what a stage needs.

    Only what the kind uses is judged: a pair with equal answers still has a good prompt.

    Args:
        record: of any kind.
        kind: what is needed; the record's own kind checks it.
        pairs: which comparisons a ranking gives.
        margin: whether they carry the difference of the scores as margin. By default they do not: what a score point
            is worth is not ours to guess.

    Raises:
        RowDropped: it is no good for this (an empty answer, a pair of equal answers, nothing but ties); the message says why.
        DataError: its kind cannot serve.
    """
    if not serves(kind_of(record), kind):
        raise wrong_kind(kind_of(record), kind, record.origin)
    if kind == "prompt":
        return [_prompt(record)]
    if kind == "conversation":
        return [_conversation(record)]
    if isinstance(record, Comparison):
        _check_pair(record)
        if kind == "ranking":
            # The chosen answer has rank 1; scores are minus the ranks.
            return [Ranking(record.prompt, [record.chosen, record.rejected], [-1.0, -2.0], record.origin)]
        if kind == "unpaired":
            return [
                Unpaired(record.prompt, record.chosen, True, record.origin),
                Unpaired(record.prompt, record.rejected, False, record.origin),
            ]
    elif isinstance(record, Ranking):
        answered = _answered(record)
        return [answered] if kind == "ranking" else list(_comparisons(answered, pairs, margin))
    elif isinstance(record, Unpaired):
        _check_answer(record.completion)
    return [record]


def pool_singles(records: Iterable[Record]) -> list[Record]:
    """Rankings of one answer each, as ChatLLaMA scores them, put together by equal prompt; the rest as it is.

    A pooled ranking stands where its first answer stood.
    """
    found: list[Record] = []
    places: dict[str, int] = {}
    for record in records:
        if not isinstance(record, Ranking) or len(record.responses) != 1:
            found.append(record)
            continue
        key = json.dumps(record.prompt, sort_keys=True)
        if key not in places:
            places[key] = len(found)
            # A copy: its lists grow.
            found.append(Ranking(record.prompt, list(record.responses), list(record.scores), record.origin))
            continue
        pool = cast(Ranking, found[places[key]])
        pool.responses.extend(record.responses)
        pool.scores.extend(record.scores)
    return found


def _prompt(record: Record) -> Prompt:
    if isinstance(record, Prompt):
        return record
    if isinstance(record, Conversation):
        if record.tools:
            raise RowDropped("a prompt cannot hold its tools")
        question = before_answer(record.messages)
        if all(message["role"] == "system" for message in question):
            raise RowDropped("no question before the answer")
        return Prompt(question, origin=record.origin)
    assert isinstance(record, (Comparison, Ranking, Unpaired))
    return Prompt(record.prompt, origin=record.origin)


def _conversation(record: Record) -> Conversation:
    if isinstance(record, Conversation):
        if is_blank(record.messages[-1]):
            raise RowDropped("empty answer")
        return record
    if isinstance(record, Unpaired) and not record.label:
        raise RowDropped("an answer that was not liked")
    if isinstance(record, Ranking):
        answered = _answered(record)
        answer = answered.responses[answered.scores.index(max(answered.scores))]
    else:
        assert isinstance(record, (Comparison, Unpaired))
        answer = record.chosen if isinstance(record, Comparison) else record.completion
        _check_answer(answer)
    return Conversation([*record.prompt, *answer], record.origin)


def _check_answer(answer: list[Message]) -> None:
    if any(map(is_blank, answer)):
        raise RowDropped("empty answer")


def _check_pair(pair: Comparison) -> None:
    _check_answer(pair.chosen)
    _check_answer(pair.rejected)
    if pair.chosen == pair.rejected:
        raise RowDropped("chosen equals rejected")


def _answered(record: Ranking) -> Ranking:
    """Without its empty answers."""
    kept = [i for i, response in enumerate(record.responses) if not any(map(is_blank, response))]
    if len(kept) == len(record.responses):
        return record
    if not kept:
        raise RowDropped("empty answer")
    return Ranking(record.prompt, [record.responses[i] for i in kept], [record.scores[i] for i in kept], record.origin)


def _comparisons(record: Ranking, pairs: Pairs, margin: bool) -> Iterable[Comparison]:
    if len(record.responses) == 1:
        raise RowDropped("only one answer to this prompt")
    scores = record.scores
    if max(scores) == min(scores):
        raise RowDropped("all scores equal")
    # Sorting is stable: of equal scores the first stays the first.
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    wanted = {
        "best-worst": [(order[0], scores.index(min(scores)))],
        "all": list(combinations(order, 2)),
        "adjacent": list(pairwise(order)),
    }[pairs]
    found = [
        Comparison(
            record.prompt,
            record.responses[better],
            record.responses[worse],
            scores[better] - scores[worse] if margin else 0.0,
            record.origin,
        )
        for better, worse in wanted
        if scores[better] > scores[worse] and record.responses[better] != record.responses[worse]
    ]
    if not found:
        raise RowDropped("chosen equals rejected")
    return found
