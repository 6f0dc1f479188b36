"""Objectives on real text: a short run of each lowers its held-out loss; GLM then fills blanks, UniLM scores in all four modes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from danlu.config import KINDS
from danlu.models import starters
from danlu.models.blank import generation_inputs
from danlu.models.load import load_model
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES

SHAPE = {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 4, "context": 96}
HELD = 60
PHRASE = 4  # words
AROUND = 6  # words before and after a blank


def written(path: Path, paragraphs: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs), "utf-8")
    return path


@pytest.fixture(scope="module")
def paragraphs(shared_data: Path) -> tuple[list[str], list[str]]:
    """Openings of children's stories, cut to 200 characters: what is trained on, and 60 others."""
    text = (shared_data / "pretrain-en" / "tinystories_sample.txt").read_text("utf-8")
    whole = dict.fromkeys(line.strip() for line in text.split("\n") if line.startswith("Once upon a time"))
    found = [opening[:200].rsplit(" ", 1)[0] for opening in whole if len(opening) < 400]
    return found[:-HELD], found[-HELD:]


@pytest.fixture(scope="module")
def tokenizer_folder(paragraphs: tuple[list[str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("real")
    values = {"data": str(written(where / "t.jsonl", paragraphs[0])), "vocab_size": 600, "out": str(where / "tok")}
    STAGES["tokenizer"].run(parse(KINDS["tokenizer"], values))
    return where / "tok" / "model"


def train(objective: str, paragraphs: tuple[list[str], list[str]], tokenizer: Path, out: Path, **changes: Any) -> Any:
    values = tiny.stage("pretrain", out, objective=objective, starter=SHAPE, tokenizer=str(tokenizer), max_length=96)
    values |= {"data": str(written(out.parent / "train.jsonl", paragraphs[0])), "learning_rate": 4e-3, "max_steps": 300}
    values |= {"eval_data": str(written(out.parent / "held.jsonl", paragraphs[1]))}
    values |= {"tokens_per_step": 1024, "micro_tokens": 1024, "epochs": 100}
    return STAGES["pretrain"].run(parse(KINDS["pretrain"], values | changes))


def blanks(paragraphs: tuple[list[str], list[str]]) -> list[tuple[str, str, str]]:
    """(before, word, after) of held-out text: the third word of each of the 40 commonest phrases of the training text."""
    phrases: Counter[tuple[str, ...]] = Counter()
    for text in paragraphs[0]:
        words = text.split(" ")
        phrases.update(tuple(words[i : i + PHRASE]) for i in range(len(words) - PHRASE + 1))
    common = {phrase for phrase, _ in phrases.most_common(40)}
    found = []
    for text in paragraphs[1]:
        words = text.split(" ")
        for i in range(len(words) - PHRASE + 1):
            if tuple(words[i : i + PHRASE]) in common:
                at = i + 2
                before, after = words[max(0, at - AROUND) : at], words[at + 1 : at + 1 + AROUND]
                found.append((" ".join(before), " " + words[at], " " + " ".join(after)))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_glm_learns_and_fills_blanks(
    paragraphs: tuple[list[str], list[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    # Short spans alone, as the published base and large models of English had: what is asked for are short blanks.
    mix = {"blank": 1.0, "sentence": 0.0, "blocked": 0.0, "short": 0.0}
    found = train(
        "glm", paragraphs, tokenizer_folder, tmp_path / "out", blanks=mix, learning_rate=3e-3, max_steps=2000
    ).metrics
    print(found["first_eval_loss"], found["eval_loss"])
    assert found["eval_loss"] < found["first_eval_loss"] - 1.5
    model = load_model(tmp_path / "out" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    ids, asked = model.config.blank_ids(), blanks(paragraphs)[::4]  # every fourth blank is enough
    begins = whole = 0
    for before, word, after in asked:
        text = tokenizer(f"{before}[MASK]{after}", add_special_tokens=False)["input_ids"]
        given = torch.tensor([[tokenizer.bos_token_id, *text]])
        inputs = generation_inputs(given, torch.ones_like(given), ids, room=8)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=ids.pad)
        written = out[0, given.shape[1] + 1 :].tolist()
        begins += tokenizer.decode(written).startswith(word)
        whole += ids.eop in written and tokenizer.decode(written[: written.index(ids.eop)]) == word
    constant = max(Counter(word for _, word, _ in asked).values())  # the best single answer to all of them
    print("blanks", len(asked), "begin right", begins, "right to the end", whole, "constant", constant)
    assert len(asked) >= 50
    assert begins > 1.5 * constant and whole > constant


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_unilm_learns_and_scores_in_all_four_modes(
    paragraphs: tuple[list[str], list[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    found = train("unilm", paragraphs, tokenizer_folder, tmp_path / "out").metrics
    print(found["first_eval_loss"], found["eval_loss"])
    assert found["eval_loss"] < found["first_eval_loss"] - 1.0
    model = load_model(tmp_path / "out" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    fresh = starters.unilm(len(tokenizer), SHAPE, {"mask_token_id": model.config.mask_token_id}, 0).eval()
    for mode in ("bidirectional", "left-to-right", "right-to-left", "seq2seq"):
        sums = [0.0, 0.0]
        for text in paragraphs[1][:20]:
            ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:90])
            for at, scorer in enumerate((model, fresh)):
                sums[at] += float(scorer.score(ids, mode, source=10)[10:].mean()) / 20
        print(mode, sums)
        assert sums[0] > sums[1] + 1.0, mode


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_t5_learns(paragraphs: tuple[list[str], list[str]], tokenizer_folder: Path, tmp_path: Path) -> None:
    found = train("t5", paragraphs, tokenizer_folder, tmp_path / "out", max_steps=150).metrics
    print(found["first_eval_loss"], found["eval_loss"])
    assert found["eval_loss"] < found["first_eval_loss"] - 1.0
