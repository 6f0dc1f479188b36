"""Weights in oneDNN's layout beside the plain ones: same products, and never those of weights that have changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models import prepacked
from danlu.models.starters import starter

PROMPTS = [[5, 9, 3, 7, 1, 2, 8], [4, 4, 6]]


def model(family: str = "llama", seed: int = 0) -> Any:
    found = starter(97, family=family, hidden_size=64, layers=2, heads=4, kv_heads=4, context=64, seed=seed, ids={})
    return found.bfloat16()


def packed(made: Any) -> list[Any]:
    return [m.__dict__[prepacked._NAME] for m in made.modules() if prepacked._NAME in m.__dict__]


def answers(engine: LocalEngine) -> list[tuple[list[int], list[float]]]:
    params = SamplingParams(max_new_tokens=6, temperature=0.0)
    return [(c.ids, c.logprobs) for c in generate(engine, [Request(p, params) for p in PROMPTS])]


def plain(made: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[float]]]:
    with monkeypatch.context() as patched:
        patched.setattr(prepacked, "MOST_BYTES", 0)
        return answers(LocalEngine(made))


def assert_alike(found: list[Any], expected: list[Any]) -> None:
    """bf16 products in another order: by the first token's log-probability, for later ones may follow another token."""
    for (_, a), (_, b) in zip(found, expected, strict=True):
        assert a[0] == pytest.approx(b[0], abs=0.03)


def test_products_are_those_of_plain_weights() -> None:
    layer = torch.nn.Linear(64, 48).bfloat16()
    assert prepacked.enable([(layer, [layer])])
    for rows in (1, 3, 16, 70):
        x = torch.randn(rows, 64).bfloat16()
        with torch.no_grad():
            found = prepacked.linear(layer, x, layer.weight, layer.bias, [layer])
        exact = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
        torch.testing.assert_close(found.float(), exact, rtol=2e-2, atol=2e-2)
    with torch.enable_grad():
        assert prepacked.linear(layer, x, layer.weight, layer.bias, [layer]).requires_grad, "training has plain weights"


def test_the_engine_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    expected = plain(made, monkeypatch)
    assert not packed(made)
    engine = LocalEngine(made)
    assert_alike(answers(engine), expected)
    assert len(packed(made)) == 2 * 4 + 1 and all(p.weight is not None for p in packed(made))
    engine.close()
    assert not packed(made)
    engine.close()  # a second time nothing happens


def test_new_weights_are_packed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, other = LocalEngine(model()), model(seed=1)
    before = answers(engine)
    engine.update_weights(other.named_parameters(), version=1)
    after, expected = answers(engine), plain(other, monkeypatch)
    assert_alike(after, expected)
    assert after[0][1][0] != pytest.approx(before[0][1][0], abs=0.03), "the models would not tell"


def test_weights_changed_in_place_are_seen() -> None:
    made = model()
    layer = made.get_output_embeddings()
    engine = LocalEngine(made)
    answers(engine)
    kept = packed(made)[-1].weight
    with torch.no_grad():
        layer.weight.mul_(0.5)
    answers(engine)
    assert packed(made)[-1].weight is not kept


def test_who_has_none() -> None:
    """fp32 promises bits; other families' layers have their own products; large models would be held twice."""
    for made in (model().float(), model("gpt2"), model("gpt_neox")):
        LocalEngine(made)._runner()
        assert not packed(made)
    layer = torch.nn.Linear(64, 48).bfloat16()
    with torch.inference_mode():
        inside = torch.nn.Linear(64, 48).bfloat16()
    assert prepacked.enable([(layer, [layer])]) and not prepacked.enable([(inside, [inside])])


def test_a_copy_packs_its_own() -> None:
    made = model()
    answers(LocalEngine(made))
    twin = copy.deepcopy(made)
    assert packed(twin) and all(p.weight is None for p in packed(twin))
    assert answers(LocalEngine(twin)) == answers(LocalEngine(made))
