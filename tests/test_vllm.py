"""vLLM's place behind the protocol, with a fake that has vLLM's signatures; and the same contract for danlu's own engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
import tiny as small
import torch
from engine_contract import PROMPT, EngineContract, request_for

from danlu.alignment_config import GrpoSettings, PpoSettings
from danlu.exceptions import EngineError, SettingsError
from danlu.generation import engine as local
from danlu.generation import vllm
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Engine, SamplingParams, generate
from danlu.generation.vllm import VllmEngine, sampling_arguments
from danlu.models.load import load_model
from danlu.parsing import parse
from danlu.trainers import grpo, ppo

Tiny = Callable[..., Any]


class TestLocalEngine(EngineContract):
    @pytest.fixture
    def make(self, tiny: Tiny) -> Callable[[int], Engine]:
        return lambda seed: LocalEngine(tiny("llama", seed=seed))

    @pytest.fixture
    def break_step(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], None]:
        def fail(*args: Any) -> Any:
            raise RuntimeError("out of memory")

        return lambda engine: monkeypatch.setattr(local, "sample", fail)


@pytest.fixture
def models() -> dict[str, Any]:
    return {}


@pytest.fixture
def calls(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    return fake_vllm.install(models, monkeypatch)


class TestVllmEngine(EngineContract):
    @pytest.fixture
    def make(self, tiny: Tiny, models: dict[str, Any], calls: Any) -> Callable[[int], Engine]:
        def made(seed: int) -> Engine:
            models[f"model{seed}"] = tiny("llama", seed=seed)
            return VllmEngine(f"model{seed}")

        return made

    @pytest.fixture
    def break_step(self) -> Callable[[Engine], None]:
        return lambda engine: setattr(engine._llm.llm_engine, "fails", True)  # type: ignore[attr-defined]

    def test_weights_go_in_pieces_and_the_cache_is_forgotten(
        self, engine: Any, tiny: Tiny, calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(vllm, "PIECE_BYTES", 9000)
        engine._transfer = tmp_path
        named = dict(tiny("llama", seed=1).named_parameters())
        engine.update_weights(named.items(), 3)
        loaded = [names for call, names in calls if call == "load_weights"]
        assert len(loaded) > 2 and sorted(n for names in loaded for n in names) == sorted(named)
        assert calls[-1] == ("reset_prefix_cache", None)
        assert not list(tmp_path.iterdir())

    def test_tied_weights_can_travel(self, engine: Any, tiny: Tiny) -> None:
        weight = torch.randn(61, 32)
        engine.update_weights([("model.embed_tokens.weight", weight), ("lm_head.weight", weight.detach())], 1)
        assert torch.equal(engine._llm.llm_engine.model.lm_head.weight, weight)

    def test_unknown_weights_leave_the_version(self, engine: Any) -> None:
        with pytest.raises(KeyError, match="nothing"):
            engine.update_weights([("nothing", torch.zeros(1))], 1)
        assert engine.version == 0

    def test_sleep_and_wake(self, engine: Any, calls: list[tuple[str, Any]]) -> None:
        engine.sleep()
        engine.sleep(keep_weights=False)
        engine.wake()
        assert calls[-3:] == [("sleep", 1), ("sleep", 2), ("wake_up", None)]

    def test_options_reach_vllm(self, models: dict[str, Any], tiny: Tiny, calls: Any) -> None:
        models["m"] = tiny("llama")
        engine = VllmEngine(Path("m"), tensor_parallel=2, context=32, enable_sleep_mode=True)
        assert engine.context == 32
        expected = {"tensor_parallel_size": 2, "enable_sleep_mode": True, "logprobs_mode": "processed_logprobs"}
        assert expected.items() <= engine._llm.arguments.items()


def test_without_vllm_an_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match="vLLM cannot be imported") as caught:
        VllmEngine("model")
    assert "pip install vllm" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"typical_p": 0.5}, "typical_p"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"num_beams": 2}, "num_beams"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha"),
        ({"bad_words": ((1, 2),)}, "bad_words of several tokens"),
        ({"logprobs": 21}, "logprobs above 20"),
        ({"temperature": 0.005}, "a temperature above 0 and below 0.01"),
        ({"typical_p": 0.5, "no_repeat_ngram_size": 2}, "typical_p, no_repeat_ngram_size"),
    ],
)
def test_what_vllm_lacks_is_refused_by_name(options: dict[str, Any], says: str) -> None:
    with pytest.raises(EngineError, match=f"vLLM cannot serve {says}"):
        sampling_arguments(SamplingParams(**options), 100)


def test_every_parameter_is_passed_on_or_refused() -> None:
    given = SamplingParams(
        max_new_tokens=50, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.2
    )
    passed = sampling_arguments(given, 100)
    names = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"}
    assert {n: passed[n] for n in names} == {n: getattr(given, n) for n in names}
    rest = SamplingParams(
        frequency_penalty=-1.0,
        logit_bias={3: 2.0},
        bad_words=((4,),),
        stop_ids=frozenset({9, 1}),
        stop=("x",),
        logprobs=5,
    )
    passed = sampling_arguments(rest, 100)
    assert passed["logit_bias"] == {3: 2.0, 4: float("-inf")}
    assert (passed["stop_token_ids"], passed["stop"], passed["detokenize"]) == ([1, 9], ["x"], True)
    assert (passed["frequency_penalty"], passed["logprobs"], passed["max_tokens"]) == (-1.0, 5, 100)
    short = sampling_arguments(SamplingParams(max_new_tokens=50, min_new_tokens=40, seed=-1), 10)
    assert (short["max_tokens"], short["min_tokens"]) == (10, 10) and short["seed"] == (1 << 63) - 1
    greedy = sampling_arguments(SamplingParams(temperature=0.0, top_k=5, top_p=0.5), 10)
    assert (greedy["temperature"], greedy["top_k"], greedy["top_p"]) == (0.0, 0, 1.0)


def test_both_engines_agree_greedily(tiny: Tiny, models: dict[str, Any], calls: Any) -> None:
    models["m"] = tiny("llama")
    requests = [request_for(PROMPT, temperature=0.0), request_for([9], temperature=0.0, repetition_penalty=1.5)]
    ours, theirs = generate(LocalEngine(tiny("llama")), requests), generate(VllmEngine("m"), requests)
    assert [c.ids for c in ours] == [c.ids for c in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "cls", "train", "adapter"),
    small.mostly_slow(
        [("ppo", PpoSettings, ppo.train, "lora"), ("grpo", GrpoSettings, grpo.train, "full")],
        [("ppo", PpoSettings, ppo.train, "full"), ("grpo", GrpoSettings, grpo.train, "lora")],
    ),
)
def test_roll_outs_by_vllm_are_those_of_danlu(
    kind: str, cls: Any, train: Any, adapter: str, models: dict[str, Any], calls: Any, tmp_path: Path
) -> None:
    """The fake draws with danlu's sampler: with the policy's weights as they are at each step the stages see the same answers."""
    models[str(small.model())] = load_model(small.model())
    found = {}
    for engine in ("danlu", "vllm"):
        values = small.stage(kind, tmp_path / engine, max_steps=3, adapter=adapter)
        values["rollout"] = {**values["rollout"], "engine": engine}
        train(parse(cls, values))
        found[engine] = small.metrics_of(tmp_path / engine)
    assert [name for name, _ in calls].count("reset_prefix_cache") >= 3
    names = ("score", "loss", "grad_norm", "engine_gap")
    for ours, theirs in zip(found["danlu"], found["vllm"], strict=True):
        shared = [n for n in names if n in ours]
        assert [theirs[n] for n in shared] == pytest.approx([ours[n] for n in shared], abs=1e-4)


@pytest.mark.parametrize(("adapter", "says"), [("qlora", "a base of 4 bits"), ("ptuning", "ptuning")])
def test_policies_that_vllm_cannot_follow_are_refused(adapter: str, says: str, calls: Any, tmp_path: Path) -> None:
    values = small.stage("grpo", tmp_path, adapter=adapter)
    values["rollout"] = {**values["rollout"], "engine": "vllm"}
    with pytest.raises(SettingsError, match=f"vLLM cannot follow a policy with {says}"):
        grpo.train(parse(GrpoSettings, values))
