"""What every engine promises, as tests: a class to inherit for each backend, whose fixture says how to make one."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from danlu.exceptions import EngineError, GenerationFailed
from danlu.generation.protocol import Completion, Engine, Request, SamplingParams, expand, generate
from danlu.generation.seeds import mix_seed

PROMPT = [5, 6, 7]


def request_for(prompt: list[int] = PROMPT, **options: Any) -> Request:
    return Request(prompt, SamplingParams(**({"max_new_tokens": 12} | options)))


def said(completion: Completion) -> tuple[Any, ...]:
    return completion.ids, completion.logprobs, completion.finish_reason, completion.top_logprobs


class EngineContract:
    """Inherit, and define the fixture `make`: an engine with the weights of `conftest.tiny("llama", seed=...)`, context 64."""

    @pytest.fixture
    def make(self) -> Callable[[int], Engine]:
        raise NotImplementedError

    @pytest.fixture
    def engine(self, make: Callable[[int], Engine]) -> Engine:
        return make(0)

    @pytest.fixture
    def model(self, tiny: Callable[..., Any]) -> Any:
        return tiny("llama")

    # -- answers

    def test_results_are_what_was_asked_for(self, engine: Engine, model: Any) -> None:
        [done] = generate(engine, [request_for(temperature=0.0)])
        assert (len(done.ids), done.finish_reason, done.policy_version) == (12, "length", 0)
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *done.ids]])).logits[0, len(PROMPT) - 1 : -1]
        assert list(done.ids) == logits.argmax(-1).tolist()

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"temperature": 0.7},
            {"temperature": 0.0},
            {"top_k": 5},
            {"top_p": 0.6, "temperature": 1.3},
            {"min_p": 0.2},
        ],
    )
    def test_logprobs_are_of_the_distribution_drawn_from(
        self, options: dict[str, Any], engine: Engine, model: Any
    ) -> None:
        [done] = generate(engine, [request_for(logprobs=4, seed=3, **options)])
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *done.ids]])).logits[0, len(PROMPT) - 1 : -1]
        for token, logprob, top, row in zip(done.ids, done.logprobs, done.top_logprobs, logits, strict=True):
            expected = distribution(row, options)
            assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
            best = [int(i) for i in expected.argsort(descending=True)[:4] if expected[i] > -math.inf]
            assert [i for i, _ in top] == best
            assert [v for _, v in top] == pytest.approx([float(expected[i]) for i in best], abs=1e-4)

    def test_top_logprobs_come_only_when_asked_for(self, engine: Engine) -> None:
        plain, asked = generate(engine, [request_for(seed=1), request_for(seed=1, logprobs=2)])
        assert plain.ids == asked.ids and all(len(top) == 2 for top in asked.top_logprobs)
        assert not any(plain.top_logprobs)

    def test_seeds_repeat_and_differ(self, engine: Engine) -> None:
        first, again, other = generate(engine, [request_for(seed=s) for s in (1, 1, 2)])
        assert first.ids == again.ids != other.ids
        assert generate(engine, [request_for(seed=1)])[0].ids == first.ids
        assert generate(engine, [request_for(seed=2**62 + 5)])[0].ids

    def test_answers_do_not_depend_on_the_others(self, engine: Engine) -> None:
        requests = [
            request_for([3 + n] * (1 + n), seed=n, max_new_tokens=4 + n, temperature=1.0 - n / 5) for n in range(5)
        ]
        together = generate(engine, requests)
        alone = [generate(engine, [r])[0] for r in requests]
        assert [c.ids for c in together] == [c.ids for c in alone]

    def test_a_stop_id_ends_and_belongs_to_the_answer(self, engine: Engine) -> None:
        [free] = generate(engine, [request_for(seed=4)])
        stop = free.ids[5]
        first = free.ids.index(stop)
        [done] = generate(engine, [request_for(seed=4, stop_ids=frozenset({stop}))])
        assert (done.ids, done.finish_reason) == (free.ids[: first + 1], "stop")
        assert done.logprobs == pytest.approx(free.logprobs[: first + 1], abs=1e-5)

    def test_only_what_was_asked_for_ends_an_answer(self, engine: Engine, model: Any) -> None:
        end = model.config.eos_token_id
        [done] = generate(engine, [request_for(logit_bias={end: 100.0}, temperature=0.0)])
        assert done.ids == (end,) * 12

    def test_an_answer_is_not_shorter_than_its_minimum(self, engine: Engine) -> None:
        stops = frozenset(range(0, 61, 2))
        [short] = generate(engine, [request_for(stop_ids=stops)])
        [longer] = generate(engine, [request_for(stop_ids=stops, min_new_tokens=6)])
        assert len(short.ids) < 6 < len(longer.ids) + 1
        assert not stops & {*longer.ids[:6]}

    def test_penalties_and_biases_act(self, engine: Engine) -> None:
        [forced] = generate(engine, [request_for(logit_bias={9: 100.0}, max_new_tokens=3, temperature=0.0)])
        assert forced.ids == (9, 9, 9)
        [banned] = generate(engine, [request_for(bad_words=((9,),), logit_bias={9: 100.0}, max_new_tokens=3)])
        assert 9 not in banned.ids
        repeats = request_for(repetition_penalty=50.0, temperature=0.0, max_new_tokens=8)
        [varied] = generate(engine, [repeats])
        assert len({*varied.ids, *PROMPT}) == 8 + len(PROMPT)

    def test_presence_and_frequency_count_the_answer(self, engine: Engine, model: Any) -> None:
        penalties = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
        [done] = generate(engine, [request_for(temperature=0.0, logit_bias={5: 8.0, 9: 8.0}, **penalties)])
        assert len({*done.ids}) < 12  # so that something is counted
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *done.ids]])).logits[0, len(PROMPT) - 1 : -1]
        for n, (token, logprob) in enumerate(zip(done.ids, done.logprobs, strict=True)):
            row = logits[n].clone()
            row[[5, 9]] += 8.0
            for seen in {*done.ids[:n]}:
                row[seen] -= 1.5 + 0.5 * done.ids[:n].count(seen)
            assert int(row.argmax()) == token
            assert logprob == pytest.approx(float(torch.log_softmax(row, -1)[token]), abs=1e-4)

    def test_answers_end_where_the_context_ends(self, engine: Engine) -> None:
        full, one = generate(engine, [request_for([5] * 60, max_new_tokens=100), request_for([5] * 63)])
        assert (len(full.ids), full.finish_reason, len(one.ids)) == (4, "length", 1)

    @pytest.mark.parametrize(("length", "says"), [(0, "empty"), (64, "64 tokens"), (99, "context holds 64")])
    def test_prompts_that_do_not_fit_are_refused(self, length: int, says: str, engine: Engine) -> None:
        with pytest.raises(EngineError, match=says):
            engine.submit(request_for([5] * length))

    # -- several answers

    @pytest.mark.parametrize("options", [{"n": 2}, {"best_of": 2}])
    def test_a_request_has_one_answer(self, options: dict[str, Any], engine: Engine) -> None:
        with pytest.raises(EngineError, match="one answer"):
            engine.submit(request_for(**options))

    @pytest.mark.parametrize("prompt", [[5, -6, 7], [5, 6.5], "abc", [5, None]])
    def test_prompts_that_are_no_ids_are_refused(self, prompt: Any, engine: Engine) -> None:
        with pytest.raises(EngineError, match="token id"):
            engine.submit(request_for(prompt))

    def test_n_answers_are_n_requests(self, engine: Engine) -> None:
        several = request_for(seed=3, n=3, max_new_tokens=6)
        singles = expand(several)
        assert [r.params.seed for r in singles] == [3, mix_seed(3, 1), mix_seed(3, 2)]
        other = request_for([7], max_new_tokens=2)
        done = generate(engine, [several, other])
        assert [c.ids for c in done] == [c.ids for c in generate(engine, [*singles, other])]
        assert len({c.ids for c in done[:3]}) == 3

    def test_best_of_returns_the_likeliest(self, engine: Engine) -> None:
        params = SamplingParams(max_new_tokens=6, seed=3, n=2, best_of=6, stop_ids=frozenset(range(0, 60, 4)))
        every = generate(engine, [Request(PROMPT, replace(params, n=6))])
        assert len({len(c.ids) for c in every}) > 1  # so that a mean is not a sum
        ranked = sorted(every, key=lambda c: -sum(c.logprobs) / len(c.logprobs))
        assert [c.ids for c in generate(engine, [Request(PROMPT, params)])] == [c.ids for c in ranked[:2]]

    # -- streams and cancelling

    def test_a_stream_is_the_result(self, engine: Engine) -> None:
        [whole] = generate(engine, [request_for(seed=2, logprobs=2)])
        request_id = engine.submit(request_for(seed=2, logprobs=2))
        tokens = list(engine.stream(request_id))
        assert [t.id for t in tokens] == list(whole.ids)
        assert [t.logprob for t in tokens] == pytest.approx(whole.logprobs, abs=1e-5)
        assert [[i for i, _ in t.top_logprobs] for t in tokens] == [[i for i, _ in top] for top in whole.top_logprobs]
        assert engine.result(request_id).ids == whole.ids

    def test_leaving_a_stream_cancels(self, engine: Engine) -> None:
        request_id = engine.submit(request_for())
        stream = engine.stream(request_id)
        first = next(stream)
        stream.close()  # type: ignore[attr-defined]
        done = engine.result(request_id)
        assert done.finish_reason == "cancelled" and done.ids[0] == first.id and len(done.ids) < 12

    def test_cancelled_requests_end_and_others_go_on(self, engine: Engine) -> None:
        [alone] = generate(engine, [request_for(seed=1)])
        gone, stays = engine.submit(request_for(seed=9)), engine.submit(request_for(seed=1))
        engine.cancel(gone)
        assert engine.result(stays).ids == alone.ids
        assert engine.result(gone).finish_reason == "cancelled"
        engine.cancel(gone)
        engine.cancel("unknown")

    def test_results_are_forgotten(self, engine: Engine) -> None:
        request_id = engine.submit(request_for(max_new_tokens=1))
        engine.result(request_id)
        with pytest.raises(EngineError, match=request_id):
            engine.result(request_id)
        with pytest.raises(EngineError, match="no request"):
            next(iter(engine.stream("unknown")))

    def test_many_threads_wait_at_once(self, engine: Engine) -> None:
        requests = [request_for(seed=n) for n in range(12)]
        alone = [generate(engine, [r])[0].ids for r in requests[:3]]
        with ThreadPoolExecutor(6) as pool:
            done = list(pool.map(lambda r: generate(engine, [r])[0].ids, requests))
        assert done[:3] == alone and threading.active_count() < 50

    def test_a_broken_step_ends_every_request(self, engine: Engine, break_step: Callable[[Engine], None]) -> None:
        ids = [engine.submit(request_for(seed=n)) for n in range(2)]
        break_step(engine)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.result(ids[0])
        with pytest.raises(GenerationFailed, match="out of memory"):
            engine.result(ids[1])

    @pytest.fixture
    def break_step(self) -> Callable[[Engine], None]:
        """A function that lets the engine's next step raise RuntimeError("out of memory")."""
        raise NotImplementedError

    # -- weights

    def test_weights_and_version_change_together(self, make: Callable[[int], Engine], tiny: Callable[..., Any]) -> None:
        engine, other = make(0), make(1)
        request = request_for(seed=5)
        [before] = generate(engine, [request])
        [expected] = generate(other, [request])
        assert engine.version == before.policy_version == 0 and before.ids != expected.ids
        engine.update_weights(tiny("llama", seed=1).named_parameters(), 7)
        [after] = generate(engine, [request])
        assert engine.version == after.policy_version == 7
        assert after.ids == expected.ids

    def test_weights_do_not_change_under_a_request(self, engine: Engine) -> None:
        request_id = engine.submit(request_for())
        with pytest.raises(EngineError, match="while requests are running"):
            engine.update_weights([], 1)
        engine.cancel(request_id)
        engine.update_weights([], 1)
        assert engine.version == 1


def distribution(logits_V: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities after temperature and one cut, by transformers."""
    from transformers.generation import logits_process as peer

    scores = logits_V[None]
    if options.get("temperature", 1.0) > 0:
        scores = scores / options.get("temperature", 1.0)
    for name, warper in (
        ("top_k", peer.TopKLogitsWarper),
        ("top_p", peer.TopPLogitsWarper),
        ("min_p", peer.MinPLogitsWarper),
    ):
        if name in options:
            scores = warper(options[name])(torch.zeros(1, 0), scores)
    return torch.log_softmax(scores, -1)[0]
