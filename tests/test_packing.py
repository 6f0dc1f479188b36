"""Every item once an epoch, steps as large as asked for, micro-batches full and even, and any step found again by its number."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.collate import Trees
from danlu.data.packing import Plan, micro_batches, plan_steps
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.training.compute import Compute
from danlu.training.step import accumulate, language_loss
from danlu.tree import conversation

lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=80)
budgets = st.integers(1, 200)
ranks_of = st.integers(1, 5)


def plan(lengths: Sequence[int], **changes: Any) -> Plan:
    options: dict[str, Any] = {"tokens_per_step": 100, "micro_tokens": 60, "epochs": 1.0, "max_steps": None, "seed": 0}
    return plan_steps(lengths, **options | changes)


def flat(step: list[list[int]]) -> list[int]:
    return [i for micro in step for i in micro]


def slow_steps(lengths: Sequence[int], tokens_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch, item by item: a step ends with the item that fills it."""
    steps: list[list[int]] = [[]]
    for index in np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist():
        if sum(lengths[i] for i in steps[-1]) >= tokens_per_step:
            steps.append([])
        steps[-1].append(index)
    return steps


# -- which items a step holds -------------------------------------------------------------------------------------------


@given(lengths_of, budgets, budgets, st.integers(0, 3), ranks_of, st.integers(1, 3))
def test_steps_hold_what_the_slow_way_gives_them(
    lengths: list[int], tokens_per_step: int, micro_tokens: int, seed: int, ranks: int, epochs: int
) -> None:
    found = plan(
        lengths,
        tokens_per_step=tokens_per_step,
        micro_tokens=micro_tokens,
        seed=seed,
        ranks=ranks,
        epochs=float(epochs),
    )
    expected = [s for epoch in range(epochs) for s in slow_steps(lengths, tokens_per_step, seed, epoch)]
    assert [sorted(flat(step)) for step in found] == [sorted(step) for step in expected]
    assert Counter(i for step in found for i in flat(step)) == dict.fromkeys(range(len(lengths)), epochs)


@given(lengths_of, budgets, budgets)
def test_the_cut_does_not_move_items_between_steps(lengths: list[int], first: int, second: int) -> None:
    one, other = plan(lengths, micro_tokens=first), plan(lengths, micro_tokens=second, ranks=3)
    assert [set(flat(step)) for step in one] == [set(flat(step)) for step in other]


@given(lengths_of, budgets)
def test_step_sizes_stay_near_the_budget(lengths: list[int], tokens_per_step: int) -> None:
    sizes = [sum(lengths[i] for i in flat(step)) for step in plan(lengths, tokens_per_step=tokens_per_step)]
    assert all(tokens_per_step <= size < tokens_per_step + max(lengths) for size in sizes[:-1])
    assert sizes[-1] < tokens_per_step + max(lengths)


def test_max_steps_goes_on_over_epochs_and_wins_over_them() -> None:
    lengths = [10] * 20
    found = plan(lengths, max_steps=5, epochs=0.1)
    assert len(found) == 5 and Counter(i for step in found[:4] for i in flat(step)) == dict.fromkeys(range(20), 2)
    assert [set(flat(s)) for s in found[:4]] == [set(flat(s)) for s in plan(lengths, epochs=2.0)]


def test_part_of_an_epoch() -> None:
    found = plan([10] * 40, epochs=1.25)
    assert len(found) == 5
    assert sum(len(flat(step)) for step in found) == 50
    assert sum(len(flat(step)) for step in plan([10] * 40, epochs=0.01)) == 1


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    found = plan([10] * 40, epochs=2.0)
    assert len({tuple(flat(step)) for step in found}) == 8
    assert [flat(s) for s in plan([10] * 40, seed=1)] != [flat(s) for s in plan([10] * 40)]


@given(lengths_of, st.data())
def test_any_step_is_found_again_by_its_number(lengths: list[int], data: st.DataObject) -> None:
    """As on resume: the later steps alone, in any order, from a plan that was made anew."""
    whole = list(plan(lengths, epochs=2.5))
    for step in data.draw(st.permutations(range(len(whole)))):
        assert plan(lengths, epochs=2.5)[step] == whole[step]
    assert plan(lengths, epochs=2.5)[-1] == whole[-1] and plan(lengths, epochs=2.5)[1:3] == whole[1:3]
    with pytest.raises(IndexError):
        plan(lengths, epochs=2.5)[len(whole)]


# -- how a step is cut --------------------------------------------------------------------------------------------------


def cut(lengths: Sequence[int], micro_tokens: int, ranks: int = 1) -> list[list[int]]:
    return micro_batches(range(len(lengths)), lengths, micro_tokens, ranks=ranks)


def in_order(lengths: Sequence[int], micro_tokens: int) -> int:
    """How many micro-batches there are when items are taken as they come."""
    count, room = 0, 0
    for length in lengths:
        if count == 0 or length > room:
            count, room = count + 1, micro_tokens
        room -= length
    return count


@given(lengths_of, budgets, ranks_of)
def test_micro_batches_hold_every_item_once_within_the_budget(lengths: list[int], budget: int, ranks: int) -> None:
    found = cut(lengths, budget, ranks)
    assert sorted(flat(found)) == list(range(len(lengths)))
    for micro in found:
        assert micro and micro == sorted(micro), "no empty one, and each in the step's order"
        assert sum(lengths[i] for i in micro) <= budget or len(micro) == 1


@given(lengths_of, budgets)
def test_best_fit_never_makes_more_than_taking_items_as_they_come(lengths: list[int], budget: int) -> None:
    count = len(cut(lengths, budget))
    assert math.ceil(sum(lengths) / budget) <= count or max(lengths) > budget
    assert count <= in_order(lengths, budget)
    if count == in_order(lengths, budget):
        assert flat(cut(lengths, budget)) == list(range(len(lengths))), "nothing is gained, so the order stays"


def test_best_fit_fills_the_gaps() -> None:
    """60 + 40, 70 + 30, 55 + 45 of 100: in this order every second item opens a new micro-batch."""
    lengths = [60, 70, 55, 45, 30, 40]
    assert in_order(lengths, 100) == 4
    assert cut(lengths, 100) == [[0, 5], [1, 4], [2, 3]]


def test_an_item_above_the_budget_stands_alone() -> None:
    assert cut([5, 300, 5], 100) == [[0, 2], [1]]


@given(lengths_of, budgets, ranks_of)
def test_every_rank_gets_as_many(lengths: list[int], budget: int, ranks: int) -> None:
    found = cut(lengths, budget, ranks)
    shares = [found[r::ranks] for r in range(ranks)]
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    if len(lengths) >= ranks * math.ceil(len(cut(lengths, budget)) / ranks):
        assert len(found) <= ranks * math.ceil(len(cut(lengths, budget)) / ranks), "no rank works longer for it"


def test_ranks_get_even_loads() -> None:
    """One full and one almost empty micro-batch become two halves; and no rank is idle while another has several."""
    rng = np.random.default_rng(0)
    for ranks, budget in itertools.product((2, 3, 4), (512, 2048, 10_000)):
        lengths = rng.integers(20, 200, 60).tolist()
        found = cut(lengths, budget, ranks)
        loads = [sum(lengths[i] for micro in found[r::ranks] for i in micro) for r in range(ranks)]
        assert max(loads) - min(loads) <= 0.05 * sum(loads) / ranks, (ranks, budget, loads)


def test_heavy_micro_batches_go_forth_and_back_over_the_ranks() -> None:
    """No two of these fit together. In plain turns the first rank would have 240 tokens and the second 215."""
    lengths = [100, 90, 80, 70, 60, 55]
    found = cut(lengths, 100, 2)
    assert [sum(lengths[i] for micro in found[r::2] for i in micro) for r in range(2)] == [230, 225]


def test_where_even_does_not_fit_the_fullest_cut_is_taken() -> None:
    """Two of 12 tokens hold these as 6 + 6 and 5 + 4 + 3 alone; longest first to the emptier one would put 13 into one."""
    assert sorted(cut([6, 6, 5, 4, 3], 12, 2)) == [[0, 1], [2, 3, 4]]


def test_fewer_items_than_ranks() -> None:
    assert sorted(cut([10, 20], 100, 4)) == [[0], [1]]


# -- what is computed ---------------------------------------------------------------------------------------------------


def test_however_a_step_is_cut_its_gradient_is_the_same(tiny: Callable[..., Any], near: Callable[..., None]) -> None:
    """The sum over micro-batches, and over the ranks that each take their share of them."""
    rng = np.random.default_rng(0)
    trees = Trees([conversation(ids, [1.0] * len(ids)) for ids in _random_ids(rng, 24)])
    items, lengths = list(range(24)), trees.lengths.tolist()
    weight = float(trees.weights.sum())
    gradients = []
    for micro_tokens, ranks in ((10_000, 1), (64, 1), (64, 3)):
        model = tiny("llama")
        root = RootModel(SeparateModels({"policy": model}, ["policy"]))
        micro = micro_batches(items, lengths, micro_tokens, ranks=ranks)
        for rank in range(ranks):
            batches = [(trees.batch(m), weight) for m in micro[rank::ranks]]
            accumulate(root, "policy", batches, language_loss, Compute("cpu", "float32", 1))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    near(gradients[1], gradients[0])
    near(gradients[2], gradients[0])


def _random_ids(rng: np.random.Generator, count: int) -> list[list[int]]:
    return [rng.integers(3, 60, rng.integers(2, 40)).tolist() for _ in range(count)]
