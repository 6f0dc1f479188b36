"""Losses of reward models: goldens worked by hand, slow references, gradients in float64, and trees against single rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from danlu.losses.preference import balanced_weights, kwise, pairwise, pairwise_tokens, pointwise, unpaired
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel, TrunkOutput
from danlu.tree import TreeBatch, branches, forest

Near = Callable[..., None]
Tiny = Callable[..., Any]
LN3 = math.log(3)


def t(*values: float) -> Tensor:
    return torch.tensor(values)


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def soft(x: float) -> float:
    """-log sigmoid, worked out without logsigmoid."""
    return math.log1p(math.exp(-x))


# -- label smoothing ------------------------------------------------------------------------------------------------------


def test_smoothing_by_hand() -> None:
    # gap ln 3, e = 0.1: -0.9 ln 3/4 - 0.1 ln 1/4 = ln 4 - 0.9 ln 3
    loss, metrics = pairwise(t(LN3), t(0), 1.0, label_smoothing=0.1)
    assert loss.item() == pytest.approx(math.log(4) - 0.9 * LN3, rel=1e-6)
    assert metrics["margin"] == pytest.approx(LN3)  # the metrics do not know of it


def test_smoothing_moves_with_the_margin() -> None:
    # gap 2 ln 3 less margin ln 3 is ln 3 again
    loss, _ = pairwise(t(2 * LN3), t(0), 1.0, margin_B=t(LN3), label_smoothing=0.1)
    assert loss.item() == pytest.approx(math.log(4) - 0.9 * LN3, rel=1e-6)


@given(st.floats(0.01, 0.49))
def test_a_smoothed_gap_has_an_optimum(share: float) -> None:
    """Without smoothing more is always better; with it the best gap is logit(1 - e)."""
    best = torch.tensor([math.log((1 - share) / share)], dtype=torch.float64, requires_grad=True)
    loss, _ = pairwise(best, torch.zeros(1, dtype=torch.float64), 1.0, label_smoothing=share)
    (slope,) = torch.autograd.grad(loss, best)
    assert slope.item() == pytest.approx(0.0, abs=1e-9)


def test_smoothed_rankings_are_smoothed_pairs() -> None:
    # Three answers, gaps ln 3, ln 3, 0 as unsmoothed in test_rankings: (2 (ln 4 - 0.9 ln 3) + ln 2) / 3
    loss, _ = kwise(t(2 * LN3, LN3, LN3), t(3, 2, 1), torch.zeros(3), 1.0, label_smoothing=0.1)
    assert loss.item() == pytest.approx((2 * (math.log(4) - 0.9 * LN3) + math.log(2)) / 3, rel=1e-6)


# -- the token level ------------------------------------------------------------------------------------------------------


def test_tokens_by_hand() -> None:
    # chosen 7 8 9, rejected 7 5: they part at the second token, so the scores of the first (9 and -9) do not count.
    # Second: ln 3 - 0. Third: the rejected answer has ended and keeps its last score 0: 0 - 0. (ln 4/3 + ln 2) / 2
    loss, metrics = pairwise_tokens(t(9, LN3, 0, -9, 0), ids(7, 8, 9, 7, 5), ids(3, 2), 1.0)
    assert loss.item() == pytest.approx(math.log(8 / 3) / 2, rel=1e-6)
    # Judged by the last tokens: 0 and 0, a tie.
    assert metrics == {"right": 0.5, "margin": 0.0, "pairs": 1.0}


def test_an_answer_that_begins_like_the_other_and_ends_earlier() -> None:
    # chosen 4, rejected 4 6: they part where the chosen one has ended; it keeps its ln 3 against 0.
    loss, _ = pairwise_tokens(t(LN3, -5, 0), ids(4, 4, 6), ids(1, 2), 1.0)
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_each_pair_weighs_the_same_however_long_it_is() -> None:
    # First pair: one token, gap ln 3: ln 4/3. Second: three tokens, gaps 0: ln 2. Over two pairs.
    scores, tokens = t(LN3, 0, 1, 1, 1, 1, 1, 1), ids(1, 2, 1, 1, 1, 2, 2, 2)
    loss, _ = pairwise_tokens(scores, tokens, ids(1, 1, 3, 3), 2.0)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-6)


def test_tokens_with_margin_and_centring_by_hand() -> None:
    # Two tokens, gaps 2 ln 3 and ln 3 less the margin ln 3: (ln 4/3 + ln 2) / 2; plus 0.1 * (ln 3 + 0)^2 at the last tokens
    loss, _ = pairwise_tokens(t(2 * LN3, LN3, 0, 0), ids(1, 3, 2, 3), ids(2, 2), 1.0, margin_B=t(LN3), centring=0.1)
    assert loss.item() == pytest.approx(math.log(8 / 3) / 2 + 0.1 * LN3**2, rel=1e-6)


ANSWER = st.lists(st.integers(1, 3), min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(ANSWER, ANSWER).filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=4)


@given(PAIRS, st.integers(0, 99), st.sampled_from([0.0, 0.2]), st.booleans())
def test_tokens_against_a_loop(
    pairs: list[tuple[list[int], list[int]]], seed: int, smoothing: float, margins: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    answers = [a for pair in pairs for a in pair]
    scores = torch.randn(sum(map(len, answers)), generator=generator)
    margin = torch.rand(len(pairs), generator=generator) if margins else None
    total, at = 0.0, 0
    for n, (chosen, rejected) in enumerate(pairs):
        high = scores[at : at + len(chosen)].tolist()
        low = scores[at + len(chosen) : at + len(chosen) + len(rejected)].tolist()
        at += len(chosen) + len(rejected)
        same = 0
        while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
            same += 1
        costs = []
        for j in range(same, max(len(chosen), len(rejected))):
            x = (
                high[min(j, len(high) - 1)]
                - low[min(j, len(low) - 1)]
                - (float(margin[n]) if margin is not None else 0)
            )
            costs.append((1 - smoothing) * soft(x) + smoothing * soft(-x))
        total += sum(costs) / len(costs)
    found, _ = pairwise_tokens(
        scores,
        torch.tensor([i for a in answers for i in a]),
        torch.tensor([len(a) for a in answers]),
        3.0,
        margin_B=margin,
        label_smoothing=smoothing,
    )
    assert found.item() == pytest.approx(total / 3, rel=1e-4, abs=1e-6)


def test_of_answers_of_one_token_the_level_makes_no_difference() -> None:
    scores, margin = t(0.3, -1.0, 2.0, 0.5), t(0.1, 0.7)
    options = {"margin_B": margin, "centring": 0.2, "label_smoothing": 0.05}
    found, told = pairwise_tokens(scores, ids(1, 2, 2, 1), ids(1, 1, 1, 1), 2.0, **options)
    expected, same = pairwise(scores[0::2], scores[1::2], 2.0, **options)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6) and told == same


# -- scores and labels ----------------------------------------------------------------------------------------------------


def test_pointwise_by_hand() -> None:
    # errors 0.5, -1, 2 of four answers in the step: (0.25 + 1 + 4) / 4
    loss, metrics = pointwise(t(1.5, 1, 3), t(1, 2, 1), 4.0)
    assert loss.item() == pytest.approx(5.25 / 4)
    assert metrics == {"error": 3.5}


def test_unpaired_by_hand() -> None:
    # A liked answer at ln 3: -ln 3/4. One that was not at ln 3: -ln 1/4. Over two.
    loss, metrics = unpaired(t(LN3, LN3), t(1, 0), 2.0)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, rel=1e-6)
    assert metrics == {"right": 1.0}


def test_unpaired_at_zero_is_half_right() -> None:
    assert unpaired(t(0, 0), t(1, 0), 2.0)[1] == {"right": 1.0}


def test_both_labels_weigh_the_same() -> None:
    # One liked answer, three that were not: 4 / (2 * 1) = 2 and 4 / (2 * 3) = 2/3; all at 0 cost ln 2 each.
    assert balanced_weights(3, 1) == (pytest.approx(2 / 3), 2.0)
    scores = torch.zeros(4, requires_grad=True)
    loss, _ = unpaired(scores, t(1, 0, 0, 0), 4.0, weights=balanced_weights(3, 1))
    (slope,) = torch.autograd.grad(loss, scores)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    # At 0 the pull of the one liked answer is that of the three others together.
    assert slope.tolist() == pytest.approx([-0.25, 0.25 / 3, 0.25 / 3, 0.25 / 3])


@given(st.lists(st.tuples(st.floats(-4, 4), st.booleans()), min_size=1, max_size=8), st.floats(0.1, 3))
def test_unpaired_is_cross_entropy(answers: list[tuple[float, bool]], weight: float) -> None:
    total = 0.0
    for score, liked in answers:
        p = 1 / (1 + math.exp(-score))
        total -= weight * math.log(p) if liked else math.log(1 - p)
    scores, labels = t(*(s for s, _ in answers)), t(*(float(y) for _, y in answers))
    found, _ = unpaired(scores, labels, 2.0, weights=(1.0, weight))
    assert found.item() == pytest.approx(total / 2, rel=1e-4, abs=1e-6)


def test_a_fixed_rejected_score_of_zero_is_unpaired() -> None:
    scores = t(0.7, -2.0)
    assert unpaired(scores, t(1, 1), 2.0)[0].item() == pytest.approx(pairwise(scores, t(0, 0), 2.0)[0].item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_out_losses_stay_finite(dtype: torch.dtype) -> None:
    scores = torch.tensor([-300.0, 300.0], dtype=dtype, requires_grad=True)
    loss, _ = unpaired(scores, t(1, 0), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(600.0)
    assert scores.grad is not None and scores.grad.tolist() == [-1.0, 1.0]


# -- gradients ------------------------------------------------------------------------------------------------------------

LENGTHS = ids(3, 2, 1, 4)
TOKENS = ids(1, 2, 3, 1, 5, 4, 4, 2, 2, 2)
RANKS, PROMPTS = t(3, 2, 1, 1, 2, 1, 4, 3, 2, 1), t(0, 0, 0, 0, 1, 1, 2, 2, 2, 2)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "pairwise": lambda s: pairwise(s[0::2], s[1::2], 3.0, margin_B=torch.ones(5), centring=0.2, label_smoothing=0.1)[0],
    "tokens": lambda s: pairwise_tokens(
        s, TOKENS, LENGTHS, 3.0, margin_B=torch.ones(2), centring=0.2, label_smoothing=0.1
    )[0],
    "kwise": lambda s: kwise(s, RANKS, PROMPTS, 3.0, centring=0.2, label_smoothing=0.1)[0],
    "pointwise": lambda s: pointwise(s, RANKS, 3.0)[0],
    "unpaired": lambda s: unpaired(s, (RANKS > 1).float(), 3.0, weights=(0.7, 1.8))[0],
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_in_float64(name: str) -> None:
    scores = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name], scores)


# -- trees and single rows ------------------------------------------------------------------------------------------------

# prompt, chosen, rejected: one with a common beginning, one with answers of different length, one that ends early
COMPARED = [
    ([5, 6, 7], [8, 9, 10, 1], [8, 9, 11, 1]),
    ([12], [13, 1], [14, 15, 16, 17, 1]),
    ([20, 21], [22, 23, 1], [22]),
]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tree_has_the_token_loss_of_separate_rows(family: str, tiny: Tiny, near: Near) -> None:
    """Prompt and answers as one tree, against two whole rows for each pair, read by transformers' own trunk."""
    model = tiny(family, scalar=True)
    rows = tiny(family, scalar=True)
    total = torch.zeros(())
    for prompt, chosen, rejected in COMPARED:
        high, low = (
            rows.score(rows.base_model(torch.tensor([prompt + a]))[0][0]).squeeze(-1) for a in (chosen, rejected)
        )
        full = [prompt + chosen, prompt + rejected]
        first = next(j for j in range(99) if [*full[0], None][j : j + 1] != [*full[1], None][j : j + 1])
        gaps = [high[min(j, len(high) - 1)] - low[min(j, len(low) - 1)] for j in range(first, max(map(len, full)))]
        total = total + torch.stack([torch.log1p(torch.exp(-g)) for g in gaps]).mean() / len(COMPARED)
    total.backward()

    def loss(out: TrunkOutput) -> Tensor:
        tree, index = out.tree, out.tree.action_index()
        lengths = (tree.node_end_N - tree.node_start_N)[tree.node_parent_N >= 0]
        return pairwise_tokens(out.scores(index), tree.input_ids_T[index], lengths, float(len(COMPARED)))[0]

    root = RootModel(SeparateModels({"reward": model}, ["reward"]))
    tree = TreeBatch.of(forest(branches(prompt, [a, b], [2.0, 1.0]) for prompt, a, b in COMPARED))
    found = root(tree, "reward", loss)
    found.backward()
    near(found, total)
    expected = dict(rows.named_parameters())
    for name, parameter in model.named_parameters():
        if expected[name].grad is not None and float(expected[name].grad.abs().max()) > 1e-6:
            near(parameter.grad, expected[name].grad, 1e-4)
