"""Prompts that are not read twice, memory that is kept to, order and fairness, and bits that do not depend on the batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import mostly_slow

from danlu.exceptions import EngineError
from danlu.generation import engine as engine_module
from danlu.generation.engine import LocalEngine
from danlu.generation.kv_cache import BLOCK, CacheShape, KeyValueCache, Lane, arena_length
from danlu.generation.memory import default_memory
from danlu.generation.prefixes import PrefixStore
from danlu.generation.protocol import Completion, Request, SamplingParams, generate
from danlu.generation.speculative import NgramDrafter
from danlu.models.load import load_model, save_model
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.tree import TreeBatch, branches

Tiny = Callable[..., Any]
CONTEXT = 512


def ids(start: int, length: int) -> list[int]:
    return [3 + (start * 17 + n * (start % 7 + 1) + n * n) % 58 for n in range(length)]


def ask(prompt: list[int], seed: int = 0, **options: Any) -> Request:
    return Request(prompt, SamplingParams(**({"max_new_tokens": 6, "seed": seed} | options)))


def result(completion: Completion) -> tuple[Any, ...]:
    """Everything but the id; log-probabilities with all their bits."""
    return completion.ids, completion.logprobs, completion.finish_reason


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Any:
    return tiny("llama", max_position_embeddings=CONTEXT)


def alone(model: Any, request: Request) -> tuple[Any, ...]:
    [completion] = generate(LocalEngine(model, memory=1 << 24), [request])
    return result(completion)


@pytest.fixture
def reading(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[LocalEngine, list[tuple[int, int]]]:
    """An engine, and (prompt tokens, answer tokens) read in each of its steps."""
    engine = LocalEngine(model, memory=1 << 24)
    runner = engine._runner()
    read, steps = runner.read, []

    def counted(reads: Any) -> Any:
        steps.append((sum(len(r.ids) for r in reads if r.prompt), sum(len(r.ids) for r in reads if not r.prompt)))
        return read(reads)

    monkeypatch.setattr(runner, "read", counted)
    return engine, steps


# --- prompts are read once --------------------------------------------------------------------------------------------


def test_several_answers_to_one_prompt_read_it_once(
    model: Any, reading: tuple[LocalEngine, list[tuple[int, int]]]
) -> None:
    engine, steps = reading
    prompt = ids(1, 150)
    expected = [alone(model, ask(prompt, seed=s)) for s in range(4)]
    done = generate(engine, [ask(prompt, seed=s) for s in range(4)])
    assert [result(c) for c in done] == expected
    # Step 1 reads the prompt for one row; in step 2 the others copy all but its last token.
    assert [p for p, _ in steps[:3]] == [150, 3, 0]


def test_a_conversation_reads_only_what_is_new(model: Any, reading: tuple[LocalEngine, list[tuple[int, int]]]) -> None:
    """The last answer is read once more, everything before it is not."""
    engine, steps = reading
    prompt, read = ids(2, 100), 0
    for turn in range(3):
        request = ask(prompt, seed=turn)
        expected = alone(model, request)
        steps.clear()
        [done] = generate(engine, [request])
        assert result(done) == expected
        assert sum(p for p, _ in steps) == len(prompt) - read
        read = len(prompt)
        prompt = [*prompt, *done.ids, *ids(turn, 30)]


@pytest.mark.parametrize("shared", [0, 7, 20, 63, 64, 65, 100, 128, 140])
def test_prompts_that_share_a_beginning(
    shared: int, model: Any, reading: tuple[LocalEngine, list[tuple[int, int]]]
) -> None:
    engine, steps = reading
    first, second = ids(3, 140), [*ids(3, shared), *ids(4, 141)]
    expected = alone(model, ask(second))
    generate(engine, [ask(first)])
    steps.clear()
    [done] = generate(engine, [ask(second)])
    assert result(done) == expected
    # Fewer than 8 shared tokens in a block are not worth a copy.
    known = shared if shared % BLOCK >= 8 else shared // BLOCK * BLOCK
    assert sum(p for p, _ in steps) == len(second) - known


def test_new_weights_forget_old_prompts(tiny: Tiny, model: Any) -> None:
    engine = LocalEngine(copy.deepcopy(model))
    other = tiny("llama", max_position_embeddings=CONTEXT, seed=1)
    request = ask(ids(5, 100))
    before = result(generate(engine, [request])[0])
    engine.update_weights(other.named_parameters(), 1)
    after = result(generate(engine, [request])[0])
    assert after == alone(other, request) != before


SHAPE = CacheShape(2, 2, 4, 4, torch.float32, torch.device("cpu"))
BLOCK_BYTES = BLOCK * SHAPE.bytes_per_position


def filled(cache: KeyValueCache, prompt: list[int]) -> Lane:
    """A lane whose keys and values are the ids themselves, and minus them."""
    lane = cache.open(len(prompt), len(prompt))
    assert lane.arena is not None
    lane.arena.keys[:, lane.slot, :, : len(prompt)] = torch.tensor(prompt, dtype=torch.float32)[:, None]
    lane.arena.values[:, lane.slot, :, : len(prompt)] = -torch.tensor(prompt, dtype=torch.float32)[:, None]
    lane.length = len(prompt)
    return lane


def loaded(store: PrefixStore, cache: KeyValueCache, prompt: list[int]) -> int:
    """How much of a prompt a store knows, all of it right."""
    lane = cache.open(len(prompt), len(prompt))
    known = lane.length = store.load(prompt, lane)
    assert lane.arena is not None
    expected = torch.tensor(prompt[:known], dtype=torch.float32)[:, None].expand(2, 2, -1, 4)
    assert torch.equal(lane.arena.keys[:, lane.slot, :, :known], expected)
    assert torch.equal(lane.arena.values[:, lane.slot, :, :known], -expected)
    cache.close(lane)
    return known


def test_the_least_recently_used_block_goes_first() -> None:
    cache, store = KeyValueCache(SHAPE, 1 << 20), PrefixStore(4 * BLOCK_BYTES)
    a, b, c = ids(1, 2 * BLOCK), ids(2, 2 * BLOCK), ids(3, BLOCK)
    store.save(a, filled(cache, a))
    store.save(b, filled(cache, b))
    assert loaded(store, cache, a) == 2 * BLOCK  # used: now b is the oldest
    store.save(c, filled(cache, c))
    assert store.bytes == 4 * BLOCK_BYTES
    # b lost its end, not its beginning, on which its end depends.
    assert [loaded(store, cache, p) for p in (a, b, c)] == [2 * BLOCK, BLOCK, BLOCK]


@given(
    prompts=st.lists(
        st.lists(st.sampled_from([1, 2]), max_size=4).flatmap(
            lambda parts: st.integers(1, BLOCK).map(
                lambda n: [i for part in parts for i in ids(part, BLOCK)] + ids(9, n)
            )
        ),
        min_size=1,
        max_size=12,
    ),
    blocks=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_a_store_knows_only_what_is_true_and_keeps_to_its_memory(prompts: list[list[int]], blocks: int) -> None:
    cache, store = KeyValueCache(SHAPE, 1 << 20), PrefixStore(blocks * BLOCK_BYTES)
    for prompt in prompts:
        known = loaded(store, cache, prompt)
        lane = filled(cache, prompt)
        store.save(prompt, lane)
        cache.close(lane)
        assert store.bytes <= store.memory
        assert store.bytes == sum(kept.bytes for kept in store._recent)
        if len(prompt) <= blocks * BLOCK and len(prompt) >= 8:
            assert loaded(store, cache, prompt) == len(prompt) >= known


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "length"),
    [(1, 128), (128, 128), (129, 256), (256, 256), (257, 384), (385, 512), (513, 768), (769, 1024), (1025, 1536)],
)
def test_arena_lengths(positions: int, length: int) -> None:
    assert arena_length(positions) == length


def test_slots_follow_from_the_memory(model: Any) -> None:
    """Two layers, two key heads, 8 wide, keys and values, fp32: 256 bytes a position. Three arenas of 128 fit, not four."""
    memory = math.ceil(3.5 * 128 * 256 / 0.75)  # a quarter is for prompts
    engine = LocalEngine(model, memory=memory)
    requests = [ask(ids(n, 20), seed=n) for n in range(7)]
    running = []
    waiting = [engine.submit(r) for r in requests]
    while engine._running or engine._waiting:
        engine.step()
        running.append(len(engine._running))
    assert max(running) == 3
    assert [result(engine.result(i)) for i in waiting] == [alone(model, r) for r in requests]


@pytest.mark.parametrize(
    ("free", "device", "expected"), [(8, "cpu", 2), (64, "cpu", 4), (64, "cuda", 16), (999, "cuda", 32)]
)
def test_default_memory(free: int, device: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.generation.memory.free_memory", lambda _: free << 30)
    assert default_memory(torch.device(device)) == expected << 30


def test_a_request_that_never_fits_is_refused_with_the_figures(model: Any) -> None:
    engine = LocalEngine(model, memory=math.ceil(128 * 256 / 0.75))
    engine.result(engine.submit(ask(ids(1, 100), max_new_tokens=28)))
    with pytest.raises(EngineError, match=r"needs 0\.0 MiB|needs 0\.\d+ MiB") as error:
        engine.submit(ask(ids(1, 100), max_new_tokens=29))
    assert "max_new_tokens" in error.value.hint and not engine._waiting


@given(
    moves=st.lists(
        st.one_of(
            st.tuples(st.just("open"), st.integers(1, 300), st.integers(0, 200)),
            st.tuples(st.just("extend"), st.integers(0, 9), st.integers(1, 90)),
            st.tuples(st.just("close"), st.integers(0, 9), st.just(0)),
            st.tuples(st.just("fork"), st.integers(0, 9), st.just(0)),
        ),
        max_size=30,
    )
)
@settings(max_examples=80, deadline=None)
def test_lanes_keep_their_own_tokens(moves: list[tuple[str, int, int]]) -> None:
    """Whatever enters, grows, leaves and forks: each lane holds what was written to it, and memory stays in its limit."""
    cache = KeyValueCache(SHAPE, 1500 * SHAPE.bytes_per_position)
    lanes: list[tuple[Lane, list[int]]] = []
    mark = 0

    def write(lane: Lane, held: list[int], count: int) -> None:
        nonlocal mark
        count = min(count, lane.reserved - lane.length)
        cache.extend(lane, lane.length + count)
        for _ in range(count):
            mark += 1
            assert lane.arena is not None
            lane.arena.keys[:, lane.slot, :, lane.length] = mark
            lane.arena.values[:, lane.slot, :, lane.length] = -mark
            lane.length += 1
            held.append(mark)

    for kind, a, b in moves:
        if kind == "open" and cache.fits(a, 2):
            lane, held = cache.open(a, min(a, b) + 1, lanes=2), []
            write(lane, held, b)
            lanes.append((lane, held))
        elif lanes and kind != "open":
            lane, held = lanes[a % len(lanes)]
            if kind == "extend":
                write(lane, held, b)
            elif kind == "close":
                cache.close(lane)
                lanes.remove((lane, held))
            elif lane.claim > arena_length(lane.reserved):
                lanes.append((cache.fork(lane), list(held)))
        for lane, held in lanes:
            assert lane.arena is not None and lane.arena.lanes[lane.slot] is lane
            assert lane.arena.keys[1, lane.slot, 1, : lane.length, 0].tolist() == held
            assert lane.arena.values[0, lane.slot, 0, : lane.length, 3].tolist() == [-m for m in held]
        assert cache.reserved == sum(lane.claim for lane, _ in lanes) <= cache.limit
        assert sum(a.capacity * a.positions for a in cache._arenas.values()) <= cache.limit


# --- the scheduler ----------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_read_in_pieces_beside_decoding(
    model: Any, reading: tuple[LocalEngine, list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_BESIDE_DECODING", 50)
    engine, steps = reading
    expected = [alone(model, ask(ids(1, 9), max_new_tokens=12)), alone(model, ask(ids(2, 330)))]
    short = engine.submit(ask(ids(1, 9), max_new_tokens=12))
    engine.step()
    long = engine.submit(ask(ids(2, 330)))
    assert [result(engine.result(i)) for i in (short, long)] == expected
    assert steps[1:8] == [(50, 1)] * 6 + [(30, 1)]


def test_requests_start_in_their_order(model: Any) -> None:
    """A large request is not overtaken by small ones that would fit before it."""
    engine = LocalEngine(model, memory=math.ceil(512 * 256 / 0.75))
    sizes = [(20, 30), (20, 100), (200, 180), (20, 6), (20, 6)]
    order = [engine.submit(ask(ids(n, p), seed=n, max_new_tokens=m)) for n, (p, m) in enumerate(sizes)]
    begun: list[str] = []
    while engine._running or engine._waiting:
        engine.step()
        begun += [r.id for r in engine._running if r.id not in begun]
    assert begun == order


@st.composite
def several(draw: st.DrawFn, room: int) -> list[tuple[int, list[int], dict[str, Any], int]]:
    """(step of arrival, prompt, parameters, tokens after which it is cancelled) of several requests; searches where 3 lanes fit."""
    found = []
    for seed in range(draw(st.integers(2, 7))):
        prompt = ids(draw(st.integers(0, 2)), draw(st.sampled_from([1, 2, 9, 60, 64, 65, 130, 200])))
        prompt += ids(draw(st.integers(5, 9)), draw(st.integers(0, 70)))
        options = {
            "max_new_tokens": draw(st.integers(1, 24)),
            "temperature": draw(st.sampled_from([0.0, 0.7, 1.0, 1.5])),
            "top_k": draw(st.sampled_from([0, 0, 5])),
            "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 1.3])),
            "stop_ids": frozenset(draw(st.sampled_from([(), (), (7, 8, 9)]))),
            "seed": seed,
        }
        search = draw(st.sampled_from([{}, {}, {}, {"num_beams": 2}, {"penalty_alpha": 0.5, "top_k": 3}]))
        if search and room >= 3:
            options |= {"temperature": 0.0, "top_k": 0} | search
        found.append((draw(st.integers(0, 30)), prompt, options, draw(st.sampled_from([99, 99, 99, 0, 1, 5]))))
    return found


@given(data=st.data(), slots=st.integers(1, 6), kilobytes=st.sampled_from([150, 450, 4000]), guesses=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_request_gets_what_it_gets_alone(
    data: st.DataObject, slots: int, kilobytes: int, guesses: bool, model: Any
) -> None:
    """Bit for bit, whatever arrives, shares its beginning, is cancelled, or waits for memory; and nobody waits for ever."""
    traffic = data.draw(several(slots if kilobytes > 150 else 1))
    drafter = NgramDrafter() if guesses else None
    engine = LocalEngine(model, max_slots=slots, memory=kilobytes * 1024, drafter=drafter)
    expected = [alone(model, ask(prompt, **options)) for _, prompt, options, _ in traffic]
    submitted: dict[int, str] = {}
    cancelled: set[int] = set()
    # Prompts in turn and tokens in turn: more steps than this would mean that somebody starves.
    bound = 31 + sum(3 + options["max_new_tokens"] for _, _, options, _ in traffic)
    for step in range(bound):
        for index, (arrival, prompt, options, patience) in enumerate(traffic):
            if arrival == step:
                submitted[index] = engine.submit(ask(prompt, **options))
            row = engine._rows.get(submitted.get(index, ""))
            if row is not None and row.finished is None and len(row.ids) >= patience:
                lanes = list(row.lanes)
                engine.cancel(row.id)
                cancelled.add(index)
                assert row not in engine._running and all(lane.arena is None for lane in lanes)
        engine.step()
        assert sum(r.width for r in engine._running) <= slots
    assert not engine._running and not engine._waiting and engine._runner().cache.reserved == 0
    for index, wanted in enumerate(expected):
        done = result(engine.result(submitted[index]))
        if index in cancelled:
            length = len(done[0])
            assert done == (wanted[0][:length], wanted[1][:length], "cancelled")
        else:
            assert done == wanted


OFTEN = ("qwen3", "gpt2", "gemma2", "opt", "phi3", "mixtral", "qwen2_moe", "bloom", "codegen", "falcon_alibi")


@pytest.mark.parametrize("family", mostly_slow(OFTEN, [f for f in families.FAST if f not in OFTEN]))
def test_bits_do_not_depend_on_what_else_runs_or_ran(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, with others, and again behind a remembered prefix: each of three beginnings once greedily, once sampled."""
    size = "n_positions" if family in ("gpt2", "codegen", "gptj") else "max_position_embeddings"
    model = families.make(family, **{size: CONTEXT})
    requests = [ask(ids(n % 3, 20 + 27 * n), seed=n, max_new_tokens=5 + n, temperature=float(n % 2)) for n in range(6)]
    expected = [alone(model, r) for r in requests]
    engine = LocalEngine(model, max_slots=4, memory=1 << 24)
    assert [result(c) for c in generate(engine, requests)] == expected
    runner = engine._runner()
    read: list[int] = []
    plain = runner.read

    def counted(reads: Any) -> Any:
        read.extend(len(r.ids) for r in reads if r.prompt)
        return plain(reads)

    monkeypatch.setattr(runner, "read", counted)
    assert [result(generate(engine, [r])[0]) for r in requests] == expected
    assert read == [1] * len(requests), "all of a prompt but its last token was remembered"


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_family_answers_in_16_bits(family: str, tmp_path: Path) -> None:
    """The likeliest first tokens, beside those of the same weights in 32 bits; tables of positions stay in those when loaded."""
    folder = save_model(families.make(family).to(torch.bfloat16), None, tmp_path / "model")
    found = []
    for model in (load_model(folder, dtype=torch.float32), load_model(folder, dtype=torch.bfloat16)):
        [completion] = generate(LocalEngine(model), [ask(ids(1, 12), temperature=0.0, logprobs=5)])
        found.append(dict(completion.top_logprobs[0]))
        assert len(completion.ids) == 6 or completion.finish_reason == "stop"
    common = found[0].keys() & found[1].keys()
    assert len(common) >= 3 and max(abs(found[0][token] - found[1][token]) for token in common) < 0.2


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_bits_do_not_depend_on_the_batch_in_wide_models(family: str) -> None:
    """From a width of 128 on MKL would take another kernel for few rows than for many (see `danlu/__init__.py`)."""
    wide = {"n_embd": 256, "n_positions": CONTEXT} if family == "gpt2" else {"max_position_embeddings": CONTEXT}
    wide |= {} if family == "gpt2" else {"hidden_size": 256, "intermediate_size": 384}
    model = families.make(family, **wide)
    requests = [ask(ids(n % 3, 7 + 30 * n), seed=n, max_new_tokens=4 + n) for n in range(7)]
    expected = [alone(model, r) for r in requests]
    assert [result(c) for c in generate(LocalEngine(model, max_slots=5), requests)] == expected


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_give_a_row_the_same_bits_in_any_company(family: str) -> None:
    """Rows of one block of experts; among them are few enough for experts that get one row, or none."""
    model = families.make(family)
    LocalEngine(model)._runner()
    block = model.model.layers[1].mlp
    rows = torch.randn(1, 256, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = block(rows)
        for first in range(0, 256, 20):
            for count in (4, 12, 20, 28):
                part = slice(first, min(256, first + count))
                assert torch.equal(block(rows[:, part]), whole[:, part])


def test_a_mixture_that_an_engine_shares_is_trained_as_before() -> None:
    """Readings and updates of a trainer are equal to the bit, with and without an engine on its model."""
    model, tree = families.make("mixtral"), TreeBatch.of(branches(ids(1, 5), [ids(2, 2)]))
    root = RootModel(SeparateModels({"policy": model}, ["policy"]))

    def read(gradients: bool) -> list[float]:
        with torch.set_grad_enabled(gradients):
            hidden: torch.Tensor = root(tree, "policy", lambda out: out.hidden_TD)
        return hidden.flatten().tolist()

    before = read(True)
    generate(LocalEngine(model), [ask(ids(1, 5))])
    assert read(True) == before and read(False) == before


@pytest.mark.parametrize("grid", [8, 256])
def test_the_grid_changes_nothing_but_rounding(grid: int, model: Any) -> None:
    """A GPU reads prompts on a wider grid than arenas are long."""
    engine = LocalEngine(model)
    cache = engine._runner().cache
    cache.causal_QS = torch.triu(torch.full((grid, grid), float("-inf")), diagonal=1)
    requests = [ask(ids(n, 10 + 70 * n), seed=n) for n in range(4)]
    for request, done in zip(requests, generate(engine, requests), strict=True):
        expected = alone(model, request)
        assert done.ids == expected[0] and done.logprobs == pytest.approx(expected[1], abs=1e-4)
