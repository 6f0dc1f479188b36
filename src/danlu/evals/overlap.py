"""Overlap with a written answer, as ChatGLM's evaluation on ADGEN measures it: BLEU-4 and ROUGE-1, -2 and -L, in per cent.

BLEU-4 (Papineni et al. 2002) over characters, smoothed by method 3 of Chen and Cherry 2014; ROUGE's F1 (Lin 2004) over the words
that jieba finds. The counting is nltk's and rouge-chinese's own.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from danlu.assistant import Assistant
from danlu.data.sources import read_sources
from danlu.evals.generation import Evaluation, answer, interval
from danlu.exceptions import DataError, SettingsError
from danlu.train_config import Sources
from danlu.types import OVERLAPS, Conversation, Prompt

PACKAGES = {"jieba": "jieba", "nltk": "nltk", "rouge_chinese": "rouge-chinese"}
METRICS = OVERLAPS


def require() -> None:
    """Raises SettingsError when a package that counts is missing: before anything is trained, not after."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SettingsError(
            f"task overlap needs {', '.join(missing)}", field="task", hint="pip install 'danlu[metrics]'"
        )


def labelled(data: Sources, limit: int | None = None) -> tuple[list[Prompt], list[str]]:
    """Questions and written answers: what stands before the last answer of each conversation, and that answer.

    Raises:
        DataError: the data are no conversations.
    """
    prompts, labels = [], []
    for record in read_sources(data, "conversation").records[:limit]:
        assert isinstance(record, Conversation)
        last = max(i for i, m in enumerate(record.messages) if m["role"] == "assistant")
        prompts.append(Prompt(record.messages[:last], origin=record.origin))
        labels.append(str(record.messages[last]["content"]))
    if not prompts:
        raise DataError("there is no question with a written answer", field="data")
    return prompts, labels


def scores(prediction: str, label: str) -> dict[str, float]:
    """The four numbers of one answer, each 0 to 100 and rounded to four digits; 0 where either text has no words."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    words, wanted = (" ".join(_words(text)) for text in (prediction, label))
    found = dict.fromkeys(METRICS, 0.0)
    if words.split() and wanted.split():
        [rouge] = _rouge().get_scores(words, wanted)
        found |= {name: round(100 * float(rouge[name]["f"]), 4) for name in METRICS[1:]}
    if prediction and label:
        smooth = SmoothingFunction().method3
        found["bleu-4"] = round(
            100 * float(sentence_bleu([list(label)], list(prediction), smoothing_function=smooth)), 4
        )
    return found


def _words(text: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba reads its dictionary through an interface that is to go
        import jieba

        jieba.setLogLevel("ERROR")
        return list(jieba.cut(text))


def _rouge() -> Any:
    from rouge_chinese import Rouge

    return Rouge()


def evaluate(
    assistant: Assistant,
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    on_done: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Answers and their overlap with the written ones; means over the questions with 95% bootstrap intervals."""
    replies = answer(
        assistant, prompts, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, on_done=on_done
    )
    rows: list[dict[str, Any]] = []
    for prompt, label, reply in zip(prompts, labels, replies, strict=True):
        row: dict[str, Any] = {"prompt": prompt.prompt, "label": label, "prediction": reply.text}
        row |= {"finished": reply.finish_reason == "stop", "tokens": len(reply.ids)}
        rows.append(row | scores(reply.text, label))
    summary: dict[str, Any] = {name: interval([r[name] for r in rows], seed) for name in METRICS}
    summary |= {
        "stop_rate": float(np.mean([r["finished"] for r in rows])),
        "length": float(np.mean([r["tokens"] for r in rows])),
        "questions": len(rows),
    }
    return Evaluation(summary, rows)
