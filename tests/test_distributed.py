"""1 process == 2 processes: gradients and metrics of a step, over gloo. This file is also the program that each rank runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from danlu.models.load import starter
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.training import distributed
from danlu.training.compute import Compute
from danlu.training.step import accumulate, language_loss
from danlu.tree import Node, TreeBatch, branches, forest

# Micro-batches per step: more than two ranks share evenly, and fewer than there are ranks.
STEPS = {"five": 5, "one": 1}
SECONDS = 30


def trees(count: int) -> list[list[Node]]:
    return [branches([3 + n, 4, 5], [[6] * (n + 1), [7, 8 + n]]) for n in range(count)]


def step(count: int) -> dict[str, Tensor]:
    """Gradients and metrics of one optimizer step of this process and whoever else takes part."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = starter(40, hidden_size=32, layers=2, heads=2, kv_heads=1, context=32, seed=distributed.world()[0], ids=ids)
    distributed.broadcast(model.parameters())  # each rank began with weights of its own
    root = RootModel(SeparateModels({"policy": model}, ["policy"]))
    total = sum(w for n in forest(trees(count)) for w in n.loss_weights)
    batches = [(TreeBatch.of(tree), total) for tree in trees(count)]
    metrics = accumulate(root, "policy", distributed.mine(batches), language_loss, Compute("cpu", "float32", 1))
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {f"metric {k}": torch.tensor(v) for k, v in metrics.items()}


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.start()
    rank, size = distributed.world()
    assert size == 2 and distributed.is_main() == (rank == 0)
    assert distributed.mine(list("abcde")) == list(("ace", "bd")[rank])
    for name, count in STEPS.items():
        torch.save(step(count), folder / f"{name}-{rank}.pt")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_rank(rank: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    place = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (folder / f"stderr-{rank}.txt").open("wb") as errors:
        command = [sys.executable, __file__, str(folder)]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | place, stderr=errors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote; a step that failed, or in which they wait for one another, wrote nothing."""
    folder, port = tmp_path_factory.mktemp("ranks"), free_port()
    processes = [start_rank(rank, port, folder) for rank in range(2)]
    end = time.monotonic() + SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    for process in processes:
        process.kill()
        process.wait()
    return folder


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_equal_one(name: str, folder: Path) -> None:
    expected = step(STEPS[name])
    for rank in range(2):
        path = folder / f"{name}-{rank}.pt"
        assert path.is_file(), f"rank {rank} failed or hung: {(folder / f'stderr-{rank}.txt').read_text()[-2000:]}"
        found = torch.load(path, weights_only=True)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            error = float((found[key] - value).abs().max())
            assert error <= 1e-5 * float(value.abs().max()), f"rank {rank}, {key}: off by {error}"


def test_one_process_is_the_identity() -> None:
    assert distributed.world() == (0, 1) and distributed.is_main()
    assert distributed.mine([1, 2, 3]) == [1, 2, 3]
    assert distributed.combine_numbers({"a": 1.5}, {"a"}) == {"a": 1.5}
    parameter = torch.nn.Parameter(torch.ones(2))
    distributed.sum_gradients([parameter])
    distributed.broadcast([parameter])
    assert parameter.grad is None and parameter.tolist() == [1.0, 1.0]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
