"""Token trees against plain transformers, one row per path, for every family: logits, loss and gradients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES, FAST, PADDED, make, padded
from test_invariants import assert_same_gradients, gradients, ids, root_of
from torch import Tensor

from danlu.exceptions import ModelError
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models.families import context_of, refuse
from danlu.models.recompute import recompute_layers
from danlu.models.root import RootModel, prepare
from danlu.training.step import language_loss
from danlu.tree import Node, TreeBatch, branches, conversation, forest

Near = Callable[..., None]


def trees() -> list[list[Node]]:
    """A single node, a pair, a group of four, and three levels with uneven, negative and missing weights."""
    single = conversation(ids(1, 13), [1.0] * 13)
    pair = branches(ids(2, 9), [ids(3, 4), ids(4, 1)], [1.0, -0.5])
    group = branches(ids(5, 3), [ids(6, 1), ids(7, 12), ids(8, 5), ids(9, 12)])
    deep = [
        Node(ids(10, 5), [0.0, 1.0, 0.0, 1.0, 1.0]),
        Node(ids(11, 3), [1.0, 0.0, 0.5], 0),
        Node(ids(12, 2), [1.0, 2.0], 1),
        Node(ids(13, 6), [1.0, 0.0, 0.5, 1.0, -0.25, 2.0], 1),
        Node(ids(14, 4), [1.0] * 4, 0),
    ]
    return [single, pair, group, deep]


NODES = forest(trees())
TREE = TreeBatch.of(NODES)
TOTAL = float(TREE.loss_weight_T.sum())


def plain(model: Any, nodes: Sequence[Node]) -> tuple[Tensor, Tensor]:
    """Logits after every token of the tree, and the loss, from a row of its own for every node's path."""
    logits, loss = [], torch.zeros(())
    for node in nodes:
        path: list[int] = list(node.ids)
        parent = node.parent
        while parent >= 0:
            path = [*nodes[parent].ids, *path]
            parent = nodes[parent].parent
        rows = model(input_ids=torch.tensor([path]), use_cache=False).logits[0]
        logits.append(rows[-len(node.ids) :])
        first = len(path) - len(node.ids)
        for place, weight in enumerate(node.loss_weights, start=first):
            if weight:
                loss = loss - weight * torch.log_softmax(rows[place - 1], -1)[path[place]]
    return torch.cat(logits), loss / TOTAL


@functools.cache
def expected(family: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What plain transformers finds: logits, loss and gradients."""
    model = make(family)
    logits, loss = plain(model, NODES)
    loss.backward()
    return logits.detach(), loss.detach(), gradients(model)


def logits_TV(root: RootModel, nodes: Sequence[Node]) -> Tensor:
    tree = TreeBatch.of(nodes)
    with torch.no_grad():
        return root(tree, "policy", lambda out: out.logits(torch.arange(tree.tokens)))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tree_equals_rows_in_plain_transformers(family: str, checkpointing: bool, near: Near) -> None:
    logits, loss, grads = expected(family)
    model = make(family)
    root = root_of(model)
    assert model.base_model.danlu_fast_path == (family in FAST)
    if checkpointing:
        recompute_layers(model)
    found, _ = root(TREE, "policy", lambda out: language_loss(out, TOTAL))
    found.backward()
    near(found, loss)
    assert_same_gradients(near, gradients(model), grads)
    if not checkpointing:
        near(logits_TV(root, NODES), logits)


@pytest.mark.parametrize("family", FAST)
def test_packed_equals_alone_and_equals_padded(family: str, near: Near) -> None:
    model = make(family)
    root = root_of(model)
    packed = logits_TV(root, NODES)
    near(packed, torch.cat([logits_TV(root, tree) for tree in trees()]))
    padded(model)
    near(logits_TV(root, NODES), packed)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_of_the_engine_are_those_of_generate(family: str) -> None:
    """Past a window and past a block of the cache; prompts of several lengths at once."""
    model = make(family, seed=3)
    engine = LocalEngine(copy.deepcopy(model))
    prompts = [ids(n, length) for n, length in enumerate((2, 45, 11))]
    requests = [Request(p, SamplingParams(max_new_tokens=16, temperature=0)) for p in prompts]
    for prompt, completion in zip(prompts, generate(engine, requests), strict=True):
        row = torch.tensor([prompt])
        with torch.no_grad():
            answer = model.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=16, do_sample=False, eos_token_id=None
            )
        assert list(completion.ids) == answer[0, len(prompt) :].tolist()


# --- positions --------------------------------------------------------------------------------------------------------

SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotary_positions(kind: str, near: Near) -> None:
    scaling = {"rope_type": kind, "rope_theta": 100.0} | SCALED[kind]
    model = make("llama", rope_parameters=scaling)
    with torch.no_grad():
        reference = plain(make("llama", rope_parameters=scaling), NODES)[0]
    near(logits_TV(root_of(model), NODES), reference)
    assert (reference - expected("llama")[0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_batch_dependent_rotary_positions_hold_up_to_the_original_context(kind: str, near: Near) -> None:
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0] * 4, "original_max_position_embeddings": 20}
    scaling = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0} | (factors if kind == "longrope" else {})
    limit = {"max_position_embeddings": 80 if kind == "longrope" else 20}
    model = make("llama", rope_parameters=scaling, **limit)
    root = root_of(model)
    with torch.no_grad():
        near(logits_TV(root, NODES), plain(make("llama", rope_parameters=scaling, **limit), NODES)[0])
    assert context_of(model.config) == 20
    with pytest.raises(ModelError, match=f"21 tokens exceed the original context of 20.*'{kind}'"):
        logits_TV(root, branches(ids(1, 18), [ids(2, 3)]))


# --- what is refused, and what is not taken for granted ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("Mixtral", {"output_router_logits": True}, "'mixtral' is a mixture of experts"),
        ("Qwen3Moe", {"output_router_logits": True}, "'qwen3_moe' is a mixture of experts"),
        ("Dbrx", {"output_router_logits": True}, "'dbrx' is a mixture of experts"),
        ("Mamba", {}, "'mamba' has layers of type 'linear_attention'"),
        ("Rwkv", {}, "'rwkv' has recurrent"),
        ("Lfm2", {}, "'lfm2' has recurrent"),
        ("FalconH1", {}, "'falcon_h1' has layers of type 'hybrid'"),
        ("T5", {}, "'t5' is an encoder-decoder"),
    ],
)
def test_families_that_trees_would_train_wrongly_are_refused(name: str, options: dict[str, Any], sentence: str) -> None:
    import transformers

    with pytest.raises(ModelError, match=sentence):
        refuse(getattr(transformers, f"{name}Config")(**options))


def test_a_window_that_never_reaches_attention_takes_the_padded_path() -> None:
    model = make("gpt_neox")
    model.config.layer_types = ["sliding_attention", "full_attention"]
    assert prepare(model).base_model.danlu_fast_path is False


def test_an_unknown_family_whose_fast_path_differs_takes_the_padded_path(
    monkeypatch: pytest.MonkeyPatch, near: Near
) -> None:
    """Cohere is not among the tested ones; here its attention forgets its scale on the fast path."""
    model = make("cohere2")
    kind = type(model.base_model.layers[0].self_attn)
    forward = kind.forward

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.scaling = 0.1 if "danlu_plan" in kwargs else 8**-0.5
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", broken)
    root = root_of(model)
    assert model.base_model.danlu_fast_path is False
    near(logits_TV(root, NODES), expected("cohere2")[0])


def test_a_head_with_an_unknown_rule_is_refused() -> None:
    model = make("cohere2")
    model.logit_scale = 0.25  # the configuration says 0.5
    with pytest.raises(ModelError, match="'cohere2' makes logits from hidden states in a way"):
        prepare(model)


def test_padded_families_are_those_without_pluggable_attention() -> None:
    for family in PADDED:
        model = prepare(make(family))
        assert model.config._attn_implementation != "danlu"
        assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 61)
