"""Rows of hidden states that nobody reads are left out by the last layer: losses and gradients are those of all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from danlu.models import lean
from danlu.models.blocks import Blocks, attend, pieces
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel, TrunkOutput, prepare
from danlu.shapes import part_of
from danlu.tree import Node, TreeBatch, branches, forest

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def _batch() -> TreeBatch:
    """Pairs with long prompts, and a lone document without anything to read."""
    generator = torch.Generator().manual_seed(3)
    ids = lambda n: torch.randint(1, 61, (n,), generator=generator).tolist()  # noqa: E731
    trees = [branches(ids(70), [ids(9), ids(5)]), branches(ids(40), [ids(3), ids(12)]), [Node(ids(30), [0.0] * 30)]]
    return TreeBatch.of(forest(trees))


def _root(kind: str = "llama", adapter: bool = False) -> RootModel:
    torch.manual_seed(0)
    if kind == "mistral":
        model: Any = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=20))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    if adapter:
        from peft import LoraConfig, inject_adapter_in_model

        model = inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return RootModel(SeparateModels({"policy": prepare(model)}, ["policy"])).train()


def _loss(out: TrunkOutput) -> Tensor:
    index = out.tree.action_index()
    logits = out.logits(out.tree.predictor_T[index])
    return torch.nn.functional.cross_entropy(logits, out.tree.input_ids_T[index])


def _gradients(root: RootModel, tree: TreeBatch, **options: Any) -> tuple[float, dict[str, Tensor]]:
    root.zero_grad(set_to_none=True)
    loss: Tensor = root(tree, "policy", _loss, **options)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in root.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "adapter"), [("llama", False), ("mistral", False), ("llama", True)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_all_rows(kind: str, adapter: bool, checkpointing: bool) -> None:
    root, tree = _root(kind, adapter), _batch()
    if checkpointing:
        trunk: Any = root.trunks.trunk("policy")
        trunk.activation_checkpointing_enable()
    loss, all_rows = _gradients(root, tree)
    seen: list[int] = []
    layer: Any = root.trunks.trunk("policy").layers[-1].mlp.down_proj
    hook = layer.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[-2])) if adapter else None
    found, some = _gradients(root, tree, reads=TreeBatch.before_actions)
    if hook is not None:
        hook.remove()
        assert set(seen) == {len(tree.before_actions().unique())}, (
            "the last layer's feed-forward part sees these rows alone"
        )
    assert found == pytest.approx(loss, abs=1e-6)
    assert all_rows.keys() == some.keys()
    for name, grad in all_rows.items():
        torch.testing.assert_close(some[name], grad, atol=1e-6, rtol=1e-5, msg=name)


def test_rows_that_are_not_read_are_no_numbers() -> None:
    root, tree = _root(), _batch()
    reads = tree.before_actions()
    rows = root(tree, "policy", lambda out: out.hidden_TD, reads=TreeBatch.before_actions)
    whole = root(tree, "policy", lambda out: out.hidden_TD)
    torch.testing.assert_close(rows[reads], whole[reads], atol=1e-6, rtol=1e-5)
    others = torch.ones(tree.tokens, dtype=torch.bool)
    others[reads] = False
    assert rows[others].isnan().all(), "whoever reads them sees it"


def test_where_nearly_all_rows_are_read_none_is_left_out() -> None:
    root, tree = _root(), _batch()
    every = lambda t: torch.arange(2, t.tokens)  # noqa: E731
    assert root(tree, "policy", lambda out: out.hidden_TD, reads=every).isfinite().all()


def test_sizes_in_bf16_come_back() -> None:
    """Of 29 rows 32 are computed, and their product is compiled once for all counts up to there."""
    root, tree = _root().bfloat16(), _batch()
    seen: list[int] = []
    own = lean._After.apply
    try:
        lean._After.apply = lambda x, *rest: (seen.append(len(x)), own(x, *rest))[1]  # type: ignore[method-assign]
        found = root(tree, "policy", lambda out: out.hidden_TD, reads=TreeBatch.before_actions)
    finally:
        lean._After.apply = own  # type: ignore[method-assign]
    assert found[tree.before_actions()].isfinite().all()
    assert len(tree.before_actions().unique()) == 27
    assert seen[-1] == 32 < seen[0]


def test_queries_that_are_not_read_are_not_attended() -> None:
    """Goldens: of 70 prompt tokens only the last one's piece is left, and pieces of answers are whole."""
    tree = _batch()
    found = pieces(tree, reads=tree.before_actions())
    spans = [(p.start, p.end, p.keys) for p in found]
    assert spans == [(69, 70, 70), (70, 78, 78), (79, 83, 74), (123, 124, 40), (124, 126, 42), (127, 138, 51)]
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(n, tree.tokens, 8, generator=generator, requires_grad=True) for n in (4, 2, 2))
    reads = tree.before_actions().unique()
    whole = attend(query, key, value, Blocks(tree), 0.3)[reads]
    some = attend(query, key, value, Blocks(tree, reads=reads), 0.3)[reads]
    torch.testing.assert_close(some, whole)
    weight = torch.randn(whole.shape, generator=generator)
    for a, b in zip(
        torch.autograd.grad((whole * weight).sum(), [query, key, value]),
        torch.autograd.grad((some * weight).sum(), [query, key, value]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "tokens", "size"),
    [
        (1, 2048, 16),
        (30, 4096, 32),
        (200, 2048, 256),
        (1000, 2048, 1024),
        (1025, 2048, 1280),
        (1025, 4000, 1280),
        (1, 64, 16),
    ],
)
def test_sizes_of_parts_are_few(rows: int, tokens: int, size: int) -> None:
    """Goldens; 1,280 of 4,000 tokens: five eighths of 2,048."""
    assert part_of(tokens, rows) == size
