"""Reward models from scores, labels and tokens: whole stages, what they leave, and data that nothing can be learnt from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny as small
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from danlu.alignment_config import RewardSettings
from danlu.cli.main import run
from danlu.data.collate import encode_scored, encode_unpaired
from danlu.models.load import load_model, save_model
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.rewards.model import judge_of, normaliser_of, stored_verdict
from danlu.rewards.protocol import Episode
from danlu.text.chat_template import ChatTemplate
from danlu.types import Ranking, Unpaired


def pairs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in small.data()["comparisons"].read_text("utf-8").splitlines()]


def fact_of(row: Mapping[str, Any]) -> str:
    """What both answers say."""
    return str(row["chosen"][0]["content"].removeprefix("Gladly. ").split(".")[0])


def scored(folder: Path, *, single: bool = False) -> Path:
    """Kind answers get 5, plain ones 3, unkind ones 0; or one answer to each question."""
    rows = []
    for number, row in enumerate(pairs()):
        answers = [(f"Gladly. {fact_of(row)}.", 5.0), (f"{fact_of(row)}.", 3.0), (f"No idea. {fact_of(row)}.", 0.0)]
        chosen = answers[number % 3 : number % 3 + 1] if single else answers
        rows += [{"user_input": row["prompt"][0]["content"], "completion": a, "score": s} for a, s in chosen]
    return small.write_rows(folder / "scored.jsonl", rows)


def labelled(folder: Path, *, liked_every: int = 2) -> Path:
    """One answer to each question, every second (third, ...) of them kind."""
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if n % liked_every == 0 else "rejected"]}
        | {"label": n % liked_every == 0}
        for n, row in enumerate(pairs())
    ]
    return small.write_rows(folder / "labelled.jsonl", rows)


def train(out: Path, **changes: Any) -> Any:
    options = {"max_length": 96, "learning_rate": 1e-2} | changes
    return STAGES["reward"].run(parse(RewardSettings, small.stage("reward", out, **options)))


class Plain:
    """A saved reward model as transformers alone reads it."""

    def __init__(self, out: Path) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
        self.template = ChatTemplate(AutoTokenizer.from_pretrained(out / "model"))

    @torch.no_grad()
    def score(self, prompt: Any, answer: Any) -> float:
        ids, rest = self.template.encode_answer(prompt, answer)
        return float(self.model(torch.tensor([ids + rest])).logits[0, 0])


# -- they learn -----------------------------------------------------------------------------------------------------------


def test_the_token_level_learns_and_is_judged_by_the_last_token(tmp_path: Path) -> None:
    heldout = small.write_rows(tmp_path / "heldout.jsonl", pairs()[::9])
    result = train(tmp_path / "out", level="token", max_steps=30, eval_data=str(heldout))
    assert result.metrics["eval_accuracy"] > 0.9 and result.gates[0].passed
    plain = Plain(tmp_path / "out")
    gaps = [
        plain.score(r["prompt"], r["chosen"]) - plain.score(r["prompt"], r["rejected"])
        for r in map(json.loads, heldout.read_text("utf-8").splitlines())
    ]
    assert result.metrics["eval_margin"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)
    first = small.metrics_of(tmp_path / "out")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=0.05)


@pytest.mark.slow
def test_scores_are_learnt_on_their_scale(tmp_path: Path) -> None:
    data = scored(tmp_path)
    lines = data.read_text("utf-8").splitlines()
    heldout = small.write_rows(
        tmp_path / "heldout.jsonl", [json.loads(x) for n, x in enumerate(lines) if n // 3 % 7 == 0]
    )
    options = {"loss": "pointwise", "score_range": [0, 5], "eval_data": str(heldout)}
    result = train(tmp_path / "out", data=str(data), max_steps=60, **options)
    assert result.metrics["eval_spearman"] > 0.8 and result.metrics["eval_r2"] > 0.6
    assert result.metrics["eval_accuracy"] > 0.9 and result.gates[0].passed
    plain = Plain(tmp_path / "out")
    errors = [
        plain.score(small.user(r["user_input"]), small.assistant(r["completion"])) - r["score"] / 5
        for r in map(json.loads, heldout.read_text("utf-8").splitlines())
    ]
    assert result.metrics["eval_loss"] == pytest.approx(sum(e * e for e in errors) / len(errors), abs=1e-5)
    first, *_, last = [r for r in small.metrics_of(tmp_path / "out") if "error" in r]
    assert last["error"] < first["error"] and "accuracy" not in first


def test_one_score_to_each_question_can_be_judged_too(tmp_path: Path) -> None:
    """As ChatLLaMA's file has them: answers of different questions are held against each other."""
    result = train(
        tmp_path / "out", data=str(scored(tmp_path, single=True)), loss="pointwise", max_steps=2, eval_fraction=0.4
    )
    assert "eval_accuracy" in result.metrics
    report = result.facts["reward_report"]
    assert 0 < report["heldout"]["pairs"] <= report["heldout"]["records"] // 2


def test_labels_are_learnt(tmp_path: Path) -> None:
    data = labelled(tmp_path, liked_every=3)
    result = train(tmp_path / "out", data=str(data), loss="unpaired", max_steps=40, eval_fraction=0.3)
    assert result.metrics["eval_auc"] > 0.9 and result.metrics["eval_accuracy"] > 0.9
    assert result.gates[0].passed and "AUC" in result.gates[0].sentence
    first = small.metrics_of(tmp_path / "out")[0]
    assert result.metrics["first_eval_loss"] == pytest.approx(math.log(2), abs=0.2)  # whatever the shares of the labels
    assert 0 <= first["accuracy"] <= 1 and "margin" not in first
    assert result.facts["answers"] + result.facts["heldout_answers"] == 96


def test_balance_is_what_keeps_a_rare_label_alive(tmp_path: Path) -> None:
    """One in eight is liked. Unbalanced, fresh weights first learn to say no; balanced, neither side is ahead."""
    means = {}
    for balance in (True, False):
        data = labelled(tmp_path, liked_every=8)
        out = tmp_path / str(balance)
        options = {"loss": "unpaired", "balance": balance, "tokens_per_step": 4096, "micro_tokens": 4096}
        result = train(out, data=str(data), max_steps=2, learning_rate=1e-2, warmup=0, **options)
        means[balance] = result.facts["score_mean"]
    assert means[False] < means[True] - 0.1


def test_micro_batches_do_not_change_training(tmp_path: Path) -> None:
    given = {"pointwise": scored(tmp_path), "unpaired": labelled(tmp_path)}
    cases = [{"loss": loss, "data": str(path)} for loss, path in given.items()] + [{"level": "token"}]
    for number, case in enumerate(cases):
        rows = []
        for micro in (96, 1024):
            out = tmp_path / f"{number}-{micro}"
            train(out, micro_tokens=micro, tokens_per_step=600, max_steps=2, **case)
            rows.append([r for r in small.metrics_of(out) if "grad_norm" in r])
        for parts, whole in zip(*rows, strict=True):
            assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_smoothing_keeps_the_margin_small(tmp_path: Path) -> None:
    margins = {}
    for smoothing in (0.0, 0.3):
        result = train(tmp_path / str(smoothing), label_smoothing=smoothing, max_steps=25)
        assert result.metrics["eval_accuracy"] > 0.9
        margins[smoothing] = result.metrics["eval_margin"]
    # The best gap is logit(0.7) = 0.85.
    assert margins[0.3] < 1.5 < margins[0.0]


# -- trees ----------------------------------------------------------------------------------------------------------------


def test_scores_and_labels_in_trees() -> None:
    template = ChatTemplate(small.tokenizer())
    answers: Any = [small.assistant("red"), small.assistant("blue"), small.assistant("red")]
    record = Ranking(small.user("Q"), answers, [2.5, -1.0, 0.0])  # type: ignore[arg-type]
    (item,) = encode_scored([record], template, 64).items
    # All answers of a prompt in one tree; equal ones with two scores are two targets, and a 0 is one too.
    assert [(n.parent, n.loss_weights[-1]) for n in item] == [(-1, 0.0), (0, 2.5), (0, -1.0), (0, 0.0)]
    assert all(n.is_action is not None and all(n.is_action) for n in item[1:])
    labels = [Unpaired(small.user("Q"), answers[0], liked) for liked in (True, False)]  # type: ignore[arg-type]
    found = encode_unpaired(labels, template, 64)
    assert [[n.loss_weights[-1] for n in i] for i in found.items] == [[0.0, 1.0], [0.0, 0.0]]
    assert found.answers == found.answers_with_stop == 2
    too_long = Ranking(small.user("Q"), [small.assistant("red " * 60), answers[0]], [1.0, 2.0])  # type: ignore[arg-type,list-item]
    dropped = encode_scored([too_long], template, 32)
    assert not dropped.items and (dropped.answers_cut, dropped.dropped) == (2, {"longer than max_length": 1})


# -- what they leave ------------------------------------------------------------------------------------------------------


def gpt2(folder: Path) -> Path:
    """A chat model of another family: learnt positions, transposed weights, biases."""
    text = small.tokenizer()
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 192, "vocab_size": len(text), "attn_pdrop": 0.0}
    ids = {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return save_model(GPT2LMHeadModel(GPT2Config(**shape, **ids)), text, folder)


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_plain_transformers_gives_the_scores(family: str, adapter: str, tmp_path: Path) -> None:
    """Its pipeline, on texts of different length in one padded batch, says the logits that danlu's judge normalises."""
    base = small.model() if family == "llama" else gpt2(tmp_path / "base" / "model")
    out = tmp_path / "out"
    train(out, model=str(base), adapter=adapter, lora={"r": 4}, max_steps=3)
    folder = out / "model"
    model, text = load_model(folder, scalar=True), AutoTokenizer.from_pretrained(folder)
    template = ChatTemplate(text)
    prompt = small.user("4: which colour has the hat?")
    texts, episodes = [], []
    for answer in ("Gladly. The hat is white.", "No.", "No idea. The hat is white. The hat is white."):
        turns = small.assistant(answer)
        texts.append(text.apply_chat_template(prompt + turns, tokenize=False).rstrip("\n"))
        ids, rest = template.encode_answer(prompt, turns)  # type: ignore[arg-type]
        episodes.append(Episode(tuple(ids), tuple(rest), True))
    judge = judge_of(model, template, template, micro_tokens=512, device="cpu")
    mean, std = normaliser_of(model)
    found = [s.value * std + mean for s in judge.score(episodes) if s.value is not None]
    classify = pipeline("text-classification", model=str(folder), function_to_apply="none", device="cpu", batch_size=3)
    expected = [row["score"] for row in classify(texts)]
    assert len({round(score, 4) for score in expected}) == 3
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_head_stays_in_full_precision(tmp_path: Path) -> None:
    train(tmp_path, dtype="bfloat16", max_steps=1)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert file.get_tensor("score.weight").dtype == torch.float32


def test_the_report_is_kept_with_the_stage_and_the_verdict_with_the_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some questions are asked twice and answered the other way round: the report knows how far people agree."""
    rows = pairs()
    twice = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} if n % 2 else r for n, r in enumerate(rows[:20])]
    data = small.write_rows(tmp_path / "data.jsonl", rows + twice)
    values = small.stage("reward", tmp_path / "runs" / "r" / "01-reward", data=str(data), max_steps=3, min_accuracy=0.0)
    assert run([*small.arguments("reward", values | {"max_length_correlation": 1.0})]) == 0
    out = Path(values["out"])
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    report = json.loads((out / "reward_report.json").read_text("utf-8"))
    assert manifest["facts"]["reward_report"] == report
    assert report["repeats"] == {"repeated": 20, "labels": 40, "agreement": 0.5, "ceiling": 0.5}
    assert report["metrics"]["eval_accuracy"] == manifest["metrics"]["eval_accuracy"] == report["accuracy"]["share"]
    assert stored_verdict(out / "model") == manifest["gates"][0]

    monkeypatch.setenv("COLUMNS", "200")
    (out.parent / "recipe.yaml").write_text("stages: [{kind: reward, name: reward}]\n", "utf-8")
    capfd.readouterr()
    assert run(["runs", str(out.parent)]) == 0
    told = capfd.readouterr().err
    assert "right on held-out pairs" in told and "chosen answer longer" in told and "people agree with people" in told
    assert run(["runs", str(out.parent), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["stages"][0]["name"] == "reward"
    assert run(["report", str(out.parent)]) == 0
    page = (out.parent / "report.html").read_text("utf-8")
    assert page.count('<svg class="chart"') >= 4 and "Right, by length" in page and "Margins" in page
    assert "calibration error" in page and "reward_report" not in page


def test_a_stage_without_held_out_answers_has_an_empty_report(tmp_path: Path) -> None:
    result = train(tmp_path, eval_fraction=0, max_steps=1)
    assert json.loads((tmp_path / "reward_report.json").read_text("utf-8")) == {} == result.facts["reward_report"]
    assert not result.gates[0].passed and stored_verdict(tmp_path / "model")["passed"] is False  # type: ignore[index]


def test_sources_are_told_apart(tmp_path: Path) -> None:
    rows = [r | ({"source": "wiki"} if n % 2 else {}) for n, r in enumerate(pairs())]
    data = small.write_rows(tmp_path / "mine.jsonl", rows)
    result = train(tmp_path / "out", data=str(data), max_steps=1, eval_fraction=0.3)
    parts = result.facts["reward_report"]["by_source"]
    assert {p["source"] for p in parts} == {"mine", "wiki"}
    assert sum(p["count"] for p in parts) == result.facts["heldout_pairs"]


# -- data that nothing can be learnt from -----------------------------------------------------------------------------------


def refused(folder: Path, rows: Iterable[Mapping[str, Any]], capfd: pytest.CaptureFixture[str], *flags: str) -> str:
    """What `danlu reward` says of a file, with exit status 1."""
    data = small.write_rows(folder / "data.jsonl", rows)
    values = small.stage("reward", folder / "out", data=str(data))
    assert run([*small.arguments("reward", values), *flags]) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "Traceback" not in said and not (folder / "out" / "model").exists()
    return said


def test_pairs_without_a_difference(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [r | {"rejected": r["chosen"]} for r in pairs()]
    assert "no row can be used as a comparison (chosen equals rejected: 96)" in refused(tmp_path, rows, capfd)


def test_rankings_without_an_order(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": r["prompt"], "responses": ["red", "blue"], "scores": [1, 1]} for r in pairs()]
    said = refused(tmp_path, rows, capfd, "--loss", "kwise")
    assert "no ranking is left to train on" in said and "all scores equal" in said


def test_labels_that_are_all_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in pairs()]
    said = refused(tmp_path, rows, capfd, "--loss", "unpaired")
    assert "answers have the label true" in said and "give answers of both labels" in said


def test_scores_that_are_all_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": r["prompt"], "responses": ["red", "blue"], "scores": [4, 4]} for r in pairs()]
    assert "scores are 4: there is nothing to tell apart" in refused(tmp_path, rows, capfd, "--loss", "pointwise")


@pytest.mark.parametrize("loss", ["pairwise", "kwise", "pointwise"])
def test_scores_that_are_no_numbers(loss: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": r["prompt"], "responses": ["red", "blue"], "scores": [4, 1]} for r in pairs()]
    rows[5]["scores"] = [math.nan, 1]
    said = refused(tmp_path, rows, capfd, "--loss", loss)
    assert "data.jsonl:6" in said and "not finite" in said


def test_scores_outside_of_their_range(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": r["prompt"], "responses": ["red", "blue"], "scores": [4, 1]} for r in pairs()]
    rows[2]["scores"] = [4, 7]
    flags = ("--loss", "pointwise", "--score-range", "0", "--score-range", "5")
    said = refused(tmp_path, rows, capfd, *flags)
    assert "data.jsonl:3" in said and "found the score 7, but score_range goes from 0 to 5" in said


def test_pairs_where_scores_are_wanted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refused(tmp_path, pairs(), capfd, "--loss", "pointwise")
    assert "found comparisons (format 'comparison'), but loss: pointwise learns the scores of answers" in said
