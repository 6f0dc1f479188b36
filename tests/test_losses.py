"""Losses: goldens worked by hand (the arithmetic stands beside them) and slow references that share no code with src."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from danlu.losses.advantages import gae, token_rewards, whiten
from danlu.losses.logprobs import token_logprobs
from danlu.losses.policy import KlEstimator, clipped_policy, importance, kl_estimate, kl_k1, kl_k2, kl_k3, kl_loss
from danlu.losses.preference import pairwise
from danlu.losses.ptx import PtxForm, gradient_share, ptx_weights
from danlu.losses.reduce import weighted_sum
from danlu.losses.value import clipped_value, explained_variance

Near = Callable[..., None]
ZERO_LOG = 0.0  # log 1: the old policy's log-probability that makes exp(logp) the ratio
NUMBERS = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=8)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def leaf(*values: float) -> Tensor:
    return t(*values).requires_grad_()


def log_t(*values: float) -> Tensor:
    return torch.tensor([math.log(v) for v in values], requires_grad=True)


# --- the normaliser ---------------------------------------------------------------------------------------------------


def test_weighted_sum_adds_up_in_fp32() -> None:
    values = torch.full((4096,), 0.01, dtype=torch.bfloat16)
    exact = float(values[0]) * 4096
    found = weighted_sum(values, torch.ones(4096, dtype=torch.bfloat16), 1.0)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact, rel=1e-4)


# --- reward model -----------------------------------------------------------------------------------------------------


def test_pairwise_by_hand() -> None:
    # gaps ln 3 and 0: sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2; -(ln 3/4 + ln 1/2) / 2 = ln(8/3) / 2
    loss, metrics = pairwise(t(math.log(3), 1), t(0, 1), 2.0)
    assert loss.item() == pytest.approx(math.log(8 / 3) / 2, rel=1e-6)
    # One pair is right, one is a tie (half right); the gaps' sum is ln 3.
    assert metrics == {"right": 1.5, "margin": pytest.approx(math.log(3)), "pairs": 2.0}


def test_pairwise_with_margin_by_hand() -> None:
    # gap 2 ln 3 less margin ln 3 is ln 3: -ln 3/4
    loss, metrics = pairwise(t(2 * math.log(3)), t(0), 1.0, margin_B=t(math.log(3)))
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert metrics["margin"] == pytest.approx(2 * math.log(3))  # the score's own gap


def test_pairwise_with_centring_by_hand() -> None:
    # gap 0: ln 2; plus 0.1 * (1.5 + 1.5)^2 = 0.9; both over 2
    loss, _ = pairwise(t(1.5), t(1.5), 2.0, centring=0.1)
    assert loss.item() == pytest.approx((math.log(2) + 0.9) / 2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairwise_stays_finite_far_out(dtype: torch.dtype) -> None:
    chosen = torch.tensor([-300.0, 300.0], dtype=dtype, requires_grad=True)
    loss, _ = pairwise(chosen, -chosen.detach(), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(600.0)  # -logsigmoid(-600) = 600, -logsigmoid(600) = 0
    assert chosen.grad is not None and chosen.grad.tolist() == [-1.0, 0.0]


# --- policy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # eps = 0.2. loss = max(-A rho, -A clip(rho)); d loss / d logp = -A rho where the plain term is the larger, else 0.
        (1.5, 2.0, -2.4, 0.0),  # -3.0 or -2 * 1.2: enough gained, no more push
        (0.5, 2.0, -1.0, -1.0),  # -1.0 or -2 * 0.8 = -1.6: the good token lost, full push back
        (1.5, -2.0, 3.0, 3.0),  # 3.0 or 2 * 1.2: the bad token gained, full push down
        (0.5, -2.0, 1.6, 0.0),  # 1.0 or 2 * 0.8: enough lost
        (1.1, 2.0, -2.2, -2.2),  # inside the range both are equal
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_clipped_policy_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    logp = log_t(ratio)
    found, metrics = clipped_policy(logp, t(ZERO_LOG), t(advantage), t(1), 1.0, clip_range=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    # Where plain and clipped are equal, torch.maximum splits the gradient, and both halves are the same.
    assert logp.grad is not None and logp.grad.item() == pytest.approx(gradient, rel=1e-5, abs=1e-6)
    assert metrics["clip_fraction"] == (1.0 if gradient == 0 else 0.0)
    assert metrics["ratio_error"] == pytest.approx(abs(ratio - 1), rel=1e-5)


def test_clipped_policy_weights_and_metrics_by_hand() -> None:
    # ratios 1.5, 1, 3; A = 1, 1, 1; weights 1, 1, 0 over 2: (-1.2 - 1 - 0) / 2 = -1.1; one of two is clipped
    loss, metrics = clipped_policy(log_t(1.5, 1, 3), t(0, 0, 0), t(1, 1, 1), t(1, 1, 0), 2.0)
    assert loss.item() == pytest.approx(-1.1, rel=1e-6)
    assert metrics["clip_fraction"] == 0.5
    # k3 of KL(old || new) at a sample of old: rho - 1 - ln rho = 0.5 - ln 1.5, and 0; over 2
    assert metrics["approx_kl"] == pytest.approx((0.5 - math.log(1.5)) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # eps = 0.2, eps_high = 0.5
        (1.4, 2.0, -2.8, -2.8),  # not yet enough: -2 * 1.4
        (1.6, 2.0, -3.0, 0.0),  # -3.2 or -2 * 1.5
        (0.7, -2.0, 1.6, 0.0),  # downwards it is 0.8 as ever: 1.4 or 2 * 0.8
        (1.6, -2.0, 3.2, 3.2),  # a bad token that gained is pushed down wherever it is
    ],
)
def test_a_wider_upper_range_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    logp = log_t(ratio)
    found, _ = clipped_policy(logp, t(ZERO_LOG), t(advantage), t(1), 1.0, clip_range=0.2, clip_range_high=0.5)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert logp.grad is not None and logp.grad.item() == pytest.approx(gradient, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "bounded"),
    [
        # c = 3: with A < 0 at most 3 |A|, and no more gradient there
        (5.0, -2.0, 6.0, 0.0, 1.0),  # 10 or 3 * 2
        (2.5, -2.0, 5.0, 5.0, 0.0),  # 5 or 6
        (0.5, -2.0, 1.6, 0.0, 0.0),  # clipped as ever
        (5.0, 2.0, -2.4, 0.0, 0.0),  # A > 0: nothing changes
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float, bounded: float) -> None:
    logp = log_t(ratio)
    found, metrics = clipped_policy(logp, t(ZERO_LOG), t(advantage), t(1), 1.0, dual_clip=3.0)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert logp.grad is not None and logp.grad.item() == pytest.approx(gradient, rel=1e-5, abs=1e-6)
    assert metrics["dual_clip_fraction"] == bounded


def test_importance_by_hand() -> None:
    # old / behaviour: 0.5, 1.5 and 4, of which the last is cut to 2
    found = importance(log_t(0.1, 0.3, 0.8).detach(), log_t(0.2, 0.2, 0.2).detach(), 2.0)
    assert found.tolist() == pytest.approx([0.5, 1.5, 2.0], rel=1e-5)
    # Ratios 1; A = 1, -1, 1; i = 0.5, 1.5, 2: (-0.5 + 1.5 - 2) / 2 = -0.5, gradients -A i / 2
    logp = leaf(0, 0, 0)
    loss, metrics = clipped_policy(logp, t(0, 0, 0), t(1, -1, 1), t(1, 1, 1), 2.0, importance_T=found)
    loss.backward()
    assert loss.item() == pytest.approx(-0.5, rel=1e-5)
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx([-0.25, 0.75, -1.0], rel=1e-5)
    # The ratio is that to the policy before the update, whatever sampled the tokens.
    assert (metrics["ratio_mean"], metrics["ratio_max"], metrics["ratio_error"]) == (1.5, 1.0, 0.0)


@given(
    NUMBERS,
    st.integers(0, 99),
    st.sampled_from([0.1, 0.2, 0.5]),
    st.sampled_from([None, 0.1, 0.6]),
    st.sampled_from([None, 1.5, 3.0]),
    st.booleans(),
)
def test_clipped_policy_against_a_loop(
    logps: list[float], seed: int, clip: float, high: float | None, dual: float | None, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, advantage = (torch.randn(len(logps), generator=generator) for _ in range(2))
    weights, stale = (torch.rand(len(logps), generator=generator) for _ in range(2))
    expected = 0.0
    rows = zip(logps, old.tolist(), advantage.tolist(), weights.tolist(), stale.tolist(), strict=True)
    for p, o, a, w, i in rows:
        rho = math.exp(p - o)
        # The papers' own form: the minimum of the two surrogates, for bad tokens at least c A.
        gain = min(rho * a, min(max(rho, 1 - clip), 1 + (clip if high is None else high)) * a)
        if dual is not None and a < 0:
            gain = max(gain, dual * a)
        expected -= w * (i if weighted else 1.0) * gain / 3.0
    options = {"clip_range_high": high, "dual_clip": dual, "importance_T": stale if weighted else None}
    found = clipped_policy(t(*logps), old, advantage, weights, 3.0, clip_range=clip, **options)[0]  # type: ignore[arg-type]
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"clip_range_high": 0.6}, {"dual_clip": 1.6}, {"clip_range": 0.05}], ids=str)
def test_gradients_of_the_policy_loss(options: dict[str, float]) -> None:
    """Against differences, in float64, at ratios that are nowhere near a corner."""
    ratios = torch.tensor([0.5, 0.9, 1.1, 1.5, 2.5], dtype=torch.float64).repeat(2)
    advantages = torch.tensor([1.0, -0.7], dtype=torch.float64).repeat_interleave(5)
    stale = torch.linspace(0.3, 1.7, 10, dtype=torch.float64)

    def loss(logp: Tensor) -> Tensor:
        ones = torch.ones_like(logp)
        zeros = torch.zeros_like(logp)
        return clipped_policy(logp, zeros, advantages, ones, 10.0, importance_T=stale, **options)[0]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, (ratios.log().requires_grad_(),))


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_kl_estimators_by_hand() -> None:
    # p = 1/2, q = 1/4: k1 = ln 2; k2 = (ln 2)^2 / 2; k3 = q/p - 1 - ln(q/p) = -1/2 + ln 2
    assert kl_k1(log_t(0.5), log_t(0.25)).item() == pytest.approx(math.log(2), rel=1e-6)
    assert kl_k2(log_t(0.5), log_t(0.25)).item() == pytest.approx(math.log(2) ** 2 / 2, rel=1e-6)
    assert kl_k3(log_t(0.5), log_t(0.25)).item() == pytest.approx(math.log(2) - 0.5, rel=1e-6)


def test_kl_estimators_are_unbiased() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = (p * (p / q).log()).sum()
    for estimator in (kl_k1, kl_k3):
        assert (p * estimator(p.log(), q.log())).sum().item() == pytest.approx(exact.item(), rel=1e-5)


@given(NUMBERS, NUMBERS)
def test_k3_is_never_negative(a: list[float], b: list[float]) -> None:
    size = min(len(a), len(b))
    assert (kl_k3(t(*a[:size]), t(*b[:size])) >= -1e-7).all()  # one rounding of expm1 at most
    assert kl_k3(t(*a), t(*a)).tolist() == [0.0] * len(a)


def mean_gradient(estimator: KlEstimator, logits: Tensor, q: Tensor) -> Tensor:
    """The mean over samples of p of the estimator's gradient; p itself is not differentiated, as in training."""
    logp = torch.log_softmax(logits, -1)
    [found] = torch.autograd.grad((logp.detach().exp() * kl_estimate(logp, q.log(), estimator)).sum(), logits)
    return found


def test_what_the_gradients_of_the_estimators_are_those_of() -> None:
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    logp = torch.log_softmax(logits, -1)
    [reverse] = torch.autograd.grad((logp.exp() * (logp - q.log())).sum(), logits, retain_graph=True)
    [forward] = torch.autograd.grad((q * (q.log() - logp)).sum(), logits)
    assert not torch.allclose(reverse, forward, atol=1e-2)
    assert torch.allclose(mean_gradient("k2", logits, q), reverse)
    assert torch.allclose(mean_gradient("k3", logits, q), forward)
    assert torch.allclose(mean_gradient("k1", logits, q), torch.zeros_like(q))


@pytest.mark.parametrize(("estimator", "expected"), [("k2", math.log(2) ** 2), ("k3", 2 * math.log(2) - 1)])
def test_kl_loss_by_hand(estimator: KlEstimator, expected: float) -> None:
    # p = 1/2, q = 1/4 twice and a token that does not count; weights 1, 3, 0 over 2: twice the estimate
    logp, ref = log_t(0.5, 0.5, 0.9), log_t(0.25, 0.25, 0.1)
    found = kl_loss(logp, ref, t(1, 3, 0), 2.0, estimator=estimator)
    found.backward()
    assert found.item() == pytest.approx(expected, rel=1e-5)
    # d k2 / d logp = ln(p/q) = ln 2; d k3 / d logp = 1 - q/p = 1/2
    slope = math.log(2) if estimator == "k2" else 0.5
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx([slope / 2, 1.5 * slope, 0.0], rel=1e-5)


# --- value ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        # eps = 0.2. 0.5 max((V - R)^2, (clip(V, old +- eps) - R)^2)
        (1.0, 1.0, 3.0, 2.0, -2.0),  # inside: 0.5 * 4; gradient V - R
        (2.0, 1.0, 3.0, 1.62, 0.0),  # moved towards R beyond 1.2: 0.5 * max(1, 1.8^2), and no more push
        (0.0, 1.0, 3.0, 4.5, -3.0),  # moved away below 0.8: 0.5 * max(9, 2.2^2), full push
        (2.0, 1.0, 0.0, 2.0, 2.0),  # the same above
        (0.5, 1.0, 0.0, 0.32, 0.0),  # towards R below 0.8: 0.5 * max(0.25, 0.64)
    ],
)
def test_clipped_value_by_hand(value: float, old: float, target: float, loss: float, gradient: float) -> None:
    values = leaf(value)
    found, metrics = clipped_value(values, t(old), t(target), t(1), 1.0, clip_range=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert values.grad is not None and values.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert metrics["value_error"] == pytest.approx((value - target) ** 2)


def test_clipped_value_weights_by_hand() -> None:
    # errors 1, 2, 5 inside the range, weights 1, 1, 0 over 4: 0.5 * (1 + 4) / 4 = 0.625
    loss, metrics = clipped_value(t(1, 2, 5), t(1, 2, 5), t(0, 0, 0), t(1, 1, 0), 4.0)
    assert loss.item() == pytest.approx(0.625)
    assert metrics["value_error"] == pytest.approx(1.25)


def test_gradients_of_the_value_loss() -> None:
    values = torch.tensor([1.0, 2.0, 0.1, 2.5, 0.4], dtype=torch.float64, requires_grad=True)
    old, target = torch.ones_like(values), torch.tensor([3.0, 3.0, 3.0, 0.0, 0.0], dtype=torch.float64)
    loss = lambda v: clipped_value(v, old, target, torch.ones_like(v), 5.0)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (values,))


def test_explained_variance_by_hand() -> None:
    # R = 0, 2, 4: variance 8/3. V = 1, 2, 3: R - V = -1, 0, 1, variance 2/3; 1 - 1/4
    assert explained_variance(t(1, 2, 3), t(0, 2, 4)) == pytest.approx(0.75)
    assert explained_variance(t(7, 9, 11), t(0, 2, 4)) == pytest.approx(1.0)  # off by a constant: nothing varies
    assert explained_variance(t(5, 5, 5), t(0, 2, 4)) == pytest.approx(0.0)
    assert explained_variance(t(4, 2, 0), t(0, 2, 4)) == pytest.approx(-3.0)  # R - V = -4, 0, 4: 32/3
    assert explained_variance(t(1, 2, 3), t(2, 2, 2)) == 0.0


# --- PTX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "weights"), [("additive", (1.0, 0.25)), ("convex", (0.75, 0.25))])
def test_the_forms_of_ptx_by_hand(form: PtxForm, weights: tuple[float, float]) -> None:
    assert ptx_weights(form, 0.25) == weights


def test_the_share_of_ptx_by_hand() -> None:
    assert gradient_share(3.0, 1.0) == 0.75
    assert (gradient_share(0.0, 2.0), gradient_share(2.0, 0.0), gradient_share(0.0, 0.0)) == (0.0, 1.0, 0.0)


# --- rewards, advantages ----------------------------------------------------------------------------------------------


def test_token_rewards_by_hand() -> None:
    # log-ratios 0.5, -1, 2 at 0.1: -0.05, 0.1, -0.2; the score 3 comes on top of the last
    found = token_rewards(3.0, t(-1, -2, -1), t(-1.5, -1, -3), kl_coef=0.1)
    assert found.tolist() == pytest.approx([-0.05, 0.1, 2.8], rel=1e-5)


def test_token_rewards_by_each_estimator() -> None:
    # log-ratios 0.5 and -1; k2: 0.125, 0.5; k3: e^-0.5 - 1 + 0.5, e - 1 - 1
    given = t(-1, -2), t(-1.5, -1)
    second = token_rewards(3.0, *given, kl_coef=0.1, estimator="k2")
    assert second.tolist() == pytest.approx([-0.0125, 2.95], rel=1e-5)
    third = token_rewards(3.0, *given, kl_coef=0.1, estimator="k3")
    assert third.tolist() == pytest.approx([-0.1 * (math.exp(-0.5) - 0.5), 3 - 0.1 * (math.e - 2)], rel=1e-5)


def test_token_rewards_leave_their_arguments_alone() -> None:
    logp, ref = t(-1.0, -2.0), t(-1.0, -2.0)
    assert token_rewards(1.0, logp, ref, kl_coef=0.0).tolist() == [0.0, 1.0]
    assert (logp.tolist(), ref.tolist()) == ([-1.0, -2.0], [-1.0, -2.0])


def test_gae_by_hand() -> None:
    # r = 1, 0, 2; V = 0.5, 1, 1.5; gamma = lambda = 0.5, so gamma * lambda = 0.25
    # delta = 1 + 0.5 * 1 - 0.5 = 1;  0 + 0.5 * 1.5 - 1 = -0.25;  2 + 0 - 1.5 = 0.5
    # A_3 = 0.5;  A_2 = -0.25 + 0.25 * 0.5 = -0.125;  A_1 = 1 + 0.25 * -0.125 = 0.96875;  R = A + V
    advantages, returns = gae(t(1, 0, 2), t(0.5, 1, 1.5), gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [0.96875, -0.125, 0.5]
    assert returns.tolist() == [1.46875, 0.875, 2.0]


def test_gae_with_lambda_zero_is_the_one_step_error() -> None:
    # gamma 1: 1 + 1 - 0.5;  0 + 1.5 - 1;  2 - 1.5
    assert gae(t(1, 0, 2), t(0.5, 1, 1.5), gamma=1.0, gae_lambda=0.0)[0].tolist() == [1.5, 0.5, 0.5]


def test_gae_with_both_one_is_rewards_to_go_minus_value() -> None:
    # rewards to go 3, 2, 2
    advantages, returns = gae(t(1, 0, 2), t(0.5, 1, 1.5), gamma=1.0, gae_lambda=1.0)
    assert advantages.tolist() == [2.5, 1.0, 0.5]
    assert returns.tolist() == [3.0, 2.0, 2.0]


def test_a_lambda_for_the_critic_alone() -> None:
    # Returns with lambda 1 and gamma 1 are the rewards to go, 3, 2, 2; the advantages are those of lambda 0.
    advantages, returns = gae(t(1, 0, 2), t(0.5, 1, 1.5), gamma=1.0, gae_lambda=0.0, critic_lambda=1.0)
    assert advantages.tolist() == [1.5, 0.5, 0.5]
    assert returns.tolist() == [3.0, 2.0, 2.0]


@given(NUMBERS, st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_gae_against_its_definition(rewards: list[float], seed: int, gamma: float, lam: float) -> None:
    values = torch.randn(len(rewards), generator=torch.Generator().manual_seed(seed)).tolist()
    following = [*values[1:], 0.0]
    deltas = [r + gamma * f - v for r, f, v in zip(rewards, following, values, strict=True)]
    # Schulman et al. 2016, eq. 16: sum_l (gamma lambda)^l delta_{t+l}
    expected = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:])) for i in range(len(deltas))]
    advantages, returns = gae(t(*rewards), t(*values), gamma=gamma, gae_lambda=lam)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, values, strict=True)], rel=1e-4, abs=1e-5)


def test_whiten_by_hand() -> None:
    # 1, 3 and 5, 7 together: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    first, second = whiten([t(1, 3), t(5, 7)])
    root = math.sqrt(5)
    assert first.tolist() == pytest.approx([-3 / root, -1 / root])
    assert second.tolist() == pytest.approx([1 / root, 3 / root])
    kept = whiten([t(1, 3), t(5, 7)], shift_mean=False)
    assert kept[0].tolist() == pytest.approx([4 - 3 / root, 4 - 1 / root])


def test_whiten_with_moments_of_all_processes() -> None:
    # This process holds 1, 3; the moments are those of 1, 3, 5, 7: count 4, sum 16, squares 84
    [found] = whiten([t(1, 3)], moments=(4.0, 16.0, 84.0))
    assert found.tolist() == pytest.approx([-3 / math.sqrt(5), -1 / math.sqrt(5)])


def test_whiten_of_equal_values_is_zero() -> None:
    assert whiten([t(2, 2), t(2)])[0].tolist() == [0.0, 0.0]


# --- log-probabilities ------------------------------------------------------------------------------------------------


def problem(bias: bool, rows: int = 7, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states [T, 5], weight [11, 5] (and bias [11]), targets [T] and what comes down from the loss."""
    generator = torch.Generator().manual_seed(rows)
    shapes: list[tuple[int, ...]] = [(rows, 5), (11, 5)] + ([(11,)] if bias else [])
    leaves = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    return leaves, torch.randint(0, 11, (rows,), generator=generator), torch.randn(rows, generator=generator)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
def test_token_logprobs_and_gradients(bias: bool, temperature: float, chunk: int, near: Near) -> None:
    leaves, targets, upstream = problem(bias)
    found, _ = token_logprobs(*leaves[:2], targets, bias_V=[*leaves, None][2], temperature=temperature, chunk=chunk)
    gradients = torch.autograd.grad((found * upstream).sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logits = exact[0] @ exact[1].T + (exact[2] if bias else 0.0)
    expected = torch.log_softmax(logits / temperature, -1)[torch.arange(7), targets]
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), exact)
    near(found, expected.float())
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        near(gradient, reference.float())


@pytest.mark.parametrize("chunk", [2, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy(chunk: int, temperature: float, near: Near) -> None:
    leaves, targets, _ = problem(bias=True)
    _, entropy = token_logprobs(
        *leaves[:2], targets, bias_V=leaves[2], temperature=temperature, chunk=chunk, entropy=True
    )
    logp = torch.log_softmax(F.linear(*leaves) / temperature, -1)
    near(entropy, -(logp.exp() * logp).sum(-1))
    plain = token_logprobs(*leaves[:2], targets)[1]
    assert plain.tolist() == [0.0] * 7 and not plain.requires_grad


def test_uniform_distribution_by_hand() -> None:
    # Zero weights over 4 tokens: log p = -ln 4 and entropy ln 4 for every target.
    logp, entropy = token_logprobs(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]), entropy=True)
    assert logp.tolist() == pytest.approx([-math.log(4)] * 2)
    assert entropy.tolist() == pytest.approx([math.log(4)] * 2)


def test_frozen_inputs_get_no_gradient(near: Near) -> None:
    """LoRA: the head is frozen and only hidden states learn; a frozen trunk is the other way round."""
    leaves, targets, upstream = problem(bias=True)
    both = torch.autograd.grad((token_logprobs(*leaves[:2], targets, bias_V=leaves[2])[0] * upstream).sum(), leaves)
    for learning in range(3):
        parts = [x.detach().requires_grad_(i == learning) for i, x in enumerate(leaves)]
        (token_logprobs(*parts[:2], targets, bias_V=parts[2], chunk=4)[0] * upstream).sum().backward()
        assert [p.grad is not None for p in parts] == [i == learning for i in range(3)]
        grad = parts[learning].grad
        assert grad is not None
        near(grad, both[learning])


def test_bf16_hidden_states_keep_fp32_results(near: Near) -> None:
    leaves, targets, upstream = problem(bias=False, rows=40, dtype=torch.bfloat16)
    found, _ = token_logprobs(*leaves, targets, chunk=16)
    assert found.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.log_softmax(exact[0] @ exact[1].T, -1)[torch.arange(40), targets]
    near(found, expected.float(), 0.01)
    gradients = torch.autograd.grad((found * upstream).sum(), leaves)
    references = torch.autograd.grad((expected * upstream).sum(), exact)
    for gradient, reference in zip(gradients, references, strict=True):
        assert gradient.dtype == torch.bfloat16
        near(gradient.float(), reference.float(), 0.02)


def test_no_rows() -> None:
    weight = torch.ones(4, 3, requires_grad=True)
    logp, _ = token_logprobs(torch.ones(0, 3), weight, torch.zeros(0, dtype=torch.int64))
    logp.sum().backward()
    assert logp.shape == (0,) and weight.grad is not None and weight.grad.abs().sum() == 0
