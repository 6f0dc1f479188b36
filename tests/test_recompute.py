"""Activation checkpointing: the same gradients from less memory, on trees, with all weights and with adapters."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import make_tiny
from torch import Tensor, nn

from danlu.cli.main import run
from danlu.exceptions import ModelError
from danlu.models.recompute import recompute_layers
from danlu.models.roles import AdapterRoles, SeparateModels
from danlu.models.root import RoleName, RootModel
from danlu.models.starters import starter
from danlu.training.step import language_loss
from danlu.tree import Node, TreeBatch, branches, conversation, forest

TREE = TreeBatch.of(
    forest(
        [
            branches([5, 6, 7], [[8, 9], [10, 11, 12]]),
            [Node([3, 4, 5, 6], [0.0, 1.0, 1.0, 1.0])],
        ]
    )
)


def gradients(roles: nn.Module, role: RoleName, *, recompute: bool, training: bool = True) -> dict[str, Tensor]:
    root = RootModel(roles).train(training)
    if recompute:
        recompute_layers(root)
    torch.manual_seed(0)

    def loss_fn(out: Any) -> Tensor:
        if role == "critic":
            return out.values(out.tree.action_index()).square().mean()
        return language_loss(out, 3.0)[0]

    root(TREE, role, loss_fn).backward()
    return {n: p.grad.clone() for n, p in root.named_parameters() if p.grad is not None}


def separate(model: Any) -> nn.Module:
    return SeparateModels({"policy": model}, ["policy"])


def adapters(model: Any) -> nn.Module:
    roles = AdapterRoles(model, ["policy", "critic"], rank=4, dropout=0.2, seed=1)
    torch.manual_seed(7)
    for name, parameter in roles.named_parameters():
        if "lora_B" in name or "scalar" in name:
            nn.init.normal_(parameter, std=0.1)  # else half of the gradients are 0
    return roles


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral", "bloom"])
@pytest.mark.parametrize(("make", "role"), [(separate, "policy"), (adapters, "policy"), (adapters, "critic")])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_equal(family: str, make: Callable[[Any], nn.Module], role: RoleName, training: bool) -> None:
    """Also with dropout, and in evaluation mode, in which RL trains."""
    expected = gradients(make(make_tiny(family)), role, recompute=False, training=training)
    found = gradients(make(make_tiny(family)), role, recompute=True, training=training)
    assert expected and found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert any(float(g.abs().max()) > 0 for g in found.values())


@pytest.mark.parametrize("training", [True, False])
def test_layers_are_done_twice(training: bool) -> None:
    model = make_tiny("llama")
    calls: list[int] = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    gradients(separate(model), "policy", recompute=False, training=training)
    calls.clear()
    gradients(separate(model), "policy", recompute=True, training=training)
    assert len(calls) == 2


def test_a_module_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be recomputed"):
        recompute_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("kind", "adapter"), tiny.mostly_slow([("sft", "full"), ("ppo", "lora")], [("sft", "lora"), ("ppo", "full")])
)
def test_a_stage_ends_with_the_same_weights(kind: str, adapter: str, tmp_path: Path) -> None:
    values = tiny.stage(kind, tmp_path / "plain", max_steps=3, adapter=adapter)
    assert run([*tiny.arguments(kind, values), "--force"]) == 0
    again = tiny.arguments(kind, values | {"out": str(tmp_path / "again")})
    assert run([*again, "--activation-checkpointing", "--force"]) == 0
    assert tiny.weights(tmp_path / "plain" / "model") == tiny.weights(tmp_path / "again" / "model")


def test_adapters_warn_of_nothing() -> None:
    """peft reads a name that transformers has renamed; that is not the user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters(make_tiny("llama"))


def _peak(folder: str, recompute: bool) -> None:
    """Writes by how many KB one forward and backward pass of 16 layers raises the peak."""
    torch.set_num_threads(1)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = starter(500, hidden_size=64, layers=16, heads=2, kv_heads=1, context=512, seed=0, ids=ids)
    root = RootModel(SeparateModels({"policy": model}, ["policy"])).train()
    tree = TreeBatch.of(forest([conversation([3] * 256, [0.0] + [1.0] * 255)] * 16))
    if recompute:
        recompute_layers(root)
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    root(tree, "policy", lambda out: language_loss(out, 1.0)[0]).backward()
    (Path(folder) / str(recompute)).write_text(str(_high_water() - before))


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_takes_less_memory(tmp_path: Path) -> None:
    """Of 16 layers, what they keep is most of the peak."""
    for recompute in (False, True):
        child = tiny._server().Process(target=_peak, args=(str(tmp_path), recompute))
        child.start()
        child.join(120)
    plain, less = (int((tmp_path / str(r)).read_text()) for r in (False, True))
    assert less < 0.55 * plain  # 0.37 to 0.5, as the allocator has it
