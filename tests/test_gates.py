"""Gates: each verdict worked out by hand, on both sides of its threshold, and on the fault that it is there for."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from danlu.alignment_config import GrpoSettings, PpoSettings, RewardSettings
from danlu.config import QuantizeSettings, SftSettings
from danlu.data.collate import Trees
from danlu.parsing import parse
from danlu.pipeline import gates
from danlu.pipeline.stages import run_sft
from danlu.text.chat_template import ChatTemplate, shipped_template
from danlu.training import answers
from danlu.types import Conversation


def facts(**changes: Any) -> dict[str, Any]:
    """Of an SFT stage with a hundred answers and no fault."""
    found = {"answers": 100, "answers_kept": 100, "answers_with_stop": 100, "answers_cut": 0}
    return found | {"stop_row_learns": True, "stop_probability": 0.0} | changes


@pytest.mark.parametrize(
    ("kept", "with_stop", "learns", "passed"),
    [
        (100, 99, True, True),
        (100, 98, True, False),
        (200, 198, True, True),
        (100, 100, False, False),
        (0, 0, True, False),
    ],
)
def test_stop(kept: int, with_stop: int, learns: bool, passed: bool) -> None:
    gate = gates.stop(facts(answers_kept=kept, answers_with_stop=with_stop, stop_row_learns=learns))
    assert (gate.code, gate.passed, gate.threshold) == ("G-STOP", passed, 0.99)
    assert gate.value == with_stop / max(kept, 1)


@pytest.mark.parametrize(("probability", "learns"), [(0.0, False), (0.09, False), (0.2, True)])
def test_a_frozen_stop_row_needs_a_model_that_ends_answers(
    probability: float, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "stop_probability", lambda *_: probability)
    seam: Any = SimpleNamespace(stop_ids={1}, name="chatml", note="")
    frozen, trained = torch.zeros(2), torch.zeros(2, requires_grad=True)
    found = [answers.answer_facts(None, head, Trees(), seam, 1, None) for head in (frozen, trained)]  # type: ignore[arg-type]
    assert [f["stop_row_learns"] for f in found] == [learns, True]


@pytest.mark.parametrize(
    ("answers", "cut", "passed"), [(100, 4, True), (100, 5, False), (1000, 49, True), (0, 0, True)]
)
def test_truncated(answers: int, cut: int, passed: bool) -> None:
    gate = gates.truncated(facts(answers=answers, answers_cut=cut))
    assert (gate.code, gate.passed, gate.threshold) == ("G-TRUNC", passed, 0.05)
    assert gate.value == cut / max(answers, 1)


@pytest.mark.parametrize(
    ("accuracy", "correlation", "passed"),
    [(0.6, 0.49, True), (0.599, 0.0, False), (0.9, 0.5, False), (0.9, -0.7, False), (0.9, -0.3, True)],
)
def test_reward_model(accuracy: float, correlation: float, passed: bool) -> None:
    (gate,) = gates.reward_model(
        {"eval_accuracy": accuracy, "eval_length_correlation": correlation}, RewardSettings(min_accuracy=0.6)
    )
    assert (gate.code, gate.passed, gate.value, gate.threshold) == ("G-RM", passed, accuracy, 0.6)


@pytest.mark.parametrize(("auc", "passed"), [(0.6, True), (0.59, False)])
def test_reward_model_of_labels(auc: float, passed: bool) -> None:
    """Most answers being liked, a model that likes everything has a high accuracy, but ranks no better than a coin."""
    metrics = {"eval_accuracy": 0.9, "eval_auc": auc, "eval_auc_low": 0.55, "eval_auc_high": 0.65}
    (gate,) = gates.reward_model(metrics, RewardSettings(loss="unpaired"))
    assert (gate.code, gate.passed, gate.value) == ("G-RM", passed, auc)
    assert "(95% interval 55.0% to 65.0%)" in gate.sentence


@pytest.mark.parametrize(
    ("loss", "metrics", "said"),
    [
        ("pairwise", {}, "no held-out pairs"),
        ("pointwise", {"eval_loss": 1.0}, "no held-out pairs"),
        ("unpaired", {"eval_accuracy": 1.0}, "no held-out answers of both labels"),
    ],
)
def test_a_reward_model_that_was_not_evaluated_does_not_pass(loss: Any, metrics: dict[str, float], said: str) -> None:
    (gate,) = gates.reward_model(metrics, RewardSettings(loss=loss))
    assert not gate.passed and said in gate.sentence


@pytest.mark.parametrize(
    ("error", "kl", "passed"),
    [(0.0, 0.0, True), (9e-5, 9e-5, True), (2e-4, 0.0, False), (0.0, 2e-4, False)],
)
def test_ratio(error: float, kl: float, passed: bool) -> None:
    gate = gates.ratio({"first": {"ratio_error": error, "kl": kl}}, PpoSettings())
    assert (gate.code, gate.passed, gate.value, gate.threshold) == ("G-RATIO", passed, max(error, kl), 1e-4)


def test_ratio_without_a_first_pass() -> None:
    assert not gates.ratio({}, PpoSettings()).passed and not gates.ratio({"first": {}}, PpoSettings()).passed


@pytest.mark.parametrize(
    ("error", "kl", "adapter", "passed"),
    [
        (0.0, 0.2, "full", True),  # 20 tokens of 0.01 nats
        (0.0, 0.2002, "full", False),
        (2e-4, 0.0, "full", False),  # the ratio is the trainer's own
        (0.0, 0.2, "lora", False),  # the reference is the base itself
        (0.0, math.nan, "full", False),
    ],
)
def test_ratio_with_a_rounded_reference(error: float, kl: float, adapter: str, passed: bool) -> None:
    settings = PpoSettings(ref_bits=8, adapter=adapter)
    gate = gates.ratio({"first": {"ratio_error": error, "kl": kl, "length": 20.0}}, settings)
    assert gate.passed == passed
    assert ("8 bits may cost 2.0e-01" in gate.sentence) == (adapter == "full")


START = {"eval_score": 0.5, "eval_length": 30.0, "eval_stop_rate": 0.9, "spread": 0.4}
END = {"eval_score": 0.9, "eval_length": 33.0, "eval_stop_rate": 0.95, "kl": 4.0}
WINS = {"eval_win_rate": 0.7, "eval_win_rate_low": 0.6, "eval_win_rate_high": 0.78}


def ppo_gate(start: dict[str, float] | None = None, **changes: float) -> gates.Gate:
    given = START if start is None else start
    return gates.policy({**END, **WINS, **changes}, {"start": given}, PpoSettings())


@pytest.mark.parametrize(
    ("changes", "passed", "said"),
    [
        ({}, True, "wins 70.0% of held-out prompts against the start model (95% interval 60.0% to 78.0%)"),
        # An interval that reaches half is no loss beyond chance.
        ({"eval_win_rate": 0.45, "eval_win_rate_low": 0.3, "eval_win_rate_high": 0.5}, True, "wins 45.0%"),
        ({"eval_win_rate": 0.4, "eval_win_rate_low": 0.3, "eval_win_rate_high": 0.49}, False, "loses beyond chance"),
        ({"kl": 50.0}, True, ""),
        ({"kl": 51.0}, False, "its KL is 51.0 nats"),
        ({"kl": -1.1}, False, "its KL is -1.1 nats"),
        ({"eval_stop_rate": 0.71}, True, ""),
        ({"eval_stop_rate": 0.69}, False, "69% of its answers end by themselves, 90% did before"),
        ({"eval_length": 10.0}, True, ""),
        ({"eval_length": 9.9}, False, "its answers have 10 tokens, 30 before"),
        ({"eval_length": 91.0}, False, "its answers have 91 tokens"),
        ({"eval_score": 0.11}, True, ""),
        ({"eval_score": 0.09}, False, "its held-out score is 0.09, 0.50 before"),
    ],
)
def test_policy(changes: dict[str, float], passed: bool, said: str) -> None:
    gate = ppo_gate(**changes)
    assert (gate.code, gate.passed, gate.threshold, gate.warning) == ("G-PPO", passed, 0.5, False)
    assert gate.value == changes.get("eval_win_rate", 0.7) and said in gate.sentence


def test_policy_by_gold_where_there_is_gold() -> None:
    """What is trained on may rise as it likes."""
    start = {**START, "eval_gold": 2.0}
    assert ppo_gate(start, eval_gold=1.7).passed and not ppo_gate(start, eval_gold=1.5).passed


def test_policy_of_grpo_has_its_own_bound() -> None:
    settings = parse(GrpoSettings, {"grpo": {"max_kl": 3.0}})
    assert not gates.policy({**END, **WINS}, {"start": START}, settings).passed


def test_policy_without_held_out_prompts_is_not_decided() -> None:
    for metrics, start in ((END, START), ({**END, **WINS}, {}), (END, {})):
        gate = gates.policy(metrics, {"start": start}, PpoSettings())
        assert not gate.passed and gate.warning and gate.sentence.startswith("not decided")


@pytest.mark.parametrize(
    ("before", "after", "passed"), [(10.0, 10.05, True), (10.0, 10.2, False), (10.0, 9.0, True), (100.0, 100.99, True)]
)
def test_quantized(before: float, after: float, passed: bool) -> None:
    gate = gates.quantized(before, after, QuantizeSettings())
    assert (gate.code, gate.passed, gate.threshold) == ("G-QUANT", passed, 0.01)
    assert gate.value == pytest.approx((after - before) / before)


def test_no_gate_holds_on_what_is_no_number() -> None:
    nan = math.nan
    assert not gates.ratio({"first": {"ratio_error": nan, "kl": 0.0}}, PpoSettings()).passed
    assert not gates.ratio({"first": {"ratio_error": 0.0, "kl": nan}}, PpoSettings()).passed
    assert not gates.quantized(10.0, nan, QuantizeSettings()).passed
    assert not gates.reward_model({"eval_accuracy": nan}, RewardSettings())[0].passed
    for name in ("kl", "eval_win_rate_high", "eval_length", "eval_stop_rate", "eval_score"):
        assert not ppo_gate(**{name: nan}).passed, name
    correlation = {"eval_accuracy": 0.9, "eval_length_correlation": nan}
    assert not gates.reward_model(correlation, RewardSettings())[0].passed


def test_a_verdict_as_it_stands_in_the_manifest() -> None:
    found = gates.truncated(facts()).as_dict()
    assert list(found) == ["code", "passed", "value", "threshold", "sentence", "warning"]
    assert found["warning"] is False
    assert found["sentence"] == "0.0% of 100 answers are lost to max_length"


# -- G-RENDER -------------------------------------------------------------------------------------------------------------

TALKS = [
    Conversation([*tiny.user("Hi"), *tiny.assistant("Hello.")]),  # type: ignore[list-item]
    Conversation(
        [
            {"role": "system", "content": "Be brief."},
            *tiny.user("One?"),
            *tiny.assistant("Two."),
            *tiny.user("Three?"),
            *tiny.assistant("Four."),
        ]  # type: ignore[list-item]
    ),
]


def template(source: str | None = None) -> ChatTemplate:
    tokenizer = tiny.tokenizer()
    if source is not None:
        tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


def test_render_of_the_same_template() -> None:
    gate = gates.render(template(), template(), TALKS)
    assert (gate.code, gate.passed, gate.value) == ("G-RENDER", True, 1.0)


@pytest.mark.parametrize(
    "fault",
    [
        lambda s: s.replace("<|im_start|>assistant\\n", "<|im_start|>assistant"),
        lambda s: "You are a helpful assistant.\n" + s,
        lambda s: shipped_template("plain"),
    ],
    ids=["a missing line break", "a system text that training never saw", "another template"],
)
def test_render_of_another_template(fault: Any) -> None:
    """What serving renders differs from what training saw, if only by a line break."""
    source = shipped_template("chatml")
    changed = fault(source)
    assert changed != source
    gate = gates.render(template(), template(changed), TALKS)
    assert not gate.passed and gate.value == 0.0
    assert gate.sentence.startswith("0 of 2")


# -- caught in training ---------------------------------------------------------------------------------------------------


def test_answers_that_do_not_fit_are_caught(tmp_path: Path) -> None:
    """Every tenth answer is longer than max_length: it is dropped, and G-TRUNC says how many."""
    rows = [
        {"messages": tiny.user(f"{n}?") + tiny.assistant("far too long " * 20 if n % 10 == 0 else "short")}
        for n in range(50)
    ]
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    values = tiny.stage("sft", tmp_path / "out", data=str(data), eval_fraction=0, max_steps=1)
    outcome = run_sft(parse(SftSettings, values))
    verdicts = {g.code: g for g in outcome.gates}
    assert not verdicts["G-TRUNC"].passed and verdicts["G-TRUNC"].value == 5 / 50
    assert verdicts["G-STOP"].passed and outcome.facts["answers_kept"] == 45


def test_a_frozen_stop_token_is_caught(tmp_path: Path) -> None:
    """Adapters cannot teach a base its stop token when the head's row is frozen and the base never heard of it."""
    values = tiny.stage("sft", tmp_path, adapter="lora", max_steps=2)
    verdicts = {g.code: g for g in run_sft(parse(SftSettings, values)).gates}
    assert not verdicts["G-STOP"].passed and "frozen" in verdicts["G-STOP"].sentence
