"""New Chinese words for a trained English model, end to end: stories260K, converted, goes on with novels and English replay.

What is compared is comparable between tokenizers: tokens per character, and perplexity per character of held-out text.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import machine, write_section
from danlu.config import KINDS
from danlu.data.sources import read_sources
from danlu.evals.perplexity import per_character
from danlu.models.convert import convert
from danlu.models.load import load_model
from danlu.parsing import parse
from danlu.text.tokenizer import load_tokenizer
from danlu.trainers import pretrain

TITLE = "New words for a trained model"
SEED = 0
STEPS = 120  # of 4,096 tokens
WORDS = 1500
KEPT = 1.10  # English perplexity may rise by a tenth
CONTEXT = 256
HELD_EVERY = 25  # of the paragraphs one is held out
LONGEST = 400  # characters of a paragraph
MEASURED = 30_000  # characters of held-out text of each language


@dataclass(frozen=True)
class Text:
    """Paragraphs of a language: trained ones and held-out ones."""

    train: list[str]
    held: list[str]


def paragraphs(files: Sequence[Path]) -> Text:
    """Lines of 20 characters or more, each once, cut at `LONGEST`; every `HELD_EVERY`-th is held out."""
    lines = (
        line.strip() for f in files for r in read_sources(str(f), "document").records for line in r.text.split("\n")
    )
    found = list(dict.fromkeys(line[:LONGEST] for line in lines if len(line) >= 20))
    held = found[::HELD_EVERY]
    out: list[str] = []
    for text in held:
        if sum(map(len, out)) >= MEASURED:
            break
        out.append(text)
    return Text([t for i, t in enumerate(found) if i % HELD_EVERY], out)


def _look(folder: Path, texts: dict[str, Text]) -> dict[str, float]:
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    assert tokenizer is not None
    found = {}
    for language, text in texts.items():
        tokens = sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in text.held)
        found[f"{language}_tokens"] = tokens / sum(map(len, text.held))
        found[f"{language}_perplexity"] = per_character(model, tokenizer, text.held, CONTEXT)
    return found


def measure(*, quick: bool, data_root: Path, docs: Path | None) -> dict[str, Any]:
    """Converts, trains and measures; prints the table.

    Args:
        quick: few steps, to see that it works.
        data_root: folder with model-stories260k, pretrain-zh and pretrain-en.
        docs: docs/tokenizers.md, to write the table into; None: it is printed only.
    """
    texts = {
        "zh": paragraphs(sorted((data_root / "pretrain-zh" / "novels").glob("*.gz"))),
        "en": paragraphs([data_root / "pretrain-en" / "tinystories_sample.txt"]),
    }
    steps = 10 if quick else STEPS
    with tempfile.TemporaryDirectory() as place:
        where = Path(place)
        base = convert(data_root / "model-stories260k" / "stories260K.bin", where / "base").folder
        for language, text in texts.items():
            rows = (json.dumps({"text": t}, ensure_ascii=False) for t in text.train)
            (where / f"{language}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
        values: dict[str, Any] = {
            "model": str(base),
            "out": str(where / "out"),
            "new_words": WORDS,
            # As many characters of English as of Chinese would be; it is what the model can do already.
            "data": [str(where / "zh.jsonl"), {"path": str(where / "en.jsonl"), "weight": 1.0}],
            "eval_fraction": 0.01,
            "max_length": CONTEXT,
            "max_steps": steps,
            "tokens_per_step": 4096,
            "micro_tokens": 4096,
            "learning_rate": 2e-3,
            "warmup": 0.05,
            "dtype": "float32",
            "seed": SEED,
        }
        before = _look(base, texts)
        begun = time.process_time()
        result = pretrain.train(parse(KINDS["pretrain"], values))
        seconds = time.process_time() - begun
        after = _look(result.model, texts)
    found = {"before": before, "after": after, "steps": steps, "cpu_seconds": seconds, "facts": result.facts}
    found["kept"] = after["en_perplexity"] <= KEPT * before["en_perplexity"]
    text = _table(found)
    print(text)
    if docs is not None:
        write_section(docs, TITLE, text)
    return found


def _table(found: dict[str, Any]) -> str:
    before, after = found["before"], found["after"]
    change = after["en_perplexity"] / before["en_perplexity"] - 1
    lines = [
        f"`python -m benchmarks vocabulary`, seed {SEED}, {machine()}:",
        "stories260K (260K parameters, 512 tokens, trained on English children's stories) is converted, gets "
        f"{found['facts']['new_words']:,} words",
        "and reads three Chinese novels with English stories between them, "
        f"{found['steps']} steps of 4,096 tokens, {found['cpu_seconds']:,.0f} s of CPU time.",
        "On held-out paragraphs:",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    for name, key, form in (
        ("tokens per Chinese character", "zh_tokens", ".3f"),
        ("perplexity per Chinese character", "zh_perplexity", ".3g"),
        ("tokens per English character", "en_tokens", ".3f"),
        ("perplexity per English character", "en_perplexity", ".3f"),
    ):
        lines.append(f"| {name} | {before[key]:{form}} | {after[key]:{form}} |")
    verdict = "holds" if found["kept"] else "missed"
    lines += ["", f"English perplexity changes by {change:+.1%} (goal: within 10%, {verdict})."]
    return "\n".join(lines)
