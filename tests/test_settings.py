"""Settings: which options there are, what they refuse, and how the command line's flags are made from them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from danlu import alignment_config, config, train_config
from danlu.cli.options import given_values, options_of
from danlu.config import KINDS, SftSettings
from danlu.exceptions import SettingsError
from danlu.parsing import parse
from danlu.train_config import Settings

STAGE = "out seed"
TRAIN = (
    "model data eval_data eval_fraction skip_bad max_records dtype adapter lora processes strategy template max_length "
    "max_prompt_tokens max_answer_tokens overlength max_steps epochs tokens_per_step micro_tokens optimizer "
    "activation_checkpointing on_oom learning_rate schedule warmup decay min_rate weight_decay max_grad_norm log_every eval_every "
    "save_every keep_checkpoints checkpoint_best early_stopping defence report_to"
)
# A new option is a decision: it is added here too, and an old one is not dropped by accident.
FROZEN = {
    "Source": "path weight format columns source_prefix phase licence",
    "EarlyStopping": "monitor mode patience",
    "Best": "monitor mode keep restore",
    "Defence": "on spike_z window patience cooldown_steps cooldown_rate max_skipped max_rollbacks",
    "Lora": "r alpha dropout target",
    "StageSettings": STAGE,
    "TrainSettings": f"{STAGE} {TRAIN}",
    "TokenizerSettings": f"{STAGE} data skip_bad vocab_size model_type sample_mb",
    "Starter": "hidden_size layers heads kv_heads context",
    "PretrainSettings": f"{STAGE} {TRAIN} tokenizer starter",
    "SftSettings": f"{STAGE} {TRAIN}",
    "Collect": "prompts count samples pairs max_new_tokens error_rate",
    "EngineSettings": "slots cache_gib speculate guesses",
    "RewardSettings": f"{STAGE} {TRAIN} loss pairs margin centring collect min_accuracy max_length_correlation",
    "DpoSettings": f"{STAGE} {TRAIN} loss pairs beta label_smoothing reference ref_bits",
    "Rollout": "batch max_new_tokens temperature",
    "Ppo": "kl_coef gamma gae_lambda clip_range value_clip_range epochs minibatches score_clip missing_stop_penalty "
    "critic_learning_rate max_kl",
    "PpoSettings": f"{STAGE} {TRAIN} reward_model rollout ppo ref_bits",
    "Grpo": "group_size kl_coef clip_range loss_average epochs minibatches missing_stop_penalty max_kl",
    "GrpoSettings": f"{STAGE} {TRAIN} method reward_model verifier verifier_weight rollout grpo ref_bits",
    "EvalSettings": f"{STAGE} models data task temperature max_new_tokens limit max_length samples",
    "QuantizeSettings": f"{STAGE} model bits eval_data questions max_perplexity_increase temperature max_new_tokens "
    "max_length",
}


def classes() -> dict[str, type[Settings]]:
    everything = vars(train_config) | vars(alignment_config) | vars(config)
    found = {n: c for n, c in everything.items() if isinstance(c, type) and issubclass(c, Settings)}
    return {n: c for n, c in found.items() if c is not Settings}


def test_the_option_set_is_frozen() -> None:
    assert {n: " ".join(c.model_fields) for n, c in classes().items()} == FROZEN


@pytest.mark.parametrize("name", FROZEN)
def test_every_option_is_described_and_defaults_hold(name: str) -> None:
    cls = classes()[name]
    cls(**{n: "given" for n, f in cls.model_fields.items() if f.is_required()})
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
        ("quantize", {"bits": 4}, "quantize.bits", "8"),
        ("tokenizer", {"vocab_size": 10}, "tokenizer.vocab_size", "260"),
        ("eval", {"task": "bleu"}, "eval.task", "'bleu'"),
        ("reward", {"collect": {"samples": 1}}, "reward.collect.samples", "2"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(kind: str, values: Any, field: str, said: str) -> None:
    error = refused(kind, **values)
    assert error.field == field and said in error.message, error


def test_rules_between_options() -> None:
    error = refused("sft", max_length=512, micro_tokens=256)
    assert "micro_tokens (256)" in error.message and "max_length (512)" in error.message
    assert "needs loss: pairwise" in refused("reward", loss="kwise", margin=True).message
    assert "whole groups" in refused("grpo", rollout={"batch": 12}).message  # of 8
    assert "whole groups" in refused("grpo", rollout={"batch": 8}, grpo={"minibatches": 2}).message
    assert "multiple of heads" in refused("pretrain", starter={"hidden_size": 32, "heads": 3}).message


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
    ],
)
def test_given_values(given: dict[str, Any], nested: dict[str, Any]) -> None:
    assert given_values(given) == nested
