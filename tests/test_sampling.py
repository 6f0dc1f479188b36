"""The sampler against transformers' own processors, hand-worked numbers, and itself row by row."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as peer

from danlu.exceptions import GenerationFailed
from danlu.generation.penalties import adjust, repeating_ids
from danlu.generation.protocol import SamplingParams
from danlu.generation.sampling import inverse_cdf, sample
from danlu.generation.seeds import mix_seed, uniform
from danlu.generation.truncation import NARROW, edge, likeliest, most_likely, truncate

DRAWS = 20_000
INF = math.inf


# --- the distribution that is drawn from, against transformers -----------------------------------------------------------


def distribution(logits_V: Tensor, params: SamplingParams, said: Sequence[int] = (), step: int = 0) -> Tensor:
    """Log-probabilities of all tokens, as this row's draw sees them."""
    adjusted = adjust(logits_V[None], [params], [step], [list(said)]) / params.temperature
    found = torch.full_like(adjusted[0], -INF)
    for _, scores, ids in truncate(adjusted, [params]):
        found[slice(None) if ids is None else ids[0]] = scores[0]
    return torch.log_softmax(found, -1)


def peers(params: SamplingParams, said: Sequence[int] = (), step: int = 0) -> LogitsProcessorList:
    """transformers' processors for the same parameters, in the order in which its `generate` calls them."""
    p, found = params, LogitsProcessorList()
    if p.logit_bias:
        found.append(peer.SequenceBiasLogitsProcessor([[[i], float(b)] for i, b in p.logit_bias.items()]))
    if p.repetition_penalty != 1.0:
        found.append(peer.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.no_repeat_ngram_size:
        found.append(peer.NoRepeatNGramLogitsProcessor(p.no_repeat_ngram_size))
    if p.bad_words:
        found.append(peer.NoBadWordsLogitsProcessor([list(w) for w in p.bad_words], torch.tensor([10**6])))
    if p.min_new_tokens:
        stops = torch.tensor(sorted(p.stop_ids))
        found.append(peer.MinNewTokensLengthLogitsProcessor(len(said) - step, p.min_new_tokens, stops))
    if p.temperature != 1.0:
        found.append(peer.TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        found.append(peer.TopKLogitsWarper(p.top_k))
    if p.top_p < 1.0:
        found.append(peer.TopPLogitsWarper(p.top_p))
    if p.min_p:
        found.append(peer.MinPLogitsWarper(p.min_p))
    if p.typical_p < 1.0:
        found.append(peer.TypicalLogitsWarper(p.typical_p))
    return found


def assert_like_transformers(logits_V: Tensor, params: SamplingParams, said: Sequence[int] = (), step: int = 0) -> None:
    # In double precision: in single, their cumulative sums of thousands of tokens err by more than a token at the edge.
    theirs = peers(params, said, step)(torch.tensor([list(said)], dtype=torch.long), logits_V[None].double())
    theirs = torch.log_softmax(theirs, -1)[0].float()
    ours = distribution(logits_V, params, said, step)
    other = ours.isfinite() ^ theirs.isfinite()
    # The mass before the edge is known to 1e-6: of thousands of tokens, less likely ones than that may be on its other side.
    assert torch.maximum(ours, theirs)[other].exp().sum() < (2e-6 if len(ours) > 10_000 else 1e-30)
    torch.testing.assert_close(ours[~other], theirs[~other], atol=2e-6, rtol=1e-6)


def random_logits(seed: int, vocab: int, spread: float) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


CUTS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 7},
    "top-k of one": {"top_k": 1},
    "top-k of many": {"top_k": 500},
    "top-k of more than there are": {"top_k": 10**6},
    "top-p": {"top_p": 0.9},
    "top-p small": {"top_p": 0.01},
    "top-p large": {"top_p": 0.999},
    "min-p": {"min_p": 0.05},
    "min-p of one": {"min_p": 1.0},
    "typical": {"typical_p": 0.8},
    "typical small": {"typical_p": 0.05},
    "typical large": {"typical_p": 0.99},
    "cold": {"temperature": 0.3, "top_p": 0.9},
    "hot": {"temperature": 3.0, "top_p": 0.9},
    "top-k and top-p": {"top_k": 40, "top_p": 0.8},
    "top-k and typical": {"top_k": 40, "typical_p": 0.5},
    "top-p and min-p": {"top_p": 0.95, "min_p": 0.02},
    "min-p and typical": {"min_p": 0.001, "typical_p": 0.7},
    "all": {"temperature": 0.8, "top_k": 300, "top_p": 0.97, "min_p": 0.01, "typical_p": 0.9},
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("vocab", [2, 50, 1003, 20_011])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_cuts_are_those_of_transformers(cut: dict[str, Any], vocab: int, spread: float) -> None:
    if cut.get("top_k", 0) > 10**5:
        cut = {**cut, "top_p": 0.9}
    assert_like_transformers(random_logits(vocab, vocab, spread), SamplingParams(**cut))


SAID = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 1, 4]
CHANGES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.3},
    "repetition wanted": {"repetition_penalty": 0.7},
    "bias": {"logit_bias": {0: 5.0, 3: -100.0, 49: 0.5}},
    "bigram": {"no_repeat_ngram_size": 2},
    "trigram": {"no_repeat_ngram_size": 3},
    "unigram": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words": ((7,), (1, 4, 11), (9, 4, 12), (4, 13))},
    "minimum": {"min_new_tokens": 5, "stop_ids": frozenset({0, 9})},
    "minimum reached": {"min_new_tokens": 4, "stop_ids": frozenset({0, 9})},
    "all": {"logit_bias": {3: 2.0, 5: -1.0}, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2}
    | {"bad_words": ((7,), (4, 13)), "min_new_tokens": 6, "stop_ids": frozenset({0}), "top_p": 0.9, "temperature": 0.7},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("seed", range(3))
def test_changes_are_those_of_transformers(change: dict[str, Any], seed: int) -> None:
    assert_like_transformers(random_logits(seed, 50, 2.0), SamplingParams(**change), SAID, 4)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**20),
    st.integers(2, 300),
    st.lists(st.integers(0, 1), max_size=12),
    st.builds(
        SamplingParams,
        temperature=st.floats(0.2, 5),
        top_k=st.sampled_from([0, 1, 5, 100]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.floats(0.5, 2),
        no_repeat_ngram_size=st.integers(0, 3),
        logit_bias=st.dictionaries(st.integers(0, 1), st.floats(-5, 5), max_size=2),
    ),
)
def test_any_combination_is_that_of_transformers(
    seed: int, vocab: int, said: list[int], params: SamplingParams
) -> None:
    logits = random_logits(seed, vocab, 2.0)
    # transformers' own classes reach past the ends of histories shorter than their n-gram, and ban everything.
    if len(said) < params.no_repeat_ngram_size or len({*said}) == vocab:
        params = replace(params, no_repeat_ngram_size=0)
    assert_like_transformers(logits, params, said or [0])


def test_presence_and_frequency_count_the_answer_only() -> None:
    # Prompt 1 1, answer 2 2 0: token 2 loses 0.5 + 2 * 0.25, token 0 loses 0.5 + 0.25.
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    changed = adjust(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), [params], [3], [[1, 1, 2, 2, 0]])
    assert changed.tolist() == [[0.25, 1.0, 0.0, 1.0]]


def test_penalties_act_before_the_temperature_and_after_the_bias() -> None:
    # Bias lifts token 0 from -1 to 1, so the repetition penalty divides it: 1 / 2 - 0.5 = 0; token 1 stays 0. Then 0 / 0.5.
    params = SamplingParams(temperature=0.5, logit_bias={0: 2.0}, repetition_penalty=2.0, presence_penalty=0.5)
    _, logp, _ = sample(torch.tensor([[-1.0, 0.0]]), [params], [1], [[0]])
    assert logp == [pytest.approx(math.log(0.5), abs=1e-6)]


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(1, 4))
def test_repeating_ids_are_what_completes_a_known_ngram(said: list[int], size: int) -> None:
    known = {tuple(said[i : i + size]) for i in range(len(said) - size + 1)}
    slow = [t for t in range(5) if (*said[len(said) - size + 1 :], t) in known] if len(said) >= size else []
    assert repeating_ids(np.array(said, np.int64), size) == slow


def test_history_may_be_an_array() -> None:
    logits, params = random_logits(0, 50, 1.0)[None], [SamplingParams(repetition_penalty=2.0, no_repeat_ngram_size=2)]
    assert sample(logits, params, [4], [array("q", SAID)]) == sample(logits, params, [4], [SAID])


# --- rows ---------------------------------------------------------------------------------------------------------------

VARIETY = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"top_k": 40, "top_p": 0.9},
    {"top_p": 0.9, "logprobs": 3},
    {"temperature": 2.0, "top_p": 0.97},
    {"min_p": 0.1, "logprobs": 7},
    {"typical_p": 0.6},
    {"typical_p": 0.95, "temperature": 1.5},
    {"repetition_penalty": 1.5, "logprobs": 1},
    {"presence_penalty": 1.0, "frequency_penalty": -0.5, "temperature": 0.0},
    {"no_repeat_ngram_size": 2, "bad_words": ((1,), (2, 3)), "logprobs": 2, "temperature": 0.0},
    {"logit_bias": {1: 3.0, 2: -INF}},
    {"min_new_tokens": 9, "stop_ids": frozenset({0, 1})},
]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_row_does_not_depend_on_the_others(data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([2, 7, 130, 513, 9001]))
    count = data.draw(st.integers(2, 12))
    chosen = data.draw(st.lists(st.sampled_from(VARIETY), min_size=count, max_size=count))
    params = [SamplingParams(seed=i, **c) for i, c in enumerate(chosen)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    logits = torch.randn(count, vocab, generator=generator) * data.draw(st.sampled_from([0.1, 1.0, 5.0]))
    if data.draw(st.booleans()):
        logits = logits.bfloat16()  # many equal values
    steps = [data.draw(st.integers(0, 6)) for _ in params]
    history = [torch.randint(0, vocab, (6 + i,), generator=generator).tolist() for i in range(count)]
    before = logits.clone()
    together = sample(logits, params, steps, history)
    assert torch.equal(logits, before)
    for i, p in enumerate(params):
        alone = sample(logits[i : i + 1], [p], [steps[i]], [history[i]])
        assert tuple(x[0] for x in alone) == tuple(x[i] for x in together)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_others_in_a_large_vocabulary(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits = torch.randn(14, 50_257, generator=torch.Generator().manual_seed(1))
        params = [SamplingParams(seed=i, **c) for i, c in enumerate(VARIETY)]
        together = sample(logits, params, [3] * 14, [SAID] * 14)
        for i, p in enumerate(params):
            alone = sample(logits[i : i + 1], [p], [3], [SAID])
            assert tuple(x[0] for x in alone) == tuple(x[i] for x in together), VARIETY[i]
    finally:
        torch.set_num_threads(before)


def test_top_logprobs_are_of_the_distribution_drawn_from() -> None:
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    wanted = [({}, [0.4, 0.3, 0.2, 0.1], 5), ({"top_k": 2}, [4 / 7, 3 / 7], 4), ({"temperature": 0.0}, [0.4, 0.3], 2)]
    for options, expected, count in wanted:
        [token], [logp], [top] = sample(logits, [SamplingParams(logprobs=count, **options)], [0], [[]])
        assert [i for i, _ in top] == [0, 2, 3, 1][: len(expected)]
        assert [math.exp(v) for _, v in top] == pytest.approx(expected, abs=1e-6)
        assert dict(top)[token] == logp
    assert sample(logits, [SamplingParams()], [0], [[]]).top_logprobs == [()]


def test_more_top_logprobs_than_the_narrow_width() -> None:
    logits = random_logits(0, 9000, 1.0)[None]
    [top] = sample(logits, [SamplingParams(logprobs=NARROW + 5)], [0], [[]]).top_logprobs
    best = torch.log_softmax(logits, -1)[0].topk(NARROW + 5)
    assert [i for i, _ in top] == best.indices.tolist()
    assert [v for _, v in top] == pytest.approx(best.values.tolist(), abs=1e-5)


# --- edges --------------------------------------------------------------------------------------------------------------


def one(logits: Sequence[float], *, said: Sequence[int] = (), step: int = 0, **options: Any) -> tuple[int, float]:
    [token], [logp], _ = sample(torch.tensor([logits]), [SamplingParams(**options)], [step], [said])
    return token, logp


def test_of_equals_the_greedy_row_takes_the_first() -> None:
    assert one([1.0, 3.0, 3.0], temperature=0) == (1, pytest.approx(-math.log(2 + math.exp(-2))))
    wide = torch.zeros(1, 40_000)
    wide[0, [39_999, 700, 20_000]] = 1.0
    assert sample(wide, [SamplingParams(temperature=0)], [0], [[]]).tokens == [700]


def test_equals_at_the_edge_of_a_cut_are_all_kept() -> None:
    equal = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0])
    for options in ({"top_k": 2}, {"top_p": 0.6}):
        assert distribution(equal, SamplingParams(**options)).isfinite().tolist() == [True] * 4 + [False]
    flat = distribution(torch.zeros(5000), SamplingParams(top_k=3))
    assert flat.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-3, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    drawn = Counter(one([80.0, 79.0, -80.0], temperature=temperature, seed=s)[0] for s in range(300))
    assert set(drawn) == ({0} if temperature < 1 else {0, 1, 2})
    if temperature > 1:
        assert all(70 < count < 130 for count in drawn.values())


def test_one_token_left() -> None:
    bans = tuple((i,) for i in range(6) if i != 4)
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"typical_p": 0.5}, {"temperature": 0}):
        assert one([9.0, 0, 0, 0, -30.0, 0], bad_words=bans, **options) == (4, 0.0)


def test_everything_banned_stops_or_lifts_the_bans() -> None:
    bans = ((0,), (1,), (2,))
    for options in ({}, {"temperature": 0}, {"top_k": 2}):
        assert one([1.0, 9.0, 1.0], bad_words=bans, stop_ids=frozenset({2, 7}), **options) == (2, 0.0)
    lifted = one([1.0, 9.0, 1.0], bad_words=bans, temperature=0)
    assert lifted == one([1.0, 9.0, 1.0], temperature=0)
    assert one([1.0, 9.0], logit_bias={0: -INF, 1: -INF}, temperature=0)[0] == 1


def test_unknown_ids_touch_no_other_row() -> None:
    logits = torch.zeros(2, 3)
    params = [
        SamplingParams(logit_bias={3: 50.0}, bad_words=((4,),), min_new_tokens=2, stop_ids=frozenset({5})),
        SamplingParams(),
    ]
    assert torch.equal(adjust(logits, params, [0, 0], [[], []]), logits)


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_logits_that_are_no_numbers_are_an_error(bad: float, options: dict[str, Any]) -> None:
    with pytest.raises(GenerationFailed, match="not numbers"):
        one([0.0, bad, 1.0, 2.0], **options)


@settings(deadline=None)
@given(st.integers(1, 1200), st.integers(0, 2**31), st.floats(0, 1, exclude_max=True))
def test_inverse_cdf_is_the_plain_one(columns: int, seed: int, draw: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(1, columns, generator=generator) * (torch.rand(1, columns, generator=generator) < 0.3)
    probs[0, seed % columns] = 1e-30
    column = int(inverse_cdf(probs, torch.tensor([draw], dtype=torch.float64)))
    exact = np.cumsum(probs[0].double().numpy())
    assert probs[0, column] > 0
    # Block sums are in single precision, so a draw may fall beside an edge by as much.
    slack = 1e-6 * exact[-1]
    assert exact[column] - float(probs[0, column]) - slack <= draw * exact[-1] <= exact[column] + slack


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(2, 12_000), st.integers(1, 130), st.booleans())
def test_likeliest_are_the_highest(seed: int, columns: int, count: int, coarse: bool) -> None:
    values = torch.randn(2, columns, generator=torch.Generator().manual_seed(seed))
    values = values.round() if coarse else values
    count = min(count, columns)
    found, ids = likeliest(values, count)
    assert torch.equal(found, values.topk(count).values) and torch.equal(values.gather(1, ids), found)
    assert all(len(set(row)) == count for row in ids.tolist())
    assert most_likely(values).tolist() == [int(np.argmax(row.numpy())) for row in values]


@pytest.mark.parametrize("columns", [9000, 9007, 9215, 9216])
def test_the_last_columns_are_looked_at(columns: int) -> None:
    """They are what is left where groups and blocks do not divide the vocabulary."""
    for column in (columns - 1, columns - 6, columns - 15, 0):
        values = torch.zeros(1, columns)
        values[0, column] = 1.0
        assert most_likely(values).tolist() == [column]
        found, ids = likeliest(values, 100)
        assert (float(found[0, 0]), int(ids[0, 0])) == (1.0, column)
        assert sample(values * 1e4, [SamplingParams(top_k=5)], [0], [[]]).tokens == [column]


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3000), st.floats(1e-6, 1.0), st.sampled_from(["keys", "even", "apart"]))
def test_edge_is_that_of_a_full_sort(seed: int, size: int, mass: float, kind: str) -> None:
    generator = np.random.default_rng(seed)
    keys = generator.integers(0, 50, size) / 50 if kind == "even" else generator.normal(size=size)
    weights = np.exp(keys) if kind == "keys" else generator.random(size) ** 8
    missing = mass * weights.sum()
    exact = [k for k in np.unique(keys) if weights[keys > k].sum() < missing * (1 + 1e-12)]
    near = [k for k in np.unique(keys) if weights[keys > k].sum() < missing * (1 - 1e-12)]
    assert min(exact) <= edge(keys, weights, mass) <= min(near)


# --- parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": -1}, "top_k must not be negative"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\]"),
        ({"typical_p": 0.0}, "typical_p must be in"),
        ({"temperature": math.nan}, "temperature must be a number"),
        ({"temperature": INF}, "temperature must be a number"),
        ({"repetition_penalty": INF}, "repetition_penalty must be positive"),
        ({"presence_penalty": 2.1}, "presence_penalty must be in"),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be in"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"logit_bias": {1: INF}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "negative token id"),
        ({"bad_words": ((),)}, "bad_words has an empty"),
        ({"stop": ("",)}, "stop has an empty"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens"),
        ({"n": 0}, "n must be"),
        ({"n": 3, "best_of": 2}, "best_of must be"),
        ({"best_of": 3, "temperature": 0.0}, "always gives the same"),
        ({"num_beams": 0}, "num_beams must be"),
        ({"num_beams": 2, "temperature": 0.7}, "num_beams draws nothing: leave temperature"),
        ({"num_beams": 2, "top_p": 0.7}, "num_beams draws nothing: top_p"),
        ({"num_beams": 2, "top_k": 7}, "num_beams draws nothing: top_k"),
        ({"num_beams": 2, "n": 2}, "num_beams draws nothing: n "),
        ({"num_beams": 2, "best_of": 2}, "best_of"),
        ({"num_beams": 2, "penalty_alpha": 0.6, "top_k": 0}, "two kinds of search"),
        ({"length_penalty": 0.5}, "length_penalty has a meaning with num_beams"),
        ({"penalty_alpha": 0.6}, "give top_k of at least 2"),
        ({"penalty_alpha": 0.6, "top_k": 4, "min_p": 0.1}, "penalty_alpha draws nothing: min_p"),
        ({"penalty_alpha": 1.5, "top_k": 4}, "penalty_alpha must be in"),
        ({"logprobs": -1}, "logprobs must not"),
    ],
)
def test_parameters_without_a_meaning_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": "5"}, "top_k must be a whole number .found: '5'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"stop": [3]}, "stop must be texts"),
        ({"stop_ids": 3}, "stop_ids must be token ids"),
        ({"bad_words": [3, 4]}, "bad_words must be sequences of token ids"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias must be numbers by token id"),
    ],
)
def test_parameters_of_another_type_are_refused_before_a_step(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SamplingParams(**options)


def test_lists_and_single_texts_will_do() -> None:
    given: dict[str, Any] = {"stop": "the end", "stop_ids": [3, 4], "bad_words": [[5], [6, 7]], "top_k": np.int64(2)}
    params = SamplingParams(**given)
    assert (params.stop, params.stop_ids, params.bad_words) == (("the end",), {3, 4}, ((5,), (6, 7)))
    assert type(params.top_k) is int and hash(params) == hash(SamplingParams(**given))


def test_searches_take_their_parameters() -> None:
    assert SamplingParams(num_beams=4, length_penalty=0.6, temperature=0.0, no_repeat_ngram_size=3).num_beams == 4
    assert SamplingParams(penalty_alpha=0.6, top_k=4).penalty_alpha == 0.6
    assert hash(SamplingParams(logit_bias={1: 2.0})) == hash(SamplingParams())


# --- draws --------------------------------------------------------------------------------------------------------------


def draw(probabilities: list[float], **options: Any) -> tuple[list[int], list[float]]:
    """Many draws from one distribution: one row, many token indices."""
    logits = torch.tensor([probabilities]).log().expand(DRAWS, -1)
    return sample(logits, [SamplingParams(seed=11, **options)] * DRAWS, list(range(DRAWS)), [[]] * DRAWS)[:2]


def assert_distribution(drawn: list[int], logp: list[float], expected: list[float]) -> None:
    """Chi-square of the counts within 5 standard deviations of its mean, and log-probabilities of the same distribution."""
    counts = Counter(drawn)
    alive = [i for i, p in enumerate(expected) if p > 0]
    assert set(counts) <= set(alive)
    chi = sum((counts[i] - DRAWS * expected[i]) ** 2 / (DRAWS * expected[i]) for i in alive)
    freedom = len(alive) - 1
    assert chi <= freedom + 5 * math.sqrt(2 * freedom)
    assert all(abs(p - math.log(expected[i])) < 1e-5 for i, p in list(zip(drawn, logp, strict=True))[:500])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.1, 0.3, 0.2]),
        # squares 16, 1, 9, 4 of 30
        ({"temperature": 0.5}, [16 / 30, 1 / 30, 9 / 30, 4 / 30]),
        ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 9}, [0.4, 0.1, 0.3, 0.2]),
        # 0.4 + 0.3 reaches 0.65; 0.4 alone reaches 0.35
        ({"top_p": 0.65}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.35}, [1, 0, 0, 0]),
        ({"top_p": 0.75}, [4 / 9, 0, 3 / 9, 2 / 9]),
        # temperature first: 16/30 + 9/30 reaches 0.8, which 0.4 + 0.3 would not
        ({"temperature": 0.5, "top_p": 0.8}, [16 / 25, 0, 9 / 25, 0]),
        ({"top_k": 3, "top_p": 0.65}, [4 / 7, 0, 3 / 7, 0]),
        # at least 0.6 * 0.4
        ({"min_p": 0.6}, [4 / 7, 0, 3 / 7, 0]),
        # entropy 1.28; surprises 0.92, 2.3, 1.2, 1.61: nearest is 0.3, then 0.2 and 0.4
        ({"typical_p": 0.25}, [0, 0, 1, 0]),
        ({"typical_p": 0.45}, [0, 0, 3 / 5, 2 / 5]),
    ],
)
def test_draws_follow_the_distribution(options: dict[str, Any], expected: list[float]) -> None:
    assert_distribution(*draw([0.4, 0.1, 0.3, 0.2], **options), expected)


def test_rows_do_not_share_their_parameters() -> None:
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log().expand(4, -1)
    params = [
        SamplingParams(temperature=0),
        SamplingParams(top_k=1),
        SamplingParams(top_p=0.1),
        SamplingParams(temperature=1e-5),
    ]
    picked, logp, _ = sample(logits, params, [0] * 4, [[]] * 4)
    assert picked == [0, 0, 0, 0]
    # Greedy: of the plain softmax. Truncated to one token: certain.
    assert logp == pytest.approx([math.log(0.4), 0.0, 0.0, math.log(0.4)], abs=1e-6)


def test_repetition_penalty() -> None:
    # Seen tokens: 2 / 2 = 1 and -1 * 2 = -2; unseen ones keep 1.5 and 0.
    logits = torch.tensor([[2.0, 1.5, -1.0, 0.0]])
    penalised = torch.log_softmax(torch.tensor([1.0, 1.5, -2.0, 0.0]), -1)
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    picked, logp, _ = sample(logits, [params], [0], [[0, 2, 2]])
    assert picked == [1] and logp[0] == pytest.approx(float(penalised[1]))
    assert sample(logits, [replace(params, repetition_penalty=1.0)], [0], [[0, 2]])[0] == [0]
    assert logits.tolist() == [[2.0, 1.5, -1.0, 0.0]]


def test_logits_out_of_range_of_a_draw() -> None:
    """Half precision, a huge gap, and the largest draw there is."""
    logits = torch.tensor([[-1e4, 5.0, 5.0]], dtype=torch.bfloat16)
    for step in range(50):
        [token], [logp], _ = sample(logits, [SamplingParams()], [step], [[]])
        assert token in (1, 2) and logp == pytest.approx(math.log(0.5))


def test_uniform_is_well_spread() -> None:
    # A million would show finer flaws; this shows constants, short cycles and steps of neighbouring seeds.
    by_index = np.array([uniform(7, n) for n in range(DRAWS)])
    by_seed = np.array([uniform(n, 3) for n in range(DRAWS)])
    for numbers in (by_index, by_seed):
        assert numbers.min() >= 0 and numbers.max() < 1 and len(set(numbers)) == DRAWS
        counts = np.histogram(numbers, 50, (0, 1))[0]
        chi = float(((counts - DRAWS / 50) ** 2 / (DRAWS / 50)).sum())
        assert chi <= 49 + 5 * math.sqrt(98)
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 5 / math.sqrt(DRAWS)


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_uniform_takes_any_seed(seed: int, index: int) -> None:
    assert 0 <= uniform(seed, index) < 1
    assert uniform(seed, index) == uniform(seed, index)


@given(st.lists(st.integers(-(2**63), 2**64), min_size=1, max_size=4))
def test_mixed_seeds_fit_63_bits(parts: list[int]) -> None:
    assert 0 <= mix_seed(*parts) < 1 << 63
    assert mix_seed(*parts) == mix_seed(*parts) != mix_seed(*parts, 1)
