"""Sizes that come back: how much is added, and that what is added changes nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from families import make
from hypothesis import given
from hypothesis import strategies as st

from danlu.losses.logprobs import token_logprobs, weighted_nll
from danlu.models import root as roots
from danlu.models.blocks import Blocks
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.shapes import compiles, rounded
from danlu.training.step import language_loss
from danlu.tree import NO_PREDICTOR, TreeBatch, conversation, forest


@given(st.integers(1, 100_000))
def test_a_size_grows_by_an_eighth_at_most(size: int) -> None:
    assert 0 <= rounded(size) - size < max(16, size / 8 + 1)
    assert rounded(rounded(size)) == rounded(size)


def test_sizes_by_hand() -> None:
    # 2,077 lies above 2,048, whose eighth is 256: 9 * 256. 100 lies above 64, whose eighth is less than 16.
    assert [rounded(n) for n in (1, 16, 17, 100, 2048, 2077)] == [16, 16, 32, 112, 2048, 2304]
    assert rounded(70, 64) == 128


def test_steps_of_one_budget_have_few_sizes() -> None:
    assert len({rounded(n) for n in range(1800, 2300)}) <= 4
    assert all(a <= b for a, b in pairwise(rounded(n) for n in range(1, 5000)))


def test_only_halves_on_a_cpu_are_compiled() -> None:
    assert compiles(torch.device("cpu"), torch.bfloat16)
    assert not compiles(torch.device("cpu"), torch.float32)
    assert not compiles(torch.device("cuda"), torch.bfloat16)


def tree() -> TreeBatch:
    return TreeBatch.of(forest([conversation(range(3, 3 + n), [0.0] + [1.0] * (n - 1)) for n in (5, 11, 3)]))


def test_the_tree_behind_carries_nothing() -> None:
    filled = tree().filled(4)
    assert filled.tokens == 23
    assert filled.nodes == tree().nodes + 1
    assert filled.loss_weight_T[19:].tolist() == [0.0] * 4
    assert filled.predictor_T[19:].tolist() == [NO_PREDICTOR] * 4
    assert filled.loss_index().tolist() == tree().loss_index().tolist()
    assert tree().filled(0).tokens == 19


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "falcon_alibi"])
def test_a_step_is_the_same_with_a_tree_behind(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, so that nothing else differs: the same loss and the same gradients."""

    def step(fill: bool) -> tuple[float, list[torch.Tensor]]:
        monkeypatch.setattr(roots, "compiles", lambda *_: fill)
        model = RootModel(SeparateModels({"policy": make(family)}, ["policy"]))
        sizes: list[int] = []
        trunk = model.trunks.trunk("policy")  # type: ignore[operator]
        trunk.register_forward_hook(lambda _, __, out: sizes.append(out.last_hidden_state.shape[1]))
        loss = model(tree(), "policy", lambda out: language_loss(out, 1.0)[0])
        loss.backward()
        assert sizes == [32 if fill else 19]
        return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]

    (plain, grads), (filled, others) = step(False), step(True)
    assert filled == pytest.approx(plain, rel=1e-6)
    assert len(grads) == len(others) > 4
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(other, grad, rtol=1e-4, atol=1e-5)


def test_steps_in_bf16_use_rounded_sizes() -> None:
    model = RootModel(SeparateModels({"policy": make("llama")}, ["policy"]))
    sizes: list[int] = []
    model.trunks.trunk("policy").register_forward_hook(  # type: ignore[operator]
        lambda _, __, out: sizes.append(out.last_hidden_state.shape[1])
    )
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(tree(), "policy", lambda out: out.hidden_TD)
    assert sizes == [32]
    assert hidden.shape[0] == 19


@pytest.mark.parametrize("chunk", [None, 7, 16])
def test_the_head_in_bf16_gives_back_its_own_rows(chunk: int | None) -> None:
    """23 rows go through as 32; gradients are those of fp32 within the rounding of bf16."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(23, 8, generator=generator), torch.randn(37, 8, generator=generator)
    targets = torch.randint(0, 37, (23,), generator=generator)
    factors = torch.rand(23, generator=generator)

    def both(dtype: torch.dtype) -> list[torch.Tensor]:
        h, w = hidden.to(dtype).requires_grad_(), weight.clone().requires_grad_()
        loss = weighted_nll(h, w, targets, factors, chunk=chunk)
        logprobs, _ = token_logprobs(h, w, targets, chunk=chunk)
        (loss + (logprobs * factors).sum() / 2).backward()
        assert logprobs.shape == (23,)
        assert h.grad is not None
        assert w.grad is not None
        return [loss.detach().float(), logprobs.detach().float(), h.grad.float(), w.grad]

    for found, expected in zip(both(torch.bfloat16), both(torch.float32), strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.06)


def test_a_frozen_heads_gradient_has_its_own_rows() -> None:
    """Where only hidden states learn, the forward pass takes their gradient at once."""
    hidden = torch.ones(23, 8, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = token_logprobs(hidden, torch.eye(37, 8), torch.zeros(23, dtype=torch.int64))
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (23, 8)


def test_blocks_have_few_shapes() -> None:
    """Of forty batches of random nodes; before sizes were rounded there were hundreds."""
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(40):
        lengths = torch.randint(5, 200, (12,), generator=generator).tolist()
        batch = TreeBatch.of(forest([conversation([1] * n, [0.0] * n) for n in lengths]))
        shapes |= {(tuple(b.query_NQ.shape), b.key_NS.shape[1]) for b in Blocks(batch).items}
    assert len(shapes) < 40
    assert all(n & (n - 1) == 0 and q & (q - 1) == 0 for (n, q), _ in shapes)
