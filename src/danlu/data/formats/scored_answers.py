"""Several answers to one question with scores or ranks, as the sets on GPT-4's judgements publish them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from danlu.data.formats.alpaca import question_of as alpaca_question
from danlu.data.formats.base import Format, Row, RowDropped
from danlu.data.formats.cells import number, optional_number
from danlu.data.formats.fields import filled_list, text, wrong_type
from danlu.data.formats.preference_text import question_of as dialogue
from danlu.data.formats.turns import assistant, published_question, user
from danlu.types import Message, Origin, Ranking, Record

Score = Callable[[Row, Origin, str], float | None]


def _ranking(prompt: list[Message], row: Row, field: str, answer: str, score: Score, origin: Origin) -> list[Record]:
    """A ranking from a list of objects; answers without a score are left out."""
    responses: list[list[Message]] = []
    scores: list[float] = []
    for i, item in enumerate(filled_list(row, field, origin)):
        inside = f"{field}[{i}]"
        if not isinstance(item, dict):
            raise wrong_type(item, f"an object with '{answer}' and a score", origin, inside)
        found = score(item, origin, f"{inside}.")
        response = text(item, answer, origin, f"{inside}.")
        if found is not None:
            responses.append([assistant(response)])
            scores.append(found)
    if not scores:
        raise RowDropped("no score")
    return [Ranking(published_question(prompt), responses, scores, origin)]


def _parse_gpt4(row: Row, origin: Origin) -> list[Record]:
    def score(item: Row, origin: Origin, inside: str) -> float:
        return number(item, "score", origin, inside)

    prompt = [user(text(row, "user_input", origin))]
    return _ranking(prompt, row, "responses_and_scores", "response", score, origin)


def _parse_ultrafeedback(row: Row, origin: Origin) -> list[Record]:
    def score(item: Row, origin: Origin, inside: str) -> float | None:
        name = "overall_score" if "overall_score" in item else "fine-grained_score"
        return optional_number(item, name, origin, inside)

    return _ranking(alpaca_question(row, origin), row, "completions", "response", score, origin)


def _parse_nectar(row: Row, origin: Origin) -> list[Record]:
    def score(item: Row, origin: Origin, inside: str) -> float:
        return -number(item, "rank", origin, inside)

    return _ranking(dialogue(text(row, "prompt", origin)), row, "answers", "answer", score, origin)


def _has_ranked_answers(row: Row) -> bool:
    answers = row.get("answers")
    return (
        isinstance(row.get("prompt"), str) and isinstance(answers, list) and all(isinstance(a, dict) for a in answers)
    )


def _parse_outputs(row: Row, origin: Origin) -> list[Record]:
    prompt = published_question(alpaca_question(row, origin))
    responses: list[list[Message]] = []
    for i, item in enumerate(filled_list(row, "output", origin)):
        if not isinstance(item, str):
            raise wrong_type(item, "text", origin, f"output[{i}]")
        responses.append([assistant(item)])
    return [Ranking(prompt, responses, [-float(rank) for rank in range(1, len(responses) + 1)], origin)]


_ABOUT_RANKS: Final = (
    "Answers in order, the best first, as in LLaMA-Factory's and ChatGLM-Efficient-Tuning's reward data "
)

GPT4 = Format(
    "gpt4-comparison",
    '{"user_input", "responses_and_scores": [{"response", "score", "source"}, ...]}',
    "ranking",
    lambda row: "responses_and_scores" in row,
    _parse_gpt4,
    "GPT-4-LLM's comparison data: answers of several models with GPT-4's score of each.",
    {
        "user_input": "Is 7 prime?",
        "responses_and_scores": [
            {"response": "Yes.", "score": 9, "source": "a"},
            {"response": "No.", "score": 1, "source": "b"},
        ],
    },
)
ULTRAFEEDBACK = Format(
    "ultrafeedback",
    '{"instruction", "completions": [{"response", "overall_score"}, ...]}',
    "ranking",
    lambda row: "instruction" in row and "completions" in row,
    _parse_ultrafeedback,
    "UltraFeedback's original rows: answers with an overall score; answers without one are left out.",
    {
        "instruction": "Is 7 prime?",
        "completions": [{"response": "Yes.", "overall_score": 9.0}, {"response": "No.", "overall_score": 2.0}],
    },
)
NECTAR = Format(
    "nectar",
    '{"prompt": "...", "answers": [{"answer", "rank"}, ...]}',
    "ranking",
    _has_ranked_answers,
    _parse_nectar,
    "Nectar's K-wise rankings (rank 1 is best); a prompt written as a dialogue is split into turns.",
    {
        "prompt": "\n\nHuman: Is 7 prime?\n\nAssistant: ",
        "answers": [{"answer": "Yes.", "rank": 1}, {"answer": "No.", "rank": 2}],
    },
)
OUTPUTS = Format(
    "ranked-outputs",
    '{"instruction", "input", "output": [best, ..., worst]}',
    "ranking",
    lambda row: "instruction" in row and isinstance(row.get("output"), list),
    _parse_outputs,
    _ABOUT_RANKS + "(the Chinese OpenAssistant rows among them), with `history` if the row has it.",
    {"instruction": "Is 7 prime?", "input": "", "output": ["Yes, it is.", "Yes", "No."], "history": []},
)
