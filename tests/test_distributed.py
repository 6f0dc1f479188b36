"""1 process == 2 processes: steps, whole stages, and resumption with another number of them. Rank functions are in this file."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import make_tiny
from safetensors.torch import load_file
from test_checkpoint import PUBLISHED, Tiny, optimizer_of
from test_ppo import everything
from torch import Tensor, nn

from danlu.config import KINDS, SftSettings
from danlu.data.collate import Trees
from danlu.models.load import save_model
from danlu.models.roles import AdapterRoles, SeparateModels
from danlu.models.root import RootModel
from danlu.models.starters import starter
from danlu.parsing import parse
from danlu.pipeline.ranks import Runner
from danlu.training import checkpoint, distributed, sharding
from danlu.training.compute import Compute
from danlu.training.launch import Crew
from danlu.training.optim import adamw
from danlu.training.result import whole_state
from danlu.training.step import accumulate, apply, heldout_loss, language_loss
from danlu.tree import Node, TreeBatch, branches, forest

# Micro-batches per step: more than two ranks share evenly, and fewer than there are ranks.
COUNTS = {"five": 5, "one": 1}
CPU = Compute("cpu", "float32", 1)
ONE = (1, "ddp")
TWO = {"ddp": (2, "ddp"), "zero2": (2, "zero2"), "fsdp2": (2, "fsdp2")}


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(2) as found:
        yield found


# -- steps --------------------------------------------------------------------------------------------------------------


def trees(count: int) -> list[list[Node]]:
    return [branches([3 + n, 4, 5], [[6] * (n + 1), [7, 8 + n]]) for n in range(count)]


def root_of(strategy: str, adapter: bool) -> RootModel:
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = starter(40, hidden_size=32, layers=2, heads=2, kv_heads=1, context=32, seed=3, ids=ids)
    roles = (
        AdapterRoles(model, ["policy", "critic"], seed=5) if adapter else SeparateModels({"policy": model}, ["policy"])
    )
    return sharding.shard(RootModel(roles), SftSettings(strategy=strategy), CPU)


def train_two_steps(task: tuple[str, str, bool]) -> dict[str, Tensor]:
    """Gradients, norm and metrics of a step, and the weights after it and another; of this process and who else takes part."""
    name, strategy, adapter = task
    root = root_of(strategy, adapter)
    optimizer = adamw(root, 0.01, 0.0)
    found: dict[str, Tensor] = {}
    for step in range(2):
        given = trees(COUNTS[name])[step:] or trees(1)
        total = sum(w for n in forest(given) for w in n.loss_weights)
        batches = distributed.mine([(TreeBatch.of(tree), total) for tree in given])
        metrics = accumulate(root, "policy", batches, language_loss, CPU)
        found |= {f"{step} metric {k}": torch.tensor(v) for k, v in metrics.items()}
        grads = [
            (n, p.grad.clone()) for n, p in root.named_parameters() if p.grad is not None
        ]  # clipped in place below
        found |= {f"{step} grad {n}": g for n, g in sharding.whole_of(grads)}
        found[f"{step} norm"] = torch.tensor(apply(optimizer, list(root.parameters()), 0.5))
    found |= {f"weight {n}": p.clone() for n, p in sharding.whole_of(root.named_parameters())}
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        error = float((found[key].float() - value.float()).abs().max())
        assert error <= tolerance * max(float(value.abs().max()), 1e-6), f"{key}: off by {error}"


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", tiny.mostly_slow(["ddp", "fsdp2"], ["zero2"]))
@pytest.mark.parametrize("name", tiny.mostly_slow(["five"], ["one"]))
def test_steps_of_two_processes_equal_those_of_one(name: str, strategy: str, adapter: bool, crew: Crew) -> None:
    expected = train_two_steps((name, "ddp", adapter))
    assert any(float(v.abs().max()) > 0 for k, v in expected.items() if "grad" in k)
    for found in crew.run(train_two_steps, (name, strategy, adapter)):
        first, wanted = ({k: v for k, v in f.items() if k.startswith("0 ")} for f in (found, expected))
        assert_close(first, wanted)
        # AdamW's first update is the sign of the gradient: of one that is nearly zero, rounding decides it.
        assert_close(found, expected, 1e-3)


def ask_one_another(items: Sequence[int]) -> dict[str, Any]:
    rank, _ = distributed.world()
    with distributed.alone():
        by_itself = distributed.world(), distributed.share(items, lambda part: [-i for i in part])
    return {
        "mine": distributed.mine(items),
        "share": distributed.share(items, lambda part: [(i * i, rank) for i in part]),
        "same": distributed.same(f"of rank {rank}"),
        "gather": distributed.gather(rank),
        "most": distributed.most(10 - rank),
        "anyone": (distributed.anyone(rank == 1), distributed.anyone(False)),
        "combined": distributed.combine_numbers({"a": 1.0 + rank, "b": 5.0 - rank}, {"b"}),
        "alone": by_itself,
    }


def test_what_ranks_tell_one_another(crew: Crew) -> None:
    first, second = crew.run(ask_one_another, [1, 2, 3])
    assert (first.pop("mine"), second.pop("mine")) == ([1, 3], [2])
    assert first == second
    assert first["share"] == [(1, 0), (4, 1), (9, 0)]
    assert (first["same"], first["gather"], first["most"], first["anyone"]) == ("of rank 0", [0, 1], 10, (True, False))
    assert first["combined"] == {"a": 3.0, "b": 5.0}
    assert first["alone"] == ((0, 1), [-1, -2, -3])


def test_one_process_is_the_identity() -> None:
    assert distributed.world() == (0, 1) and distributed.is_main()
    assert distributed.mine([1, 2, 3]) == [1, 2, 3]
    assert distributed.share([1, 2], lambda part: [i + 1 for i in part]) == [2, 3]
    assert distributed.combine_numbers({"a": 1.5}, {"a"}) == {"a": 1.5}
    parameter = nn.Parameter(torch.ones(2))
    distributed.sum_gradients([parameter])
    distributed.broadcast([parameter])
    assert parameter.grad is None and parameter.tolist() == [1.0, 1.0]


# -- sharded weights ----------------------------------------------------------------------------------------------------


def save_from_shards(task: tuple[Path, str]) -> tuple[list[tuple[int, ...]], float, dict[str, Tensor] | None]:
    """Shapes of this rank's shards, a held-out loss, and the whole state, after a checkpoint was written."""
    folder, strategy = task
    root = root_of(strategy, False)
    model: Any = root.trunks.models["policy"]
    items = Trees(items=trees(3))
    loss = heldout_loss(root, items, 8, CPU)
    checkpoint.save(folder, 1, root, {}, {})
    shapes = [tuple(p.to_local().shape) for p in root.parameters()]
    return shapes, loss, whole_state(model)


@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_each_rank_holds_a_part_and_leaves_the_whole(strategy: str, crew: Crew, tmp_path: Path) -> None:
    one = root_of("ddp", False)
    (shapes, loss, state), (other_shapes, other_loss, nothing) = crew.run(save_from_shards, (tmp_path, strategy))
    sizes = [p.numel() for p in one.parameters()]
    parts = [torch.Size(a).numel() + torch.Size(b).numel() for a, b in zip(shapes, other_shapes, strict=True)]
    assert parts == sizes and sum(torch.Size(s).numel() for s in shapes) < 0.6 * sum(sizes)
    assert loss == other_loss == pytest.approx(heldout_loss(one, Trees(items=trees(3)), 8, CPU), rel=1e-5)
    model: Any = one.trunks.models["policy"]
    assert state is not None and not nothing  # rank 0 alone keeps what was gathered
    assert_close(state, {n: p.detach() for n, p in model.named_parameters()}, 0.0)
    saved = load_file(tmp_path / "step-00000001" / "weights.safetensors")
    assert_close(saved, {n: p.detach() for n, p in one.named_parameters()}, 0.0)


def load_published(strategy: str) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = Tiny(seed=1)
    if strategy == "fsdp2":
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    optimizer = optimizer_of(module)
    checkpoint.load(PUBLISHED / "step-00000200", module, {"policy": optimizer})
    found = dict(sharding.whole_of(module.named_parameters()))
    return found | {k: sharding.whole(v) for k, v in optimizer.state[module.matrix].items()}


def test_the_published_checkpoint_is_sharded_on_reading(crew: Crew) -> None:
    expected = load_published("ddp")
    for found in crew.run(load_published, "fsdp2"):
        assert_close(found, expected, 0.0)


# -- stages -------------------------------------------------------------------------------------------------------------

STEPS = {"sft": 8, "reward": 4, "ppo": 4}


@pytest.fixture(scope="module")
def runner(crew: Crew) -> Runner:
    """With the crew that is there already."""
    found = Runner()
    found._crew = crew
    return found


def settings_of(kind: str, out: Path, shared: tuple[int, str]) -> Any:
    """`eval_every` makes a held-out evaluation fall before and after the checkpoint."""
    half = STEPS[kind] // 2
    changes = {"processes": shared[0], "strategy": shared[1], "save_every": half, "eval_every": half}
    return parse(KINDS[kind], tiny.stage(kind, out, max_steps=STEPS[kind], schedule="constant", **changes))


@functools.cache
def finished(kind: str, shared: tuple[int, str], runner: Runner) -> Path:
    """A stage run in one go, once per process."""
    out = tiny.home() / f"{kind}-{shared[0]}-{shared[1]}"
    out.mkdir()
    runner.run(kind, settings_of(kind, out, shared))
    return out


def without_key_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same for all keys, they change no attention: their gradient is rounding, and so are Adam's updates of them."""
    for name, value in weights.items():
        if name.endswith("c_attn.bias"):
            value.chunk(3)[1].zero_()
        elif name.endswith("query_key_value.bias"):
            value.view(4, 3, -1)[:, 1].zero_()  # by heads
    return weights


def assert_same_stage(out: Path, expected: Path) -> None:
    rows, wanted = tiny.metrics_of(out), tiny.metrics_of(expected)
    assert len(rows) == len(wanted) > 0
    for row, other in zip(rows, wanted, strict=True):
        losses = {k for k in other if "loss" in k or k in ("step", "score", "kl", "eval_score")}
        assert {k: row[k] for k in losses} == pytest.approx({k: other[k] for k in losses}, rel=1e-5, abs=1e-5)
    # Adam's updates of entries whose gradient is nearly zero are decided by rounding.
    found, weights = (without_key_biases(load_file(o / "model" / "model.safetensors")) for o in (out, expected))
    assert_close(found, weights, 1e-4)


@pytest.mark.parametrize("strategy", tiny.mostly_slow(["ddp", "fsdp2"], ["zero2"]))
@pytest.mark.parametrize("kind", STEPS)
def test_a_stage_of_two_processes_equals_one(kind: str, strategy: str, runner: Runner) -> None:
    assert_same_stage(finished(kind, TWO[strategy], runner), finished(kind, ONE, runner))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_natural_steps_of_two_processes_equal_those_of_one(kind: str, runner: Runner, tmp_path: Path) -> None:
    """Every process measures the metric on all answers."""
    steps = {"optimizer": "natural", "natural": {"every": 2, "trust": 1e-6}}
    for name, shared in {"one": ONE, "two": TWO["ddp"]}.items():
        out = tmp_path / name
        out.mkdir()
        changes = steps | {"processes": shared[0], "strategy": shared[1], "schedule": "constant"}
        runner.run(kind, parse(KINDS[kind], tiny.stage(kind, out, max_steps=4, **changes)))
    assert_same_stage(tmp_path / "two", tmp_path / "one")


MODELS = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),  # one table for embedding and head
    "qwen3": ("qwen3", {}),
    "bloom": ("bloom", {}),  # rows of padding in place of trees
    "lora": ("qwen3", {"adapter": "lora"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", TWO)
@pytest.mark.parametrize("name", MODELS)
def test_sft_of_a_family_in_two_processes(name: str, strategy: str, runner: Runner, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    text = tiny.tokenizer()
    ids = {f"{n}_token_id": getattr(text, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    model = make_tiny(family, vocab_size=len(text), **ids)
    save_model(model, text, tmp_path / "model")
    for folder, shared in {"one": ONE, "two": TWO[strategy]}.items():
        out = tmp_path / folder
        out.mkdir()
        settings = settings_of("sft", out, shared).model_dump() | {"model": str(tmp_path / "model"), **changes}
        runner.run("sft", SftSettings(**settings))
    assert_same_stage(tmp_path / "two", tmp_path / "one")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("model", "two/model"))
    assert any(float((after[n] - w).abs().max()) > 1e-3 for n, w in before.items()), "nothing was learnt"


@pytest.mark.parametrize("strategy", tiny.mostly_slow(["zero2"], ["ddp", "fsdp2"]))
def test_ppo_with_everything_in_two_processes(strategy: str, runner: Runner, tmp_path: Path) -> None:
    """Whitening, moments, PTX and averages are those of all ranks together."""
    shared = {"ppo-ddp": ONE, strategy: TWO[strategy]}
    outs = []
    for name, (processes, kind) in shared.items():
        out = tmp_path / name
        out.mkdir()
        changes = everything() | {"processes": processes, "strategy": kind, "save_every": 2, "learning_rate": 1e-3}
        runner.run("ppo", parse(KINDS["ppo"], tiny.stage("ppo", out, max_steps=4, schedule="constant", **changes)))
        outs.append(out)
    one, two = outs
    assert_same_stage(two, one)
    exact = (
        "advantage_std",
        "advantage_max",
        "explained_variance",
        "importance_mean",
        "ptx_loss",
        "ptx_share",
        "ratio_max",
    )
    for row, other in zip(tiny.metrics_of(two), tiny.metrics_of(one), strict=True):
        assert {k: row[k] for k in exact if k in other} == pytest.approx(
            {k: other[k] for k in exact if k in other}, rel=1e-3, abs=1e-4
        )
    found, expected = (load_file(o / "ema" / "model.safetensors") for o in (two, one))
    assert_close(found, expected, 1e-4)


def half_done(whole: Path, out: Path, step: int) -> Path:
    """A stage as a kill after its checkpoint at `step` leaves it."""
    shutil.copytree(whole / "checkpoints" / f"step-{step:08d}", out / "checkpoints" / f"step-{step:08d}")
    for name in ("compute.json", "metrics.jsonl"):
        shutil.copy(whole / name, out / name)
    return out


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("sft", TWO["ddp"], ONE),
        ("sft", ONE, TWO["fsdp2"]),
        ("reward", TWO["fsdp2"], TWO["ddp"]),
        ("ppo", TWO["fsdp2"], ONE),
        pytest.param("ppo", TWO["zero2"], ONE, marks=pytest.mark.slow),
        pytest.param("sft", ONE, TWO["ddp"], marks=pytest.mark.slow),
        pytest.param("sft", TWO["fsdp2"], TWO["ddp"], marks=pytest.mark.slow),
        pytest.param("reward", TWO["fsdp2"], ONE, marks=pytest.mark.slow),
        pytest.param("ppo", TWO["ddp"], TWO["fsdp2"], marks=pytest.mark.slow),
    ],
)
def test_resumption_with_another_number_of_processes(
    kind: str, before: tuple[int, str], after: tuple[int, str], runner: Runner, tmp_path: Path
) -> None:
    out = half_done(finished(kind, before, runner), tmp_path, STEPS[kind] // 2)
    runner.run(kind, settings_of(kind, out, after))
    assert json.loads((out / "compute.json").read_text("utf-8"))["processes"] == after[0]
    assert_same_stage(out, finished(kind, ONE, runner))


@pytest.mark.parametrize("strategy", TWO)
@pytest.mark.parametrize("kind", ["sft", pytest.param("ppo", marks=pytest.mark.slow)])
def test_resumption_with_as_many_processes_is_exact(kind: str, strategy: str, runner: Runner, tmp_path: Path) -> None:
    whole = finished(kind, TWO[strategy], runner)
    out = half_done(whole, tmp_path, STEPS[kind] // 2)
    runner.run(kind, settings_of(kind, out, TWO[strategy]))
    assert tiny.weights(out / "model") == tiny.weights(whole / "model")
    assert (out / "metrics.jsonl").read_text("utf-8") == (whole / "metrics.jsonl").read_text("utf-8")
