"""The chunked head against the plain one: log-probabilities, cross entropy, gradients, adapters, and what it holds at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from danlu.config import SftSettings
from danlu.exceptions import ModelError
from danlu.losses.logprobs import _compiled, token_logprobs, weighted_nll
from danlu.models.roles import AdapterRoles, SeparateModels
from danlu.models.root import RootModel
from danlu.parsing import parse
from danlu.trainers import sft
from danlu.training.logprobs import logprobs, nll
from danlu.tree import TreeBatch, branches

Near = Callable[..., None]
ROWS, WIDTH, VOCAB = 23, 6, 37
RULES = [{}, {"scale": 0.4}, {"softcap": 1.5}, {"scale": 2.0, "softcap": 3.0}]
TREE = TreeBatch.of(branches([5, 9, 30], [[7, 8, 44, 12], [3, 3]]))


def problem(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, weight (and bias); targets; one number per row of any sign."""
    generator = torch.Generator().manual_seed(3)
    shapes: list[tuple[int, ...]] = [(ROWS, WIDTH), (VOCAB, WIDTH)] + ([(VOCAB,)] if bias else [])
    leaves = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return leaves, targets, torch.randn(ROWS, generator=generator)


def plain(
    leaves: list[Tensor], targets: Tensor, temperature: float, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Log-probabilities from whole logits, in double precision."""
    return whole_logprobs(leaves, temperature, scale, softcap)[torch.arange(ROWS), targets]


def whole_logprobs(
    leaves: list[Tensor], temperature: float, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Of every token of the vocabulary."""
    logits = (nn.functional.linear(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, -1)


def test_cross_entropy_by_hand() -> None:
    # p = 1/2, 1/4, 1/8 and weights 1, 0, 2: 1 * ln 2 + 0 * ln 4 + 2 * ln 8 = 7 ln 2. The head is the identity: logits are rows.
    rows = (
        torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.125, 0.5, 0.375]]).log().clamp_(min=-80).requires_grad_()
    )
    loss = weighted_nll(rows, torch.eye(3), torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, 0.0, 2.0]))
    assert loss.item() == pytest.approx(7 * math.log(2), rel=1e-6)
    [grad] = torch.autograd.grad(loss / 5, rows)
    # w (p - onehot) / 5
    assert grad.flatten().tolist() == pytest.approx([-0.1, 0.1, 0, 0, 0, 0, -0.35, 0.2, 0.15], abs=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize("learning", [(0, 1, 2), (0,), (1, 2)], ids=["all", "hidden", "head"])
def test_gradients_are_those_of_whole_logits(
    rule: dict[str, float], bias: bool, chunk: int | None, learning: tuple[int, ...], near: Near
) -> None:
    leaves, targets, upstream = problem(bias)
    parts = [x.detach().requires_grad_(i in learning) for i, x in enumerate(leaves)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    options = {"bias_V": parts[2] if bias else None, "chunk": chunk, **rule}
    found, _ = token_logprobs(*parts[:2], targets, temperature=0.7, **options)
    expected = plain(exact, targets, 0.7, **rule)
    near(found, expected.float())
    loss = weighted_nll(*parts[:2], targets, upstream, **options)
    expected_loss = -(plain(exact, targets, 1.0, **rule) * upstream).sum()
    near(loss, expected_loss.float())
    for result, reference in (
        ((found * upstream).sum(), (expected * upstream).sum()),
        (3.0 * loss, 3.0 * expected_loss),
    ):
        wanted = [p for p in parts if p.requires_grad]
        own = torch.autograd.grad(result, wanted)
        right = torch.autograd.grad(reference, [e for e, p in zip(exact, parts, strict=True) if p.requires_grad])
        for gradient, other in zip(own, right, strict=True):
            near(gradient, other.float())


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize("learning", [(0, 1, 2), (0,), (1, 2)], ids=["all", "hidden", "head"])
def test_gradients_of_entropy_are_those_of_whole_logits(
    rule: dict[str, float], chunk: int | None, learning: tuple[int, ...]
) -> None:
    """In float64, of log-probabilities and entropies together, and of the entropies alone."""
    leaves, targets, upstream = problem(True, torch.float64)
    parts = [x.detach().requires_grad_(i in learning) for i, x in enumerate(leaves)]
    wanted = [p for p in parts if p.requires_grad]
    found, entropy = token_logprobs(
        *parts[:2], targets, bias_V=parts[2], temperature=0.7, chunk=chunk, entropy=True, **rule
    )
    logp = whole_logprobs(parts, 0.7, **rule)
    expected, expected_entropy = logp[torch.arange(ROWS), targets], -(logp.exp() * logp).sum(-1)
    assert torch.allclose(entropy, expected_entropy, atol=1e-12) and entropy.dtype == torch.float64
    tilt = -0.3 * upstream.flip(0)
    for result, reference in (
        ((found * upstream + entropy * tilt).sum(), (expected * upstream + expected_entropy * tilt).sum()),
        (entropy.square().sum(), expected_entropy.square().sum()),
    ):
        own = torch.autograd.grad(result, wanted, retain_graph=True)
        right = torch.autograd.grad(reference, wanted, retain_graph=True)
        for gradient, other in zip(own, right, strict=True):
            assert torch.allclose(gradient, other, atol=1e-10)


def test_gradcheck_of_log_probabilities_and_entropies() -> None:
    leaves, targets, _ = problem(True, torch.float64)
    few = [leaves[0].detach()[:4].requires_grad_(), *leaves[1:]]

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(
            hidden, weight, targets[:4], bias_V=bias, temperature=0.7, scale=2.0, softcap=3.0, chunk=3, entropy=True
        )

    assert torch.autograd.gradcheck(function, few)


def test_the_gradient_of_entropy_by_hand() -> None:
    # The head is the identity, p = 1/2, 1/4, 1/4: H = 1.5 ln 2. dH/dz_j = -p_j (log p_j + H): -1/2 (-1 + 1.5) ln 2 and twice
    # -1/4 (-2 + 1.5) ln 2. Going that way evens the distribution out.
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    _, entropy = token_logprobs(logits, torch.eye(3), torch.tensor([0]), entropy=True)
    assert entropy.item() == pytest.approx(1.5 * math.log(2), rel=1e-6)
    [grad] = torch.autograd.grad(entropy.sum(), logits)
    assert grad.flatten().tolist() == pytest.approx([-0.25 * math.log(2), 0.125 * math.log(2), 0.125 * math.log(2)])


def test_bf16_hidden_states_give_an_fp32_head_an_fp32_gradient(near: Near) -> None:
    """Each row adds 2^-12 of the largest gradient: summed in bf16 it would be lost."""
    hidden = torch.ones(4097, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, requires_grad=True)
    targets = torch.zeros(4097, dtype=torch.int64)
    weighted_nll(hidden, weight, targets, torch.ones(4097), chunk=1).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert weight.grad.tolist() == [[-2048.5], [2048.5]]  # 4097 rows of p - 1 = -1/2


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor):
                self.entries = max(self.entries, made.untyped_storage().nbytes() // made.element_size())
        return out


@pytest.mark.parametrize("form", ["logprobs", "frozen", "nll", "entropy"])
def test_the_largest_tensor_does_not_grow_with_the_rows(form: str) -> None:
    def largest(rows: int) -> int:
        hidden = torch.randn(rows, 4, requires_grad=True)
        weight = torch.randn(512, 4, requires_grad=form != "frozen")
        targets = torch.zeros(rows, dtype=torch.int64)
        with Largest() as seen:
            if form == "nll":
                weighted_nll(hidden, weight, targets, torch.ones(rows), softcap=2.0, chunk=32).backward()
            else:
                logp, entropy = token_logprobs(hidden, weight, targets, chunk=32, entropy=form == "entropy")
                (logp.sum() + entropy.sum()).backward()
        return seen.entries

    assert largest(128) == largest(2048) == 32 * 512


@pytest.mark.parametrize("family", ["gemma2", "granite", "phi", "llama"])
def test_tied_embeddings_caps_and_factors_of_families(family: str, near: Near) -> None:
    """The embedding's gradient is that of both its uses (Gemma 2 ties, caps; Granite scales; Phi has a bias)."""
    index = TREE.action_index()
    grads = []
    for head in ("chunks", "whole"):
        model = make(family)
        root = RootModel(SeparateModels({"policy": model}, ["policy"]))
        if head == "chunks":
            loss = root(TREE, "policy", lambda out: nll(out, index, torch.ones(len(index))))
        else:
            rows = root(TREE, "policy", lambda out: out.logits(TREE.predictor_T[index]))
            loss = -torch.log_softmax(rows, -1)[torch.arange(len(index)), TREE.input_ids_T[index]].sum()
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[1].items():
        near(grads[0][name], gradient)


# --- LoRA on the head -------------------------------------------------------------------------------------------------


def adapted(**options: Any) -> AdapterRoles:
    roles = AdapterRoles(make("llama"), ["policy"], rank=3, target=["q_proj", "lm_head"], **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in roles.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return roles


def test_an_adapter_on_the_head_learns_and_is_off_for_ref(near: Near) -> None:
    roles = adapted()
    root = RootModel(roles)
    index = TREE.action_index()

    def whole(out: Any) -> Tensor:
        rows = torch.log_softmax(out.logits(TREE.predictor_T[index]), -1)
        return rows[torch.arange(len(index)), TREE.input_ids_T[index]]

    grads = []
    for form in (lambda out: logprobs(out, index)[0], whole):
        roles.zero_grad(set_to_none=True)
        root(TREE, "policy", form).square().sum().backward()
        grads.append({n: p.grad for n, p in roles.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and sum("lm_head" in n for n in grads[0]) == 2
    for name, gradient in grads[1].items():
        near(grads[0][name], gradient)
    with torch.no_grad():
        near(root(TREE, "ref", lambda out: logprobs(out, index)[0]), root(TREE, "ref", whole))
        plain_root = RootModel(SeparateModels({"policy": make("llama")}, []))
        near(root(TREE, "ref", whole), plain_root(TREE, "policy", whole))
        assert (root(TREE, "policy", whole) - root(TREE, "ref", whole)).abs().max() > 0.1


def test_dropout_on_the_heads_adapter_is_refused_in_training() -> None:
    roles = adapted(dropout=0.1)
    roles.train()
    with pytest.raises(ModelError, match="plain LoRA without dropout"):
        RootModel(roles)(TREE, "policy", lambda out: logprobs(out, TREE.action_index()))


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was compiled: the program is traced as torch.compile does, and run without a compiler."""
    found: list[Any] = []
    compile_ = torch.compile

    def traced(function: Any, **options: Any) -> Any:
        found.append(function)
        return compile_(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    _compiled.cache_clear()
    yield found
    _compiled.cache_clear()


def test_a_compiled_head_is_the_plain_one(compiles: list[Any], near: Near) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(23, 8), torch.randn(31, 8), torch.randint(31, (23,))
    loss_weights = torch.rand(23)
    results = []
    for compiled in (False, True):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        loss = weighted_nll(h, w, targets, loss_weights, chunk=7, compiled=compiled)
        logprobs, entropies = token_logprobs(h, w, targets, chunk=7, entropy=True, compiled=compiled)
        (loss + (logprobs * loss_weights).sum() + entropies.sum()).backward()
        results.append((loss, logprobs, entropies, h.grad, w.grad))
    assert len(compiles) == 1, "once for a process"
    for expected, found in zip(*results, strict=True):
        near(found, expected, 1e-6)


def test_the_setting_reaches_the_head(compiles: list[Any], tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        sft.train(parse(SftSettings, tiny.stage("sft", tmp_path / str(on), max_steps=2, compile_head=on)))
        found.append([row["loss"] for row in tiny.metrics_of(tmp_path / str(on)) if "loss" in row])
        assert len(compiles) == int(on)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
