"""Several reward models as one judge, in a recipe and in training; and reward models of which G-RM said no."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import tiny as small
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.alignment_config import PpoSettings
from danlu.cli.main import run
from danlu.config import KINDS
from danlu.exceptions import GateError, RewardError, SettingsError
from danlu.models.load import save_model
from danlu.parsing import parse
from danlu.pipeline.recipe import load_recipe
from danlu.pipeline.run import execute, placed, run_stage, stage_key
from danlu.pipeline.stages import STAGES
from danlu.rewards.combine import Combined, Term
from danlu.rewards.model import (
    CONFIG_KEY,
    EnsembleReward,
    ModelReward,
    judge_of,
    normaliser_of,
    store_verdict,
    stored_verdict,
)
from danlu.rewards.protocol import Episode, Score
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import train_tokenizer
from danlu.trainers import grpo, online_dpo, ppo, raft
from danlu.trainers.judges import opinions

Tiny = Callable[..., Any]
EPISODES = [Episode((5, 6), (7, n), True) for n in range(3)]


class Fixed(ModelReward):
    """A member with scores that are known."""

    def __init__(self, *scores: float | None) -> None:
        self.scores = [Score(s) if s is not None else Score(None, "score is nan", "R-NAN") for s in scores]

    def score(self, episodes: Sequence[Episode], **_: Any) -> list[Score]:
        return self.scores[: len(episodes)]


# -- arithmetic -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    # Scores 1 and 3: mean 2, deviation 1. 4 and 4: 4 and 0. -3 and 3: 0 and 3.
    [("mean", [2.0, 4.0, 0.0]), ("min", [1.0, 4.0, -3.0]), ("mean-std", [1.0, 4.0, -3.0])],
)
def test_scores_by_hand(how: Any, expected: list[float]) -> None:
    judge = EnsembleReward([Fixed(1, 4, -3), Fixed(3, 4, 3)], how)
    assert [s.value for s in judge.score(EPISODES)] == expected
    # Deviations 1, 0 and 3: 4 / 3.
    combined = Combined([Term("model", 1.0, judge)])
    combined.settle(EPISODES, combined.score(EPISODES), step=0, keep=None)
    assert combined.metrics["disagreement"] == pytest.approx(4 / 3)


def test_three_members_by_hand() -> None:
    # 0, 3, 6: mean 3, variance (9 + 0 + 9) / 3 = 6
    judge = EnsembleReward([Fixed(0), Fixed(3), Fixed(6)], "mean-std")
    found = judge.score(EPISODES[:1])[0]
    assert found.value == pytest.approx(3 - 6**0.5) and found.spread == pytest.approx(6**0.5)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=4))
def test_caution_lowers_a_score(members: list[list[float]]) -> None:
    found = {}
    for how in ("mean", "min", "mean-std"):
        judge = EnsembleReward([Fixed(*scores) for scores in members], how)  # type: ignore[arg-type]
        found[how] = [s.value for s in judge.score(EPISODES)]
    for own, mean, lowest, careful in zip(zip(*members, strict=True), *found.values(), strict=True):
        assert mean == pytest.approx(fmean(own)) and lowest == min(own)
        assert careful == pytest.approx(fmean(own) - pstdev(own), abs=1e-9)


def test_an_answer_that_a_member_cannot_score_has_its_error() -> None:
    judge = EnsembleReward([Fixed(1, 2), Fixed(3, None)], "mean")
    found = judge.score(EPISODES[:2])
    assert found[0] == Score(2.0, spread=1.0) and found[1] == Score(None, "member 2 of 2: score is nan", "R-NAN")


# -- members --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(small.tokenizer())


def test_each_member_has_its_own_normaliser_and_tokenizer(tiny: Tiny, template: ChatTemplate) -> None:
    """The second one knows other tokens: it reads text. Each alone says what it says in the ensemble."""
    other = ChatTemplate(train_tokenizer(["The hat is white", "你好"], 300))
    models, rows = [], []
    for seed, seam, normaliser in ((0, template, (1.0, 2.0)), (1, other, (-3.0, 0.5))):
        model = tiny("llama", seed=seed, scalar=True, vocab_size=len(seam.tokenizer))
        setattr(model.config, CONFIG_KEY, dict(zip(("mean", "std"), normaliser, strict=True)))
        models.append(model)
        rows.append(copy.deepcopy(model))
    prompt, answer = small.user("Which colour?"), small.assistant("white")
    ids, rest = template.encode_answer(prompt, answer)  # type: ignore[arg-type]
    episode = Episode(tuple(ids), tuple(rest), True, tuple(prompt), "white")  # type: ignore[arg-type]
    options: Any = {"micro_tokens": 64, "device": "cpu"}
    alone = [
        judge_of(m, seam, template, **options).score([episode])[0].value
        for m, seam in zip(models, (template, other), strict=True)
    ]
    judge = judge_of(models, [template, other], template, **options, ensemble="min")
    assert isinstance(judge, EnsembleReward)
    assert [m.template is None for m in judge.members] == [True, False]
    assert judge.score([episode])[0].value == pytest.approx(min(a for a in alone if a is not None))
    with torch.no_grad():
        again, row = other.encode_answer(prompt, answer)  # type: ignore[arg-type]
        raw = float(rows[1](torch.tensor([again + row])).logits[0, 0])
    assert alone[1] == pytest.approx((raw + 3.0) / 0.5, abs=1e-4)


def test_one_model_alone_is_no_ensemble(tiny: Tiny, template: ChatTemplate) -> None:
    model = tiny("llama", scalar=True, vocab_size=len(template.tokenizer))
    for one, seam in ((model, template), ([model], [template])):
        assert isinstance(judge_of(one, seam, template, micro_tokens=64, device="cpu"), ModelReward)


# -- training -------------------------------------------------------------------------------------------------------------


def judges(folder: Path, count: int) -> list[str]:
    """Reward models whose heads differ."""
    import transformers

    found = []
    for number in range(count):
        torch.manual_seed(number)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(small.model(), num_labels=1)
        torch.nn.init.normal_(model.score.weight, std=0.5)
        model.config.pad_token_id = small.tokenizer().pad_token_id
        found.append(str(save_model(model, small.tokenizer(), folder / f"judge-{number}" / "model")))
    return found


@pytest.mark.parametrize("kind", small.mostly_slow(["grpo"], ["ppo"]))
def test_training_follows_an_ensemble(kind: str, tmp_path: Path) -> None:
    named = judges(tmp_path, 2)
    rows, begun = {}, {}
    unclipped = {"ppo": {"ppo": {"score_clip": 1e6}}, "grpo": {}}[kind]
    for how in ("mean", "min"):
        out = tmp_path / how
        values = small.stage(kind, out, reward_model=named, ensemble=how, max_steps=1, **unclipped)
        begun[how] = STAGES[kind].run(parse(KINDS[kind], values)).facts["start"]
        rows[how] = next(r for r in small.metrics_of(out) if "score" in r)
    assert rows["mean"]["disagreement"] == pytest.approx(rows["min"]["disagreement"], rel=1e-5)
    assert rows["mean"]["disagreement"] > 0.01
    # The same answers of the same policy, and of two scores the lower one is the mean less the deviation.
    gap = rows["mean"]["score"] - rows["min"]["score"]
    assert gap == pytest.approx(rows["mean"]["disagreement"], rel=1e-4)
    # So it is on held-out answers of the start model; after training they are logged beside their score.
    gap = begun["mean"]["eval_score"] - begun["min"]["eval_score"]
    assert gap == pytest.approx(begun["mean"]["eval_disagreement"], rel=1e-4) and gap > 0.01
    (held,) = (r for r in small.metrics_of(tmp_path / "min") if "eval_score" in r)
    assert held["step"] == 1 and held["eval_disagreement"] > 0.01
    assert held["eval_disagreement"] != rows["min"]["disagreement"]
    twice = tmp_path / "twice"
    found = STAGES[kind].run(parse(KINDS[kind], small.stage(kind, twice, reward_model=[named[0]] * 2, max_steps=1)))
    assert found.facts["start"]["eval_disagreement"] == pytest.approx(0.0, abs=1e-6)
    row = next(r for r in small.metrics_of(twice) if "score" in r)
    assert row["disagreement"] == pytest.approx(0.0, abs=1e-6)


# -- recipes --------------------------------------------------------------------------------------------------------------

RECIPE = """
model: /models/base
stages:
  - {kind: reward, name: one, data: a}
  - {kind: reward, name: two, data: a, seed: 1}
  - {kind: ppo, data: b, reward_model: ["stage:one", "stage:two", /models/third], ensemble: min}
  - {kind: grpo, data: b, model: /models/base}
"""


def recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, "utf-8")
    return path


def test_stages_in_a_list_are_placed(tmp_path: Path) -> None:
    loaded = load_recipe(recipe(tmp_path))
    ppo, grpo = loaded.stages[2:]
    settings = placed(ppo, loaded, tmp_path / "run")
    assert isinstance(settings, PpoSettings) and settings.ensemble == "min"
    run_folder = tmp_path / "run"
    assert settings.reward_model == [
        str(run_folder / "01-one" / "model"),
        str(run_folder / "02-two" / "model"),
        "/models/third",
    ]
    assert grpo.settings.reward_model == "stage:two"  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_gold_may_be_a_reward_model(kind: str, tmp_path: Path) -> None:
    """It is measured, judges the wins, and changes nothing that is learnt."""
    mean, std = 0.25, 2.0
    gold = tmp_path / "gold"
    shutil.copytree(small.reward_model(), gold)
    config = json.loads((gold / "config.json").read_text("utf-8"))
    (gold / "config.json").write_text(json.dumps({**config, "danlu_reward": {"mean": mean, "std": std}}), "utf-8")
    rows = {}
    for name, extra in (("gold", {"eval_reward_model": str(gold)}), ("plain", {})):
        values = small.stage(kind, tmp_path / name, max_steps=2, eval_every=1, **extra)
        values[kind] = {**values[kind], "missing_stop_penalty": 0.0, **({"score_clip": 100.0} if kind == "ppo" else {})}
        STAGES[kind].run(parse(KINDS[kind], values))
        rows[name] = small.metrics_of(tmp_path / name)
    held = [r for r in rows["gold"] if "eval_gold" in r]
    assert held and all(r["eval_gold"] == pytest.approx((r["eval_score"] - mean) / std, abs=1e-5) for r in held)
    assert not any("eval_gold" in r for r in rows["plain"])
    scores = {name: [r["score"] for r in found if "score" in r] for name, found in rows.items()}
    assert scores["gold"] == scores["plain"]


def test_gold_that_is_no_reward_model_is_named(tmp_path: Path) -> None:
    values = small.stage("grpo", tmp_path, max_steps=1, eval_reward_model=str(small.model()))
    with pytest.raises(RewardError, match="R-HEAD") as caught:
        STAGES["grpo"].run(parse(KINDS["grpo"], values))
    assert caught.value.field == "eval_reward_model"


def test_a_stage_in_a_list_that_does_not_come_before(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="stage 'ppo' names 'tow', which is no stage before it") as caught:
        load_recipe(recipe(tmp_path, RECIPE.replace("stage:two", "stage:tow")))
    assert "'two'" in caught.value.hint
    with pytest.raises(SettingsError, match="names 'grpo'"):
        load_recipe(recipe(tmp_path, RECIPE.replace("stage:two", "stage:grpo")))


# -- what G-RM said ---------------------------------------------------------------------------------------------------------


def judge_with(folder: Path, passed: bool | None) -> str:
    """A reward model with a verdict; None: without one, as others make them."""
    model = shutil.copytree(small.reward_model(), folder / "judge" / "model")
    if passed is not None:
        sentence = "the reward model is right on 51.0% of held-out pairs"
        store_verdict(model, {"code": "G-RM", "passed": passed, "value": 0.51, "threshold": 0.6, "sentence": sentence})
    return str(model)


def test_a_verdict_stays_beside_the_normaliser(tmp_path: Path) -> None:
    from danlu.models.load import load_model

    folder = Path(judge_with(tmp_path, None))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert stored_verdict(folder) is None and stored_verdict(tmp_path) is None
    (folder / "config.json").write_text(json.dumps(config | {CONFIG_KEY: {"mean": 0.5, "std": 2.0}}), "utf-8")
    store_verdict(folder, {"passed": True, "sentence": "good"})
    assert stored_verdict(folder) == {"passed": True, "sentence": "good"}
    # Everything else in the file is as it was.
    after = json.loads((folder / "config.json").read_text("utf-8"))
    assert {k: v for k, v in after.items() if k != CONFIG_KEY} == config
    assert normaliser_of(load_model(folder, scalar=True)) == (0.5, 2.0)


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_reward_model_that_failed_is_refused(kind: str, tmp_path: Path) -> None:
    bad, good = judge_with(tmp_path / "bad", False), judge_with(tmp_path / "good", True)
    settings = parse(KINDS[kind], small.stage(kind, tmp_path / "out", reward_model=[good, bad], max_steps=1))
    with pytest.raises(GateError, match=r"did not pass G-RM: the reward model is right on 51\.0%") as caught:
        run_stage(kind, kind, settings)
    assert bad in caught.value.message and "--force" in caught.value.hint
    assert not (tmp_path / "out" / "manifest.json").exists()


TRAINERS = {
    "ppo": ("ppo", ppo.train, {}),
    "grpo": ("grpo", grpo.train, {}),
    "online-dpo": ("grpo", online_dpo.train, {"method": "online-dpo"}),
    "raft": ("grpo", raft.train, {"method": "raft"}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_refuses_it_without_a_stage(name: str, tmp_path: Path) -> None:
    kind, train, changes = TRAINERS[name]
    bad = judge_with(tmp_path, False)
    values = small.stage(kind, tmp_path / "out", reward_model=bad, max_steps=1, **changes)
    with pytest.raises(GateError, match=r"did not pass G-RM: the reward model is right on 51\.0%") as caught:
        train(parse(KINDS[kind], values))
    assert "follow_failed" in caught.value.hint
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    result = train(parse(KINDS[kind], values | {"follow_failed": True}))
    assert result.facts["reward_models"] == [{"model": bad, "gate": stored_verdict(Path(bad))}]


def test_whether_it_is_followed_changes_no_result(tmp_path: Path) -> None:
    bad = judge_with(tmp_path, False)
    forced = parse(KINDS["ppo"], small.stage("ppo", tmp_path, reward_model=bad, follow_failed=True))
    plain = forced.model_copy(update={"follow_failed": False})
    assert stage_key("ppo", forced, []) == stage_key("ppo", plain, [])


def test_force_follows_it_and_says_so(tmp_path: Path) -> None:
    bad = judge_with(tmp_path, False)
    settings = parse(KINDS["ppo"], small.stage("ppo", tmp_path / "out", reward_model=bad, max_steps=1))
    said: list[str] = []
    manifest = run_stage("ppo", "ppo", settings, force=True, say=said.append)
    assert any("did not pass G-RM" in line for line in said)
    assert manifest["facts"]["reward_models"] == [{"model": bad, "gate": stored_verdict(Path(bad))}]
    run_stage("ppo", "ppo", settings)  # it is done, and is not asked for again


@pytest.mark.parametrize(("passed", "note"), [(None, "brings no verdict of G-RM"), (True, "")])
def test_others_are_followed(passed: bool | None, note: str, tmp_path: Path) -> None:
    model = judge_with(tmp_path, passed)
    settings = parse(KINDS["ppo"], small.stage("ppo", tmp_path / "out", reward_model=["", model]))
    (opinion,) = opinions(settings)
    assert opinion.model == model and (note in opinion.note if note else opinion.note == "")
    # A stage without a reward model has nobody to ask about.
    verified = parse(KINDS["grpo"], small.stage("grpo", tmp_path / "out", reward_model=""))
    assert opinions(verified) == []
    assert opinions(parse(KINDS["sft"], small.stage("sft", tmp_path / "out"))) == []


def test_a_note_reaches_people(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = small.stage("ppo", tmp_path / "out", reward_model=judge_with(tmp_path, None), max_steps=1)
    assert run(small.arguments("ppo", values)) == 0
    assert "brings no verdict of G-RM" in " ".join(capfd.readouterr().err.split())


def test_force_reaches_the_stage_through_a_recipe(tmp_path: Path) -> None:
    bad = judge_with(tmp_path, False)
    stage = {k: v for k, v in small.stage("ppo", tmp_path, reward_model=bad, max_steps=1).items() if k != "out"}
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"model": str(small.model()), "stages": [{"kind": "ppo", **stage}]}), "utf-8")
    with pytest.raises(GateError, match="did not pass G-RM"):
        execute(load_recipe(path), tmp_path / "run")
    execute(load_recipe(path), tmp_path / "run", force=True)
    assert (tmp_path / "run" / "01-ppo" / "model" / "config.json").is_file()
