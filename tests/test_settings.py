"""Settings: which options there are, what they refuse, and how the command line's flags are made from them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from danlu import alignment_config, config, reward_config, train_config
from danlu.alignment_config import PpoSettings
from danlu.cli.options import given_values, options_of
from danlu.config import KINDS, SftSettings
from danlu.exceptions import SettingsError, UsageError
from danlu.health_config import HEALTH_ACTIONS, HEALTH_ADAPTS
from danlu.parsing import parse
from danlu.train_config import Settings
from danlu.training.health import CORRECTIONS
from danlu.training.rules import RULES

STAGE = "out seed"
TRAIN = (
    "model data eval_data eval_fraction skip_bad max_records dtype adapter lora adalora prefix freeze base_bits base_format "
    "neftune_alpha "
    "processes strategy template max_length "
    "max_prompt_tokens max_answer_tokens overlength max_steps epochs tokens_per_step micro_tokens optimizer natural "
    "activation_checkpointing compile_head on_oom learning_rate schedule warmup decay min_rate weight_decay max_grad_norm "
    "log_every eval_every save_every keep_checkpoints checkpoint_best early_stopping defence report_to"
)
ROLLOUT = (
    "reward_model ensemble follow_failed verifier verifier_weight rewards eval_rewards eval_reward_model max_failed sandbox health "
    "rollout ref_bits"
)
TERM = "weight name"
ENDPOINT = "api_key_env concurrency timeout retries backoff cache"
# What settings cannot do without and "given" would not do for.
NEEDED: dict[str, dict[str, Any]] = {
    "JudgeTerm": {"base_url": "http://host/v1"},
    "HttpTerm": {"url": "http://host/score"},
    "PythonTerm": {"function": "module:function"},
    "LengthTerm": {"limit": 10},
    "FormatTerm": {"pattern": "x"},
}
# A new option is a decision: it is added here too, and an old one is not dropped by accident.
FROZEN = {
    "Source": "path weight format columns source_prefix phase licence",
    "EarlyStopping": "monitor mode patience",
    "Best": "monitor mode keep restore",
    "Defence": "on spike_z window patience cooldown_steps cooldown_rate max_skipped max_rollbacks",
    "Lora": "r alpha dropout target init rate_ratio embeddings",
    "AdaLora": "initial_r target_r warmup final every beta orthogonality",
    "NaturalSteps": "trust momentum every",
    "Prefix": "tokens projection hidden",
    "Freeze": "layers head",
    "StageSettings": STAGE,
    "TrainSettings": f"{STAGE} {TRAIN}",
    "TokenizerSettings": f"{STAGE} data skip_bad vocab_size model_type template sample_mb",
    "Starter": "family hidden_size layers heads kv_heads context",
    "Blanks": "blank sentence ratio mean_span single short blocked rest_min infill",
    "PretrainSettings": f"{STAGE} {TRAIN} objective preset blanks instruction_data instruction_share tokenizer starter new_words",
    "SftSettings": f"{STAGE} {TRAIN} task",
    "TeachSettings": "out seed model facts file replay adapter rank trust fact_margin alpha dropout target learning_rate max_steps "
    "phrasings both_languages varied replay_pool replay_batch kl_weight margin earlier_batch stop lead kept "
    "min_agreement max_kl max_perplexity_ratio probes dtype",
    "Collect": "prompts count samples pairs max_new_tokens error_rate",
    "EngineSettings": "slots cache_gib speculate guesses",
    "RewardSettings": f"{STAGE} {TRAIN} loss level pairs margin label_smoothing centring score_range balance collect "
    "min_accuracy max_length_correlation",
    "DpoSettings": f"{STAGE} {TRAIN} loss pairs beta gamma label_smoothing sft_weight desirable_weight undesirable_weight "
    "reference ref_bits",
    "HealthSettings": "on actions",
    "Rollout": "batch max_new_tokens temperature engine vllm_memory",
    "PpoRollout": "batch max_new_tokens temperature engine vllm_memory per_update reuse buffer",
    "Ppo": "kl_coef kl_estimator kl_in kl_controller kl_target kl_horizon gamma gae_lambda critic_lambda whiten_rewards "
    "clip_range clip_range_high dual_clip importance_clip value_clip_range entropy_coef epochs minibatches keep_graphs update_kl "
    "score_norm score_clip missing_stop_penalty critic_learning_rate critic_warmup critic_init max_kl",
    "Ptx": "data form coef tokens",
    "RewardTerm": TERM,
    "Endpoint": f"{TERM} {ENDPOINT}",
    "JudgeTerm": f"{TERM} {ENDPOINT} kind base_url model rubric rubric_file scale_min scale_max pairwise max_tokens",
    "HttpTerm": f"{TERM} {ENDPOINT} kind url batch",
    "PythonTerm": f"{TERM} kind function options",
    "LengthTerm": f"{TERM} kind limit target",
    "RepetitionTerm": f"{TERM} kind n",
    "FormatTerm": f"{TERM} kind pattern match json_schema",
    "Sandbox": "timeout memory_mb",
    "RolloutSettings": f"{STAGE} {TRAIN} {ROLLOUT}",
    "PpoSettings": f"{STAGE} {TRAIN} {ROLLOUT} ppo ptx ema",
    "Grpo": "group_size advantage loss_average ratio clip_range clip_range_high kl_coef kl_in kl_estimator max_resample "
    "overlong importance_clip epochs minibatches missing_stop_penalty max_kl",
    "OnlineDpo": "loss beta",
    "Raft": "keep min_score unfinished train",
    "GrpoSettings": f"{STAGE} {TRAIN} {ROLLOUT} method grpo online_dpo raft",
    "EvalSettings": f"{STAGE} models data task temperature max_new_tokens limit max_length samples",
    "QuantizeSettings": f"{STAGE} model bits method calibration group_size symmetric layout max_shard_size eval_data questions "
    "max_perplexity_increase temperature max_new_tokens max_length",
}


def classes() -> dict[str, type[Settings]]:
    everything = vars(train_config) | vars(reward_config) | vars(alignment_config) | vars(config)
    found = {n: c for n, c in everything.items() if isinstance(c, type) and issubclass(c, Settings)}
    return {n: c for n, c in found.items() if c is not Settings}


def test_the_option_set_is_frozen() -> None:
    assert {n: " ".join(c.model_fields) for n, c in classes().items()} == FROZEN


@pytest.mark.parametrize("name", FROZEN)
def test_every_option_is_described_and_defaults_hold(name: str) -> None:
    cls = classes()[name]
    cls(**{n: "given" for n, f in cls.model_fields.items() if f.is_required()} | NEEDED.get(name, {}))
    undescribed = [n for n, f in cls.model_fields.items() if not f.description and not _is_group(f.annotation)]
    assert undescribed == []


def _is_group(annotation: Any) -> bool:
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return any(isinstance(k, type) and issubclass(k, BaseModel) for k in kinds)


def test_settings_do_not_change() -> None:
    settings = SftSettings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 3


def refused(kind: str, **values: Any) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        parse(KINDS[kind], values, file="r.yaml", prefix=f"{kind}.")
    assert caught.value.file == "r.yaml" and caught.value.exit_status == 1
    return caught.value


@pytest.mark.parametrize(
    ("kind", "values", "field", "near"),
    [
        ("sft", {"learnig_rate": 1e-3}, "sft.learnig_rate", "'learning_rate'"),
        ("sft", {"lora": {"rank_": 3, "alhpa": 1}}, "sft.lora.rank_", None),
        ("sft", {"lora": {"alhpa": 1}}, "sft.lora.alhpa", "'alpha'"),
        ("ppo", {"ppo": {"klcoef": 1}}, "ppo.ppo.klcoef", "'kl_coef'"),
        ("ppo", {"rollout": {"bach": 1}}, "ppo.rollout.bach", "'batch'"),
        ("reward", {"collect": {"prompts": "p", "sample": 3}}, "reward.collect.sample", "'samples'"),
        ("sft", {"early_stopping": {"patince": 3}}, "sft.early_stopping.patince", "'patience'"),
        ("tokenizer", {"vocabsize": 300}, "tokenizer.vocabsize", "'vocab_size'"),
        ("grpo", {"rewards": [{"kind": "length", "limt": 3}]}, "grpo.rewards.0.limt", "'limit'"),
        ("ppo", {"rewards": [{"kind": "http", "url": "http://h", "bach": 3}]}, "ppo.rewards.0.bach", "'batch'"),
        ("ppo", {"health": {"action": {}}}, "ppo.health.action", "'actions'"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest(kind: str, values: Any, field: str, near: str | None) -> None:
    error = refused(kind, **values)
    assert error.field == field
    assert error.hint == f"did you mean {near}?" if near else "known:" in error.hint


@pytest.mark.parametrize(
    ("kind", "values", "field", "said"),
    [
        ("sft", {"max_steps": "many"}, "sft.max_steps", "'many'"),
        ("sft", {"learning_rate": 0}, "sft.learning_rate", "greater than 0"),
        ("sft", {"learning_rate": [1]}, "sft.learning_rate", "[1]"),
        ("sft", {"dtype": "float8"}, "sft.dtype", "'float8'"),
        ("sft", {"processes": 0}, "sft.processes", "a number from 1 on, or auto"),
        ("sft", {"eval_fraction": 1.0}, "sft.eval_fraction", "less than 1"),
        ("sft", {"report_to": ["tensorbord"]}, "sft.report_to.0", "tensorbord"),
        ("sft", {"seed": -1}, "sft.seed", "-1"),
        ("sft", {"data": 3}, "sft.data", "3"),
        ("ppo", {"ppo": {"clip_range": 1.5}}, "ppo.ppo.clip_range", "less than 1"),
        ("ppo", {"ppo": {"dual_clip": 1.0}}, "ppo.ppo.dual_clip", "greater than 1"),
        ("ppo", {"ppo": {"importance_clip": 0.5}}, "ppo.ppo.importance_clip", "greater than or equal to 1"),
        ("ppo", {"ema": 1.0}, "ppo.ema", "less than 1"),
        ("quantize", {"bits": 5}, "quantize.bits", "4"),
        ("quantize", {"bits": 4, "method": "gptq"}, "quantize", "calibration"),
        ("tokenizer", {"vocab_size": 10}, "tokenizer.vocab_size", "260"),
        ("eval", {"task": "bleu"}, "eval.task", "'bleu'"),
        ("reward", {"collect": {"samples": 1}}, "reward.collect.samples", "2"),
        ("ppo", {"max_failed": 1.0}, "ppo.max_failed", "less than 1"),
        ("ppo", {"rewards": {"kind": "length"}}, "ppo.rewards", "list"),
        ("ppo", {"rewards": [{"limit": 3}]}, "ppo.rewards.0", "an object with kind: judge, http, python, length"),
        ("ppo", {"rewards": [{"kind": "judg"}]}, "ppo.rewards.0", "judge, http, python, length, repetition, format"),
        ("ppo", {"rewards": ["length"]}, "ppo.rewards.0", "an object with kind"),
        ("ppo", {"rewards": [{"kind": "http"}]}, "ppo.rewards.0.url", "required"),
        ("ppo", {"rewards": [{"kind": "http", "url": "host"}]}, "ppo.rewards.0.url", "'host'"),
        ("grpo", {"eval_rewards": [{"kind": "length"}]}, "grpo.eval_rewards.0", "limit or target"),
        ("grpo", {"rewards": [{"kind": "python", "function": "f"}]}, "grpo.rewards.0.function", "'f'"),
        ("grpo", {"rewards": [{"kind": "format", "pattern": "("}]}, "grpo.rewards.0.pattern", "regular expression"),
        ("grpo", {"rewards": [{"kind": "format"}]}, "grpo.rewards.0", "pattern, json_schema or both"),
        ("ppo", {"health": {"actions": {"P-KLHIGH": "warn"}}}, "ppo.health", "did you mean P-KL-HIGH?"),
        ("grpo", {"health": {"actions": {"P-TIMID": "adapt"}}}, "grpo.health", "no correction for P-TIMID"),
        ("ppo", {"health": {"actions": {"P-TIMID": "shout"}}}, "ppo.health.actions.P-TIMID", "'shout'"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(kind: str, values: Any, field: str, said: str) -> None:
    error = refused(kind, **values)
    assert error.field == field and said in error.message, error


def test_rules_between_options() -> None:
    error = refused("sft", max_length=512, micro_tokens=256)
    assert "micro_tokens (256)" in error.message and "max_length (512)" in error.message
    assert "needs loss: pairwise" in refused("reward", loss="kwise", margin=True).message
    assert "level: token needs loss: pairwise" in refused("reward", loss="kwise", level="token").message
    for name, value in (("label_smoothing", 0.1), ("centring", 0.1)):
        assert f"{name} needs loss: pairwise or kwise" in refused("reward", loss="unpaired", **{name: value}).message
    assert "score_range needs loss: pointwise" in refused("reward", score_range=[0, 5]).message
    assert "lowest and highest" in refused("reward", loss="pointwise", score_range=[5, 5]).message
    assert "pointwise needs scores" in refused("reward", loss="pointwise", collect={"prompts": "p"}).message
    assert "whole groups" in refused("grpo", rollout={"batch": 12}).message  # of 8
    assert "whole groups" in refused("grpo", rollout={"batch": 8}, grpo={"minibatches": 2}).message
    assert "k2 or k3" in refused("ppo", ppo={"kl_in": "loss"}).message  # the default is k1
    assert "needs adapter: full" in refused("ppo", adapter="lora", ppo={"critic_init": "reward"}).message
    assert "at most 1" in refused("ppo", ptx={"form": "convex", "coef": 27.8}).message
    assert "needs loss: sigmoid or robust" in refused("dpo", loss="ipo", label_smoothing=0.1).message
    assert "robust needs label_smoothing" in refused("dpo", loss="robust").message
    assert "has this term already" in refused("dpo", loss="orpo", sft_weight=1.0).message
    assert "no chosen answers" in refused("dpo", loss="kto", sft_weight=1.0).message
    assert "has no reference" in refused("dpo", loss="simpo", reference="online").message
    assert "ref_bits: 8 needs reference: online" in refused("dpo", ref_bits=8).message
    assert "gamma needs loss: simpo" in refused("dpo", gamma=0.5).message
    assert "desirable_weight needs loss: kto" in refused("dpo", desirable_weight=2.0).message
    assert "raft needs method: raft" in refused("grpo", raft={"min_score": 0.0}).message
    assert "online_dpo needs method: online-dpo" in refused("grpo", online_dpo={"beta": 1.0}).message
    assert "grpo.ratio has no meaning" in refused("grpo", method="raft", grpo={"ratio": "sequence"}).message
    assert "must leave some" in refused("grpo", method="raft", raft={"keep": 8}).message
    assert "multiple of heads" in refused("pretrain", starter={"hidden_size": 32, "heads": 3}).message


def test_words_that_yaml_reads_as_truth_values() -> None:
    """A recipe's `on: false` and `off`, which YAML 1.1 gives as True and False."""
    given = yaml.safe_load("health: {on: true, actions: {P-TIMID: off}}\ndefence: {on: false}")
    settings = parse(PpoSettings, given)
    assert settings.health.on and settings.health.action("P-TIMID") == "off" and not settings.defence.on
    assert parse(PpoSettings, yaml.safe_load("health: {on: false}")).health.action("P-KL-HIGH") == "off"


def test_every_health_rule_has_an_action_and_every_correction_a_rule() -> None:
    assert list(HEALTH_ACTIONS) == list(RULES) and set(HEALTH_ADAPTS) == set(CORRECTIONS)
    assert parse(PpoSettings, {}).health.action("P-KL-HIGH") == "adapt"


# -- the command line ---------------------------------------------------------------------------------------------------


def flattened(cls: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, field in cls.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        group = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        found += flattened(group, f"{prefix}{name}.") if group else [prefix + name]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_flags_are_the_settings_names(kind: str) -> None:
    flags = [o.opts[0] for o in options_of(KINDS[kind])]
    assert flags == ["--" + n.replace("_", "-") for n in flattened(KINDS[kind])]


@pytest.mark.parametrize(
    ("given", "nested"),
    [
        ({"max_steps": None, "seed": 3}, {"seed": 3}),
        ({"lora__r": 4, "lora__alpha": 8.0}, {"lora": {"r": 4, "alpha": 8.0}}),
        ({"data": ("a.jsonl",)}, {"data": "a.jsonl"}),
        ({"data": ("a.jsonl", "b.jsonl"), "eval_data": ()}, {"data": ["a.jsonl", "b.jsonl"]}),
        ({"report_to": ("tensorboard",)}, {"report_to": ["tensorboard"]}),
        ({"early_stopping__patience": 2}, {"early_stopping": {"patience": 2}}),
        # PEFT takes the word only as a text, not as a list of one.
        ({"lora__target": ("all-linear",)}, {"lora": {"target": "all-linear"}}),
        ({"lora__target": ("q_proj", "v_proj")}, {"lora": {"target": ["q_proj", "v_proj"]}}),
        ({"margin": False}, {"margin": False}),
        ({"reward_model": ("a",)}, {"reward_model": "a"}),
        ({"reward_model": ("a", "b")}, {"reward_model": ["a", "b"]}),
        ({"score_range": (0.0, 5.0)}, {"score_range": [0.0, 5.0]}),
        ({"rewards": ('{"kind": "length", "limit": 9}',)}, {"rewards": [{"kind": "length", "limit": 9}]}),
        ({"eval_rewards": ("{kind: repetition, n: 2}",)}, {"eval_rewards": [{"kind": "repetition", "n": 2}]}),
        (
            {"rewards": ("{kind: repetition}", '[{"kind": "length", "limit": 9}, {"kind": "repetition", "n": 4}]')},
            {"rewards": [{"kind": "repetition"}, {"kind": "length", "limit": 9}, {"kind": "repetition", "n": 4}]},
        ),
        (
            {"health__actions": "{P-KL-HIGH: stop, P-TIMID: off}"},
            {"health": {"actions": {"P-KL-HIGH": "stop", "P-TIMID": False}}},
        ),
    ],
)
def test_given_values(given: dict[str, Any], nested: dict[str, Any]) -> None:
    assert given_values(given) == nested


@pytest.mark.parametrize(
    ("text", "said"), [("length", "objects with a kind"), ("{kind: ", "not valid YAML"), ("[1]", "found: 1")]
)
def test_reward_terms_that_are_none(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        given_values({"rewards": (text,)})
    assert "--rewards" in caught.value.hint


def test_reward_terms_come_back_as_they_went() -> None:
    """From YAML to settings to the plain values that a run keeps, and again."""
    terms = [
        {"kind": "judge", "base_url": "https://h/v1", "model": "m", "weight": 2.5, "name": "gpt"},
        {"kind": "format", "json_schema": {"type": "object"}, "weight": -1},
        {"kind": "python", "function": "a/b.py:f", "options": {"most": 3}},
    ]
    settings = parse(KINDS["ppo"], {"rewards": terms})
    again = parse(KINDS["ppo"], settings.model_dump(mode="json"))
    assert again == settings and [t.kind for t in again.rewards] == ["judge", "format", "python"]  # type: ignore[attr-defined]
    assert again.reward_files() == ["a/b.py"]  # type: ignore[attr-defined]
