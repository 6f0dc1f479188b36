"""Cloze classification (Du et al. 2022, GLM, section 2.3): which of some words belongs into a blank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from danlu.data.labelled_text import BLANK, Cloze
from danlu.evals.generation import Evaluation, interval
from danlu.exceptions import ModelError
from danlu.models.blank import choice_inputs

TOGETHER = 16


def cloze(model: Any, tokenizer: Any, rows: Sequence[Cloze], seed: int = 0) -> Evaluation:
    """Accuracy; of each row the choice with the greatest log-probability, summed over its tokens, is the answer.

    Raises:
        ModelError: the model does not fill blanks.
    """
    if not hasattr(model, "choose"):
        raise ModelError(f"{type(model).__name__} does not fill blanks", hint="task cloze wants a GLM")
    ids = model.config.blank_ids()
    start = tokenizer.convert_tokens_to_ids("[CLS]") if "[CLS]" in tokenizer.get_vocab() else tokenizer.bos_token_id
    found: list[dict[str, Any]] = []
    for first in range(0, len(rows), TOGETHER):
        part = rows[first : first + TOGETHER]
        contexts = [[*([start] if start is not None else []), *encode(tokenizer, r.text, ids.masks[0])] for r in part]
        choices = [[tokenizer(c, add_special_tokens=False)["input_ids"] for c in r.choices] for r in part]
        for row, scores in zip(part, model.eval().choose(choice_inputs(contexts, choices, ids)), strict=True):
            best = int(scores.argmax())
            found.append(
                {
                    "prompt": row.text,
                    "label": row.choices[row.label],
                    "prediction": row.choices[best],
                    "correct": float(best == row.label),
                    "logprobs": [round(float(s), 4) for s in scores],
                }
            )
    summary: dict[str, Any] = {"correct": interval([r["correct"] for r in found], seed), "questions": len(found)}
    return Evaluation(summary, found)


def encode(tokenizer: Any, text: str, mask: int) -> list[int]:
    """Ids of a text whose [MASK] is one token, whatever the tokenizer makes of these letters."""
    before, _, after = text.partition(BLANK)
    left, right = (tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in (before, after))
    return [*left, mask, *right]
