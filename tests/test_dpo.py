"""DPO: a plain padded reference, what it and its relatives learn, and everything that must not change their numbers."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny as small
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from danlu.alignment_config import DpoSettings
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel, TrunkOutput
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.text.chat_template import ChatTemplate
from danlu.training import pairs
from danlu.training.compute import Compute
from danlu.training.session import Session
from danlu.training.step import accumulate
from danlu.tree import TreeBatch, branches, forest

CPU = Compute("cpu", "float32", 1)
STEPS = {"max_steps": 20, "learning_rate": 1e-2}


def train(out: Path, **changes: Any) -> Any:
    """What the stage reports, gates and all."""
    return STAGES["dpo"].run(parse(DpoSettings, small.stage("dpo", out, **changes)))


def updates(out: Path) -> list[dict[str, float]]:
    return [r for r in small.metrics_of(out) if "grad_norm" in r]


def t(*values: float) -> Tensor:
    return torch.tensor(values)


# -- against plain transformers -------------------------------------------------------------------------------------------

PAIRS = [
    ([5, 6, 7, 8], [9, 10, 11, 1], [12, 1]),
    ([13, 14], [15, 16, 17, 18, 19, 20, 1], [15, 16, 21, 1]),
    ([22, 23, 24], [25, 1], [26, 27, 28, 29, 1]),
]


def padded_logprobs(model: Any, answers: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Log-probabilities of answers, one padded row each."""
    width = max(len(p) + len(a) for p, a in answers)
    rows = torch.tensor([p + a + [2] * (width - len(p) - len(a)) for p, a in answers])
    mask = torch.tensor([[1] * (len(p) + len(a)) + [0] * (width - len(p) - len(a)) for p, a in answers])
    logp = model(input_ids=rows, attention_mask=mask).logits.float().log_softmax(-1)
    return torch.stack(
        [
            sum((logp[r, len(p) + i - 1, token] for i, token in enumerate(a)), torch.zeros(()))
            for r, (p, a) in enumerate(answers)
        ]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_tree_loss_and_gradients_are_those_of_padded_rows(
    family: str, tiny: Callable[..., Any], near: Callable[..., None]
) -> None:
    model, ref = tiny(family, seed=1), tiny(family, seed=2)
    plain, plain_ref = tiny(family, seed=1), tiny(family, seed=2)
    root = RootModel(SeparateModels({"policy": model, "ref": ref}, ["policy"])).eval()
    trees = [TreeBatch.of(forest([branches(p, [c, r]) for p, c, r in part])) for part in (PAIRS[:2], PAIRS[2:])]
    settings = DpoSettings(beta=0.3, label_smoothing=0.05)

    def loss_fn(out: TrunkOutput, frozen: Tensor) -> tuple[Tensor, dict[str, float]]:
        return pairs.pair_loss(pairs.pair_logprobs(out), frozen, pairs.pair_tokens(out.tree), 3.0, settings)

    frozen = pairs.read_answers(root, "ref", trees, lambda tree: tree, CPU)
    metrics = accumulate(root, "policy", list(zip(trees, frozen, strict=True)), loss_fn, CPU)

    chosen, rejected = [(p, c) for p, c, _ in PAIRS], [(p, r) for p, _, r in PAIRS]
    with torch.no_grad():
        gap = padded_logprobs(plain_ref, rejected) - padded_logprobs(plain_ref, chosen)
    gap = 0.3 * (padded_logprobs(plain, chosen) - padded_logprobs(plain, rejected) + gap)
    loss = (-0.95 * F.logsigmoid(gap) - 0.05 * F.logsigmoid(-gap)).mean()
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["margin"] == pytest.approx(gap.sum().item(), rel=1e-5)
    grads = [p.grad for _, p in sorted(plain.named_parameters()) if p.grad is not None]
    found = [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
    assert len(found) == len(grads) > 4
    near(torch.cat([g.flatten() for g in found]), torch.cat([g.flatten() for g in grads]))


# -- training -------------------------------------------------------------------------------------------------------------


def test_it_learns_a_separable_preference(tmp_path: Path) -> None:
    result = train(tmp_path, **STEPS)
    first, last = updates(tmp_path)[0], result.metrics
    # Before the first update policy and reference are one model: every pair is a tie.
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["margin"], first["accuracy"], first["chosen_reward"]) == (0.0, 0.5, 0.0)
    assert last["eval_loss"] < 0.3 and last["eval_accuracy"] > 0.9
    assert last["eval_accuracy_low"] < last["eval_accuracy"] <= last["eval_accuracy_high"]
    assert last["eval_margin"] == pytest.approx(last["eval_chosen_reward"] - last["eval_rejected_reward"], abs=1e-5)
    assert [g.code for g in result.gates if g.passed] == ["G-STOP", "G-TRUNC", "G-RENDER"]
    assert result.facts["pairs"] + result.facts["heldout_pairs"] == 96
    assert "Gladly." in result.facts["rendered_example"]


# Where a loss begins that compares equal numbers, with its defaults: ln 2; (1 / (2 beta))^2; 1.
FIRST = {"robust": math.log(2), "ipo": 25.0, "hinge": 1.0}


@pytest.mark.parametrize("loss", small.mostly_slow(["ipo", "simpo", "orpo"], ["robust", "hinge"]))
def test_its_relatives_learn_it_too(loss: str, tmp_path: Path) -> None:
    options = {"label_smoothing": 0.05} if loss == "robust" else {}
    result = train(tmp_path, loss=loss, **options, **STEPS)
    first, last = updates(tmp_path)[0], result.metrics
    assert last["eval_accuracy"] > 0.9 and last["margin"] > first["margin"]
    if loss in FIRST:
        assert first["loss"] == pytest.approx(FIRST[loss], rel=1e-5) and first["margin"] == 0.0
    else:
        assert "chosen_reward" not in first and last["chosen_mean"] > last["rejected_mean"]
    assert [g.code for g in result.gates if g.passed] == ["G-STOP", "G-TRUNC", "G-RENDER"]


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_without_a_reference_none_is_read(adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles: list[str] = []
    forward = RootModel.forward

    def seen(self: RootModel, tree: TreeBatch, role: Any, head_fn: Any, **options: Any) -> Any:
        roles.append(f"{role}, {'training' if torch.is_grad_enabled() else 'reading'}")
        return forward(self, tree, role, head_fn, **options)

    monkeypatch.setattr(RootModel, "forward", seen)
    train(tmp_path, loss="simpo", adapter=adapter, max_steps=2, eval_every=10)
    # Nothing before the first step; afterwards the held-out pairs and the probability of the stop token.
    assert roles[0] == "policy, training" and {r.split(",")[0] for r in roles} == {"policy"}


def test_the_sft_term_keeps_chosen_answers_likely(tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 1.0):
        found[weight] = train(tmp_path / str(weight), sft_weight=weight, **STEPS).metrics
    assert found[1.0]["eval_chosen_logprob"] > found[0.0]["eval_chosen_logprob"] + 1
    assert found[1.0]["nll"] < updates(tmp_path / "1.0")[0]["nll"] and "nll" not in found[0.0]


def test_the_saved_model_has_the_reported_rewards(tmp_path: Path) -> None:
    """beta (log pi - log ref) of the held-out pairs, one row at a time with transformers' own forward."""
    lines = small.data()["comparisons"].read_text("utf-8").splitlines(keepends=True)[::9]
    data = tmp_path / "heldout.jsonl"
    data.write_text("".join(lines), "utf-8")
    for adapter in ("full", "lora"):
        result = train(tmp_path / adapter, eval_data=str(data), adapter=adapter, beta=0.2, **STEPS)
        folders = tmp_path / adapter / "model", small.model()
        after, before = (AutoModelForCausalLM.from_pretrained(f).eval() for f in folders)
        template = ChatTemplate(AutoTokenizer.from_pretrained(folders[0]))
        rewards: dict[str, list[float]] = {"chosen": [], "rejected": []}
        for row in map(json.loads, lines):
            for side, found in rewards.items():
                answer = [template.encode_answer(row["prompt"], row[side])]
                with torch.no_grad():
                    found.append(0.2 * float(padded_logprobs(after, answer) - padded_logprobs(before, answer)))
        for side, found in rewards.items():
            expected = sum(found) / len(found)
            assert result.metrics[f"eval_{side}_reward"] == pytest.approx(expected, abs=1e-4), (adapter, side)
            assert abs(expected) > 1e-3


@pytest.mark.parametrize("adapter", small.mostly_slow(["lora"], ["full"]))
def test_the_reference_before_training_and_at_every_step_are_one(adapter: str, tmp_path: Path) -> None:
    """Over two epochs, the second of which has other micro-batches than those the reference was read in."""
    rows = []
    for reference in ("precomputed", "online"):
        train(tmp_path / reference, reference=reference, adapter=adapter, learning_rate=1e-2, epochs=2)
        rows.append(updates(tmp_path / reference))
    assert len(rows[0]) > 10
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["chosen_reward"] == pytest.approx(other["chosen_reward"], abs=1e-4)


def test_micro_batches_do_not_change_training(tmp_path: Path) -> None:
    rows = []
    for micro in (64, 1024):
        train(tmp_path / str(micro), micro_tokens=micro, tokens_per_step=600, max_steps=4, learning_rate=1e-2)
        rows.append(updates(tmp_path / str(micro)))
    for small_ones, large in zip(*rows, strict=True):
        assert small_ones["loss"] == pytest.approx(large["loss"], rel=1e-5)
        assert small_ones["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-3)


def test_dropout_is_off(tmp_path: Path) -> None:
    train(tmp_path, adapter="lora", lora={"dropout": 0.5}, max_steps=1)
    assert updates(tmp_path)[0]["margin"] == 0.0


class KilledError(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize(
    "changes",
    small.mostly_slow([{"adapter": "lora", "reference": "online"}, {"loss": "kto"}], [{}, {"loss": "orpo"}]),
    ids=["lora", "kto", "full", "orpo"],
)
def test_an_interrupted_stage_goes_on_bit_for_bit(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second epoch: the reference is read again from the first model, not from the checkpoint."""
    options = {**STEPS, "max_steps": 24, "save_every": 7, "eval_every": 5, **changes}
    whole = train(tmp_path / "whole", **options)
    log = Session.log

    def killed(self: Session, step: int, *args: Any, **rest: Any) -> None:
        if step == 19:
            raise KilledError
        log(self, step, *args, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "log", killed)
        with pytest.raises(KilledError):
            train(tmp_path / "out", **options)
    assert not (tmp_path / "out" / "model").exists()
    again = train(tmp_path / "out", **options)
    assert small.weights(tmp_path / "out" / "model") == small.weights(tmp_path / "whole" / "model")
    assert again.metrics == whole.metrics
    assert small.metrics_of(tmp_path / "out") == small.metrics_of(tmp_path / "whole")


def test_early_stopping(tmp_path: Path) -> None:
    rule = {"monitor": "eval_accuracy", "mode": "max", "patience": 1}
    result = train(tmp_path, max_steps=60, eval_every=5, learning_rate=1e-2, early_stopping=rule)
    found = [r["eval_accuracy"] for r in small.metrics_of(tmp_path) if "eval_accuracy" in r]
    assert len(found) < 12 and found[-1] <= found[-2]
    assert result.metrics["eval_accuracy"] == max(found), "the manifest speaks of the model that was saved"


def test_published_pairs(shared_data: Path, tmp_path: Path) -> None:
    """HH-RLHF as published: a few pairs learnt by heart."""
    with gzip.open(next((shared_data / "hh-rlhf" / "helpful-base").glob("*.gz")), "rt", encoding="utf-8") as file:
        rows = [line for line in islice(file, 200) if len(line) < 700][:24]
    path = tmp_path / "helpful-base" / "pairs.jsonl"
    path.parent.mkdir()
    path.write_text("".join(rows), "utf-8")
    # The toy tokenizer writes English in many tokens.
    model = small.model_folder(tmp_path / "model", context=1024)
    options = {"max_length": 1024, "micro_tokens": 4096, "tokens_per_step": 4096, "eval_fraction": 0.1, "max_steps": 12}
    result = train(tmp_path / "out", data=str(path), model=str(model), learning_rate=1e-2, **options)
    found = [r["loss"] for r in updates(tmp_path / "out")]
    assert found[0] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(found[-3:]) / 3 < 0.6
    assert result.facts["answers"] == 2 * len(rows) - 2 * result.facts["heldout_pairs"]
