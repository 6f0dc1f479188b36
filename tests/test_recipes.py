"""Recipes: what they may say, how stages find each other, `--set`, and errors that name the file and the nearest word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from danlu.exceptions import DanluError, SettingsError, UsageError
from danlu.pipeline.recipe import Recipe, load_recipe

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
CHAIN = """
description: a chain
seed: 7
data_root: /data
stages:
  - {kind: tokenizer, data: "${data_root}/a.txt"}
  - {kind: pretrain, data: "${data_root}/a.txt"}
  - {kind: sft, data: ["${data_root}/b.jsonl", c.jsonl], seed: 9}
  - {kind: reward, data: c}
  - {kind: ppo, data: d}
  - {kind: sft, name: polish, data: e}
  - {kind: eval, data: f}
  - {kind: quantize}
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(text: str) -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(text, "utf-8")
        return path

    return written


def refused(path: Path, *overrides: str) -> DanluError:
    with pytest.raises((SettingsError, UsageError)) as caught:
        load_recipe(path, overrides)
    return caught.value


def setting(recipe: Recipe, stage: str, name: str) -> Any:
    return getattr(next(s.settings for s in recipe.stages if s.name == stage), name)


# -- what is right ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.description and "\n" not in recipe.description
    # What is saved in the run folder says the same again.
    again = [s["kind"] for s in recipe.resolved["stages"]]
    assert again == [s.kind for s in recipe.stages]


def test_there_are_recipes() -> None:
    assert "quickstart" in [p.stem for p in SHIPPED]


def test_stages_are_wired_in_order(write: Any) -> None:
    recipe = load_recipe(write(CHAIN))
    assert [s.folder for s in recipe.stages][5:] == ["06-polish", "07-eval", "08-quantize"]
    assert setting(recipe, "pretrain", "tokenizer") == "stage:tokenizer"
    assert setting(recipe, "sft", "model") == "stage:pretrain"
    assert setting(recipe, "reward", "model") == "stage:sft"
    assert (setting(recipe, "ppo", "model"), setting(recipe, "ppo", "reward_model")) == ("stage:sft", "stage:reward")
    assert setting(recipe, "polish", "model") == "stage:ppo"
    assert setting(recipe, "eval", "models") == ["stage:pretrain", "stage:sft", "stage:ppo", "stage:polish"]
    assert setting(recipe, "quantize", "model") == "stage:polish"


def test_seeds_and_variables(write: Any) -> None:
    recipe = load_recipe(write(CHAIN))
    assert (setting(recipe, "sft", "seed"), setting(recipe, "ppo", "seed")) == (9, 7)
    assert setting(recipe, "tokenizer", "data") == "/data/a.txt"
    assert setting(recipe, "sft", "data") == ["/data/b.jsonl", "c.jsonl"]


def test_the_resolved_recipe_is_a_recipe_again(write: Any, tmp_path: Path) -> None:
    """The run folder's recipe.yaml, run again, is the same recipe."""
    first = load_recipe(write(CHAIN))
    second = load_recipe(write(yaml.safe_dump(first.resolved, sort_keys=False)))
    assert [s.settings for s in second.stages] == [s.settings for s in first.stages]


LICENSED = CHAIN.replace(
    "stages:",
    """licences:
  ${data_root}: MIT
  ${data_root}/b.jsonl: CC-BY-NC-4.0
  ${data_root}/no: never
stages:""",
)


def test_licences_reach_the_sources_under_them(write: Any) -> None:
    recipe = load_recipe(
        write(LICENSED), ["ppo.data={path: /data/d, licence: GPL}", "ppo.ptx.data=/data/p", "polish.data=/data/none"]
    )
    assert setting(recipe, "pretrain", "data").licence == "MIT"
    first, second = setting(recipe, "sft", "data")  # the nearest one holds; what lies elsewhere has none
    assert (first.path, first.licence, second) == ("/data/b.jsonl", "CC-BY-NC-4.0", "c.jsonl")
    assert setting(recipe, "ppo", "data").licence == "GPL"  # its own word
    assert setting(recipe, "ppo", "ptx").data.licence == "MIT"
    assert setting(recipe, "polish", "data").licence == "MIT"  # a folder's name is no beginning of another's


def test_shipped_recipes_say_the_licences_of_their_data() -> None:
    from danlu.train_config import Source, as_list

    silent = [
        f"{path.stem} {stage.name} {source.path}"
        for path in SHIPPED
        for stage in load_recipe(
            path, ["data_root=/published"] if "data_root" in path.read_text("utf-8") else []
        ).stages
        for source in as_list(getattr(stage.settings, "data", None) or [])
        if isinstance(source, Source) and source.path.startswith("/published/") and not source.licence
    ]
    assert silent == ["wenzhong-gpt2 tokenizer /published/pretrain-zh"]  # two folders, each with its own


def test_a_model_takes_the_place_of_the_starter(write: Any) -> None:
    recipe = load_recipe(write(CHAIN), ["model=/models/base"])
    assert [s.name for s in recipe.stages][:2] == ["pretrain", "sft"]
    assert setting(recipe, "pretrain", "model") == "/models/base" and setting(recipe, "pretrain", "tokenizer") == ""
    assert setting(recipe, "sft", "model") == "stage:pretrain"
    short = "model: /models/base\nstages:\n  - {kind: sft, data: a}\n  - {kind: eval, data: b}\n"
    assert setting(load_recipe(write(short)), "sft", "model") == "/models/base"
    only = "model: /models/base\nstages:\n  - {kind: eval, data: b}\n"
    assert setting(load_recipe(write(only)), "eval", "models") == ["/models/base"]


WITH_MODEL = """
stages:
  - {kind: tokenizer, data: a}
  - {kind: pretrain, name: small, data: a, with_model: skip}
  - {kind: pretrain, data: a, with_model: skip}
  - {kind: sft, data: b, learning_rate: 1.0e-3, with_model: {learning_rate: 2.0e-5}}
  - {kind: reward, data: c, model: "stage:small", with_model: {model: "${model}"}}
  - {kind: ppo, data: d, ppo: {gamma: 0.9, kl_coef: 0.2}, with_model: {ppo: {kl_coef: 0.1}}}
"""


def test_what_a_stage_says_of_a_given_model(write: Any) -> None:
    own = load_recipe(write(WITH_MODEL))
    assert [s.name for s in own.stages] == ["tokenizer", "small", "pretrain", "sft", "reward", "ppo"]
    assert setting(own, "sft", "learning_rate") == 1e-3 and setting(own, "reward", "model") == "stage:small"
    assert setting(own, "ppo", "ppo").kl_coef == 0.2
    given = load_recipe(write(WITH_MODEL), ["pretrain.max_steps=3", "model=/models/base"])
    assert [s.folder for s in given.stages] == ["01-sft", "02-reward", "03-ppo"]
    assert setting(given, "sft", "learning_rate") == 2e-5
    assert (setting(given, "sft", "model"), setting(given, "reward", "model")) == ("/models/base", "/models/base")
    options = setting(given, "ppo", "ppo")
    assert (options.gamma, options.kl_coef) == (0.9, 0.1), "the rest of a group stays"
    # Whoever runs it has the last word, in whatever order it comes.
    changed = load_recipe(write(WITH_MODEL), ["sft.learning_rate=7e-5", "reward.model=/small", "model=/models/base"])
    assert (setting(changed, "sft", "learning_rate"), setting(changed, "reward", "model")) == (7e-5, "/small")
    again = load_recipe(write(yaml.safe_dump(changed.resolved)))
    assert [s.settings for s in again.stages] == [s.settings for s in changed.stages]
    error = refused(write(WITH_MODEL.replace("{learning_rate: 2.0e-5}", "leave")))
    assert error.field == "sft.with_model" and "expected skip" in error.message


ALIGNMENT = ("chatllama", "colossalchat", "deepspeed-chat", "hh-assistant", "gsm8k-grpo", "feedback", "dpo")


@pytest.mark.parametrize("name", ALIGNMENT)
def test_alignment_recipes_do_not_ruin_a_given_model(name: str) -> None:
    """It is not pre-trained anew, and learns at rates that are usual for models of billions."""
    path = next(p for p in SHIPPED if p.stem == name)
    stages = load_recipe(path, ["model=/models/base"]).stages
    assert "pretrain" not in [s.kind for s in stages]
    assert {s.settings.model for s in stages if s.kind in ("sft", "reward")} <= {"/models/base", "stage:sft"}  # type: ignore[attr-defined]
    if name != "feedback":
        rates = {s.kind: s.settings.learning_rate for s in stages if hasattr(s.settings, "learning_rate")}
        most = {"sft": 2e-5, "reward": 2e-5, "dpo": 5e-6, "ppo": 5e-6, "grpo": 5e-6}
        assert all(rate <= most[kind] for kind, rate in rates.items()) and rates


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.stem not in (*ALIGNMENT, "quickstart")], ids=lambda p: p.stem)
def test_other_recipes_do_not_ruin_a_given_model_either(path: Path) -> None:
    """What pre-training is left adds something to it, and all weights learn at most at 1e-4."""
    stages = load_recipe(path, ["model=/models/base"]).stages
    assert "tokenizer" not in [s.kind for s in stages]
    assert [s.name for s in stages if s.kind == "pretrain"] == {
        "belle-chinese": ["chinese"],
        "pmc-llama": ["domain"],
        "glm-pretrain": ["pretrain"],
    }.get(path.stem, [])
    assert stages[0].settings.model == "/models/base"  # type: ignore[attr-defined]
    whole = [s.settings for s in stages if getattr(s.settings, "adapter", None) == "full"]
    assert all(settings.learning_rate <= 1e-4 for settings in whole)  # type: ignore[attr-defined]


def test_ppo_without_a_reward_stage(write: Any) -> None:
    """Other rewards, a verifier that is named, or an empty reward model: then nobody asks for a reward stage."""
    terms = "rewards: [{kind: format, pattern: '^a$'}, {kind: python, function: '${data_root}/f.py:f'}]"
    for given in (terms, "verifier: number", "reward_model: ''"):
        text = CHAIN.replace("  - {kind: reward, data: c}\n", "").replace(
            "{kind: ppo, data: d}", f"{{kind: ppo, data: d, {given}}}"
        )
        recipe = load_recipe(write(text))
        assert setting(recipe, "ppo", "reward_model") == ""
        if given == terms:
            pattern, function = setting(recipe, "ppo", "rewards")
            assert pattern.pattern == "^a$" and function.function == "/data/f.py:f"
            again = load_recipe(write(yaml.safe_dump(recipe.resolved, sort_keys=False)))
            assert [s.settings for s in again.stages] == [s.settings for s in recipe.stages]
    beside = load_recipe(write(CHAIN.replace("{kind: ppo, data: d}", "{kind: ppo, data: d, verifier: number}")))
    assert setting(beside, "ppo", "reward_model") == "stage:reward"


@pytest.mark.parametrize(
    ("override", "stage", "name", "value"),
    [
        ("seed=3", "ppo", "seed", 3),
        ("data_root=/other", "tokenizer", "data", "/other/a.txt"),
        ("sft.max_steps=10", "sft", "max_steps", 10),
        ("sft.learning_rate=1e-3", "sft", "learning_rate", 1e-3),
        ("sft.data=[x, y]", "sft", "data", ["x", "y"]),
        ("polish.epochs=0.5", "polish", "epochs", 0.5),
        ("sft.max_steps=null", "sft", "max_steps", None),
        ("sft.data=a=b.jsonl", "sft", "data", "a=b.jsonl"),
        ("tokenizer.data=town:sft", "tokenizer", "data", "town:sft"),
        ("sft.template=plain", "sft", "template", "plain"),
    ],
)
def test_set(write: Any, override: str, stage: str, name: str, value: Any) -> None:
    assert setting(load_recipe(write(CHAIN), [override]), stage, name) == value


def test_set_inside_a_group_keeps_the_rest(write: Any) -> None:
    text = CHAIN.replace("{kind: ppo, data: d}", "{kind: ppo, data: d, ppo: {gamma: 0.9}}")
    options = setting(load_recipe(write(text), ["ppo.ppo.kl_coef=0.2", "ppo.rollout.batch=8"]), "ppo", "ppo")
    assert (options.gamma, options.kl_coef) == (0.9, 0.2)


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("kind: ppo", "kind: pppo", ["no stage kind 'pppo'", "did you mean 'ppo'?"]),
        ("kind: ppo", "kind: ferment", ["no stage kind 'ferment'", "kinds: tokenizer"]),
        ("name: polish", "name: sft", ["two stages are named 'sft'"]),
        ("seed: 7", "seeed: [7]", ["seeed", "did you mean 'seed'?"]),
        ("seed: 7", "seed: often", ["tokenizer.seed", "often"]),
        ("${data_root}/a.txt", "${data_rot}/a.txt", ["${data_rot}", "unknown variable", "tokenizer"]),
        ("data: d}", "data: d, learnig_rate: 3}", ["ppo.learnig_rate", "did you mean 'learning_rate'?"]),
        ("data: e}", "data: e, max_steps: 0}", ["polish.max_steps", "0"]),
        ("data: e}", "data: e, starter: 3}", ["polish.starter"]),
        ("- {kind: reward, data: c}", "- reward", ["a stage is a mapping with a 'kind'", "'reward'"]),
        ("  - {kind: reward, data: c}\n", "", ["stage 'ppo' (ppo) needs a reward stage"]),
        ('  - {kind: tokenizer, data: "${data_root}/a.txt"}\n', "", ["'pretrain'", "needs a tokenizer stage"]),
    ],
)
def test_a_faulty_recipe(write: Any, old: str, new: str, said: list[str]) -> None:
    assert old in CHAIN
    error = refused(write(CHAIN.replace(old, new, 1)))
    assert error.exit_status == 1 and str(error.file).endswith("r.yaml")
    for word in said:
        assert word in str(error)


@pytest.mark.parametrize("kind", ["sft", "reward", "ppo", "eval", "quantize"])
def test_a_stage_that_has_nothing_to_start_from(write: Any, kind: str) -> None:
    error = refused(
        write(f"stages:\n  - {{kind: {kind}, data: x}}\n" if kind != "quantize" else "stages: [{kind: quantize}]")
    )
    assert f"stage '{kind}' ({kind}) needs" in error.message and "reorder" in error.hint


@pytest.mark.parametrize("text", ["", "a: 1\n", "stages: []\n", "stages: sft\n", "- kind: sft\n", "just words\n"])
def test_files_that_are_no_recipes(write: Any, text: str) -> None:
    error = refused(write(text))
    assert "list 'stages'" in error.message and "quickstart" in error.hint


def test_broken_yaml_is_named_with_its_line(write: Any) -> None:
    error = refused(write("seed: 1\nstages:\n  - {kind: sft\n  - x: [\n"))
    assert isinstance(error, SettingsError) and error.line is not None and error.line >= 3
    assert "not valid YAML" in error.message


def test_a_recipe_in_another_encoding(write: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("description: 小镇\nstages: []\n".encode("gb18030"))
    assert "UTF-8" in str(refused(path))


def test_a_missing_recipe_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(CHAIN, "utf-8")
    error = refused(tmp_path / "quikstart.yaml")
    assert "no such recipe" in error.message and "quickstart.yaml" in error.hint


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", ["key=value"]),
        ("=3", ["key=value"]),
        ("sed=3", ["no such key", "did you mean 'seed'?"]),
        ("stf.max_steps=3", ["no stage 'stf'", "did you mean 'sft'?"]),
        ("zzz.max_steps=3", ["no stage 'zzz'", "stages: tokenizer"]),
    ],
)
def test_overrides_that_name_nothing_are_wrong_usage(write: Any, override: str, said: list[str]) -> None:
    error = refused(write(CHAIN), override)
    assert error.exit_status == 2
    for word in said:
        assert word in str(error)


def test_an_override_with_a_misspelt_field(write: Any) -> None:
    error = refused(write(CHAIN), "sft.max_step=3")
    assert error.field == "sft.max_step" and "'max_steps'" in error.hint
    error = refused(write(CHAIN), "ppo.rollout.bach=3")
    assert error.field == "ppo.rollout.bach" and "'batch'" in error.hint
    error = refused(write(CHAIN), "sft.seed.x=3")
    assert "sft.seed" in str(error)


@pytest.mark.parametrize("given", ["MIT", "[MIT]", "{/data: }", "{/data: 3}"])
def test_licences_that_are_no_table(write: Any, given: str) -> None:
    error = refused(write(CHAIN.replace("stages:", f"licences: {given}\nstages:")))
    assert "licences" in str(error) and "expected paths and their licences" in str(error)
