"""What the quantize stage needs beside rounding: text to calibrate on, checked; and how fast a model answers."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu.config import EngineSettings, QuantizeSettings
from danlu.data.corpus import stream_texts
from danlu.data.language import language_of
from danlu.evals import perplexity
from danlu.exceptions import DataError
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models.families import context_of
from danlu.train_config import Sources

ROWS = 128  # of calibration text, as in the paper
LEAST_TOKENS = 2048
LOOKED_AT = 500  # texts whose language is told
PRESENT = 0.1  # share of the texts from which on a language counts as one of the model's
LANGUAGES = {"zh": "Chinese", "en": "English", "other": "another script"}
SPOKEN = 24  # tokens of an answer whose speed is taken


def calibration_rows(settings: QuantizeSettings, tokenizer: Any, config: Any, folder: str) -> Tensor:
    """Token ids `[R, L]` of the calibration text: what it says end to end, in rows without padding.

    Raises:
        DataError: the text is too short, or of a language that the model's own text does not have.
    """
    assert settings.calibration is not None, "checked by the settings"
    _check_language(settings, folder)
    length = min(settings.max_length, context_of(config))
    trees = perplexity.encode(settings.calibration, tokenizer, length, max_tokens=2 * ROWS * length)
    ids = [token for item in trees.items for node in item for token in node.ids]
    if len(ids) < max(LEAST_TOKENS, length):
        raise DataError(
            f"the calibration text is too short: {len(ids):,} tokens, and at least {max(LEAST_TOKENS, length):,} are needed",
            field="calibration",
            hint="a few hundred conversations or documents like those the model is for, or --method rtn",
        )
    rows = min(ROWS, len(ids) // length)
    return torch.tensor(ids[: rows * length]).view(rows, length)


def _check_language(settings: QuantizeSettings, folder: str) -> None:
    """Compares with `eval_data`, else with what the manifest beside the model says that it was trained on, where that is here."""
    assert settings.calibration is not None, "checked by the settings"
    own = _languages(stream_texts(settings.calibration, skip_bad=True))
    known = settings.eval_data if settings.eval_data is not None else _trained_on(folder)
    if not known or not own:
        return
    theirs = _languages(stream_texts(known, skip_bad=True))
    language = max(own, key=lambda name: own[name])
    if theirs and theirs.get(language, 0.0) < PRESENT:
        raise DataError(
            f"the calibration text is {LANGUAGES[language]} ({own[language]:.0%} of it), of which"
            f" {'eval_data' if settings.eval_data is not None else 'the data that the model was trained on'} has"
            f" {theirs.get(language, 0.0):.0%}",
            field="calibration",
            hint="calibrate on text like that which the model will see",
        )


def _languages(texts: Iterable[str]) -> dict[str, float]:
    counts = Counter(language_of([text]) for text in islice(texts, LOOKED_AT))
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def _trained_on(folder: str) -> Sources:
    path = Path(folder).parent / "manifest.json"
    if not path.is_file():
        return []
    inputs = json.loads(path.read_text("utf-8")).get("inputs", [])
    return [i["path"] for i in inputs if i.get("field") == "data" and Path(i.get("path", "")).is_file()]


def tokens_per_second(model: Any, repeats: int = 3) -> float:
    """Tokens a second of one greedy answer after a short prompt, the best of some repeats; in the model's own dtype."""
    engine = LocalEngine(model, None, max_slots=EngineSettings().slots)
    ids = [i % int(model.config.vocab_size) for i in range(3, 11)]
    params = SamplingParams(max_new_tokens=SPOKEN, temperature=0.0)
    generate(engine, [Request(ids, params)])
    best = 0.0
    for _ in range(repeats):
        begun = time.perf_counter()
        [done] = generate(engine, [Request(ids, params)])
        best = max(best, len(done.ids) / (time.perf_counter() - begun))
    return best
