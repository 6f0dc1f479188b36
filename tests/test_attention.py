"""Attention on token trees against one row of scores per token, in blocks and through the variable-length kernel's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from danlu.exceptions import ModelError
from danlu.models import blocks, varlen
from danlu.models.attention import KeyBias, TreePlan, VirtualRoot
from danlu.models.blocks import Blocks, attend, pieces
from danlu.tree import Node, TreeBatch

Near = Callable[..., None]
WIDTH, SCALE = 8, 0.3


@st.composite
def forests(draw: Any) -> TreeBatch:
    """Up to ten nodes of one to 40 tokens, depth first."""
    nodes: list[Node] = []
    path: list[int] = []
    for index in range(draw(st.integers(1, 10))):
        keep = draw(st.integers(0, len(path)))
        path = path[:keep]
        length = draw(st.integers(1, 40))
        nodes.append(Node([1] * length, [0.0] * length, path[-1] if path else -1))
        path.append(index)
    return TreeBatch.of(nodes)


windows = st.one_of(st.none(), st.integers(1, 30))


def sees(tree: TreeBatch, window: int | None) -> Tensor:
    """[T, T]: which tokens a token attends to, token by token up its path."""
    node_of = [n for n in range(tree.nodes) for _ in range(int(tree.node_end_N[n] - tree.node_start_N[n]))]
    allowed = torch.zeros(tree.tokens, tree.tokens, dtype=torch.bool)
    for token in range(tree.tokens):
        path = [i for i in tree.token_index(tree.path(node_of[token])).tolist() if i <= token]
        allowed[token, path[-window:] if window else path] = True
    return allowed


def inputs(tokens: int, heads: int, groups: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, tokens, WIDTH, generator=generator) for n in (heads, groups, groups)]
    return [x.requires_grad_() for x in made]


def reference(qkv: list[Tensor], allowed: Tensor, softcap: float | None, bias: Tensor | float = 0.0) -> Tensor:
    """One row of scores per token; bias: `[H, keys]`."""
    query, key, value = qkv
    share = query.shape[0] // key.shape[0]
    scores = query @ key.repeat_interleave(share, 0).transpose(1, 2) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + (bias[:, None] if isinstance(bias, Tensor) else bias)
    probs = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1)
    return (probs @ value.repeat_interleave(share, 0)).transpose(0, 1)


def compare(
    found: Callable[[list[Tensor]], Tensor], expected: Callable[[list[Tensor]], Tensor], qkv: list[Tensor]
) -> None:
    """Results and the gradients of a random projection of them."""
    results = [found(qkv), expected(qkv)]
    upstream = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(9))
    grads = [torch.autograd.grad((r * upstream).sum(), qkv) for r in results]
    for own, plain in zip([results[0], *grads[0]], [results[1], *grads[1]], strict=True):
        size = max(float(plain.detach().abs().max()), 1e-3)
        assert float((own - plain).detach().abs().max()) <= 1e-5 * size


# --- blocks -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    forests(),
    windows,
    st.sampled_from([3, 7, 256]),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.sampled_from([None, 1.5]),
)
def test_blocks_equal_one_row_of_scores_per_token(
    tree: TreeBatch, window: int | None, longest: int, heads: tuple[int, int], softcap: float | None
) -> None:
    allowed = sees(tree, window)
    made = Blocks(tree, window, longest)
    compare(
        lambda qkv: attend(*qkv, made, SCALE, softcap),
        lambda qkv: reference(qkv, allowed, softcap),
        inputs(tree.tokens, *heads),
    )


@settings(max_examples=40, deadline=None)
@given(forests(), st.sampled_from([0, 5]), st.sampled_from([(2, 2), (4, 1)]), st.booleans())
def test_a_bias_by_the_place_of_a_key(tree: TreeBatch, before: int, heads: tuple[int, int], kept: bool) -> None:
    """ALiBi's slopes behind a virtual root; with weights kept for the backward pass, and made again."""
    allowed = torch.cat([torch.ones(tree.tokens, before, dtype=torch.bool), sees(tree, None)], 1)
    places = torch.cat([torch.arange(before), before + tree.position_ids_T])
    bias = KeyBias(torch.tensor([[0.5], [0.1], [0.03], [0.2]])[: heads[0]], factor=0.7)
    query, key, value = inputs(tree.tokens, *heads)
    first = [torch.randn(heads[1], before, WIDTH).requires_grad_() for _ in range(2)]
    plan = TreePlan(tree, root=VirtualRoot([first[0]], [first[1]], 0) if before else None)

    def found(leaves: list[Tensor]) -> Tensor:
        return plan.attend(0, *leaves[:3], SCALE, bias=bias)

    def expected(leaves: list[Tensor]) -> Tensor:
        keys, values = (torch.cat([a, b], dim=1) for a, b in zip(leaves[3:], leaves[1:3], strict=True))
        return reference([leaves[0], keys, values], allowed, None, bias.of(places))

    with pytest.MonkeyPatch.context() as patch:
        if not kept:
            patch.setattr(blocks, "KEPT_KEYS", 0)
        leaves = [query, key, value, *first]
        if before:
            compare(found, expected, leaves)
        else:
            assert torch.allclose(found(leaves), expected(leaves), atol=1e-5)


def test_a_bias_and_a_window_are_refused() -> None:
    plan = TreePlan(TreeBatch.of([Node([1] * 9, [0.0] * 9)]))
    with pytest.raises(ModelError, match="a sliding window with a bias by position"):
        plan.attend(0, *inputs(9, 2, 2), SCALE, window=3, bias=KeyBias(torch.ones(2, 1)))


@settings(max_examples=60, deadline=None)
@given(forests(), windows, st.integers(1, 50))
def test_pieces_cover_every_token_once_and_read_no_key_in_vain(
    tree: TreeBatch, window: int | None, longest: int
) -> None:
    allowed = sees(tree, window)
    found = pieces(tree, window, longest)
    assert sorted(t for p in found for t in range(p.start, p.end)) == list(range(tree.tokens))
    for piece in found:
        assert 0 < piece.queries <= longest
        keys = [t for run in piece.runs for t in range(*run)]
        seen = allowed[piece.start : piece.end].any(0).nonzero().squeeze(1).tolist()
        assert sorted(keys) == seen and len(keys) == piece.keys


def test_weights_made_again_in_the_backward_pass_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = TreeBatch.of([Node([1] * 30, [0.0] * 30), Node([1] * 9, [0.0] * 9, 0), Node([1] * 9, [0.0] * 9, 0)])
    qkv = inputs(tree.tokens, 4, 2)
    kept = Blocks(tree)

    def again(x: list[Tensor]) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "KEPT_KEYS", 0)
            return attend(*x, Blocks(tree), SCALE)

    compare(again, lambda x: attend(*x, kept, SCALE), qkv)


def test_many_short_nodes_share_blocks_and_long_ones_are_cut() -> None:
    short = Blocks(TreeBatch.of([Node([1] * (20 + n % 5), [0.0] * (20 + n % 5)) for n in range(60)]))
    assert len(short.items) == 1 and short.single
    long = Blocks(TreeBatch.of([Node([1] * 2048, [0.0] * 2048)]))
    cells = sum(b.mask_NQS.numel() for b in long.items)
    assert cells < 0.6 * 2048**2 and not long.single
    sliding = Blocks(TreeBatch.of([Node([1] * 2048, [0.0] * 2048)]), window=128)
    assert sum(b.mask_NQS.numel() for b in sliding.items) < 0.25 * 2048**2


def test_bf16_values_set_the_dtype_of_products() -> None:
    """Under autocast rotary positions leave queries and keys in fp32; gradients come back in each one's own dtype."""
    tree = TreeBatch.of([Node([1] * 12, [0.0] * 12), Node([1] * 5, [0.0] * 5, 0)])
    query, key, value = inputs(tree.tokens, 4, 2)
    half = value.detach().bfloat16().requires_grad_()
    out = attend(query, key, half, Blocks(tree), SCALE)
    exact = reference([query, key, half.float()], sees(tree, None), None)
    assert out.dtype == torch.bfloat16 and float((out - exact).detach().abs().max()) < 0.03
    grads = torch.autograd.grad(out.float().square().sum(), [query, key, half])
    plain = torch.autograd.grad(exact.square().sum(), [query, key, half])
    assert [g.dtype for g in grads] == [torch.float32, torch.float32, torch.bfloat16]
    for found, expected in zip(grads, plain, strict=True):
        assert torch.cosine_similarity(found.flatten().float(), expected.flatten().float(), dim=0) > 0.995


# --- the variable-length kernel ---------------------------------------------------------------------------------------


def emulated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What `varlen_attn` computes for each sequence: query i of n sees key j of m if -left <= j - (i + m - n) <= right."""
    for ends, tokens, longest in ((cu_seq_q, len(query), max_q), (cu_seq_k, len(key), max_k)):
        assert ends.dtype == torch.int32 and int(ends[0]) == 0 and int(ends[-1]) == tokens
        assert int(ends.diff().max()) == longest and int(ends.diff().min()) > 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out = []
    for n in range(len(cu_seq_q) - 1):
        q = query[int(cu_seq_q[n]) : int(cu_seq_q[n + 1])].transpose(0, 1)
        k, v = (x[int(cu_seq_k[n]) : int(cu_seq_k[n + 1])].transpose(0, 1) for x in (key, value))
        share = q.shape[0] // k.shape[0]
        apart = torch.arange(k.shape[1]) - (torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1])
        left, right = window_size
        hidden = (apart > right) if right >= 0 else torch.zeros_like(apart, dtype=torch.bool)
        hidden = hidden | (apart < -left) if left >= 0 else hidden
        scores = (q @ k.repeat_interleave(share, 0).transpose(1, 2)) * (scale or q.shape[-1] ** -0.5)
        probs = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        out.append((probs @ v.repeat_interleave(share, 0)).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulation in place of torch's function, and taken on this machine too."""
    monkeypatch.setattr(varlen, "kernel", lambda: emulated)
    monkeypatch.setattr(varlen, "fits", lambda value, softcap: softcap is None)
    yield


TREES = [
    [Node([1] * 7, [0.0] * 7), Node([1], [0.0]), Node([1] * 20, [0.0] * 20)],
    [
        Node([1] * length, [0.0] * length, parent)
        for length, parent in ((5, -1), (3, 0), (2, 1), (6, 1), (4, 0), (30, -1), (2, 5))
    ],
]


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("nodes", TREES, ids=["flat", "deep"])
def test_variable_length_sequences_equal_blocks(
    nodes: list[Node], heads: tuple[int, int], window: int | None, kernel: None
) -> None:
    tree = TreeBatch.of(nodes)
    made = Blocks(tree, window)
    compare(
        lambda qkv: TreePlan(tree).attend(0, *qkv, SCALE, window),
        lambda qkv: attend(*qkv, made, SCALE),
        inputs(tree.tokens, *heads),
    )


@settings(max_examples=40, deadline=None)
@given(forests(), windows)
def test_variable_length_sequences_of_any_forest(tree: TreeBatch, window: int | None) -> None:
    allowed = sees(tree, window)
    nodes = varlen.Sequences.of(tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "kernel", lambda: emulated)
        compare(
            lambda qkv: varlen.attend(*qkv, nodes, SCALE, window),
            lambda qkv: reference(qkv, allowed, None),
            inputs(tree.tokens, 4, 2),
        )


def test_keys_are_gathered_only_where_nodes_share_them() -> None:
    assert varlen.Sequences.of(TreeBatch.of(TREES[0])).key_index_M is None
    shared = varlen.Sequences.of(TreeBatch.of(TREES[1]))
    assert shared.key_index_M is not None
    # 5; 5+3; 5+3+2; 5+3+6; 5+4; 30; 30+2 keys.
    assert shared.key_ends.tolist() == [0, 5, 13, 23, 37, 46, 76, 108] and shared.most_keys == 32
    assert shared.query_ends.tolist() == [0, 5, 8, 10, 16, 20, 50, 52] and shared.most_queries == 30


def test_the_kernels_own_function_takes_what_it_is_given() -> None:
    """The installed torch has the function; its parameters are those that the emulation and the call use."""
    import inspect

    found = varlen.kernel()
    assert found is not None
    parameters = inspect.signature(found).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= parameters.keys()
    assert not varlen.fits(torch.zeros(2, 3, 8, dtype=torch.bfloat16), None)  # no kernel for a CPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA KERNEL NOT TESTED: no GPU here")
@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_on_a_gpu_equals_blocks(window: int | None) -> None:
    tree = TreeBatch.of(TREES[1]).to("cuda")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, tree.tokens, 64, generator=generator) for n in (4, 2, 2))
    leaves = [x.cuda().bfloat16().requires_grad_() for x in (query, key, value)]
    assert varlen.fits(leaves[2], None)
    found = TreePlan(tree).attend(0, *leaves, SCALE, window)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    expected = attend(*exact, Blocks(tree, window), SCALE)
    pairs = [(found, expected)]
    grads = [torch.autograd.grad(r.float().square().sum(), x) for r, x in ((found, leaves), (expected, exact))]
    for own, plain in [*pairs, *zip(*grads, strict=True)]:
        assert torch.cosine_similarity(own.detach().flatten().float(), plain.detach().flatten(), dim=0) > 0.999
