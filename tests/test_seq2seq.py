"""Encoder-decoders: the engine against transformers' generate, training against plain cross entropy, chat and evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import seq2seq_models as small
import tiny
import torch

import danlu
from danlu.config import SftSettings
from danlu.data.pairs import encode_pairs
from danlu.data.truncate import Limits
from danlu.evals import perplexity
from danlu.exceptions import DataError, ModelError, SettingsError
from danlu.generation.encoder_decoder import EncoderDecoderEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models.load import load_model, save_model
from danlu.models.seq2seq import PairBatch, start_id, target_logprobs
from danlu.pipeline.stages import run_sft
from danlu.text.text_to_text import Pair, TextToText
from danlu.trainers.seq2seq_sft import batches_of
from danlu.types import Conversation, Message

SOURCES = [[5, 9, 77, 20, 1], [11, 1], [40, 41, 42, 43, 44, 45, 46, 1], [7, 7, 30, 1]]


def talk(*texts: str) -> list[Message]:
    return [{"role": "assistant" if n % 2 else "user", "content": t} for n, t in enumerate(texts)]  # type: ignore[misc]


@pytest.mark.parametrize("kind", small.KINDS)
def test_greedy_tokens_are_those_of_generate(kind: str, tmp_path: Path) -> None:
    """Several lengths in one cohort, one that ends early, and a second cohort that comes later."""
    model = small.make(kind)
    save_model(model, None, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    engine = EncoderDecoderEngine(loaded, max_slots=3)
    counts = [6, 3, 9, 5]
    requests = [
        Request(s, SamplingParams(max_new_tokens=n, temperature=0)) for s, n in zip(SOURCES, counts, strict=True)
    ]
    for source, count, answer in zip(SOURCES, counts, generate(engine, requests), strict=True):
        expected = model.generate(
            torch.tensor([source]), max_new_tokens=count, do_sample=False, eos_token_id=None, num_beams=1
        )
        assert list(answer.ids) == expected[0, 1:].tolist()
        batch = PairBatch.of([Pair(source, list(answer.ids))], start_id(model))
        with torch.no_grad():
            logprobs = target_logprobs(model, batch)[0]
        assert torch.tensor(answer.logprobs).allclose(logprobs, atol=1e-4)
    assert not engine._cohorts and not engine._waiting


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 4, "length_penalty": 0.5}, {"penalty": 1.7}, {"ngram": 2}]
)
def test_searches_and_penalties_are_those_of_generate(kind: str, options: dict[str, Any]) -> None:
    model = small.make(kind, seed=4)
    stop = 17
    ours = {"num_beams": options.get("num_beams", 1), "length_penalty": options.get("length_penalty", 1.0)}
    ours |= {"repetition_penalty": options.get("penalty", 1.0), "no_repeat_ngram_size": options.get("ngram", 0)}
    params = SamplingParams(max_new_tokens=7, temperature=0, stop_ids=frozenset({stop}), **ours)
    answers = generate(EncoderDecoderEngine(model), [Request(s, params) for s in SOURCES])
    for source, answer in zip(SOURCES, answers, strict=True):
        expected = model.generate(
            torch.tensor([source]), max_new_tokens=7, do_sample=False, eos_token_id=stop, pad_token_id=0, **ours
        )[0, 1:].tolist()
        assert list(answer.ids) == expected[: len(answer.ids)]
        assert set(expected[len(answer.ids) :]) <= {0}


def test_contrastive_search_reads_every_candidate() -> None:
    """Against a slow search that reads the whole answer again for each candidate."""
    model = small.make("t5", seed=2)
    params = SamplingParams(max_new_tokens=5, top_k=3, penalty_alpha=0.6)
    found = generate(EncoderDecoderEngine(model), [Request(SOURCES[0], params)])[0]
    text = [0]
    with torch.no_grad():
        for _ in range(5):

            def read(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
                out = model(
                    torch.tensor([SOURCES[0]]), decoder_input_ids=torch.tensor([ids]), output_hidden_states=True
                )
                return out.logits[0], torch.nn.functional.normalize(out.decoder_hidden_states[-1][0], dim=-1)

            logits, hidden = read(text)
            probs, candidates = logits[-1].softmax(-1).topk(3)
            scores = [
                0.4 * float(p) - 0.6 * float((read([*text, int(c)])[1][-1] @ hidden.T).max())
                for p, c in zip(probs, candidates, strict=True)
            ]
            text.append(int(candidates[scores.index(max(scores))]))
    assert list(found.ids) == text[1:]


def test_draws_are_a_function_of_the_seed_and_requests_can_leave() -> None:
    engine = EncoderDecoderEngine(small.make("t5"))
    params = SamplingParams(max_new_tokens=6, seed=5, n=2)
    first = generate(engine, [Request(SOURCES[0], params)])
    beside = generate(engine, [Request(s, params) for s in SOURCES])
    assert [c.ids for c in beside[:2]] == [c.ids for c in first] and first[0].ids != first[1].ids
    slow, quick = (
        engine.submit(Request(s, SamplingParams(max_new_tokens=n))) for s, n in ((SOURCES[0], 40), (SOURCES[1], 4))
    )
    stream = engine.stream(slow)
    next(stream)
    stream.close()
    assert len(engine.result(quick).ids) == 4 and engine.result(slow).finish_reason == "cancelled"
    engine.step()
    assert not engine._cohorts


def test_the_loss_is_the_mean_over_target_tokens(near: Any) -> None:
    """One batch and batches of one give the same gradient; the reference is transformers' own loss with labels."""
    pairs = [Pair(s, s[::-1][: n + 2]) for n, s in enumerate(SOURCES)]
    total = sum(len(p.target_ids) for p in pairs)
    gradients = []
    for groups in ([pairs], [[p] for p in pairs]):
        model = small.make("t5").train()
        for group in groups:
            (-target_logprobs(model, PairBatch.of(group, 0)).sum() / total).backward()
        gradients.append(model.get_parameter("encoder.block.0.layer.0.SelfAttention.q.weight").grad)
    reference = small.make("t5").train()
    longest = max(len(p.target_ids) for p in pairs)
    labels = torch.tensor([[*p.target_ids, *[-100] * (longest - len(p.target_ids))] for p in pairs])
    batch = PairBatch.of(pairs, 0)
    reference(input_ids=batch.source_BS, attention_mask=batch.source_mask_BS, labels=labels).loss.backward()
    gradients.append(reference.get_parameter("encoder.block.0.layer.0.SelfAttention.q.weight").grad)
    near(gradients[0], gradients[2])
    near(gradients[1], gradients[2])


def test_sources_and_targets() -> None:
    template = TextToText(small.tokenizer())
    messages = talk("translate: Haus", "house", "and Maus?", "mouse")
    first, second = template.pairs(messages)
    decode = template.tokenizer.decode
    assert decode(first.source_ids) == "translate: Haus</s>" and decode(first.target_ids) == "house</s>"
    assert (
        decode(second.source_ids) == "translate: Haus\nhouse\nand Maus?</s>"
        and decode(second.target_ids) == "mouse</s>"
    )
    assert template.encode_prompt(messages[:1]) == first.source_ids
    assert template.decode(first.target_ids) == "house" and template.stop_ids == {1}
    bart = TextToText(small.tokenizer(bos=True))
    assert decode(bart.pairs(messages[:2])[0].target_ids) == "<s>house</s>"
    named = TextToText(small.tokenizer(), "alpaca")
    assert "### Instruction:\ntranslate: Haus" in decode(named.encode_prompt(messages[:1]))


def test_what_is_too_long() -> None:
    template = TextToText(small.tokenizer())
    record = Conversation(talk("abcdefghij", "xyz"))  # 11 + 4 tokens
    assert len(encode_pairs([record], template, 15).items) == 1
    dropped = encode_pairs([record], template, 14)
    assert not dropped.items and dropped.answers_cut == 1 and dropped.dropped == {"longer than max_length": 1}
    (cut,) = encode_pairs([record], template, Limits(14, 5, overlength="truncate")).items
    assert template.tokenizer.decode(cut.source_ids) == "ghij</s>" and len(cut.target_ids) == 4
    with pytest.raises(DataError, match=r"source and target have 11 \+ 4 tokens; the limit is 14"):
        encode_pairs([record], template, Limits(14, overlength="error"))


def rows(path: Path) -> Path:
    colours = {"door": "red", "lamp": "green", "boat": "blue", "bell": "black"}
    lines = [json.dumps({"messages": talk(f"the {thing}?", colour)}) for thing, colour in colours.items()]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.mark.parametrize(("kind", "scale", "steps"), tiny.mostly_slow([("bart", 0.05, 80)], [("t5", 0.1, 150)]))
def test_sft_learns_by_heart_and_the_model_answers(kind: str, scale: float, steps: int, tmp_path: Path) -> None:
    """Rows of loss to near zero; the stop token is produced; what is saved opens in plain transformers."""
    import transformers

    folder, data = small.folder(tmp_path / "base", kind, scale=scale), rows(tmp_path / "rows.jsonl")
    settings = SftSettings(
        model=str(folder), data=str(data), eval_data=str(data), out=str(tmp_path / "out"), max_steps=steps, learning_rate=1e-2,
        tokens_per_step=400, micro_tokens=200, max_length=64, dtype="float32", weight_decay=0.0, eval_every=1000,
    )  # fmt: skip
    outcome = run_sft(settings)
    assert outcome.metrics["eval_loss"] < 0.1 < outcome.metrics["first_eval_loss"]
    assert {g.code: g.passed for g in outcome.gates} == {"G-STOP": True, "G-TRUNC": True, "G-RENDER": True}
    assistant = danlu.load(tmp_path / "out" / "model")
    answers = assistant.generate(
        [talk("the boat?"), talk("the bell?")], SamplingParams(max_new_tokens=12, temperature=0)
    )
    assert [a.text for a in answers] == ["blue", "black"] and answers[0].finish_reason == "stop"
    response, history = assistant.chat("the door?", history=[], params=SamplingParams(max_new_tokens=12, temperature=0))
    assert response == "red" and history == [("the door?", "red")]
    measured, tokens = perplexity.measure(assistant.model, str(data), assistant.tokenizer, 64)
    assert measured == pytest.approx(math.exp(outcome.metrics["eval_loss"]), rel=1e-4) and tokens > 16
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out" / "model")
    ids = assistant.tokenizer("the boat?", return_tensors="pt")["input_ids"]
    assert "blue" in assistant.tokenizer.decode(plain.generate(ids, max_new_tokens=12)[0], skip_special_tokens=True)


def test_held_out_batches_hold_every_pair_once() -> None:
    template = TextToText(small.tokenizer())
    pairs = encode_pairs([Conversation(talk("a" * n, "b" * (n % 5 + 1))) for n in range(1, 20)], template, 100)
    batches = batches_of(pairs, 0, 60)
    assert sum(len(b.source_BS) for b in batches) == 19
    assert sum(float(b.weight_BT.sum()) for b in batches) == pairs.weights.sum()


def test_what_encoder_decoders_cannot_do_is_a_sentence(tmp_path: Path) -> None:
    folder, data = small.folder(tmp_path / "base", "t5"), rows(tmp_path / "rows.jsonl")
    with pytest.raises(SettingsError, match="encoder-decoders train all their weights"):
        run_sft(SftSettings(model=str(folder), data=str(data), out=str(tmp_path / "o"), adapter="lora"))
    with pytest.raises(ModelError, match="'t5' is an encoder-decoder; reward models and critics are decoders"):
        load_model(folder, scalar=True)
    from danlu.config import PretrainSettings
    from danlu.trainers import pretrain

    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some text"}\n' * 9, "utf-8")
    with pytest.raises(ModelError, match="'t5' is an encoder-decoder, and this needs a decoder"):
        pretrain.train(PretrainSettings(model=str(folder), data=str(text), out=str(tmp_path / "p")))
