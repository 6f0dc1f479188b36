"""The engine and the sampler: independence of rows, streams, cancellation, limits, weights, threads, distributions."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from danlu.exceptions import EngineError
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Completion, Request, SamplingParams, generate
from danlu.generation.rollout import rollout
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.text.tokenizer import train_tokenizer
from danlu.training.logprobs import logprobs
from danlu.tree import TreeBatch, branches

Tiny = Callable[..., Any]
Near = Callable[..., None]
PROMPTS = [[5, 6, 7], [8], list(range(3, 43)), [9, 9], [30, 31, 32, 33]]


@pytest.fixture(params=["llama", "gpt_neo"], ids=["own cache", "transformers' cache"])
def model(request: pytest.FixtureRequest, tiny: Tiny) -> Any:
    return tiny(request.param)


def request_for(prompt: list[int], seed: int = 0, **options: Any) -> Request:
    return Request(prompt, SamplingParams(**({"max_new_tokens": 12, "seed": seed} | options)))


def alone(model: Any, request: Request) -> Completion:
    [completion] = generate(LocalEngine(copy.deepcopy(model)), [request])
    return completion


def tokens(completion: Completion) -> tuple[tuple[int, ...], str]:
    return completion.ids, completion.finish_reason


@contextmanager
def counted_steps(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Running requests after every step of an engine."""
    running: list[int] = []
    step = engine.step

    def counted() -> None:
        step()
        running.append(len(engine._running))

    monkeypatch.setattr(engine, "step", counted)
    yield running


# --- one request does not see another ---------------------------------------------------------------------------------


def test_same_tokens_whatever_else_runs(model: Any) -> None:
    requests = [request_for(p, seed=n, max_new_tokens=3 + 4 * n) for n, p in enumerate(PROMPTS)]
    expected = [tokens(alone(model, r)) for r in requests]
    assert len({ids for ids, _ in expected}) == len(PROMPTS)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [2, 2, 2, 0, 4]):
        done = generate(LocalEngine(copy.deepcopy(model), max_slots=3), [requests[n] for n in order])
        assert [tokens(c) for c in done] == [expected[n] for n in order]


def test_requests_that_join_later_change_nothing(model: Any) -> None:
    requests = [request_for(p, seed=n, max_new_tokens=14) for n, p in enumerate(PROMPTS)]
    expected = [tokens(alone(model, r)) for r in requests]
    engine = LocalEngine(model, max_slots=4)
    ids = []
    for request in requests:
        ids.append(engine.submit(request))
        for _ in range(3):
            engine.step()
    assert [tokens(engine.result(i)) for i in ids] == expected


def test_long_answers_outgrow_the_first_cache_block(tiny: Tiny, near: Near) -> None:
    """64 positions at first; one row needs 190 while another joins when the cache was made anew."""
    model = tiny("llama", max_position_embeddings=200)
    engine = LocalEngine(copy.deepcopy(model))
    long = engine.submit(request_for([5, 6], max_new_tokens=188))
    for _ in range(100):
        engine.step()
    late = engine.submit(request_for(list(range(3, 60)), seed=1, max_new_tokens=40))
    root = RootModel(SeparateModels({"policy": model}, ["policy"]))
    for prompt, done in (([5, 6], engine.result(long)), (list(range(3, 60)), engine.result(late))):
        tree = TreeBatch.of(branches(prompt, [list(done.ids)]))
        with torch.no_grad():
            found, _ = root(tree, "policy", lambda out: logprobs(out, out.tree.action_index()))
        near(torch.tensor(done.logprobs), found)


def test_seeds_make_the_difference(model: Any) -> None:
    engine = LocalEngine(model)
    first, again, other = generate(engine, [request_for([5, 6], seed=s) for s in (1, 1, 2)])
    assert first.ids == again.ids and first.logprobs == again.logprobs
    assert first.ids != other.ids


# --- slots ------------------------------------------------------------------------------------------------------------


def test_more_requests_than_slots(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(model, max_slots=2)
    with counted_steps(engine, monkeypatch) as running:
        done = generate(engine, [request_for([n + 3], seed=n, max_new_tokens=1 + n) for n in range(7)])
    assert [len(c.ids) for c in done] == [1 + n for n in range(7)]
    assert max(running) == 2 and engine._running == []


def test_cancel_frees_the_slot_and_leaves_others_alone(model: Any) -> None:
    requests = [request_for(p, seed=n) for n, p in enumerate(PROMPTS)]
    expected = [tokens(alone(model, r)) for r in requests]
    engine = LocalEngine(model, max_slots=3)
    ids = [engine.submit(r) for r in requests]
    for _ in range(4):
        engine.step()
    engine.cancel(ids[0])  # running: the last row moves into its place
    engine.cancel(ids[4])  # waiting
    assert len(engine._running) == 2 and len(engine._waiting) == 1
    done = [engine.result(i) for i in ids]
    assert [c.finish_reason for c in done] == ["cancelled", "length", "length", "length", "cancelled"]
    assert done[0].ids == expected[0][0][:4] and done[4].ids == ()
    assert [tokens(c) for c in done[1:4]] == expected[1:4]


def test_cancelling_unknown_or_finished_requests_is_ignored(model: Any) -> None:
    engine = LocalEngine(model)
    request_id = engine.submit(request_for([5], max_new_tokens=1))
    engine.step()
    engine.cancel(request_id)
    engine.cancel("nobody")
    assert engine.result(request_id).finish_reason == "length"
    engine.cancel(request_id)
    with pytest.raises(EngineError, match="no request"):
        engine.result(request_id)


# --- streams ----------------------------------------------------------------------------------------------------------


def test_stream_gives_the_result(model: Any) -> None:
    engine = LocalEngine(model)
    expected = alone(model, request_for([5, 6]))
    request_id = engine.submit(request_for([5, 6]))
    streamed = list(engine.stream(request_id))
    done = engine.result(request_id)
    assert tuple(t.id for t in streamed) == done.ids == expected.ids
    assert tuple(t.logprob for t in streamed) == done.logprobs


def test_leaving_a_stream_cancels(model: Any) -> None:
    engine = LocalEngine(model)
    request_id = engine.submit(request_for([5, 6]))
    stream = engine.stream(request_id)
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine._running == []
    done = engine.result(request_id)
    assert done.finish_reason == "cancelled" and done.ids[0] == first.id


def test_threads_that_stream_together(model: Any) -> None:
    requests = [request_for(PROMPTS[n % 5], seed=n) for n in range(12)]
    expected = [alone(model, r).ids for r in requests]
    engine = LocalEngine(model, max_slots=5)

    def run(request: Request) -> tuple[int, ...]:
        return tuple(t.id for t in engine.stream(engine.submit(request)))

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(run, requests)) == expected
    assert engine._running == [] and not engine._waiting


def test_a_failing_step_does_not_leave_others_waiting_for_ever(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory while prompts are read: every request of that admission must end, with the error or without."""
    engine = LocalEngine(tiny("llama"))
    ids = [engine.submit(request_for(p)) for p in PROMPTS[:2]]
    runner = engine._runner()
    read = runner.read
    failures = iter([True])

    def fails_once(*args: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("out of memory")
        return read(*args)

    monkeypatch.setattr(runner, "read", fails_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.result(ids[0])
    ended = threading.Event()

    def wait_for_second() -> None:
        try:
            engine.result(ids[1])
        except (RuntimeError, EngineError):
            pass
        finally:
            ended.set()

    threading.Thread(target=wait_for_second, daemon=True).start()
    finished = ended.wait(3)
    for row in list(engine._rows.values()):
        row.finished = "cancelled"  # lets the thread go if it hangs
    assert finished, "the second request waits for ever"


# --- where answers end ------------------------------------------------------------------------------------------------


def test_stop_ids_end_an_answer_and_belong_to_it(model: Any) -> None:
    free = alone(model, request_for([5, 6], max_new_tokens=20))
    stop = free.ids[7]
    first = free.ids.index(stop)
    done = alone(model, request_for([5, 6], max_new_tokens=20, stop_ids=frozenset({stop})))
    assert done.ids == free.ids[: first + 1] and done.finish_reason == "stop"
    assert done.logprobs == free.logprobs[: first + 1]


def test_stop_and_limit_at_once_count_as_stop(model: Any) -> None:
    free = alone(model, request_for([5, 6], max_new_tokens=1))
    assert free.finish_reason == "length"
    assert alone(model, request_for([5, 6], max_new_tokens=1, stop_ids=frozenset(free.ids))).finish_reason == "stop"


def test_stop_text_across_tokens(tiny: Tiny) -> None:
    tokenizer = train_tokenizer(["你好 abc"], 260)
    model = tiny("llama", vocab_size=260)
    free = alone(model, request_for([70, 71], max_new_tokens=30))
    text = tokenizer.decode(free.ids[5:8])  # three tokens of one byte each
    engine = LocalEngine(model, tokenizer)
    [done] = generate(engine, [request_for([70, 71], max_new_tokens=30, stop=(text, "never"))])
    assert done.finish_reason == "stop" and done.ids == free.ids[: len(done.ids)]
    assert text in tokenizer.decode(done.ids) and text not in tokenizer.decode(done.ids[:-1])


def test_stop_texts_without_tokenizer_are_refused(model: Any) -> None:
    with pytest.raises(EngineError, match="tokenizer"):
        LocalEngine(model).submit(request_for([5], stop=("x",)))


def test_answers_end_where_the_context_ends(tiny: Tiny) -> None:
    engine = LocalEngine(tiny("llama"))  # 64 positions
    full, short = generate(engine, [request_for([5] * 60, max_new_tokens=100), request_for([5] * 63)])
    assert (len(full.ids), full.finish_reason) == (4, "length")
    assert len(short.ids) == 1


@pytest.mark.parametrize("wrong", [61, -1])
def test_ids_that_the_model_does_not_know_touch_no_other_request(wrong: int, model: Any) -> None:
    expected = generate(LocalEngine(copy.deepcopy(model)), [Request([5, 6, 7])])[0].ids
    engine = LocalEngine(model)
    running = engine.submit(Request([5, 6, 7]))
    engine.step()
    with pytest.raises(EngineError, match=f"token id {wrong}.*") as caught:
        engine.submit(Request([5, wrong, 7]))
    assert caught.value.hint == "its ids are 0 to 60"
    assert engine.result(running).ids == expected


@pytest.mark.parametrize(("length", "says"), [(0, "empty"), (64, "64 tokens"), (99, "context holds 64")])
def test_prompts_that_do_not_fit_are_refused(length: int, says: str, tiny: Tiny) -> None:
    engine = LocalEngine(tiny("llama"))
    with pytest.raises(EngineError, match=says):
        engine.submit(request_for([5] * length))
    assert not engine._waiting and not engine._rows


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


# --- weights ----------------------------------------------------------------------------------------------------------


def test_update_weights(tiny: Tiny) -> None:
    engine, other = LocalEngine(tiny("llama", seed=0)), tiny("llama", seed=1)
    request = request_for([5, 6])
    expected = alone(other, request)
    before = generate(engine, [request])[0]
    assert before.policy_version == 0 and before.ids != expected.ids
    engine.update_weights(other.named_parameters(), 7)
    after = generate(engine, [request])[0]
    assert engine.version == after.policy_version == 7
    assert tokens(after) == tokens(expected)
    with torch.no_grad():
        next(other.parameters()).zero_()  # the engine holds a copy
    assert tokens(generate(engine, [request])[0]) == tokens(expected)


@pytest.mark.parametrize("steps", [0, 2], ids=["waiting", "running"])
def test_weights_do_not_change_under_a_request(steps: int, tiny: Tiny) -> None:
    engine = LocalEngine(tiny("llama"))
    request_id = engine.submit(request_for([5]))
    for _ in range(steps):
        engine.step()
    with pytest.raises(EngineError, match="while requests are running"):
        engine.update_weights([], 1)
    assert engine.version == 0
    engine.cancel(request_id)
    engine.update_weights([], 1)
    assert engine.version == 1


def test_unknown_weights_are_refused(tiny: Tiny) -> None:
    with pytest.raises(EngineError, match=r"no parameter named 'model\.nothing'"):
        LocalEngine(tiny("llama")).update_weights([("model.nothing", torch.zeros(1))], 1)


def test_rollouts_are_a_function_of_seed_step_and_sample(tiny: Tiny) -> None:
    engine = LocalEngine(tiny("llama"))
    params = SamplingParams(max_new_tokens=8, stop_ids=frozenset(range(0, 60, 4)))
    prompts = [[5, 6], [5, 6], [7]]
    first = rollout(engine, prompts, params, seed=1, step=2)
    assert rollout(engine, prompts, params, seed=1, step=2) == first
    assert rollout(engine, prompts[:1], params, seed=1, step=2) == first[:1]
    assert first[0].actions != first[1].actions
    assert rollout(engine, prompts, params, seed=1, step=3)[0].actions != first[0].actions
    for trajectory in first:
        assert trajectory.finished == (trajectory.actions[-1] in params.stop_ids)
        assert len(trajectory.logprobs) == len(trajectory.actions)
