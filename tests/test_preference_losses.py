"""DPO's losses and their relatives: goldens worked by hand, slow references that share no code, gradients in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from danlu.alignment_config import DpoSettings
from danlu.losses.dpo import hinge, ipo, robust, sigmoid
from danlu.losses.kto import kl_baseline, kto
from danlu.losses.reduce import sum_by_node
from danlu.losses.reference_free import SUREST, answer_nll, orpo, simpo
from danlu.training.pairs import pair_loss, pair_tokens
from danlu.tree import TreeBatch, branches, forest


def t(*values: float) -> Tensor:
    return torch.tensor(values)


def test_sigmoid_by_hand() -> None:
    # beta 1/2. Pair 1: log-ratios 2 ln 3 and 0, so h = ln 3 and sigmoid(h) = 3/4. Pair 2: -1 and -1, so h = 0 and 1/2.
    ref = t(-4.0, -1.0), t(-3.0, -2.0)
    loss, metrics = sigmoid(t(-4 + 2 * math.log(3), -2.0), t(-3.0, -3.0), *ref, 2.0, beta=0.5)
    assert loss.item() == pytest.approx(math.log(8 / 3) / 2, rel=1e-6)  # -(ln 3/4 + ln 1/2) / 2
    assert metrics == {
        "right": 1.5,  # a tie is half right
        "margin": pytest.approx(math.log(3), rel=1e-6),
        "chosen_reward": pytest.approx(math.log(3) - 0.5, rel=1e-6),
        "rejected_reward": pytest.approx(-0.5, rel=1e-6),
        "chosen_logprob": pytest.approx(-6 + 2 * math.log(3), rel=1e-6),
        "rejected_logprob": pytest.approx(-6.0),
    }


def test_label_smoothing_by_hand() -> None:
    # h = ln 3, e = 0.1: -0.9 ln 3/4 - 0.1 ln 1/4 = ln 4 - 0.9 ln 3
    loss, _ = sigmoid(t(math.log(3)), t(0.0), t(0.0), t(0.0), 1.0, beta=1.0, label_smoothing=0.1)
    assert loss.item() == pytest.approx(math.log(4) - 0.9 * math.log(3), rel=1e-6)


def test_the_gradient_is_that_of_equation_7() -> None:
    # d loss / d log pi_w = -beta sigmoid(-h), and the opposite for log pi_l; h = ln 3 / 2 * 2 beta with beta 1/2
    chosen, rejected = t(math.log(3)).requires_grad_(), t(-math.log(3)).requires_grad_()
    sigmoid(chosen, rejected, t(0.0), t(0.0), 1.0, beta=0.5)[0].backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.5 * 0.25, rel=1e-6)  # sigmoid(-ln 3) = 1/4
    assert rejected.grad.item() == pytest.approx(0.5 * 0.25, rel=1e-6)


def test_far_out_it_stays_finite() -> None:
    loss, _ = sigmoid(t(-900.0), t(900.0), t(0.0), t(0.0), 1.0, beta=1.0)
    assert loss.item() == pytest.approx(1800.0)


def test_sums_of_nodes() -> None:
    tree = TreeBatch.of(forest([branches([7, 7], [[1, 2, 3], [4]]), branches([7], [[5, 6], [8]])]))
    index = tree.action_index()
    found = sum_by_node(tree.input_ids_T[index].float(), index, tree)
    assert found.tolist() == [0.0, 6.0, 4.0, 0.0, 11.0, 8.0]


# -- other curves over the same margin ------------------------------------------------------------------------------------


def test_robust_by_hand() -> None:
    # beta h = ln 3, e = 0.1: [-0.9 ln 3/4 + 0.1 ln 1/4] / 0.8 = [0.8 ln 4 - 0.9 ln 3] / 0.8
    loss, metrics = robust(t(math.log(3)), t(0.0), t(0.0), t(0.0), 1.0, beta=1.0, flip_rate=0.1)
    assert loss.item() == pytest.approx(math.log(4) - 9 / 8 * math.log(3), rel=1e-6)
    assert metrics["margin"] == pytest.approx(math.log(3)) and metrics["right"] == 1.0


@given(st.floats(-4, 4), st.floats(0.01, 0.45))
def test_robust_is_the_true_loss_in_the_mean(h: float, flips: float) -> None:
    """Chowdhury et al. 2024: over comparisons of which a share was turned round, its mean is the loss on the true ones."""

    def of(chosen: float) -> float:
        return float(robust(t(chosen).double(), *[t(0.0).double()] * 3, 1.0, beta=1.0, flip_rate=flips)[0])

    true = float(sigmoid(t(h).double(), *[t(0.0).double()] * 3, 1.0, beta=1.0)[0])
    assert (1 - flips) * of(h) + flips * of(-h) == pytest.approx(true, rel=1e-9)


def test_ipo_by_hand() -> None:
    # tau 1/4, so h is drawn to 2. h = 3 - (-1) - 1 + 0 = 3, then 2: (3 - 2)^2 + (2 - 2)^2 over 2 pairs.
    loss, metrics = ipo(t(3.0, 2.0), t(-1.0, 0.0), t(1.0, 0.0), t(0.0, 0.0), 2.0, beta=0.25)
    assert loss.item() == pytest.approx(0.5) and metrics["margin"] == pytest.approx(0.25 * (3 + 2))


def test_hinge_by_hand() -> None:
    # beta h: 0.5 * 1 = 0.5, 0.5 * 4 = 2, 0.5 * -2 = -1: 0.5 + 0 + 2
    loss, metrics = hinge(t(1.0, 4.0, -2.0), t(0.0, 0.0, 0.0), t(0.0, 0.0, 0.0), t(0.0, 0.0, 0.0), 5.0, beta=0.5)
    assert loss.item() == pytest.approx(2.5 / 5) and metrics["right"] == 2.0


def test_simpo_by_hand() -> None:
    # means -1 and -2, beta 2: 2 * 1 - gamma; gamma = 2 - ln 3 leaves ln 3
    loss, metrics = simpo(t(-2.0), t(-6.0), t(2), t(3), 1.0, beta=2.0, gamma=2 - math.log(3))
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert metrics == {
        "right": 1.0,
        "margin": 2.0,
        "chosen_mean": -1.0,
        "rejected_mean": -2.0,
        "chosen_logprob": -2.0,
        "rejected_logprob": -6.0,
    }


def test_length_does_not_count_for_simpo() -> None:
    one, _ = simpo(t(-2.0), t(-6.0), t(2), t(3), 1.0, beta=2.0, gamma=0.5)
    other, _ = simpo(t(-20.0), t(-6.0), t(20), t(3), 1.0, beta=2.0, gamma=0.5)
    assert one.item() == pytest.approx(other.item(), rel=1e-6)


def test_orpo_by_hand() -> None:
    # Probabilities per token 3/4 and 1/2: odds 3 and 1, log odds ratio ln 3, -ln 3/4; and the chosen answer's -ln 3/4.
    loss, metrics = orpo(t(2 * math.log(0.75)), t(3 * math.log(0.5)), t(2), t(3), 1.0, weight=0.5)
    assert loss.item() == pytest.approx(1.5 * math.log(4 / 3), rel=1e-5)
    assert metrics["margin"] == pytest.approx(math.log(3), rel=1e-5)
    assert metrics["nll"] == pytest.approx(math.log(4 / 3), rel=1e-5)


def test_orpo_stays_finite_where_an_answer_is_certain() -> None:
    chosen = t(0.0).requires_grad_()
    loss, _ = orpo(chosen, t(-30.0), t(2), t(3), 1.0, weight=0.5)
    loss.backward()
    assert math.isfinite(loss.item()) and chosen.grad is not None and chosen.grad.tolist() == [-0.5]
    assert SUREST < 0


def test_answer_nll_by_hand() -> None:
    # 2 / 4 and 3 / 1 over 2 pairs: long answers count as much as short ones
    loss, metrics = answer_nll(t(-2.0, -3.0), t(4, 1), 2.0)
    assert loss.item() == 1.75 and metrics == {"nll": 3.5}


def test_kto_by_hand() -> None:
    # beta 1, z = ln 2. Liked: r = ln 6, sigmoid(ln 3) = 3/4, so 2 * 1/4. Not: r = ln 4, sigmoid(ln 2 - ln 4) = 1/3, so 6 * 2/3.
    liked = torch.tensor([True, False])
    loss, metrics = kto(
        t(math.log(6), math.log(4) - 1),
        t(0.0, -1.0),
        liked,
        math.log(2),
        2.0,
        beta=1.0,
        desirable_weight=2.0,
        undesirable_weight=6.0,
    )
    assert loss.item() == pytest.approx((0.5 + 4) / 2, rel=1e-6)
    assert metrics == {
        "right": 1.0,  # the liked one is above z, the other one is, too
        "liked": 1.0,
        "liked_reward": pytest.approx(math.log(6)),
        "other_reward": pytest.approx(math.log(4)),
    }


def test_the_baseline_is_never_negative() -> None:
    assert kl_baseline(t(1.0, 2.0, -0.5)) == pytest.approx(2.5 / 3)
    assert kl_baseline(t(1.0, -2.0)) == kl_baseline(torch.zeros(0)) == 0.0


# -- slow references ------------------------------------------------------------------------------------------------------


def logsigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def slow(name: str, pw: float, pl: float, rw: float, rl: float, nw: int, nl: int) -> float:
    """One pair, with beta 0.3, label smoothing 0.2, gamma 0.4, as the papers write them."""
    h = 0.3 * ((pw - rw) - (pl - rl))
    if name == "sigmoid":
        return -0.8 * logsigmoid(h) - 0.2 * logsigmoid(-h)
    if name == "robust":
        return (-0.8 * logsigmoid(h) + 0.2 * logsigmoid(-h)) / 0.6
    if name == "ipo":
        return (h / 0.3 - 1 / 0.6) ** 2
    if name == "hinge":
        return max(0.0, 1 - h)
    if name == "simpo":
        return -logsigmoid(0.3 * pw / nw - 0.3 * pl / nl - 0.4)
    w, lo = math.exp(pw / nw), math.exp(pl / nl)
    return -pw / nw - 0.3 * logsigmoid(math.log(w / (1 - w) / (lo / (1 - lo))))


LOSSES = ("sigmoid", "robust", "ipo", "hinge", "simpo", "orpo")


def settings_of(name: str) -> DpoSettings:
    smoothing = 0.2 if name in ("sigmoid", "robust") else 0.0
    return DpoSettings(loss=name, beta=0.3, label_smoothing=smoothing, gamma=0.4 if name == "simpo" else 1.0)  # type: ignore[arg-type]


PAIR = st.tuples(*[st.floats(-20, -0.5)] * 4, st.integers(1, 9), st.integers(1, 9))


@pytest.mark.parametrize("name", LOSSES)
@given(rows=st.lists(PAIR, min_size=1, max_size=5))
def test_every_loss_is_its_formula(name: str, rows: list[Any]) -> None:
    table = torch.tensor(rows, dtype=torch.float64)
    loss, _ = pair_loss(table[:, :2], table[:, 2:4], table[:, 4:].long(), 7.0, settings_of(name))
    assert loss.item() == pytest.approx(sum(slow(name, *row) for row in rows) / 7, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "orpo"])
def test_the_sft_term_is_added(name: str) -> None:
    policy, ref, tokens = torch.tensor([[-4.0, -9.0]]), torch.tensor([[-5.0, -8.0]]), torch.tensor([[2, 3]])
    plain, _ = pair_loss(policy, ref, tokens, 1.0, settings_of(name))
    both, metrics = pair_loss(policy, ref, tokens, 1.0, settings_of(name).model_copy(update={"sft_weight": 0.25}))
    assert both.item() - plain.item() == pytest.approx(0.25 * 2, rel=1e-5) and metrics["nll"] == 2.0


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_in_float64(name: str) -> None:
    # No margin of 1 is near, where hinge has its kink.
    policy = torch.tensor([[-4.0, -9.0], [-7.0, -2.0]], dtype=torch.float64, requires_grad=True)
    ref, tokens = torch.tensor([[-5.0, -8.0], [-6.0, -3.0]], dtype=torch.float64), torch.tensor([[2, 3], [4, 1]])
    settings = settings_of(name)
    assert torch.autograd.gradcheck(lambda p: pair_loss(p, ref, tokens, 2.0, settings)[0], policy)


def test_gradients_of_kto_in_float64() -> None:
    policy = torch.tensor([-4.0, -9.0, -3.0], dtype=torch.float64, requires_grad=True)
    ref, liked = torch.tensor([-5.0, -8.0, -3.0], dtype=torch.float64), torch.tensor([True, False, True])

    def loss(p: Tensor) -> Tensor:
        return kto(p, ref, liked, 0.7, 3.0, beta=0.5, desirable_weight=2.0)[0]

    assert torch.autograd.gradcheck(loss, policy)


@pytest.mark.parametrize("name", LOSSES)
def test_a_descent_step_prefers_the_chosen_answer(name: str) -> None:
    """Whatever the curve: at equal log-probabilities the gradient raises the chosen answer and lowers the rejected one."""
    policy = torch.tensor([[-4.0, -4.0]], requires_grad=True)
    pair_loss(policy, policy.detach(), torch.tensor([[2, 2]]), 1.0, settings_of(name))[0].backward()
    assert policy.grad is not None and policy.grad[0, 0] < 0 < policy.grad[0, 1]


def test_defaults_of_beta() -> None:
    found = {name: DpoSettings(loss=name).strength for name in LOSSES if name != "robust"}  # type: ignore[arg-type]
    assert found == {"sigmoid": 0.1, "ipo": 0.1, "hinge": 0.1, "simpo": 2.0, "orpo": 0.1}
    assert DpoSettings(loss="simpo", beta=3.0).strength == 3.0


def test_tokens_of_pairs() -> None:
    tree = TreeBatch.of(forest([branches([7, 7], [[1, 2, 3], [4]]), branches([7], [[5, 6], [8]])]))
    assert pair_tokens(tree).tolist() == [[3, 1], [2, 1]]
