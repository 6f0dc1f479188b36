"""Every trainer learns what there is to learn, and leaves a folder that plain transformers reads the same way."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import danlu
from danlu.config import KINDS
from danlu.evals import perplexity
from danlu.exceptions import DataError, ModelError, SettingsError, TrainingError
from danlu.generation.protocol import SamplingParams
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.rewards.model import CONFIG_KEY, ModelReward
from danlu.rewards.protocol import Episode, Score
from danlu.text.chat_template import ChatTemplate
from danlu.trainers import reward_model
from danlu.training import compute, tracking
from danlu.training.compute import choose
from danlu.tree import TreeBatch, conversation, forest

TRAINERS = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")


def train(kind: str, out: Path, **changes: Any) -> Any:
    """What the stage reports, gates and all."""
    return STAGES[kind].run(parse(KINDS[kind], tiny.stage(kind, out, **changes)))


def heldout(folder: Path, kind: str, count: int = 12) -> Path:
    """Toy records as a file of its own."""
    lines = tiny.data()[kind].read_text("utf-8").splitlines(keepends=True)
    path = folder / f"heldout-{kind}.jsonl"
    path.write_text("".join(lines[:: len(lines) // count]), "utf-8")
    return path


# -- they learn ---------------------------------------------------------------------------------------------------------


def test_pretraining_learns_a_toy_text(tmp_path: Path) -> None:
    result = train("pretrain", tmp_path, max_steps=60, eval_every=5, learning_rate=2e-2)
    assert result.metrics["first_eval_loss"] > 4
    assert result.metrics["eval_loss"] < 1.0
    assert result.facts["records"] + result.facts["heldout"] == 96 and result.facts["heldout"] > 0
    # A document begins with its mark: from there the model writes such a text as it has learnt.
    model, text = plain(tmp_path / "model")
    ids = text("<|endoftext|>Note 3: the", return_tensors="pt")["input_ids"]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert re.match(r".*Note 3: the (\w+) is \w+\. The \w+ is \w+, as ever", text.decode(written[0]))


def plain(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer as transformers alone loads them."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_sft_learns_toy_answers(tmp_path: Path) -> None:
    result = train("sft", tmp_path, max_steps=60, learning_rate=2e-2)
    size = len(tiny.tokenizer())
    assert result.metrics["first_eval_loss"] == pytest.approx(math.log(size), abs=0.3)  # fresh weights know nothing
    assert result.metrics["eval_loss"] < 1.0
    assert [g.code for g in result.gates if g.passed] == ["G-STOP", "G-TRUNC", "G-RENDER"]
    answer, _ = danlu.load(tmp_path / "model").chat("5: which colour has the lamp?", params=greedy())
    assert re.fullmatch(r"The (\w+) is (\w+)\.", answer), answer


def greedy() -> SamplingParams:
    return SamplingParams(max_new_tokens=16, temperature=0.0)


def test_sft_loss_is_the_loss_of_plain_transformers(tmp_path: Path) -> None:
    """The reported held-out loss, worked out again one conversation at a time with transformers' own forward."""
    data = heldout(tmp_path, "conversations")
    result = train("sft", tmp_path / "out", max_steps=5, eval_data=str(data))
    model, text = plain(tmp_path / "out" / "model")
    total, count = 0.0, 0
    for line in data.read_text("utf-8").splitlines():
        question, answer = (m["content"] for m in json.loads(line)["messages"])
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids, rest = text(prompt)["input_ids"], text(answer + "<|im_end|>")["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([ids + rest])).logits[0].log_softmax(-1)
        total -= sum(float(logp[len(ids) + i - 1, token]) for i, token in enumerate(rest))
        count += len(rest)
    assert result.metrics["eval_loss"] == pytest.approx(total / count, abs=1e-5)


def test_reward_model_learns_a_separable_preference(tmp_path: Path) -> None:
    result = train("reward", tmp_path, max_steps=30, learning_rate=1e-2)
    assert result.metrics["eval_accuracy"] > 0.9
    assert result.metrics["eval_accuracy_low"] < result.metrics["eval_accuracy"] <= result.metrics["eval_accuracy_high"]
    assert result.gates[0].code == "G-RM" and result.gates[0].passed
    kind, unkind = plain_scores(tmp_path / "model", ["Gladly. The hat is white.", "No idea. The hat is white."])
    assert kind > unkind
    # On its own training answers the score has mean 0 and variance 1 after normalising.
    assert result.facts["score_mean"] == pytest.approx((kind + unkind) / 2, abs=2 * result.facts["score_std"])


def test_the_normaliser_is_measured_on_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the pairs gives nearly the same mean and scale as all of them, and the same ones every time."""
    whole = train("reward", tmp_path / "whole", max_steps=5, learning_rate=1e-2).facts
    monkeypatch.setattr(reward_model, "NORMALISER_PAIRS", 12)
    few, again = (train("reward", tmp_path / n, max_steps=5, learning_rate=1e-2).facts for n in ("few", "again"))
    assert few == again and few["score_mean"] != whole["score_mean"]
    assert few["score_mean"] == pytest.approx(whole["score_mean"], abs=3 * whole["score_std"] / 24**0.5)


def plain_scores(folder: Path, answers: Sequence[str]) -> list[float]:
    """Scores by transformers' own sequence-classification forward."""
    model, text = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for answer in answers:
        messages = tiny.user("4: which colour has the hat?") + tiny.assistant(answer)
        rendered = text.apply_chat_template(messages, tokenize=False).rstrip("\n")
        with torch.no_grad():
            found.append(float(model(torch.tensor([text(rendered)["input_ids"]])).logits[0, 0]))
    return found


def toy_judge(self: ModelReward, episodes: Sequence[Episode], **_: Any) -> list[Score]:
    """Likes even tokens: the share of them, from -1 to 1."""
    shares = [sum(t % 2 == 0 for t in e.response_ids) / len(e.response_ids) for e in episodes]
    return [Score(2 * share - 1) for share in shares]


@pytest.mark.slow
def test_ppo_raises_a_toy_reward_and_kl_holds_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelReward, "score", toy_judge)
    found: dict[str, dict[str, float]] = {}
    for name, coefficient in (("free", 0.0), ("held", 5.0)):
        options = {"critic_learning_rate": 1e-3, "missing_stop_penalty": 0.0, "kl_coef": coefficient}
        rollout = {"batch": 32, "max_new_tokens": 8}
        result = train("ppo", tmp_path / name, max_steps=16, learning_rate=3e-2, ppo=options, rollout=rollout)
        assert result.gates[0].code == "G-RATIO" and result.gates[0].value == 0.0
        found[name] = result.metrics
        first = next(r for r in tiny.metrics_of(tmp_path / name) if "score" in r)
        assert abs(first["score"]) < 0.3, "fresh weights draw even and odd tokens alike"
        assert first["kl"] == 0.0
    assert found["free"]["score"] > 0.6 and found["free"]["eval_score"] > 0.6
    assert found["free"]["kl"] > 5, "which it can only do by leaving the reference"
    assert found["held"]["kl"] < 1.5 and found["held"]["score"] < 0.3


def test_ppo_stops_when_the_policy_leaves_the_reference(tmp_path: Path) -> None:
    options = {"critic_learning_rate": 1e-3, "kl_coef": 0.0, "max_kl": 1e-6}
    with pytest.raises(TrainingError, match=r"max_kl 1e-06"):
        train("ppo", tmp_path, max_steps=5, ppo=options)


def test_a_judge_with_a_template_of_its_own_gets_the_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same vocabulary, other template: the policy's ids would mean something else to the judge, so it gets the turns."""
    judge = shutil.copytree(tiny.reward_model(), tmp_path / "judge")
    template = judge / "chat_template.jinja"
    template.write_text(template.read_text("utf-8").replace("<|im_start|>", "<|im_start|>the "), "utf-8")
    heard: list[Episode] = []

    def listen(self: ModelReward, episodes: Sequence[Episode], **_: Any) -> list[Score]:
        assert self.template is not None and "the " in self.template.source
        heard.extend(episodes)
        return toy_judge(self, episodes)

    monkeypatch.setattr(ModelReward, "score", listen)
    train("ppo", tmp_path / "out", max_steps=1, reward_model=str(judge))
    asked = {
        json.loads(line)["prompt"][-1]["content"] for line in tiny.data()["prompts"].read_text("utf-8").splitlines()
    }
    assert heard and all(e.prompt[-1]["role"] == "user" and e.prompt[-1]["content"] in asked for e in heard)


def test_the_critic_begins_with_the_judge_s_own_scale(tmp_path: Path) -> None:
    """Its first values are normalised scores: a raw head would begin wrong by the normaliser's mean and scale."""
    judge = shutil.copytree(tiny.reward_model(), tmp_path / "judge")
    config = json.loads((judge / "config.json").read_text("utf-8"))
    errors = []
    for name, shift in (("plain", 0.0), ("shifted", 50.0)):
        # The normalised scores move by 50 and the critic with them: nothing may change.
        weights = {**config, CONFIG_KEY: {"mean": shift, "std": 1.0}}
        (judge / "config.json").write_text(json.dumps(weights), "utf-8")
        train("ppo", tmp_path / name, max_steps=1, reward_model=str(judge), ppo={"score_clip": 1e6})
        errors.append(next(r for r in tiny.metrics_of(tmp_path / name) if "value_error" in r)["value_error"])
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


# -- what they leave ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.mostly_slow(["sft", "reward", "ppo"], ["pretrain", "dpo", "grpo"]))
def test_a_trained_folder_reads_the_same_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    """Full weights and a merged adapter: an ordinary folder either way, changed by training."""
    for adapter in ("full", "lora"):
        out = tmp_path / adapter
        starting = {"model": str(tiny.model()), "tokenizer": ""} if kind == "pretrain" else {}
        result = train(kind, out, max_steps=3, learning_rate=1e-2, adapter=adapter, lora={"r": 4}, **starting)
        folder = out / "model"
        assert not (folder / "adapter_config.json").exists() and not list(folder.glob("*.bin"))
        if kind == "reward":
            kind_answer, unkind = plain_scores(folder, ["Gladly. It is red.", "No idea. It is red."])
            assert kind_answer != unkind
            continue
        ids = [5, 70, 81, 200, 3, 9, 300, 11]
        with torch.no_grad():
            expected, fresh = (plain(f)[0](torch.tensor([ids])).logits[0] for f in (folder, tiny.model()))
        assert torch.allclose(danlu_logits(folder, ids), expected, atol=1e-5)
        assert (expected - fresh).abs().max() > 1e-3, "training changed nothing"
        assert result.metrics


@torch.no_grad()
def danlu_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits on the path that danlu trains and scores on."""
    root = RootModel(SeparateModels({"policy": danlu.load(folder).model}, [])).eval()
    tree = TreeBatch.of(forest([conversation(ids, [1.0] * len(ids))]))
    return root(tree, "policy", lambda out: out.linear(out.hidden_TD))


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_saved_weights_have_the_reported_loss(adapter: str, tmp_path: Path) -> None:
    """With an adapter this is G-MERGE: the loss before merging is that of the merged folder."""
    data = heldout(tmp_path, "conversations")
    result = train("sft", tmp_path / "out", max_steps=4, adapter=adapter, learning_rate=1e-2, eval_data=str(data))
    loaded = danlu.load(tmp_path / "out" / "model")
    found = perplexity.perplexity(loaded.model, perplexity.encode(str(data), loaded.tokenizer, 64))
    assert math.log(found) == pytest.approx(result.metrics["eval_loss"], abs=1e-4)


def test_saved_reward_adapter_has_the_reported_accuracy(tmp_path: Path) -> None:
    data = heldout(tmp_path, "comparisons")
    result = train("reward", tmp_path / "out", max_steps=10, adapter="lora", learning_rate=2e-2, eval_data=str(data))
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    template = ChatTemplate(AutoTokenizer.from_pretrained(tmp_path / "out" / "model"))

    def score(row: dict[str, Any], side: str) -> float:
        ids = template.encode([*row["prompt"], *row[side]]).ids
        with torch.no_grad():
            return float(model(torch.tensor([ids])).logits[0, 0])

    margins = [score(r, "chosen") - score(r, "rejected") for r in rows]
    assert sum(margins) / len(margins) == pytest.approx(result.metrics["eval_margin"], abs=1e-4)
    assert sum(m > 0 for m in margins) / len(margins) == pytest.approx(result.metrics["eval_accuracy"])


def test_lora_trains_adapters_only(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train("sft", tmp_path, max_steps=3, save_every=2, adapter="lora")
    saved = load_file(tmp_path / "checkpoints" / "step-00000002" / "weights.safetensors")
    assert saved and all("lora_" in name for name in saved)


# -- settings of training -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_early_stopping_stops_and_keeps_the_best_weights(tmp_path: Path) -> None:
    """Trained on shuffled answers, the held-out loss soon rises: what is saved must be the model of its lowest point."""
    rows = [json.loads(line) for line in tiny.data()["conversations"].read_text("utf-8").splitlines()]
    for index, row in enumerate(rows[:24]):
        row["messages"][1]["content"] = f"{index * 37 % 101} and {index * 53 % 89}"
    few = tiny.write_rows(tmp_path / "few.jsonl", rows[:16])
    other = tiny.write_rows(tmp_path / "other.jsonl", rows[16:24])
    result = train(
        "sft",
        tmp_path / "out",
        data=str(few),
        eval_data=str(other),
        max_steps=200,
        eval_every=4,
        learning_rate=1e-2,
        early_stopping={"patience": 2},
    )
    losses = [r["eval_loss"] for r in tiny.metrics_of(tmp_path / "out") if "eval_loss" in r]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 50, "it ends two evaluations after the best one"
    assert tiny.steps_of(tmp_path / "out")[-1] == 4 * len(losses)
    loaded = danlu.load(tmp_path / "out" / "model")
    found = perplexity.perplexity(loaded.model, perplexity.encode(str(other), loaded.tokenizer, 64))
    assert math.log(found) == pytest.approx(min(losses), abs=1e-4)
    # The manifest speaks of the model that was saved.
    assert result.metrics["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


def test_early_stopping_with_nothing_to_watch(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="held out") as caught:
        train("sft", tmp_path, eval_fraction=0.0, early_stopping={"patience": 2})
    assert caught.value.field == "early_stopping"


def test_early_stopping_of_a_metric_that_is_larger_when_better(tmp_path: Path) -> None:
    rule = {"monitor": "eval_accuracy", "mode": "max", "patience": 1}
    train("reward", tmp_path, max_steps=60, eval_every=5, learning_rate=1e-2, early_stopping=rule)
    found = [r["eval_accuracy"] for r in tiny.metrics_of(tmp_path) if "eval_accuracy" in r]
    assert found[-2] == max(found) and found[-1] <= found[-2] and len(found) < 12


def test_early_stopping_of_an_unknown_metric(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="eval_los") as caught:
        train("sft", tmp_path, max_steps=5, eval_every=2, early_stopping={"monitor": "eval_los"})
    assert "eval_loss" in caught.value.hint


def test_a_loss_that_is_no_number_stops_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="does not recover") as caught:
        train("sft", tmp_path, max_steps=40, learning_rate=1e30, max_grad_norm=1e30, warmup=0)
    assert "learning_rate" in caught.value.hint
    assert not (tmp_path / "model").exists()


def test_metrics_go_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("sft", tmp_path, max_steps=3, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    wanted = [r for r in tiny.metrics_of(tmp_path) if "grad_norm" in r]
    found = events.Scalars("loss")
    assert [e.step for e in found] == [1, 2, 3]
    assert [e.value for e in found] == pytest.approx([r["loss"] for r in wanted])


def test_max_records_takes_a_seeded_sample(tmp_path: Path) -> None:
    first = train("sft", tmp_path / "a", max_steps=1, max_records=7)
    assert first.facts["records"] == 7
    losses = {}
    for name, seed in (("b", 0), ("c", 1)):
        train("sft", tmp_path / name, max_steps=1, max_records=7, seed=seed)
        losses[name] = tiny.metrics_of(tmp_path / name)[0]["loss"]
    assert tiny.metrics_of(tmp_path / "a")[0]["loss"] == losses["b"] != losses["c"]


def test_old_checkpoints_are_deleted(tmp_path: Path) -> None:
    train("sft", tmp_path, max_steps=9, save_every=2, keep_checkpoints=3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step-0000000{n}" for n in (4, 6, 8)]


def test_metrics_are_logged_at_the_steps_asked_for(tmp_path: Path) -> None:
    train("sft", tmp_path, max_steps=10, log_every=4, eval_every=5)
    assert tiny.steps_of(tmp_path) == [1, 4, 8, 10]
    assert [r["step"] for r in tiny.metrics_of(tmp_path) if "eval_loss" in r] == [5, 10]


def test_no_heldout_data(tmp_path: Path) -> None:
    result = train("sft", tmp_path, max_steps=2, eval_fraction=0)
    assert "eval_loss" not in result.metrics and result.facts["heldout"] == 0


def test_the_shipped_template_can_be_chosen(tmp_path: Path) -> None:
    """The name of a template travels into the saved tokenizer, so that serving renders what training saw."""
    result = train("sft", tmp_path, max_steps=2, template="plain")
    assert all(g.passed for g in result.gates)
    assert "Human:" in result.facts["rendered_example"]


def test_dtype_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def gain(width: int) -> float:
        calls.append(width)
        return 3.0

    monkeypatch.setattr(compute, "bf16_gain", gain)
    if torch.cuda.is_available():
        pytest.skip("on a GPU nothing is measured")
    first = choose(tmp_path, "auto", 32)
    assert (first.dtype, first.device) == ("bfloat16", "cpu") and calls == [32]
    assert json.loads((tmp_path / "compute.json").read_text("utf-8"))["dtype"] == "bfloat16"
    monkeypatch.setattr(compute, "bf16_gain", lambda width: 0.1)
    assert choose(tmp_path, "auto", 32) == first, "a resumed stage computes as it began"
    assert choose(tmp_path / "other", "auto", 32).dtype == "float32"
    assert choose(tmp_path, "float32", 32).dtype == "float32", "what is asked for wins over what was measured"


def test_bfloat16_trains_too(tmp_path: Path) -> None:
    """Products in bf16, weights and optimizer in fp32: nearly the losses of fp32."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        train("sft", tmp_path / dtype, max_steps=8, dtype=dtype, learning_rate=1e-2)
        losses[dtype] = [r["loss"] for r in tiny.metrics_of(tmp_path / dtype) if "grad_norm" in r]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.05)


# -- how much is trained at a time makes no difference --------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.mostly_slow(["sft", "reward"], ["pretrain", "dpo"]))
def test_micro_batches_do_not_change_training(kind: str, tmp_path: Path) -> None:
    """One normaliser: a step cut into two or eight micro-batches has the same loss and gradient."""
    rows = []
    for micro in (64, 512):
        out = tmp_path / str(micro)
        train(kind, out, max_steps=4, micro_tokens=micro, tokens_per_step=400)
        rows.append([r for r in tiny.metrics_of(out) if "grad_norm" in r])
    for small, large in zip(*rows, strict=True):
        assert small["loss"] == pytest.approx(large["loss"], rel=1e-5)
        assert small["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-3)


# -- what cannot be trained -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINERS)
def test_no_data_no_model(kind: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        train(kind, tmp_path, data="")
    assert caught.value.field == "data"
    with pytest.raises((SettingsError, ModelError)) as caught:
        train(kind, tmp_path, model="", **({"tokenizer": ""} if kind == "pretrain" else {}))
    assert "model" in str(caught.value) and "--model" in caught.value.hint


def test_ppo_without_reward_model(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        train("ppo", tmp_path, reward_model="")
    assert caught.value.field == "reward_model"


def test_nothing_fits_max_length(tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "sft": {"max_length": 16},
        "reward": {"max_length": 16},
        "ppo": {"max_length": 10},
    }
    for kind, change in changes.items():
        with pytest.raises(DataError) as caught:
            train(kind, tmp_path / kind, **change)
        assert "max_length" in caught.value.hint


# -- metrics.jsonl --------------------------------------------------------------------------------------------------------


def tracker(folder: Path, start_step: int) -> tracking.Tracker:
    return tracking.Tracker(folder, [], name="t", start_step=start_step)


def test_a_resumed_stage_drops_lines_after_its_checkpoint(tmp_path: Path) -> None:
    first = tracker(tmp_path, 0)
    for step in range(1, 8):
        first.log(step, {"loss": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a line
    second = tracker(tmp_path, 4)
    second.log(5, {"loss": 2.0})
    second.close()
    assert [(r["step"], r["loss"]) for r in tiny.metrics_of(tmp_path)] == [(n, 1.0) for n in (1, 2, 3, 4)] + [(5, 2.0)]


def test_lines_survive_a_crash_while_a_stage_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed a second time right after the start of the second run, nothing of the first one may be lost."""
    first = tracker(tmp_path, 0)
    for step in range(1, 5):
        first.log(step, {"loss": 1.0})
    first.close()
    killed_after(monkeypatch, 2)
    with pytest.raises(KilledError):
        tracker(tmp_path, 4).log(5, {"loss": 2.0})
    monkeypatch.undo()
    third = tracker(tmp_path, 4)
    third.close()
    assert [r["step"] for r in tiny.metrics_of(tmp_path)] == [1, 2, 3, 4]


class KilledError(BaseException):
    """Stands for SIGKILL."""


def killed_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The process dies when it turns the next but `count` line into JSON."""
    dumps: Callable[..., str] = json.dumps
    left = [count]

    def limited(*args: Any, **options: Any) -> str:
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        return dumps(*args, **options)

    monkeypatch.setattr("danlu.training.tracking.json.dumps", limited)
