"""Beam search against transformers, contrastive search against its definition, speculation against decoding without it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from danlu.exceptions import EngineError
from danlu.generation import engine as engine_module
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Completion, Request, SamplingParams, generate
from danlu.generation.speculative import Drafter, Guessing, ModelDrafter, NgramDrafter

Tiny = Callable[..., Any]
FAMILIES = ["llama", "gpt2", "bloom", "gpt_neo"]
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18]]


def ask(prompt: list[int], **options: Any) -> Request:
    return Request(prompt, SamplingParams(**({"max_new_tokens": 14} | options)))


def result(completion: Completion) -> tuple[Any, ...]:
    return completion.ids, completion.logprobs, completion.finish_reason


# --- beam search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 4, "length_penalty": 2.0},
        {"num_beams": 3, "length_penalty": 0.0, "repetition_penalty": 1.4},
        {"num_beams": 5, "length_penalty": -1.0, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_beam_search_gives_what_transformers_gives(family: str, options: dict[str, Any], tiny: Tiny) -> None:
    plain, engine = tiny(family, seed=2), LocalEngine(tiny(family, seed=2))
    stops = [1, 20, 21, 22]
    wanted = []
    for prompt in PROMPTS:
        with torch.no_grad():
            found = plain.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=14,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=2,
                output_scores=True,
                return_dict_in_generate=True,
                **options,
            )
        wanted.append((found.sequences[0, len(prompt) :].tolist(), float(found.sequences_scores[0])))
    # All searches, and two requests that sample, at once.
    others = [ask([8], seed=n, max_new_tokens=20) for n in range(2)]
    searches = [ask(p, temperature=0, stop_ids=frozenset(stops), **options) for p in PROMPTS]
    done = generate(engine, [others[0], *searches, others[1]])[1:-1]
    for completion, (ids, score) in zip(done, wanted, strict=True):
        assert list(completion.ids) == ids
        length = len(ids) ** options.get("length_penalty", 1.0)
        assert sum(completion.logprobs) / length == pytest.approx(score, rel=1e-4)
        assert completion.finish_reason == ("stop" if ids[-1] in stops else "length")
    assert {c.finish_reason for c in done} <= {"stop", "length"} and engine._running == []


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 4}], ids=["beams", "contrastive"]
)
def test_a_search_does_not_see_other_requests(
    options: dict[str, Any], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt is read in pieces beside the others."""
    model = tiny("llama", max_position_embeddings=256)
    prompt = [3 + n * n % 50 for n in range(120)]
    searching = ask(prompt, temperature=0, max_new_tokens=30, **options)
    [alone] = generate(LocalEngine(model), [searching])
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 150)
    monkeypatch.setattr(engine_module, "PREFILL_BESIDE_DECODING", 50)
    engine = LocalEngine(model, max_slots=9)
    others = [ask(prompt[:n], seed=n, max_new_tokens=25) for n in (120, 3, 70)]
    done = generate(engine, [others[0], searching, others[1], searching, others[2]])
    assert result(done[1]) == result(done[3]) == result(alone)
    assert [result(done[n]) for n in (0, 2, 4)] == [result(generate(LocalEngine(model), [r])[0]) for r in others]
    assert engine._runner().cache.reserved == 0


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3, "length_penalty": 0.5}, {"penalty_alpha": 0.6, "top_k": 4}],
    ids=["beams", "contrastive"],
)
def test_searches_tell_the_likeliest_tokens(options: dict[str, Any], tiny: Tiny) -> None:
    [done] = generate(LocalEngine(tiny("llama")), [ask([5, 6], temperature=0, logprobs=3, **options)])
    with torch.no_grad():
        logprobs = tiny("llama")(torch.tensor([[5, 6, *done.ids]])).logits[0, 1:-1].log_softmax(-1)
    values, index = logprobs.topk(3)
    assert [[i for i, _ in top] for top in done.top_logprobs] == index.tolist()
    assert [v for top in done.top_logprobs for _, v in top] == pytest.approx(values.flatten().tolist(), abs=1e-4)


def test_cancelled_searches_free_all_their_slots(tiny: Tiny) -> None:
    engine = LocalEngine(tiny("llama"), max_slots=4)
    first = engine.submit(ask([5, 6], num_beams=3))
    second = engine.submit(ask([5, 6], num_beams=2))
    for _ in range(3):
        engine.step()
    assert len(engine._running) == 1 and len(engine._waiting) == 1  # 3 + 2 beams are more than 4 slots
    engine.cancel(first)
    assert engine._runner().cache.reserved == 0
    assert engine.result(second).finish_reason == "length"
    with pytest.raises(EngineError, match="5 slots and the engine has 4"):
        engine.submit(ask([5], num_beams=5))


# --- contrastive search -----------------------------------------------------------------------------------------------


def contrastive(model: Any, prompt: Sequence[int], alpha: float, k: int, count: int) -> list[int]:
    """Su et al. 2022, eq. 5, word for word: the whole text is read again for every candidate."""
    text = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            probs = model(torch.tensor([text])).logits[0, -1].softmax(-1)
            scores = {}
            for v in probs.topk(k).indices.tolist():
                states = model.base_model(torch.tensor([[*text, v]])).last_hidden_state[0]
                likeness = torch.cosine_similarity(states[-1:], states[:-1]).max()
                scores[v] = float((1 - alpha) * probs[v] - alpha * likeness)
        text.append(max(scores, key=lambda v: scores[v]))
    return text[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("alpha", "k"), [(0.6, 4), (0.1, 2), (1.0, 3)])
def test_contrastive_search_follows_its_definition(family: str, alpha: float, k: int, tiny: Tiny) -> None:
    engine, plain = LocalEngine(tiny(family, seed=4)), tiny(family, seed=4)
    requests = [ask(p, temperature=0, penalty_alpha=alpha, top_k=k, max_new_tokens=8) for p in PROMPTS]
    for prompt, done in zip(PROMPTS, generate(engine, requests), strict=True):
        assert list(done.ids) == contrastive(plain, prompt, alpha, k, 8)
        with torch.no_grad():
            logits = plain(torch.tensor([[*prompt, *done.ids]])).logits[0].log_softmax(-1)
        expected = [float(logits[len(prompt) - 1 + n, i]) for n, i in enumerate(done.ids)]
        assert done.logprobs == pytest.approx(expected, abs=1e-4)


def test_contrastive_search_streams_and_stops(tiny: Tiny) -> None:
    engine = LocalEngine(tiny("llama"))
    options = {"temperature": 0, "penalty_alpha": 0.5, "top_k": 3}
    [free] = generate(engine, [ask([5, 6], **options)])
    stop = free.ids[6]
    request_id = engine.submit(ask([5, 6], stop_ids=frozenset({stop}), **options))
    streamed = tuple(t.id for t in engine.stream(request_id))
    done = engine.result(request_id)
    assert streamed == done.ids == free.ids[: free.ids.index(stop) + 1] and done.finish_reason == "stop"


# --- speculation ------------------------------------------------------------------------------------------------------


class Oracle:
    """Guesses what is known to come, with an error now and then."""

    tokens = 6

    def __init__(self, answers: dict[int, Sequence[int]], wrong_at: int) -> None:
        self.answers, self.wrong_at = answers, wrong_at
        self.asked = 0

    def guess(self, asked: Sequence[Guessing]) -> list[list[int]]:
        found = []
        for g in asked:
            self.asked += 1
            answer = self.answers[g.ids[0]]
            at = len(g.ids) - 40
            guess = list(answer[at : at + g.count])
            if len(guess) > self.wrong_at:
                guess[self.wrong_at] = 60 - guess[self.wrong_at]
            found.append(guess)
        return found

    def forget(self, request_id: str) -> None:
        pass


def requests(**options: Any) -> list[Request]:
    """Prompts of 40 tokens with repetitions; answers cross the end of their arena."""
    return [ask([s, *([4, 5, 6, 7, 8, 9] * 7)[:39]], seed=s, max_new_tokens=45, **options) for s in (3, 11, 25, 30)]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 8, "repetition_penalty": 1.2, "frequency_penalty": 0.4},
        {"temperature": 0, "stop_ids": frozenset(range(0, 60, 13)), "logprobs": 2},
    ],
    ids=["greedy", "sampled", "penalised", "stopped"],
)
@pytest.mark.parametrize("drafter", ["ngram", "itself", "smaller", "oracle"])
def test_guesses_change_nothing(drafter: str, options: dict[str, Any], tiny: Tiny) -> None:
    """Bit for bit, greedy or sampled; only the number of steps changes."""
    model = tiny("llama", max_position_embeddings=128)
    plain = [generate(LocalEngine(model), [r])[0] for r in requests(**options)]
    answers = {r.prompt_ids[0]: c.ids for r, c in zip(requests(), plain, strict=True)}
    drafters: dict[str, Callable[[], Drafter]] = {
        "ngram": NgramDrafter,
        "itself": lambda: ModelDrafter(copy.deepcopy(model), vocab_size=61, memory=1 << 22),
        "smaller": lambda: ModelDrafter(tiny("gpt2", n_layer=1, n_positions=70), vocab_size=61, memory=1 << 16),
        "oracle": lambda: Oracle(answers, wrong_at=4),
    }
    engine = LocalEngine(model, drafter=drafters[drafter](), max_slots=3)
    ids = [engine.submit(r) for r in requests(**options)]
    steps = 0
    while engine._running or engine._waiting:
        engine.step()
        steps += 1
    done = [engine.result(i) for i in ids]
    assert [(*result(c), c.top_logprobs) for c in done] == [(*result(c), c.top_logprobs) for c in plain]
    if drafter == "oracle" and "stop_ids" not in options:
        assert steps <= 2 * (45 / 5 + 4)  # four guesses of six are right, and two groups of requests; alone 90 steps
    if drafter == "itself" and options == {"temperature": 0}:
        assert steps <= 2 * (45 / 5 + 4)


def test_ngrams_continue_the_last_occurrence() -> None:
    drafter = NgramDrafter(tokens=3)
    text = [1, 2, 3, 9, 9, 1, 2, 3, 7, 8, 6, 5, 1, 2, 3]
    assert drafter.guess([Guessing("a", text, 3)]) == [[7, 8, 6]]
    # Longer runs count for more: (5, 2, 3) never occurred, (2, 3) last before 7.
    assert drafter.guess([Guessing("b", [*text[:11], 5, 2, 3], 2)]) == [[7, 8]]
    assert drafter.guess([Guessing("c", [1, 2, 3, 4], 3)]) == [[]]
    # The index goes on with the text.
    assert drafter.guess([Guessing("a", [*text, 4, 4, 1, 2, 3], 3)]) == [[4, 4, 1]]


def test_a_draft_model_needs_the_same_vocabulary(tiny: Tiny) -> None:
    with pytest.raises(EngineError, match="70 tokens, the model 61"):
        ModelDrafter(tiny("llama", vocab_size=70), vocab_size=61)
    with pytest.raises(EngineError, match="GPTNeoForCausalLM cannot be a draft model"):
        ModelDrafter(tiny("gpt_neo"), vocab_size=61)
