"""The engine on families with attention of their own, with windows, and behind `danlu.load`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import danlu.assistant
from danlu.config import EngineSettings
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.generation.speculative import ModelDrafter, NgramDrafter
from danlu.models.load import save_model
from danlu.text.tokenizer import train_tokenizer

Tiny = Callable[..., Any]


def request(prompt: list[int], count: int) -> Request:
    return Request(prompt, SamplingParams(max_new_tokens=count, temperature=0))


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """One full forward for each token."""
    text = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


def test_attention_without_a_plan_decodes_in_one_batch(tiny: Tiny) -> None:
    """Rows of different lengths that join and leave; a forward for each length of new prompts, and one for all others."""
    model = tiny("gpt_neo")
    prompts = [[5, 6, 7], [9], [8, 8, 8, 9], [10, 11, 12], [13] * 9]
    counts = [9, 14, 4, 12, 8]
    expected = [greedy(model, p, c) for p, c in zip(prompts, counts, strict=True)]
    engine = LocalEngine(model, max_slots=3)
    assert not model.base_model.danlu_fast_path
    forwards: list[int] = []
    model.base_model.register_forward_hook(lambda module, args, output: forwards.append(len(output[0])))
    ids = [engine.submit(request(p, c)) for p, c in zip(prompts, counts, strict=True)]
    forwards.clear()
    steps = 0
    while engine._running or engine._waiting:
        engine.step()
        steps += 1
    assert [list(engine.result(i).ids) for i in ids] == expected
    assert steps <= len(forwards) <= steps + len(prompts)
    assert max(forwards) == 3


@pytest.mark.parametrize("beams", [1, 2])
def test_attention_without_a_plan_reads_what_prompts_share_once(beams: int, tiny: Tiny) -> None:
    model = tiny("gpt_neo")
    first = [3 + (7 * n) % 58 for n in range(40)]
    prompts = [first, [*first[:25], *range(20, 29)], [*first, 5, 6], first]
    params = SamplingParams(max_new_tokens=6, temperature=0, num_beams=beams)
    expected = [generate(LocalEngine(model), [Request(p, params)])[0].ids for p in prompts]
    engine = LocalEngine(model)
    engine._runner()  # reads a token to find out what the model keeps
    read: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = []
    for prompt in prompts:
        read.clear()
        found.append((generate(engine, [Request(prompt, params)])[0].ids, read[0]))
    assert [f for f, _ in found] == expected
    assert [r for _, r in found] == [40, 9, 2, 1]
    engine.forget_prompts()
    read.clear()
    generate(engine, [Request(first, params)])
    assert read[0] == 40


@pytest.mark.parametrize("beams", [1, 3])
def test_windows_are_kept_while_decoding(beams: int, tiny: Tiny) -> None:
    """A window of 8: prompts and answers that outgrow it."""
    plain, engine = tiny("mistral", seed=5), LocalEngine(tiny("mistral", seed=5))
    prompts = [[5, 6, 7], list(range(3, 23)), [9] * 11]
    params = SamplingParams(max_new_tokens=16, temperature=0, num_beams=beams)
    assert engine.model.base_model.danlu_fast_path
    for prompt, done in zip(prompts, generate(engine, [Request(p, params) for p in prompts]), strict=True):
        with torch.no_grad():
            found = plain.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=16,
                num_beams=beams,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=2,
            )
        assert list(done.ids) == found[0, len(prompt) :].tolist()


def test_settings_of_the_engine_reach_it(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["你好 abc"], 260)
    save_model(tiny("llama", vocab_size=260), tokenizer, tmp_path / "model")
    save_model(tiny("gpt2", vocab_size=260, n_layer=1), tokenizer, tmp_path / "draft")
    plain = danlu.assistant.load(tmp_path / "model")
    settings = EngineSettings(slots=2, cache_gib=0.01, speculate=str(tmp_path / "draft"), guesses=3)
    loaded = danlu.assistant.load(tmp_path / "model", engine=settings)
    assert isinstance(loaded.engine.drafter, ModelDrafter) and loaded.engine.drafter.tokens == 3
    assert loaded.engine.max_slots == 2 and loaded.engine._memory == int(0.01 * 2**30)
    question = [{"role": "user", "content": "abc"}]
    params = SamplingParams(max_new_tokens=20, seed=4)
    assert loaded.generate(question, params) == plain.generate(question, params)
    ngram = danlu.assistant.load(tmp_path / "model", engine=EngineSettings(speculate="ngram"))
    assert isinstance(ngram.engine.drafter, NgramDrafter) and plain.engine.drafter is None
