"""Decoding steps of fixed shape (what CUDA graphs capture) give what steps made for the moment give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make
from torch import Tensor

from danlu.generation.engine import LocalEngine
from danlu.generation.graphs import DecodeGraphs
from danlu.generation.protocol import Completion, Request, SamplingParams, generate
from danlu.generation.runner import CachedRunner
from danlu.models.prefix import attach
from danlu.models.virtual_root import Prefix, shape_of

LENGTHS = (3, 20, 9, 33, 5, 14, 2)


def _asked(**changes: Any) -> list[Request]:
    """Prompts and answers of many lengths: lanes leave at different times and move to longer arenas."""
    asked = []
    for i, length in enumerate(LENGTHS):
        params = SamplingParams(max_new_tokens=min(5 + 4 * i, 60 - length), temperature=0.8, seed=i, **changes)
        asked.append(Request([(7 * i + k) % 50 + 3 for k in range(length)], params))
    return asked


def _answers(
    model: Any, *, fixed: bool, slots: int = 5, **changes: Any
) -> tuple[list[Completion], DecodeGraphs | None]:
    engine = LocalEngine(model, max_slots=slots)
    runner = engine._runner()
    assert isinstance(runner, CachedRunner)
    if fixed:
        runner.graphs = DecodeGraphs(model, runner.cache, capture=False)
    return generate(engine, _asked(**changes)), runner.graphs


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2", "gemma2", "gpt_neox"])
def test_fixed_steps_give_the_same_answers(family: str) -> None:
    model = make(family)
    plain, _ = _answers(model, fixed=False)
    found, graphs = _answers(model, fixed=True)
    assert graphs is not None and graphs.steps, "steps that only decode were fixed ones"
    assert [c.ids for c in found] == [c.ids for c in plain]
    for own, other in zip(found, plain, strict=True):
        torch.testing.assert_close(torch.tensor(own.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-5)


def test_a_prefix_is_read_by_fixed_steps_and_a_new_one_makes_new_ones() -> None:
    model = make("llama")
    shape = shape_of(model.base_model)
    generator = torch.Generator().manual_seed(1)

    def put() -> None:
        attach(model, Prefix("ptuning", torch.randn(4, shape.numbers, generator=generator), shape))

    put()
    plain, _ = _answers(model, fixed=False)
    found, _ = _answers(model, fixed=True)
    assert [c.ids for c in found] == [c.ids for c in plain]
    put()
    engine = LocalEngine(model, max_slots=5)
    runner = engine._runner()
    assert isinstance(runner, CachedRunner)
    runner.graphs = DecodeGraphs(model, runner.cache, capture=False)
    generate(engine, _asked())
    assert runner.graphs.steps
    engine.forget_prompts()
    assert not runner.graphs.steps, "the root's numbers lie elsewhere now"


def test_beams_are_fixed_steps_too() -> None:
    model = make("llama")
    asked = [Request([3, 4, 5, 6], SamplingParams(max_new_tokens=10, num_beams=3, temperature=0.0))]
    engine = LocalEngine(model, max_slots=4)
    runner = engine._runner()
    assert isinstance(runner, CachedRunner)
    plain = generate(engine, asked)
    runner.graphs = DecodeGraphs(model, runner.cache, capture=False)
    assert [c.ids for c in generate(engine, asked)] == [c.ids for c in plain]
    assert runner.graphs.steps


def test_weights_copied_in_place_keep_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = make("llama"), make("llama", seed=1)
    expected, _ = _answers(other, fixed=False)
    engine = LocalEngine(model, max_slots=5)
    runner = engine._runner()
    assert isinstance(runner, CachedRunner)
    runner.graphs = DecodeGraphs(model, runner.cache, capture=False)
    generate(engine, _asked())
    kept = len(runner.graphs.steps)
    named: list[tuple[str, Tensor]] = list(other.named_parameters())
    engine.update_weights(named, 1)
    assert len(runner.graphs.steps) == kept > 0
    assert [c.ids for c in generate(engine, _asked())] == [c.ids for c in expected]


def test_few_shapes_are_enough() -> None:
    model = make("llama")
    _, graphs = _answers(model, fixed=True, slots=7)
    assert graphs is not None
    assert all(part[-1] in (1, 2, 4, 8) for key in graphs.steps for part in key)
