"""What is computed on a CUDA card equals what a CPU computes. Skipped, loudly, where there is no card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import FAST, make
from torch import Tensor

from danlu.config import KINDS
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.generation.runner import CachedRunner
from danlu.models import packed_cuda
from danlu.models.quantize import quantize_model
from danlu.models.resting import rest
from danlu.models.roles import AdapterRoles, SeparateModels
from danlu.models.root import RootModel
from danlu.parsing import parse
from danlu.trainers import dpo, grpo, ppo, reward_model, sft
from danlu.training.adamw8bit import AdamW8bit
from danlu.training.adamw_offload import AdamWOffload
from danlu.training.logprobs import logprobs
from danlu.tree import TreeBatch, branches, conversation, forest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA NOT TESTED: no GPU here")
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "glm4", "gemma2", "phi"]


def _tree() -> TreeBatch:
    long = [(5 * k) % 50 + 3 for k in range(40)]
    return TreeBatch.of(forest([branches([5, 6, 7], [[8, 9], [10, 3, 4]]), conversation(long, [1.0] * len(long))]))


def _read(root: RootModel, device: str, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    root.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        found, _ = root(_tree().to(device), "policy", lambda out: logprobs(out, out.tree.loss_index()))
    found.mean().backward()
    return found.detach().cpu(), {n: p.grad.cpu().clone() for n, p in root.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", list(FAST))
def test_trees_in_float32(family: str) -> None:
    model = make(family)
    expected, gradients = _read(RootModel(SeparateModels({"policy": model}, ["policy"])), "cpu")
    found, own = _read(RootModel(SeparateModels({"policy": model.cuda()}, ["policy"])), "cuda")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for name, value in gradients.items():
        torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", list(FAST))
def test_trees_in_bfloat16_with_a_resting_base(family: str) -> None:
    """The kernel of varlen attention where heads allow it; adapters on weights that rest."""
    roles = AdapterRoles(make(family), ["policy"])
    for name, parameter in roles.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    exact, _ = _read(RootModel(copy.deepcopy(roles)).eval(), "cpu")
    rest(roles.base, torch.bfloat16)
    found, own = _read(RootModel(roles).cuda().eval(), "cuda", torch.bfloat16)
    assert float((found - exact).abs().max()) < 0.5, "large random weights, 8 bits of mantissa"
    assert own and all(torch.isfinite(g).all() for g in own.values())


def _asked() -> list[Request]:
    asked = []
    for i, length in enumerate((3, 20, 9, 33, 5, 14, 2)):
        params = SamplingParams(max_new_tokens=5 + 3 * i, temperature=0.0 if i % 2 else 0.8, seed=i)
        asked.append(Request([(7 * i + k) % 50 + 3 for k in range(length)], params))
    return asked


@pytest.mark.parametrize("family", DECODERS)
def test_the_engine_answers_as_on_a_cpu_and_by_graphs(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(family)
    expected = generate(LocalEngine(copy.deepcopy(model), max_slots=5), _asked())
    engine = LocalEngine(model.cuda(), max_slots=5)
    found = generate(engine, _asked())
    again = generate(engine, _asked())
    runner = engine._runner()
    assert isinstance(runner, CachedRunner) and runner.graphs is not None
    assert runner.graphs.refused == "" and runner.graphs.steps, capsys.readouterr().err
    for one in (found, again):
        assert [c.ids for c in one] == [c.ids for c in expected]
        for own, other in zip(one, expected, strict=True):
            torch.testing.assert_close(torch.tensor(own.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-4)


def test_graphs_see_new_weights() -> None:
    model, other = make("llama").cuda(), make("llama", seed=1).cuda()
    expected = generate(LocalEngine(copy.deepcopy(other)), _asked())
    engine = LocalEngine(model)
    for _ in range(2):
        generate(engine, _asked())
    engine.update_weights(other.named_parameters(), 1)
    assert [c.ids for c in generate(engine, _asked())] == [c.ids for c in expected]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights(bits: int, dtype: torch.dtype) -> None:
    assert packed_cuda.available("cuda"), "else the plain products are tested"
    config = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = quantize_model(make("llama", **config), bits)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = model.to("cuda", dtype)(input_ids=ids.cuda()).logits.float().cpu()
    bound = 1e-4 if dtype == torch.float32 else 0.1  # large random weights
    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())


@pytest.mark.parametrize("kind", [AdamW8bit, AdamWOffload])
def test_own_optimizers(kind: Any) -> None:
    def train(device: str) -> Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 256).to(device)
        optimizer = kind(layer.parameters(), lr=1e-2)
        for step in range(3):
            x = torch.linspace(-1, 1, 64, device=device)[None] * (step + 1)
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer.weight.detach().cpu()

    torch.testing.assert_close(train("cuda"), train("cpu"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("adapter", ["full", "lora", "qlora", "ptuning"])
@pytest.mark.parametrize(
    ("kind", "train"),
    [("sft", sft.train), ("reward", reward_model.train), ("dpo", dpo.train), ("ppo", ppo.train), ("grpo", grpo.train)],
)
def test_stages(kind: str, train: Any, adapter: str, tmp_path: Path) -> None:
    changes = {"adapter": adapter, "dtype": "bfloat16", "max_steps": 2, "prefix": {"tokens": 4}}
    result = train(parse(KINDS[kind], tiny.stage(kind, tmp_path / "out", **changes)))
    assert (Path(result.model) / "config.json").is_file() or (Path(result.model) / "adapter_config.json").is_file()
    numbers = [v for row in tiny.metrics_of(tmp_path / "out") for v in row.values() if isinstance(v, float)]
    assert numbers and all(abs(v) < 1e6 for v in numbers)
