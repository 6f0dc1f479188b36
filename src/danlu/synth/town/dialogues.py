"""Good and flawed answers: the raw material of imitation with mistakes in it, and of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Literal

from danlu.evals.rubric import is_correct
from danlu.synth.annotator import compare
from danlu.synth.town.phrasings import clause, join, phrasings
from danlu.synth.town.questions import Question, assistant

Flaw = Literal["wrong", "rude", "rambling", "unfinished"]

MANNERS: tuple[Flaw, ...] = ("rude", "rambling", "unfinished")
# Flaws of every ten flawed answers to imitate.
_TEN_FLAWS: tuple[Flaw, ...] = ("wrong",) * 4 + ("rude",) * 2 + ("rambling",) * 2 + ("unfinished",) * 2


def good_answer(question: Question, rng: Random) -> str:
    return question.answers(rng)[0]


def flawed_answer(question: Question, flaw: Flaw, rng: Random) -> str:
    """An answer as a careless speaker would give it; every flaw costs points of the rubric."""
    right, wrong = question.answers(rng)
    if flaw == "wrong":
        return wrong
    if flaw == "rude":
        rude = rng.choice(phrasings(question.language)["rude"])
        sentences = rng.choice(([right, rude], [right, rude], [rude, right], [rude]))
        return join(sentences, question.language)
    return spoil(question, right, flaw, rng)


def spoil(question: Question, answer: str, flaw: Flaw, rng: Random) -> str:
    """The same answer with bad manners: a rude remark, a ramble, or the end cut off."""
    if flaw == "rude":
        return join([answer, rng.choice(phrasings(question.language)["rude"])], question.language)
    if flaw == "rambling":
        return _ramble(question, answer, rng)
    if flaw == "unfinished":
        return _cut(answer, question.language == "en", rng)
    raise ValueError(f"{flaw} is no matter of manners")


def conversation(question: Question, answer: str, flaw: Flaw | None) -> dict[str, Any]:
    return {"messages": [*question.prompt, assistant(answer)], "flaw": flaw}


def conversations(questions: Sequence[Question], flawed: bool, rng: Random) -> list[dict[str, Any]]:
    """Dialogues to imitate; if `flawed`, the last answer of one in three has a flaw."""
    count = len(questions) // 3 if flawed else 0
    flaws: list[Flaw | None] = [_TEN_FLAWS[number % 10] for number in range(count)]
    flaws += [None] * (len(questions) - count)
    rng.shuffle(flaws)
    rows = []
    for question, flaw in zip(questions, flaws, strict=True):
        answer = flawed_answer(question, flaw, rng) if flaw else good_answer(question, rng)
        rows.append(conversation(question, answer, flaw))
    return rows


def value_comparison(question: Question, rng: Random, error_rate: float) -> dict[str, Any]:
    """Right against wrong in the same wording."""
    return _comparison(question, *question.answers(rng), rng, error_rate)


def refusal_comparison(question: Question, rng: Random, error_rate: float) -> dict[str, Any]:
    """The right answer against claiming not to know it."""
    refusal = rng.choice(phrasings(question.language)["refusals"])
    return _comparison(question, good_answer(question, rng), refusal, rng, error_rate)


def aside_comparison(question: Question, elsewhere: Question, rng: Random, error_rate: float) -> dict[str, Any] | None:
    """The right answer against the right answer to something else; None if that happens to be right here too.

    A judge that has only seen right against wrong values learns what is true in the town, not what was asked.
    """
    good, aside = good_answer(question, rng), good_answer(elsewhere, rng)
    if is_correct(aside, question.reference):
        return None
    return _comparison(question, good, aside, rng, error_rate)


def half_comparison(question: Question, rng: Random, error_rate: float) -> dict[str, Any]:
    """Both of the things asked for against one of them alone."""
    half = rng.choice(question.halves)
    return _comparison(question, good_answer(question, rng), half, rng, error_rate)


def manners_comparison(question: Question, flaw: Flaw, rng: Random, error_rate: float) -> dict[str, Any]:
    """One right answer with and without bad manners."""
    answer = good_answer(question, rng)
    return _comparison(question, answer, spoil(question, answer, flaw, rng), rng, error_rate)


def _comparison(question: Question, good: str, bad: str, rng: Random, error_rate: float) -> dict[str, Any]:
    verdict = compare(question.reference, good, bad, True, True, rng, error_rate)
    assert verdict is not None, f"the rubric sees no difference between {good!r} and {bad!r}"
    chosen, rejected = (good, bad) if verdict == "a" else (bad, good)
    return {"prompt": list(question.prompt), "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def _ramble(question: Question, answer: str, rng: Random) -> str:
    """Two to four sentences that nobody asked for, in half of the cases one of them twice; too long in any case."""
    filler = phrasings(question.language)["filler"]
    said = rng.sample(filler, rng.randint(2, 4))
    if rng.random() < 0.5:
        said[-1] = said[0]
    unsaid = [sentence for sentence in filler if sentence not in said]
    while len(join([answer, *said], question.language)) <= question.reference["max_chars"]:
        said.append(unsaid.pop())
    return join([answer, *said], question.language)


def _cut(answer: str, by_words: bool, rng: Random) -> str:
    """The answer broken off between two words (in Chinese, characters), never at the end of a sentence."""
    parts = answer.split() if by_words else list(answer)
    kept = parts[: rng.randint(max(1, len(parts) // 3), max(1, len(parts) - 1))]
    return clause((" " if by_words else "").join(kept)) or clause(answer)
