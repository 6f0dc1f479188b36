"""ChatLLaMA's three files: examples for the actor, scored answers for the reward model, questions for RLHF.

ChatLLaMA makes them of HH-RLHF, too: a question of exactly the form `Human: ... Assistant:` is split into turns.
"""

from __future__ import annotations

from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.cells import optional_number
from danlu.data.formats.fields import text
from danlu.data.formats.preference_text import question_of
from danlu.data.formats.turns import assistant, published_conversation, published_question
from danlu.types import Message, Origin, Prompt, Ranking, Record


def _is_rlhf(row: Row) -> bool:
    return "user_input" in row and "completion" not in row and "responses_and_scores" not in row


def _question(row: Row, origin: Origin) -> list[Message]:
    return published_question(question_of(text(row, "user_input", origin)))


def _parse_actor(row: Row, origin: Origin) -> list[Record]:
    turns = [*question_of(text(row, "user_input", origin)), assistant(text(row, "completion", origin))]
    return [published_conversation(turns, origin)]


def _parse_reward(row: Row, origin: Origin) -> list[Record]:
    prompt, answer = _question(row, origin), assistant(text(row, "completion", origin))
    score = optional_number(row, "score", origin)
    if score is None:
        raise RowDropped("no score")
    return [Ranking(prompt, [[answer]], [score], origin)]


def _parse_rlhf(row: Row, origin: Origin) -> list[Record]:
    return [Prompt(_question(row, origin), origin=origin)]


REWARD = Format(
    "chatllama-reward",
    '{"user_input", "completion", "score"}',
    "ranking",
    lambda row: "user_input" in row and "completion" in row and "score" in row,
    _parse_reward,
    "Answers with a score, 0 to 5 in ChatLLaMA. Rows with the same `user_input` become one ranking when a stage reads "
    "them; rows whose score is null are left out and counted.",
    {"user_input": "Name a colour of the rainbow.", "completion": "Green.", "score": 4.5},
)
ACTOR = Format(
    "chatllama-actor",
    '{"user_input", "completion"}',
    "conversation",
    lambda row: "user_input" in row and "completion" in row,
    _parse_actor,
    "Questions and answers for ChatLLaMA's first stage.",
    {"user_input": "Name a colour of the rainbow.", "completion": "Green."},
)
RLHF = Format(
    "chatllama-rlhf",
    '{"user_input"}',
    "prompt",
    _is_rlhf,
    _parse_rlhf,
    "Questions for ChatLLaMA's last stage.",
    {"user_input": "Name a colour of the rainbow."},
)
