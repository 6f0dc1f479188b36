"""Checkpoints: exact resumption, interrupted saves, damage, other models, and the published schema 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from danlu.exceptions import CheckpointError
from danlu.training import checkpoint
from danlu.training.optim import adamw

# Written by this danlu's schema 1 and never again: later versions must go on reading it. Made with `write_published`:
#   python -c "import sys; sys.path[:0] = ['tests']; import test_checkpoint as t; t.write_published()"
PUBLISHED = Path(__file__).parent / "data" / "checkpoint-schema1"


class Tiny(nn.Module):
    """A trained matrix and bias, and a frozen matrix that no checkpoint holds."""

    def __init__(self, seed: int = 0, width: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(2, width, generator=generator))
        self.bias = nn.Parameter(torch.randn(2, generator=generator))
        self.frozen = nn.Parameter(torch.randn(2, 2, generator=generator), requires_grad=False)


def optimizer_of(module: nn.Module) -> torch.optim.AdamW:
    return adamw(module, 0.1, 0.01)


def train(module: Tiny, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        x = torch.linspace(-1, 1, module.matrix.shape[1]) * (step + 1)
        (module.matrix @ x + module.bias).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def write(folder: Path, step: int = 3, **options: Any) -> tuple[Tiny, torch.optim.Optimizer, Path]:
    module = Tiny()
    optimizer = optimizer_of(module)
    train(module, optimizer, 0, step)
    return module, optimizer, checkpoint.save(folder, step, module, {"adamw": optimizer}, {"seen": 12}, **options)


def write_published() -> None:
    """Exact binary numbers, so that any machine writes and reads the same."""
    module = Tiny()
    with torch.no_grad():
        module.matrix.copy_(torch.arange(6).view(2, 3) / 4)
        module.bias.copy_(torch.tensor([-0.5, 8.0]))
    optimizer = optimizer_of(module)
    module.matrix.grad, module.bias.grad = torch.ones(2, 3), torch.ones(2) * 2
    optimizer.step()
    with torch.no_grad():
        module.matrix.copy_(torch.arange(6).view(2, 3) / 4)
        module.bias.copy_(torch.tensor([-0.5, 8.0]))
    checkpoint.save(PUBLISHED, 200, module, {"policy": optimizer}, {"epoch": 1, "kl_coef": 0.125, "note": "丹炉"})


def assert_equal_states(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal_states(found[key], expected[key])
    elif isinstance(expected, list):
        for a, b in zip(found, expected, strict=True):
            assert_equal_states(a, b)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    else:
        assert found == expected


def test_save_and_load_are_bit_identical(tmp_path: Path) -> None:
    module, optimizer, path = write(tmp_path)
    assert path.name == "step-00000003"
    other = Tiny(seed=1)
    other_optimizer = optimizer_of(other)
    found = checkpoint.load(path, other, {"adamw": other_optimizer})
    assert (found.step, found.extra, found.folder) == (3, {"seen": 12}, path)
    assert torch.equal(other.matrix, module.matrix) and torch.equal(other.bias, module.bias)
    assert not torch.equal(other.frozen, module.frozen)  # not trained: not saved
    assert_equal_states(other_optimizer.state_dict(), optimizer.state_dict())


def test_a_resumed_run_ends_bit_identical(tmp_path: Path) -> None:
    straight = Tiny()
    train(straight, optimizer_of(straight), 0, 8)
    _, _, path = write(tmp_path)
    resumed = Tiny(seed=2)
    optimizer = optimizer_of(resumed)
    checkpoint.load(path, resumed, {"adamw": optimizer})
    train(resumed, optimizer, 3, 5)
    assert torch.equal(resumed.matrix, straight.matrix) and torch.equal(resumed.bias, straight.bias)


def test_latest_and_prune(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nothing") is None
    for step in (5, 100, 20):
        write(tmp_path, step)
    write(tmp_path, 2, name="best")
    (tmp_path / "step-00000999").mkdir()  # no state.json: not a checkpoint
    (tmp_path / ".step-00000100.17.partial").mkdir()
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.name == "step-00000100"
    (tmp_path / "step-00000999").rmdir()
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-00000020", "step-00000100"]


def test_an_interrupted_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer, path = write(tmp_path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    train(module, optimizer, 3, 1)
    monkeypatch.setattr("danlu.training.checkpoint.torch.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for step in (3, 4):  # over the old one, and beside it
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, step, module, {"adamw": optimizer}, {})
    assert checkpoint.latest(tmp_path) == path
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    checkpoint.prune(tmp_path, 5)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_saving_again_replaces(tmp_path: Path) -> None:
    write(tmp_path, 3, name="last")
    module, _, path = write(tmp_path, 6, name="last")
    found = Tiny(seed=1)
    assert checkpoint.load(path, found, {"adamw": optimizer_of(found)}).step == 6
    assert torch.equal(found.matrix, module.matrix)


def load_into_new(path: Path, module: nn.Module | None = None, name: str = "adamw") -> CheckpointError:
    module = module or Tiny(seed=1)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, module, {name: optimizer_of(module)})
    assert caught.value.file == str(path)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters()), "half loaded"
    return caught.value


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    *_, path = write(tmp_path)
    state = json.loads((path / "state.json").read_text("utf-8"))
    (path / "state.json").write_text(json.dumps(state | {"schema": checkpoint.SCHEMA + 1}), "utf-8")
    error = load_into_new(path)
    assert f"schema {checkpoint.SCHEMA + 1}" in error.message and "update" in error.hint


@pytest.mark.parametrize("name", ["weights.safetensors", "adamw.pt", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "other"])
def test_damaged_files(tmp_path: Path, name: str, damage: str) -> None:
    *_, path = write(tmp_path)
    file = path / name
    if damage == "missing":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "other": b"\x00" * len(data)}[damage])
    assert "delete this checkpoint folder" in load_into_new(path).hint


@pytest.mark.parametrize("content", ["[]", "{}", '{"schema": 1}', '{"schema": "one", "step": 3, "extra": {}}'])
def test_a_state_file_of_something_else(tmp_path: Path, content: str) -> None:
    *_, path = write(tmp_path)
    (path / "state.json").write_text(content, "utf-8")
    load_into_new(path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    *_, path = write(tmp_path)
    assert "(2, 3), expected (2, 4)" in load_into_new(path, Tiny(width=4)).message
    more = Tiny()
    more.register_parameter("head", nn.Parameter(torch.zeros(1, 1)))
    assert "parameter head is on one side only" in load_into_new(path, more).message
    assert "one side only" in load_into_new(path, nn.Linear(3, 2)).message


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """Weights without a bias group beside an optimizer that has one: torch's own ValueError says nothing of the file."""
    module, _, path = write(tmp_path)
    torch.save(optimizer_of(nn.Linear(3, 2, bias=False)).state_dict(), path / "adamw.pt")
    load_into_new(path)
    assert module.bias is not None


def test_published_schema_1_loads() -> None:
    module = Tiny(seed=1)
    optimizer = optimizer_of(module)
    found = checkpoint.load(PUBLISHED / "step-00000200", module, {"policy": optimizer})
    assert (found.step, found.extra) == (200, {"epoch": 1, "kl_coef": 0.125, "note": "丹炉"})
    assert module.matrix.tolist() == [[0.0, 0.25, 0.5], [0.75, 1.0, 1.25]]
    assert module.bias.tolist() == [-0.5, 8.0]
    matrix, bias = (optimizer.state[p] for p in (module.matrix, module.bias))
    assert float(matrix["step"]) == 1.0
    # betas (0.9, 0.95) after one gradient of 1 and of 2: 0.1 g and 0.05 g^2
    assert torch.allclose(matrix["exp_avg"], torch.full((2, 3), 0.1))
    assert torch.allclose(bias["exp_avg_sq"], torch.full((2,), 0.2))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]


def test_the_published_checkpoint_is_of_the_schema_it_says(tmp_path: Path) -> None:
    """Reading must not depend on what is written today, so the folder holds exactly these files."""
    copied = shutil.copytree(PUBLISHED, tmp_path / "copy") / "step-00000200"
    assert sorted(p.name for p in copied.iterdir()) == ["policy.pt", "state.json", "weights.safetensors"]
    assert json.loads((copied / "state.json").read_text("utf-8"))["schema"] == 1
