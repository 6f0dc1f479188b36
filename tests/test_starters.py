"""Starters of every family: their weights are a function of shape and seed, they are sound, and they learn."""

from __future__ import annotations

import math

import pytest
import torch

from danlu.config import Starter
from danlu.exceptions import ModelError
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.models.starters import FAMILIES, starter
from danlu.training.compute import Compute
from danlu.training.optim import adamw
from danlu.training.step import accumulate, apply, language_loss
from danlu.tree import TreeBatch, conversation, forest

SHAPE = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 64}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CPU = Compute("cpu", "float32", 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_a_function_of_shape_and_seed(family: str) -> None:
    one, same, other = (starter(60, **SHAPE, seed=seed, ids=IDS, family=family) for seed in (3, 3, 4))
    states = [m.state_dict() for m in (one, same, other)]
    assert one.config.model_type == {"chatglm2": "chatglm"}.get(family, family) and one.config.num_hidden_layers == 2
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert any(not torch.equal(states[0][n], states[2][n]) for n in states[0])
    for name, parameter in one.named_parameters():
        if parameter.dim() < 2:
            assert set(parameter.unique().tolist()) == {0.0 if name.endswith("bias") else 1.0}, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_starter_knows_nothing_and_learns(family: str) -> None:
    """Its loss begins at ln V, and three texts are learnt by heart."""
    model = starter(60, **SHAPE, seed=0, ids=IDS, family=family)
    root = RootModel(SeparateModels({"policy": model}, ["policy"]))
    items = [conversation([3 + i, *range(10 + i, 18 + 3 * i, 2)], [0.0, *[1.0] * (4 + i)]) for i in range(3)]
    tree = TreeBatch.of(forest(items))
    total = float(tree.loss_weight_T.sum())
    optimizer = adamw(root, 0.01, 0.0)
    losses = []
    for _ in range(60):
        losses.append(accumulate(root, "policy", [(tree, total)], language_loss, CPU)["loss"])
        apply(optimizer, list(root.parameters()), 1.0)
    assert losses[0] == pytest.approx(math.log(60), rel=0.02)
    assert losses[-1] < 0.1


def test_shapes_that_a_family_cannot_have_are_refused() -> None:
    with pytest.raises(ModelError, match="four parts"):
        starter(60, **{**SHAPE, "heads": 2}, seed=0, ids=IDS, family="codegen")
    with pytest.raises(ModelError, match="no starter of the family 'rwkv'"):
        starter(60, **SHAPE, seed=0, ids=IDS, family="rwkv")


@pytest.mark.parametrize("family", ["gpt2", "codegen", "opt"])
def test_a_text_beyond_the_table_of_positions_is_a_sentence(family: str) -> None:
    model = starter(60, **SHAPE, seed=0, ids=IDS, family=family)
    root = RootModel(SeparateModels({"policy": model}, ["policy"]))
    tree = TreeBatch.of(conversation([3] * 65, [1.0] * 65))
    with pytest.raises(ModelError, match="65 tokens exceed the 64 positions"):
        root(tree, "policy", lambda out: language_loss(out, 1.0))


def test_every_family_can_be_asked_for() -> None:
    assert {Starter(family=name).family for name in FAMILIES} == set(FAMILIES)
