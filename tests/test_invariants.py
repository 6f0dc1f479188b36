"""The invariants of the token tree (design, section 3), against plain transformers on one row per path; more: test_families."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import families
import pytest
import torch
from families import padded
from torch import Tensor

from danlu.exceptions import ModelError
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel, prepare
from danlu.training.compute import Compute
from danlu.training.logprobs import logprobs
from danlu.training.step import accumulate, language_loss
from danlu.tree import Node, TreeBatch, branches, forest

FAST = ("llama", "gpt2", "qwen3", "bloom", "codegen")
OWN_ATTENTION = ("gpt_neo",)
CPU = Compute("cpu", "float32", 1)
Near = Callable[..., None]
Tiny = Callable[..., Any]


def ids(seed: int, length: int) -> list[int]:
    return torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def deep_tree() -> list[Node]:
    """prompt -> {a -> {c, d}, b}, with uneven, negative and missing weights."""
    weights = [1.0, 0.0, 0.5, 1.0, -0.25, 2.0]
    return [
        Node(ids(1, 5), [0.0, 1.0, 0.0, 1.0, 1.0]),
        Node(ids(2, 3), weights[:3], 0),
        Node(ids(3, 2), weights[:2], 1),
        Node(ids(4, 6), weights, 1),
        Node(ids(5, 4), weights[:4], 0),
    ]


def batch_of_trees() -> list[list[Node]]:
    single = [Node(ids(6, 9), [0.0] + [1.0] * 8)]
    group = branches(ids(7, 3), [ids(8, 1), ids(9, 12), ids(10, 5)])
    return [deep_tree(), single, group, [Node([4], [0.0])], branches(ids(11, 20), [ids(12, 2), ids(13, 2)])]


def root_of(model: Any) -> RootModel:
    return RootModel(SeparateModels({"policy": model}, ["policy"]))


def padded_root(model: Any) -> RootModel:
    """The same model, made to take the path of families whose attention takes no plan."""
    root = root_of(model)
    padded(model)
    return root


def denominator(nodes: Sequence[Node]) -> float:
    return sum(w for n in nodes for w in n.loss_weights)


def logits_TV(root: RootModel, nodes: list[Node]) -> Tensor:
    tree = TreeBatch.of(nodes)
    with torch.no_grad():
        return root(tree, "policy", lambda out: out.logits(torch.arange(tree.tokens)))


def plain_rows(model: Any, nodes: list[Node]) -> list[tuple[Node, Tensor]]:
    """Each node with the logits that predict its tokens and one more, from its whole path in a row of its own."""
    found = []
    for node in nodes:
        before: list[int] = []
        parent = node.parent
        while parent >= 0:
            before = [*nodes[parent].ids, *before]
            parent = nodes[parent].parent
        rows = model(input_ids=torch.tensor([[*before, *node.ids]]), use_cache=False).logits[0]
        first = len(before) - 1
        if first < 0:
            rows, first = torch.cat([torch.zeros_like(rows[:1]), rows]), 0
        found.append((node, rows[first:]))
    return found


def plain_logits_TV(model: Any, nodes: list[Node]) -> Tensor:
    with torch.no_grad():
        return torch.cat([rows[1:] for _, rows in plain_rows(model, nodes)])


def plain_loss(model: Any, nodes: list[Node]) -> Tensor:
    total = torch.zeros(())
    for node, rows in plain_rows(model, nodes):
        for token, weight, row in zip(node.ids, node.loss_weights, rows, strict=False):
            total = total - weight * torch.log_softmax(row, -1)[token]
    return total / denominator(nodes)


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(near: Near, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Some are zero but for rounding: without rotary positions a key's bias moves all scores of a query alike."""
    assert found.keys() == expected.keys() and expected
    least = 1e-6 * max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        try:
            if float(gradient.abs().max()) > least:
                near(found[name], gradient)
            else:
                assert float(found[name].abs().max()) <= least, "not zero"
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def trained(model: Any, cuts: list[list[list[Node]]], total: float, compute: Compute = CPU) -> tuple[float, Any]:
    """Loss and gradients of a step cut into micro-batches; every one is divided by the step's own total."""
    root = root_of(model)
    batches = [(TreeBatch.of(forest(trees)), total) for trees in cuts]
    return accumulate(root, "policy", batches, language_loss, compute)["loss"], gradients(model)


# --- tree == plain transformers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAST + OWN_ATTENTION)
def test_tree_equals_rows_in_plain_transformers(family: str, tiny: Tiny, near: Near) -> None:
    plain, model = tiny(family), tiny(family)
    nodes = forest(batch_of_trees())
    expected_loss = plain_loss(plain, nodes)
    expected_loss.backward()
    loss, found = trained(model, [batch_of_trees()], denominator(nodes))
    assert model.base_model.danlu_fast_path == (family in FAST)
    near(torch.tensor(loss), expected_loss)
    assert_same_gradients(near, found, gradients(plain))
    near(logits_TV(root_of(model), nodes), plain_logits_TV(plain, nodes))


@pytest.mark.parametrize("family", FAST)
def test_padded_fallback_equals_the_fast_path(family: str, tiny: Tiny, near: Near) -> None:
    nodes = forest(batch_of_trees())
    total = denominator(nodes)
    found = []
    for make in (root_of, padded_root):
        model = tiny(family)
        root = make(model)
        loss, _ = root(TreeBatch.of(nodes), "policy", lambda out: language_loss(out, total))
        loss.backward()
        found.append((loss, gradients(model), logits_TV(root, nodes)))
    (loss, grads, logits), (slow_loss, slow_grads, slow_logits) = found
    near(slow_loss, loss)
    near(slow_logits, logits)
    assert_same_gradients(near, slow_grads, grads)


def test_the_fast_path_is_checked_and_not_assumed(tiny: Tiny) -> None:
    """A family whose attention takes no plan keeps transformers' own attention and still works there."""
    model = prepare(tiny("gpt_neo"))
    assert model.base_model.danlu_fast_path is False
    assert model.config._attn_implementation != "danlu"
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 61)


# --- packing, accumulation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAST)
def test_packed_equals_unpacked(family: str, tiny: Tiny, near: Near) -> None:
    root = root_of(tiny(family))
    packed = logits_TV(root, forest(batch_of_trees()))
    near(packed, torch.cat([logits_TV(root, tree) for tree in batch_of_trees()]))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_one_batch_of_eight_equals_eight_of_one(family: str, near: Near) -> None:
    trees = [branches(ids(n, 2 + n), [ids(20 + n, 9 - n), ids(40 + n, 1 + n)]) for n in range(8)]
    total = denominator(forest(trees))
    loss, whole = trained(families.make(family), [trees], total)
    summed, parts = trained(families.make(family), [[tree] for tree in trees], total)
    near(torch.tensor(summed), torch.tensor(loss))
    assert_same_gradients(near, parts, whole)


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_logprobs_equal_the_trainers(family: str, temperature: float, near: Near) -> None:
    model = families.make(family)
    engine = LocalEngine(copy.deepcopy(model), max_slots=3)
    prompts = [ids(n, length) for n, length in enumerate((1, 7, 30, 4, 4))]
    params = [
        SamplingParams(max_new_tokens=5 + 3 * n, temperature=temperature, seed=n, stop_ids=frozenset({9}))
        for n in range(len(prompts))
    ]
    done = generate(engine, [Request(p, q) for p, q in zip(prompts, params, strict=True)])
    root = root_of(model)
    for prompt, completion in zip(prompts, done, strict=True):
        tree = TreeBatch.of(branches(prompt, [list(completion.ids)]))
        with torch.no_grad():
            found, _ = root(tree, "policy", lambda out: logprobs(out, out.tree.action_index(), temperature))
        near(torch.tensor(completion.logprobs), found)


@pytest.mark.parametrize("family", FAST + OWN_ATTENTION)
def test_cached_decoding_equals_full_forward(family: str, tiny: Tiny) -> None:
    """Greedy, past a block of cache positions, on lengths that end at different times."""
    plain = tiny(family, seed=3)
    engine = LocalEngine(tiny(family, seed=3))
    prompts = [ids(n, length) for n, length in enumerate((2, 50, 11))]
    requests = [Request(p, SamplingParams(max_new_tokens=12, temperature=0)) for p in prompts]
    for prompt, completion in zip(prompts, generate(engine, requests), strict=True):
        text = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                text.append(int(plain(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        assert list(completion.ids) == text[len(prompt) :]


# --- dropout, and bf16 -----------------------------------------------------------------------------------------------


def test_attention_dropout_is_refused_in_training(tiny: Tiny) -> None:
    model = tiny("llama", attention_dropout=0.1)
    root = root_of(model)
    model.train()
    with pytest.raises(ModelError, match="attention dropout"):
        logits_TV(root, deep_tree())


@pytest.mark.parametrize("family", FAST)
def test_bf16_autocast_is_near_fp32(family: str, tiny: Tiny, near: Near) -> None:
    nodes = batch_of_trees()
    total = denominator(forest(nodes))
    loss, exact = trained(tiny(family), [nodes], total)
    rough_loss, rough = trained(tiny(family), [nodes], total, Compute("cpu", "bfloat16", 1))
    assert rough_loss == pytest.approx(loss, rel=0.02) and rough_loss != loss
    assert rough.keys() == exact.keys()
    for name, gradient in rough.items():
        assert gradient.dtype == torch.float32
        similarity = torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0)
        assert similarity > 0.98, name
