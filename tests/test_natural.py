"""Natural gradients: the metric against gradients taken one by one, the step and the cut by hand, and a lesson on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from danlu.data.collate import Trees
from danlu.exceptions import KnowledgeError
from danlu.knowledge.facts import Fact
from danlu.knowledge.memory import encode
from danlu.knowledge.natural import Changes, cut, metrics_of
from danlu.knowledge.phrasings import user
from danlu.knowledge.replay import Pool, Question
from danlu.knowledge.teach import Pupil, _draw, teach_one
from danlu.knowledge_config import TeachSettings
from danlu.models.load import load_model, save_model
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import load_tokenizer
from danlu.training.compute import Compute
from danlu.training.fisher import DAMPING, Metric, Side, layers_of, learning

CPU = Compute("cpu", "float32", 1)


class Two(nn.Module):
    """Two linear layers under the names of a model's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)


def positive(width: int, seed: int) -> torch.Tensor:
    rows = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows


def damped(moment: torch.Tensor) -> torch.Tensor:
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment))


def test_powers_of_a_side() -> None:
    moment = positive(4, 0)
    rows = torch.randn(3, 4)
    inverse = torch.linalg.inv(damped(moment))  # the mean eigenvalue is the mean of the diagonal
    torch.testing.assert_close(Side.of(moment).scaled(rows, -1.0), rows @ inverse, rtol=1e-4, atol=1e-5)
    diagonal = torch.tensor([1.0, 2.0, 3.0, 2.0])  # mean 2: one is added to each
    torch.testing.assert_close(Side.of(diagonal).scaled(rows, -1.0), rows / torch.tensor([2.0, 3.0, 4.0, 3.0]))


def test_a_step_goes_as_far_as_it_may_in_the_metric() -> None:
    model = Two()
    moments = {n: (positive(4, i), positive(3, 9 + i)) for i, n in enumerate(("first", "second"))}
    metrics = {n: Metric(Side.of(c), Side.of(g)) for n, (c, g) in moments.items()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    changes = Changes(model, metrics)
    gradients = {}
    for n, p in model.named_parameters():
        p.grad = torch.randn_like(p)
        gradients[n] = p.grad.clone()
    changes.step(0.04)
    price = 0.0
    for n, (c, g) in moments.items():
        change = model.get_submodule(n).weight.detach() - before[f"{n}.weight"]
        price += float(torch.trace(damped(g) @ change @ damped(c) @ change.T))
        along = torch.linalg.inv(damped(g)) @ gradients[f"{n}.weight"] @ torch.linalg.inv(damped(c))
        ratio = change / along
        torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])), rtol=1e-3, atol=0.0)
        assert ratio[0, 0] < 0, "downhill"
        assert model.get_submodule(n).weight.grad is None
    assert price == pytest.approx(0.04, rel=1e-3)
    changes.close()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_gradients_that_are_no_numbers_are_a_sentence(number: float) -> None:
    model = Two()
    metrics = {n: Metric(Side.of(torch.ones(4)), Side.of(torch.ones(3))) for n in ("first", "second")}
    changes = Changes(model, metrics)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, number)
    with pytest.raises(KnowledgeError, match="no numbers"):
        changes.step(0.04)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    changes.step(0.04)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "nothing to learn"


def test_the_cut_keeps_what_weighs_most_wherever_it_is() -> None:
    model = Two()
    # The first layer's inputs are a hundred times those of the second: of equal changes the first one's weigh ten times as much.
    metrics = {
        "first": Metric(Side.of(100.0 * torch.ones(4)), Side.of(torch.ones(3))),
        "second": Metric(Side.of(torch.ones(4)), Side.of(torch.ones(3))),
    }
    changes = Changes(model, metrics)
    change = torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ torch.eye(3, 4)
    for name in metrics:
        changes.changes[name] = change.clone()
    found = changes.factors(1)  # two in all: 30 and 20 of the first before 3 of the second
    assert found.keys() == {"first"}
    expected = torch.diag(torch.tensor([3.0, 2.0, 0.0])) @ torch.eye(3, 4)
    torch.testing.assert_close(found["first"].b @ found["first"].a, expected, rtol=1e-4, atol=1e-5)
    whole = changes.factors(3)
    for name in metrics:
        torch.testing.assert_close(whole[name].b @ whole[name].a, change, rtol=1e-4, atol=1e-5)
    asked = iter([False, True])
    wider = cut(changes, 1, lambda: next(asked))
    assert sum(len(f.a) for f in wider.values()) == 4, "two a layer, since one did not hold"
    with changes.as_if(found):
        torch.testing.assert_close(model.second.weight, changes.before["second"])
        assert not torch.equal(model.first.weight, changes.before["first"])
    for name in metrics:  # afterwards it has the whole change
        torch.testing.assert_close(model.get_submodule(name).weight, changes.before[name] + change)


def gpt2_folder(tmp_path: Path) -> Path:
    """A GPT-2, whose layers keep their weights the other way round."""
    text = load_tokenizer(tiny.model())
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": len(text)}
    config = GPT2Config(**shape, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return save_model(GPT2LMHeadModel(config), text, tmp_path / "gpt2")


@pytest.fixture(scope="module")
def taught() -> tuple[Any, Any, Trees]:
    folder = tiny.model()
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    dialogues = [([user(text)], "green.") for text in ("the lamp?", "and the door?", "what of it?")]
    return model, tokenizer, encode(dialogues, ChatTemplate(tokenizer), 128).trees


def test_moments_are_those_of_gradients_taken_one_by_one(taught: tuple[Any, Any, Trees]) -> None:
    model, _, trees = taught
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    root = RootModel(SeparateModels({"policy": model}, [])).eval()
    found = metrics_of(model, root, [trees], "down_proj", CPU, 5)
    assert set(found) == {"model.layers.0.mlp.down_proj", name}

    # The reference: the same draws, sums over tokens by a loop, and the model's own forward without danlu's trees.
    rows: list[torch.Tensor] = []
    slopes: list[torch.Tensor] = []

    def watch(module: Any, inputs: Any, output: torch.Tensor) -> None:
        rows.append(inputs[0].detach()[0])
        output.register_hook(lambda g: slopes.append(g[0]))

    draws = torch.Generator().manual_seed(5)
    handle = layer.register_forward_hook(watch)
    model.config._attn_implementation = "eager"
    with learning(model, layers_of(model, "down_proj")):
        for item in sorted(range(3), key=lambda i: trees.lengths[i]):
            tree = trees.batch([item])
            logits = model(tree.input_ids_T[None]).logits[0]
            logprobs = logits[tree.predictor_T[tree.loss_index()]].log_softmax(-1)
            drawn = torch.multinomial(logprobs.detach().exp(), 1, generator=draws)
            (-logprobs.gather(1, drawn).sum()).backward()
    handle.remove()
    inner, outer = (sum(torch.outer(r, r) for r in torch.cat(part)) / len(torch.cat(rows)) for part in (rows, slopes))
    probe = torch.randn(2, inner.shape[0])  # type: ignore[union-attr]
    torch.testing.assert_close(found[name].inner.scaled(probe, 1.0), probe @ damped(inner), rtol=2e-3, atol=1e-5)  # type: ignore[arg-type]
    probe = torch.randn(2, outer.shape[0])  # type: ignore[union-attr]
    expected = probe @ damped(outer)  # type: ignore[arg-type]
    torch.testing.assert_close(found[name].outer.scaled(probe, 1.0), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("family", tiny.mostly_slow(["llama"], ["gpt2"]))
def test_a_lesson_is_its_factors_and_nothing_else(family: str, tmp_path: Path) -> None:
    folder = tiny.model() if family == "llama" else gpt2_folder(tmp_path)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    questions = tuple(Question((user(f"{n}: the lamp?"),)) for n in range(12))
    settings = TeachSettings(
        trust=1e-4, max_steps=20, rank=8, phrasings=8, probes=4, varied=False, both_languages=False, fact_margin=1.0
    )
    pupil = Pupil(model, tokenizer, settings, Pool(questions, questions[:4]))
    lesson = teach_one(pupil, Fact("hat", "red."), force=True)
    assert len(lesson.losses) == 20 and lesson.losses[-1] < 0.9 * lesson.losses[0] and lesson.factors
    for name, change in lesson.factors.items():
        now = model.get_submodule(name).weight
        was = before[f"{name}.weight"]
        delta = change.b @ change.a
        torch.testing.assert_close(now - was, delta if family == "llama" else delta.T, rtol=1e-3, atol=1e-5)
    others = [n for n, p in model.named_parameters() if n.removesuffix(".weight") not in lesson.factors]
    assert all(torch.equal(before[n], dict(model.named_parameters())[n]) for n in others)


def test_a_first_reply_that_fills_the_context_is_left_out() -> None:
    pupil = Pupil(load_model(tiny.model()), load_tokenizer(tiny.model()), TeachSettings(), Pool((), ()))
    asked = [user("the lamp?")]
    long = [user("the hat?"), {"role": "assistant", "content": "red " * pupil.context}, *asked]
    assert pupil.answer([long, asked], 8)[0] == pupil.answer([asked, asked], 8)[0]


def test_nothing_to_hold_is_a_sentence(taught: tuple[Any, Any, Trees]) -> None:
    model, tokenizer, _ = taught
    pupil = Pupil(model, tokenizer, TeachSettings(replay_pool=0, probes=1), Pool((), ()))
    with pytest.raises(KnowledgeError, match="needs answers that are to stay"):
        metrics_of(model, pupil.root(), [], "all-linear", CPU, 0)


def test_half_of_a_draw_is_out_of_what_is_weak() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        drawn = _draw(rng, 40, 8, weak=range(30, 40))
        assert drawn == sorted(set(drawn)) and len(drawn) == 8 and max(drawn) < 40
        assert sum(d >= 30 for d in drawn) >= 4
    assert {30, 31} <= set(_draw(rng, 40, 8, weak=[30, 31]))  # fewer than half: all of them
    assert _draw(rng, 5, 8, weak=[4]) == [0, 1, 2, 3, 4]
    # Without any it is an ordinary draw.
    assert _draw(np.random.default_rng(3), 40, 8) == sorted(
        np.random.default_rng(3).choice(40, 8, replace=False).tolist()
    )
