"""PPO's options in whole small stages: what each changes, and what it must leave alone."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_trainers import plain, toy_judge, train
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import danlu
from danlu.exceptions import RewardError, SettingsError
from danlu.models.load import save_model
from danlu.models.root import RootModel
from danlu.rewards.model import ModelReward
from danlu.rewards.protocol import Episode, Score
from danlu.text.chat_template import shipped_template
from danlu.text.tokenizer import train_tokenizer
from danlu.trainers import ppo
from danlu.training import objectives
from danlu.training.monitor import Monitor

NAMES = (
    "score score_raw reward_total kl kl_k3 entropy length stop_rate engine_gap engine_gap_max ratio_mean ratio_max ratio_error "
    "ratio_error_first clip_fraction dual_clip_fraction approx_kl loss value_loss value_error explained_variance "
    "advantage_std advantage_max grad_norm critic_grad_norm kl_coef importance_mean importance_clipped staleness passes "
    "tokens step"
)
ASKED = {"reward_model", "reward_failed", "repetition", "distinct_1", "distinct_2", "empty_rate"}
EVERYTHING: dict[str, Any] = {
    "ppo": {
        "kl_estimator": "k3",
        "kl_in": "loss",
        "kl_controller": "adaptive",
        "kl_horizon": 50,
        "kl_target": 1.0,
        "score_norm": "running",
        "whiten_rewards": True,
        "critic_lambda": 1.0,
        "clip_range_high": 0.3,
        "dual_clip": 3.0,
        "entropy_coef": 0.01,
        "update_kl": 0.5,
        "critic_warmup": 1,
        "critic_init": "policy",
        "critic_learning_rate": 1e-3,
        "keep_graphs": True,
    },
    "rollout": {"batch": 8, "max_new_tokens": 8, "reuse": 2, "buffer": "disk"},
    "ema": 0.9,
}


def everything() -> dict[str, Any]:
    """Settings with every option at work."""
    return EVERYTHING | {"ptx": {"data": str(tiny.data()["documents"]), "tokens": 60}}


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [r for r in tiny.metrics_of(out) if "score" in r]


def short(**changes: Any) -> dict[str, Any]:
    """Answers of at most eight tokens, eight at a time."""
    return {"batch": 8, "max_new_tokens": 8, **changes}


def test_what_an_iteration_logs(tmp_path: Path) -> None:
    train("ppo", tmp_path / "plain", max_steps=3)
    for row in rows_of(tmp_path / "plain"):
        assert set(row) == set(NAMES.split()) | ASKED
        assert row["importance_mean"] == pytest.approx(1.0, abs=1e-5) and row["importance_clipped"] == 0
        assert row["engine_gap"] < 1e-5 and row["staleness"] == 0 and row["passes"] == 4
        assert row["reward_total"] == pytest.approx(row["score"] - 0.05 * row["kl"], abs=1e-6)
        assert row["ratio_max"] >= row["ratio_mean"] > 0.5
    train("ppo", tmp_path / "full", max_steps=4, **everything())
    first, second, third, fourth = rows_of(tmp_path / "full")
    own = {"kl_loss", "ptx_loss", "ptx_share"}
    assert set(third) == set(NAMES.split()) | own | ASKED
    old = (set(NAMES.split()) | own | ASKED) - {"engine_gap", "engine_gap_max", "reward_model", "reward_failed"}
    assert set(second) == set(fourth) == old, "old answers alone"
    assert {"grad_norm", "ptx_loss", "ratio_error_first"}.isdisjoint(first) and first["critic_grad_norm"] > 0
    assert not (tmp_path / "full" / "buffer").exists(), "what waited in files is gone with the stage"


# -- rewards ------------------------------------------------------------------------------------------------------------


def run_with_toy_judge(out: Path, patch: pytest.MonkeyPatch, *, steps: int = 8, **options: Any) -> list[dict[str, Any]]:
    patch.setattr(ModelReward, "score", toy_judge)
    given = {"critic_learning_rate": 1e-3, "missing_stop_penalty": 0.0, "kl_coef": 0.0, **options}
    changes = {"learning_rate": 3e-2, "eval_fraction": 0.0, "micro_tokens": 1024, "rollout": short(batch=16)}
    train("ppo", out, max_steps=steps, ppo=given, **changes)
    return rows_of(out)


@pytest.mark.slow
def test_kl_in_the_loss_holds_the_policy_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = {}
    for name, options in {
        "free": {},
        "k2": {"kl_coef": 5.0, "kl_in": "loss", "kl_estimator": "k2"},
        "k3": {"kl_coef": 5.0, "kl_in": "loss", "kl_estimator": "k3"},
    }.items():
        last[name] = run_with_toy_judge(tmp_path / name, monkeypatch, **options)[-1]
    assert last["free"]["kl"] > 4
    assert last["k2"]["kl"] < 2 and last["k3"]["kl"] < 2
    assert last["k2"]["kl_loss"] > 0


@pytest.mark.slow
def test_an_entropy_bonus_keeps_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_row = run_with_toy_judge(tmp_path / "plain", monkeypatch)[-1]
    kept = run_with_toy_judge(tmp_path / "kept", monkeypatch, entropy_coef=0.5)[-1]
    assert kept["entropy"] > plain_row["entropy"] + 0.3


def test_an_adaptive_weight_follows_the_kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"kl_coef": 0.2, "kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 100}
    rows = run_with_toy_judge(tmp_path, monkeypatch, **options)
    expected = 0.2
    for row in rows:
        assert row["kl_coef"] == pytest.approx(expected, rel=1e-9)
        expected *= 1 + max(-0.2, min(0.2, (row["kl"] - 0.5) / 0.5)) * 16 / 100
    assert rows[-1]["kl_coef"] > max(0.2, rows[1]["kl_coef"]), "it fell at first and rose with the KL"


def test_normalised_scores_have_mean_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run_with_toy_judge(tmp_path, monkeypatch, score_norm="batch")
    assert all(abs(r["score"]) < 1e-6 for r in rows)
    first, last = (sum(r["score_raw"] for r in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.15, "the policy learns by them as it does by the plain ones"


# -- the critic ---------------------------------------------------------------------------------------------------------


def test_the_critic_learns_alone_at_first(tmp_path: Path) -> None:
    result = train("ppo", tmp_path, max_steps=4, ppo={"critic_learning_rate": 1e-3, "critic_warmup": 2})
    rows = rows_of(tmp_path)
    assert ["grad_norm" in r for r in rows] == [False, False, True, True]
    assert all(r["critic_grad_norm"] > 0 for r in rows)
    assert [r["kl"] for r in rows[:3]] == [0.0] * 3 and rows[3]["kl"] != 0, "the third iteration moves the policy"
    assert result.gates[0].code == "G-RATIO" and result.gates[0].passed
    with pytest.raises(SettingsError, match="none of 4 iterations"):
        train("ppo", tmp_path / "other", max_steps=4, ppo={"critic_warmup": 4})


def test_where_the_critic_begins(tmp_path: Path) -> None:
    first = {}
    for wanted in ("auto", "reward", "policy"):
        train("ppo", tmp_path / wanted, max_steps=1, ppo={"critic_init": wanted})
        first[wanted] = rows_of(tmp_path / wanted)[0]
    assert first["auto"] == first["reward"], "this reward model has the policy's shape"
    assert first["policy"]["explained_variance"] == pytest.approx(0.0, abs=1e-6), "a head of zeros says nothing"
    assert first["policy"]["score"] == first["auto"]["score"] and first["policy"]["loss"] != first["auto"]["loss"]


def test_a_reward_model_of_another_size_is_the_critic_that_is_asked_for(tmp_path: Path) -> None:
    """InstructGPT's critic was a thirtieth of its policy; auto takes the policy."""
    wide = tiny.model_folder(tmp_path / "wide", hidden_size=64)
    explained = {}
    for wanted in ("reward", "auto"):
        train("ppo", tmp_path / wanted, model=str(wide), max_steps=1, ppo={"critic_init": wanted})
        explained[wanted] = rows_of(tmp_path / wanted)[0]["explained_variance"]
    assert explained["auto"] == pytest.approx(0.0, abs=1e-6) and abs(explained["reward"]) > 1e-3


def test_a_reward_model_with_other_words_is_no_critic(tmp_path: Path) -> None:
    """Also where it has as many of them."""
    judge = tmp_path / "judge"
    shutil.copytree(tiny.reward_model(), judge)
    words = (judge / "tokenizer.json").read_text("utf-8")
    (judge / "tokenizer.json").write_text(words.replace("<|im_start|>", "<|begins|>"), "utf-8")
    (judge / "tokenizer_config.json").write_text(
        (judge / "tokenizer_config.json").read_text("utf-8").replace("<|im_start|>", "<|begins|>"), "utf-8"
    )
    with pytest.raises(SettingsError, match="another vocabulary than the policy") as caught:
        train("ppo", tmp_path / "out", reward_model=str(judge), max_steps=1, ppo={"critic_init": "reward"})
    assert caught.value.field == "ppo.critic_init"
    train("ppo", tmp_path / "auto", reward_model=str(judge), max_steps=1)
    assert rows_of(tmp_path / "auto")[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)


def foreign_judge(folder: Path) -> Path:
    """A trained reward model of another family, with words and turns of its own."""
    text = train_tokenizer(["Gladly. No idea. white black"] * 4, 300)
    text.chat_template = shipped_template("belle")
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 160, "vocab_size": len(text), "attn_pdrop": 0.0}
    base = save_model(GPT2LMHeadModel(GPT2Config(**shape, **ids)), text, folder / "base")
    changes = {"model": str(base), "max_length": 160, "max_steps": 6, "learning_rate": 1e-2, "micro_tokens": 512}
    gate = {"min_accuracy": 0.0, "max_length_correlation": 1.0}  # what it has learnt is not asked here
    train("reward", folder / "judge", **changes, **gate)
    return folder / "judge" / "model"


def by_hand(model: Any, text: Any, prompt: Sequence[Any], answer: str, finished: bool) -> float:
    """The score of a text by transformers alone, normalised as config.json says."""
    rendered = text.apply_chat_template([*prompt, *tiny.assistant(answer)], tokenize=False).rstrip("\n")
    ids = text(rendered, add_special_tokens=False)["input_ids"]
    assert ids[-1] == text.eos_token_id
    with torch.no_grad():
        raw = float(model(torch.tensor([ids if finished else ids[:-1]])).logits[0, 0])
    return (raw - model.config.danlu_reward["mean"]) / model.config.danlu_reward["std"]


def test_a_judge_of_another_family_reads_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several iterations, in whole batches, while the policy changes: its scores are those of the decoded text."""
    judge, real = foreign_judge(tmp_path), ppo._scores
    model, text = AutoModelForSequenceClassification.from_pretrained(judge).eval(), AutoTokenizer.from_pretrained(judge)
    policy = AutoTokenizer.from_pretrained(tiny.model())
    iterations: list[list[float]] = []

    def compared(players: Any, asked: Any, found: Any, settings: Any) -> list[float | None]:
        scores = real(players, asked, found, settings)
        answers = [policy.decode(t.actions, skip_special_tokens=True) for t in found]
        expected = [
            by_hand(model, text, a.messages, answer, t.finished)
            for a, answer, t in zip(asked, answers, found, strict=True)
        ]
        assert scores == pytest.approx(expected, abs=1e-4)
        iterations.append(expected)
        return scores

    monkeypatch.setattr(ppo, "_scores", compared)
    changes = {"max_steps": 4, "learning_rate": 1e-2, "eval_fraction": 0.0, "rollout": short()}
    train("ppo", tmp_path / "out", reward_model=str(judge), **changes)
    raw = [r["score_raw"] for r in rows_of(tmp_path / "out")]
    assert raw == pytest.approx([fmean(scores) for scores in iterations], abs=1e-4) and len(raw) == 4
    assert pstdev([v for scores in iterations for v in scores]) > 0.1, "or all texts are the same to it"


# -- updates ------------------------------------------------------------------------------------------------------------


def test_an_iteration_ends_when_the_policy_has_moved_enough(tmp_path: Path) -> None:
    options = {"critic_learning_rate": 1e-3, "update_kl": 1e-7, "epochs": 3}
    train("ppo", tmp_path, max_steps=3, learning_rate=1e-2, ppo=options)
    for row in rows_of(tmp_path):
        assert row["passes"] == 1, "the first pass has a KL of 0, the second has not, and is not made"
        assert row["approx_kl"] < 1e-9


def test_ptx_teaches_what_it_is_given(tmp_path: Path) -> None:
    ptx = {"data": str(tiny.data()["documents"]), "coef": 1.0, "tokens": 400}
    train("ppo", tmp_path, max_steps=12, learning_rate=1e-2, ptx=ptx)
    rows = rows_of(tmp_path)
    assert rows[-1]["ptx_loss"] < rows[0]["ptx_loss"] - 1
    assert all(0 < r["ptx_share"] < 1 for r in rows)


def test_an_update_that_is_refused_is_not_among_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_loss = objectives.clipped_policy
    calls = []

    def spoilt(*args: Any, **options: Any) -> Any:
        calls.append(0)
        loss, metrics = plain_loss(*args, **options)
        return (loss * float("nan"), metrics) if 8 < len(calls) <= 12 else (loss, metrics)

    monkeypatch.setattr(objectives, "clipped_policy", spoilt)
    train("ppo", tmp_path, max_steps=5, ema=0.5, micro_tokens=512)
    rows = rows_of(tmp_path)
    assert [r.get("skipped", 0) for r in rows] == [0, 0, 1, 0, 0]
    assert {"loss", "grad_norm", "approx_kl", "clip_fraction"}.isdisjoint(rows[2])
    assert rows[2]["critic_grad_norm"] > 0 and rows[2]["score"] and rows[2]["passes"] == 4
    assert rows[3]["passes"] == 4 and "loss" in rows[3]


# -- what is drawn, kept and used again -----------------------------------------------------------------------------------


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[list[int]]]]:
    """(number, prompts) of every roll-out that training draws."""
    found: list[tuple[int, list[list[int]]]] = []
    plain_rollout = ppo.share_rollout

    def listen(engine: Any, prompts: Sequence[Sequence[int]], params: Any, *, seed: int, step: int) -> Any:
        found.append((step, [list(p) for p in prompts]))
        return plain_rollout(engine, prompts, params, seed=seed, step=step)

    monkeypatch.setattr(ppo, "share_rollout", listen)
    return found


@pytest.mark.parametrize("options", [{"reuse": 2}, {"per_update": 2}], ids=str)
def test_answers_that_are_used_later(options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listened = drawn(monkeypatch)
    train("ppo", tmp_path, max_steps=4, learning_rate=1e-2, rollout=short(**options))
    rows = rows_of(tmp_path)
    assert [r["staleness"] for r in rows] == [0, 1, 0, 1]
    assert ["engine_gap" in r for r in rows] == [True, False, True, False]
    for row in rows[1::2]:
        assert abs(row["importance_mean"] - 1) > 1e-4, "the policy has moved since it answered"
        assert row["ratio_error_first"] == 0, "the ratio is that to the policy before the update"
    count = 2 if options == {"reuse": 2} else 4
    assert len(listened) == count and len({n for n, _ in listened}) == count
    asked = [p for _, prompts in listened for p in prompts]
    assert len({tuple(p) for p in asked}) == 8 * count, "no prompt twice before all had their turn"


LORA = {"adapter": "lora", "activation_checkpointing": True}
IN_PARTS = {"ppo": {"critic_warmup": 1, "minibatches": 1, "update_kl": 1e-9}, "micro_tokens": 64}


@pytest.mark.parametrize(
    "options, saved",
    [
        pytest.param({}, range(3, 4), id="full"),  # one micro-batch, in the second to the fourth iteration
        pytest.param(LORA, range(3, 4), id="lora", marks=pytest.mark.slow),
        pytest.param(IN_PARTS, range(4, 50), id="parts", marks=pytest.mark.slow),
    ],
)
def test_updates_through_the_readings_change_nothing(
    options: dict[str, Any], saved: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, forward = Counter[str](), RootModel.forward

    def counted(self: RootModel, tree: Any, role: Any, *args: Any, **told: Any) -> Any:
        passes[role] += 1
        return forward(self, tree, role, *args, **told)

    monkeypatch.setattr(RootModel, "forward", counted)
    found: dict[bool, Counter[str]] = {}
    for keep in (False, True):
        passes.clear()
        own = {"epochs": 2, "minibatches": 2, "keep_graphs": keep} | options.get("ppo", {})
        rates = {"max_steps": 4, "learning_rate": 1e-2, "rollout": short()}
        train("ppo", tmp_path / str(keep), **rates | options | {"ppo": own})
        found[keep] = passes.copy()
    kept, plain = tmp_path / "True", tmp_path / "False"
    assert rows_of(kept) == rows_of(plain)
    name = "adapter/adapter_model.safetensors" if "adapter" in options else "model/model.safetensors"
    expected = load_file(plain / name)
    assert all(torch.equal(w, expected[n]) for n, w in load_file(kept / name).items())
    fewer = found[False] - found[True]
    assert fewer["policy"] == fewer["critic"] in saved and set(fewer) == {"policy", "critic"}


def test_one_epoch_of_prompts_that_are_used_twice(tmp_path: Path) -> None:
    result = train("ppo", tmp_path, epochs=0.2, rollout=short(reuse=2))
    assert len(rows_of(tmp_path)) == round(0.2 * result.facts["prompts"] * 2 / 8) > 2


def test_answers_without_a_score_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_scores = ppo._scores

    def failing(*args: Any) -> list[float | None]:
        found = plain_scores(*args)
        return [None if i % 3 == 0 else v for i, v in enumerate(found)]

    monkeypatch.setattr(ppo, "_scores", failing)
    listened = drawn(monkeypatch)
    train("ppo", tmp_path, max_steps=3, learning_rate=1e-2, eval_fraction=0.0, rollout=short())
    rows = rows_of(tmp_path)
    # Five of eight are scored. 5 + 5 for the first iteration leave 2; 2 + 5 + 5 leave 4; 4 + 5 leave 1.
    assert len(listened) == 5
    assert [r["staleness"] for r in rows] == [0.0, 2 / 8, 4 / 8]
    assert len({(n, str(p)) for n, p in listened}) == 5, "further draws are of other prompts"


def test_a_judge_that_scores_nothing_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(players: Any, prompts: Sequence[Any], *_: Any) -> list[float | None]:
        return [None] * len(prompts)

    monkeypatch.setattr(ppo, "_scores", failing)
    with pytest.raises(RewardError, match="only 0 of 72 answers could be scored at iteration 1"):
        train("ppo", tmp_path, max_steps=2, eval_fraction=0.0)


def test_where_answers_wait_changes_nothing(tmp_path: Path) -> None:
    for kind in ("memory", "disk"):
        train("ppo", tmp_path / kind, max_steps=3, rollout=short(reuse=2, per_update=2, buffer=kind))
    assert tiny.weights(tmp_path / "memory" / "model") == tiny.weights(tmp_path / "disk" / "model")


def test_importance_weights_hardly_change_what_is_on_policy(tmp_path: Path) -> None:
    found = {}
    for clip in (2.0, None):
        train("ppo", tmp_path / str(clip), max_steps=3, ppo={"critic_learning_rate": 1e-3, "importance_clip": clip})
        found[clip] = rows_of(tmp_path / str(clip))
    for weighted, other in zip(found[2.0], found[None], strict=True):
        assert {k: weighted[k] for k in other} == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_an_engine_with_old_weights_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forgotten(engine: Any, root: Any, version: int) -> None:
        engine.version = version

    monkeypatch.setattr(ppo, "push_weights", forgotten)
    train("ppo", tmp_path, max_steps=4, learning_rate=1e-2, eval_fraction=0.0)
    rows = rows_of(tmp_path)
    assert ["engine_gap_high" in r for r in rows] == [False, True, True, True]
    assert capsys.readouterr().err.count("P-ENGINE-GAP at step") == 1


# -- the average of the weights -------------------------------------------------------------------------------------------


def test_the_average_is_that_of_the_weights_after_every_update(tmp_path: Path) -> None:
    options = {"critic_learning_rate": 1e-3, "epochs": 1, "minibatches": 1}
    train("ppo", tmp_path, max_steps=5, learning_rate=1e-2, ppo=options, ema=0.8, save_every=1, keep_checkpoints=9)
    expected = {n: w.double() for n, w in load_file(tiny.model() / "model.safetensors").items()}
    final = load_file(tmp_path / "model" / "model.safetensors")
    for step in range(1, 6):
        saved = tmp_path / "checkpoints" / f"step-{step:08d}" / "weights.safetensors"
        named = {} if step == 5 else load_file(saved)
        weights = {n.removeprefix("trunks.models.policy."): w for n, w in named.items()} or final
        expected = {n: 0.8 * w + 0.2 * weights[n].double() for n, w in expected.items()}
    found = load_file(tmp_path / "ema" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name].double(), weight, atol=1e-6)
        assert not torch.equal(found[name], final[name])
    answer, _ = danlu.load(tmp_path / "ema").chat("5: which colour has the lamp?")
    assert isinstance(answer, str)


@pytest.mark.parametrize("adapter", tiny.mostly_slow(["lora"], ["full"]))
def test_the_average_is_a_model_folder(adapter: str, tmp_path: Path) -> None:
    """A decay of nearly 0 keeps the last weights, one of nearly 1 the first."""
    ids = torch.tensor([[5, 70, 81, 200, 3, 9, 300, 11]])
    for decay, same in ((1e-9, "model"), (1 - 1e-9, "first")):
        out = tmp_path / str(decay)
        train("ppo", out, max_steps=2, learning_rate=1e-2, adapter=adapter, lora={"r": 4}, ema=decay)
        folders = {"ema": out / "ema", "model": out / "model", "first": tiny.model()}
        with torch.no_grad():
            logits = {name: plain(folder)[0](ids).logits for name, folder in folders.items()}
        other = "first" if same == "model" else "model"
        assert torch.allclose(logits["ema"], logits[same], atol=1e-5)
        assert (logits["ema"] - logits[other]).abs().max() > 1e-3
        shutil.rmtree(out)


def test_the_average_waits_while_updates_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_check = Monitor.check

    def refuse(self: Monitor, name: str, loss: float, norm: float) -> bool:
        return plain_check(self, name, loss if name == "critic" else float("nan"), norm)

    monkeypatch.setattr(Monitor, "check", refuse)
    train("ppo", tmp_path, max_steps=2, learning_rate=1e-2, ema=0.5)
    assert tiny.weights(tmp_path / "ema") == tiny.weights(tmp_path / "model")


def test_a_judge_hears_every_answer_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Episode] = []

    def listen(self: ModelReward, episodes: Sequence[Episode], **_: Any) -> list[Score]:
        heard.extend(episodes)
        return toy_judge(self, episodes)

    monkeypatch.setattr(ModelReward, "score", listen)
    train("ppo", tmp_path, max_steps=4, eval_fraction=0.0, rollout=short(reuse=4))
    assert len(heard) == 8, "answers are kept with their scores"


def test_memory_that_runs_out_in_an_iteration_costs_no_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drawn and counted before it ran out is drawn and counted again, and not twice."""
    options = {"rollout": short(reuse=2), "ppo": {"score_norm": "running", "critic_learning_rate": 1e-3}, "ema": 0.5}
    train("ppo", tmp_path / "whole", max_steps=5, **options)
    plain_experience, calls = ppo.experience_of, []

    def scarce(*args: Any, **given: Any) -> Any:
        calls.append(0)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain_experience(*args, **given)

    monkeypatch.setattr(ppo, "experience_of", scarce)
    train("ppo", tmp_path / "out", max_steps=5, on_oom="halve", save_every=100, **options)
    assert len(calls) == 6 and (tmp_path / "out" / "micro_tokens.json").is_file()
    rows, whole = rows_of(tmp_path / "out"), rows_of(tmp_path / "whole")
    names = ("step", "score", "score_raw", "kl", "staleness", "length", "value_loss", "importance_mean")
    assert [[r[n] for n in names] for r in rows] == [pytest.approx([r[n] for n in names], abs=1e-5) for r in whole]
