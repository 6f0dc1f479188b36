"""Reward models on rankings: the K-wise loss by hand and against a slow reference, trees with ranks, and a whole stage."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tiny as small
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from danlu.alignment_config import RewardSettings
from danlu.data.collate import Trees, encode_comparisons, encode_rankings
from danlu.losses.preference import kwise, pairwise
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.text.chat_template import ChatTemplate
from danlu.types import Comparison, Ranking

LN3 = math.log(3)


def t(*values: float) -> Tensor:
    return torch.tensor(values)


# -- the loss -----------------------------------------------------------------------------------------------------------


def test_kwise_by_hand() -> None:
    # Best first 2 ln 3, ln 3, ln 3 with ranks 3, 2, 1. Gaps ln 3, ln 3, 0: -(2 ln 3/4 + ln 1/2) / 3 = ln(32/9) / 3
    loss, metrics = kwise(t(2 * LN3, LN3, LN3), t(3, 2, 1), torch.zeros(3), 1.0)
    assert loss.item() == pytest.approx(math.log(32 / 9) / 3, rel=1e-6)
    # Two pairs are right, one is a tie; the mean gap is 2 ln 3 / 3.
    assert metrics == {
        "right": pytest.approx(2.5 / 3),
        "margin": pytest.approx(2 * LN3 / 3, rel=1e-6),
        "pairs": 1.0,
    }


def test_answers_of_equal_rank_are_no_pair() -> None:
    # Of three answers two share a rank: pairs (0, 1) and (0, 2), gaps ln 3 and 0, mean ln(8/3) / 2
    loss, _ = kwise(t(LN3, 0, LN3), t(2, 1, 1), torch.zeros(3), 1.0)
    assert loss.item() == pytest.approx(math.log(8 / 3) / 2, rel=1e-6)


def test_a_prompt_counts_once() -> None:
    # Prompt 5: one pair, gap ln 3. Prompt 9: three pairs, all gaps 0. (ln 4/3 + ln 2) / 2, not a mean over four pairs.
    scores, ranks = t(LN3, 0, 1, 1, 1), t(2, 1, 1, 2, 3)
    loss, metrics = kwise(scores, ranks, t(5, 5, 9, 9, 9), 2.0)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-6)
    assert (metrics["right"], metrics["pairs"]) == (pytest.approx(1.5), 2.0)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=6), st.sampled_from([0.0, 0.3]))
def test_with_two_answers_it_is_pairwise(pairs: list[tuple[float, float]], centring: float) -> None:
    chosen, rejected = torch.tensor(pairs).unbind(1)
    expected, metrics = pairwise(chosen, rejected, 3.0, centring=centring)
    prompts = torch.arange(len(pairs)).repeat_interleave(2)
    found, same = kwise(torch.tensor(pairs).flatten(), t(2, 1).repeat(len(pairs)), prompts, 3.0, centring=centring)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert same == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@given(
    st.lists(
        st.lists(st.tuples(st.floats(-3, 3), st.integers(1, 3)), min_size=2, max_size=5).filter(
            lambda group: len({rank for _, rank in group}) > 1
        ),
        min_size=1,
        max_size=4,
    )
)
def test_kwise_is_the_loop_over_prompts_and_pairs(groups: list[list[tuple[float, int]]]) -> None:
    total, scores = 0.0, []
    for group in groups:
        pairs = [(a, b) if a[1] > b[1] else (b, a) for a, b in combinations(group, 2) if a[1] != b[1]]
        total += sum(math.log1p(math.exp(-(a[0] - b[0]))) for a, b in pairs) / len(pairs)
        scores += [s for s, _ in group]
    ranks = t(*(float(r) for group in groups for _, r in group))
    prompts = torch.tensor([n for n, group in enumerate(groups) for _ in group])
    leaf = torch.tensor(scores, requires_grad=True)
    loss, _ = kwise(leaf, ranks, prompts, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(total / 2, rel=1e-4)
    assert leaf.grad is not None
    for n in range(len(groups)):  # a shift of all scores of a prompt changes nothing
        assert float(leaf.grad[prompts == n].sum()) == pytest.approx(0.0, abs=1e-5)


# -- trees ----------------------------------------------------------------------------------------------------------------


def ranking(*scored: tuple[str, float]) -> Ranking:
    answers: Any = [small.assistant(text) for text, _ in scored]
    return Ranking(small.user("Which colour?"), answers, [s for _, s in scored])  # type: ignore[arg-type]


def ranks_of(trees: Trees) -> list[list[float]]:
    return [[n.loss_weights[-1] for n in item[1:]] for item in trees.items]


def test_answers_carry_their_ranks() -> None:
    template = ChatTemplate(small.tokenizer())
    records = [
        ranking(("red", 0.5), ("green", 9.0), ("blue", 0.5), ("black", -3.0)),
        ranking(("red", 1.0), ("green", 1.0)),
        ranking(("red", 1.0)),
        ranking(("red", 1.0), ("red", 2.0), ("blue", 1.5)),
    ]
    trees = encode_rankings(records, template, 64)
    # Equal scores share a rank; of two equal answers the better score stays.
    assert ranks_of(trees) == [[2.0, 3.0, 2.0, 1.0], [2.0, 1.0]]
    assert trees.dropped == {"all scores equal": 1, "only one answer to this prompt": 1}
    assert (trees.answers, trees.answers_with_stop) == (10, 6)
    prompt, *answers = trees.items[0]
    ids, answer = template.encode_answer(records[0].prompt, records[0].responses[1])
    assert (prompt.ids, answers[1].ids) == (ids, answer) and all(n.parent == 0 for n in answers)


def test_a_pair_s_chosen_answer_has_the_higher_rank() -> None:
    pair = Comparison(small.user("Q"), small.assistant("yes"), small.assistant("no"))  # type: ignore[arg-type]
    assert ranks_of(encode_comparisons([pair], ChatTemplate(small.tokenizer()), 64)) == [[2.0, 1.0]]


def test_rankings_that_are_too_long() -> None:
    template = ChatTemplate(small.tokenizer())
    trees = encode_rankings([ranking(("red", 1), ("green " * 40, 2), ("blue", 3))], template, 32)
    assert not trees.items and trees.answers_cut == 3 and trees.dropped == {"longer than max_length": 1}


# -- the stage --------------------------------------------------------------------------------------------------------------


def ranked_data(folder: Path) -> Path:
    """Four answers to each question: the kinder the better, two of them equally good."""
    rows = []
    for row in map(json.loads, small.data()["comparisons"].read_text("utf-8").splitlines()):
        fact = row["chosen"][0]["content"].removeprefix("Gladly. ").split(".")[0]
        scored = [(f"Gladly. {fact}.", 2.0), (f"{fact}.", 1.0), (f"{fact}. {fact}.", 1.0), (f"No idea. {fact}.", 0.0)]
        rows.append(
            {
                "prompt": row["prompt"],
                "responses": [small.assistant(text) for text, _ in scored],
                "scores": [score for _, score in scored],
            }
        )
    return small.write_rows(folder / "ranked.jsonl", rows)


def train(out: Path, **changes: Any) -> Any:
    return STAGES["reward"].run(parse(RewardSettings, small.stage("reward", out, **changes)))


def test_it_learns_a_ranking(tmp_path: Path) -> None:
    options = {"max_length": 96, "learning_rate": 1e-2, "max_steps": 30}
    result = train(tmp_path / "out", data=str(ranked_data(tmp_path)), loss="kwise", **options)
    assert result.metrics["eval_accuracy"] > 0.9 and result.gates[0].passed
    assert result.facts["rankings"] + result.facts["heldout_rankings"] == 96
    low, high = result.metrics["eval_accuracy_low"], result.metrics["eval_accuracy_high"]
    assert low < result.metrics["eval_accuracy"] <= high
    first = small.metrics_of(tmp_path / "out")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=0.05)


def test_the_reported_loss_is_that_of_single_rows(tmp_path: Path) -> None:
    """All pairs of all held-out prompts from transformers' own scores."""
    data = ranked_data(tmp_path)
    lines = data.read_text("utf-8").splitlines(keepends=True)[::9]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(lines), "utf-8")
    options = {"max_length": 96, "learning_rate": 1e-2, "max_steps": 4, "loss": "kwise", "eval_data": str(heldout)}
    result = train(tmp_path / "out", data=str(data), **options)
    folder = tmp_path / "out" / "model"
    model, text = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    template = ChatTemplate(text)
    losses, rights = [], []
    for row in map(json.loads, lines):
        scores = []
        for response in row["responses"]:
            prompt, answer = template.encode_answer(row["prompt"], response)
            with torch.no_grad():
                scores.append(float(model(torch.tensor([prompt + answer])).logits[0, 0]))
        pairs = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
        gaps = torch.tensor([scores[a] - scores[b] for a, b in pairs])
        losses.append(float(-F.logsigmoid(gaps).mean()))
        rights.append(float((gaps > 0).float().mean()))
    assert result.metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert result.metrics["eval_accuracy"] == pytest.approx(sum(rights) / len(rights), abs=1e-6)


def test_pairs_are_rankings_of_two(tmp_path: Path) -> None:
    rows = []
    for loss in ("pairwise", "kwise"):
        train(tmp_path / loss, loss=loss, max_steps=4, learning_rate=1e-2)
        rows.append(small.metrics_of(tmp_path / loss))
    assert len(rows[0]) == len(rows[1]) >= 5
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_micro_batches_do_not_change_training(tmp_path: Path) -> None:
    data, rows = ranked_data(tmp_path), []
    for micro in (96, 1024):
        options = {"max_length": 96, "micro_tokens": micro, "tokens_per_step": 600, "max_steps": 3}
        train(tmp_path / str(micro), data=str(data), loss="kwise", **options)
        rows.append([r for r in small.metrics_of(tmp_path / str(micro)) if "grad_norm" in r])
    for parts, whole in zip(*rows, strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
