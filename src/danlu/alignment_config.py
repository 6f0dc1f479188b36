"""Settings of the stages that learn from preferences and rewards."""

from __future__ import annotations

import difflib
from types import MappingProxyType
from typing import Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from danlu.train_config import Pairs, Schedule, Settings, Sources, TrainSettings


class Collect(Settings):
    """Comparisons of the policy's own answers, judged by the simulated annotator (rubric)."""

    prompts: Sources = Field("", description="prompts with a reference that the rubric can judge by")
    count: int = Field(1000, ge=1, description="prompts that are answered")
    samples: int = Field(4, ge=2, description="answers per prompt")
    pairs: int = Field(2, ge=1, description="comparisons per prompt at most")
    max_new_tokens: int = Field(64, ge=1, description="tokens of an answer at most")
    error_rate: float = Field(0.1, ge=0, le=0.5, description="share of comparisons the annotator gets wrong")


class RewardSettings(TrainSettings):
    """Reward model on comparisons or rankings (Bradley-Terry)."""

    loss: Literal["pairwise", "kwise"] = Field(
        "pairwise", description="pairs alone, or all pairs of a ranking in one tree (InstructGPT)"
    )
    pairs: Pairs = Field("best-worst", description="pairwise: which of them several ranked or scored answers give")
    margin: bool = Field(
        False,
        description="use the comparisons' margins in the loss; those made of scores get the difference; pairwise only",
    )
    centring: float = Field(0.0, ge=0, description="weight of (r_chosen + r_rejected)^2")
    collect: Collect | None = Field(None, description="gather comparisons of the policy's own answers first")
    min_accuracy: float = Field(0.6, ge=0, le=1, description="G-RM: held-out pair accuracy")
    max_length_correlation: float = Field(
        0.5, ge=0, le=1, description="G-RM: correlation of the score with answer length"
    )

    @model_validator(mode="after")
    def _margins(self) -> RewardSettings:
        if self.margin and self.loss == "kwise":
            raise ValueError("margin needs loss: pairwise (a ranking's answers have an order, but no margins)")
        return self


class DpoSettings(TrainSettings):
    """Direct preference optimisation on comparisons; dropout is off."""

    loss: Literal["sigmoid"] = Field("sigmoid", description="sigmoid: the plain form (Rafailov et al. 2023)")
    pairs: Pairs = Field(
        "best-worst", description="which comparisons several ranked or scored answers to one prompt give"
    )
    beta: float = Field(0.1, gt=0, description="how dear it is to leave the reference")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of comparisons taken to be the wrong way round (cDPO)"
    )
    reference: Literal["precomputed", "online"] = Field(
        "precomputed",
        description="log-probs of the model before training: of all pairs at the start, without a second model in memory; "
        "or anew at every step, beside a frozen copy (with LoRA: the bare base)",
    )
    ref_bits: Literal[8, 32] = Field(
        32, description="of the frozen reference's weights beside a policy that trains all of its own; 8: int8 trunk"
    )
    learning_rate: float = Field(1e-6, gt=0, description="peak rate of AdamW (Rafailov et al. 2023)")


HealthAction = Literal["off", "warn", "adapt", "stop"]
HEALTH_ACTIONS: Final = MappingProxyType[str, HealthAction](
    {
        "P-KL-HIGH": "adapt",
        "P-KL-NEGATIVE": "warn",
        "P-TIMID": "warn",
        "P-LEN-GROWTH": "warn",
        "P-LEN-COLLAPSE": "warn",
        "P-STOP-LOST": "warn",
        "P-ENTROPY-LOST": "warn",
        "P-REPEATS": "warn",
        "P-EMPTY": "warn",
        "P-REWARD-HACK": "stop",
        "P-CRITIC-BLIND": "warn",
        "P-RATIO": "warn",
        "P-ENGINE-GAP": "warn",
        "P-CLIP-HIGH": "warn",
        "P-SCORE-FALLS": "warn",
        "P-EQUAL-GROUPS": "warn",
        "P-GRAD": "warn",
        "P-PTX-SHARE": "warn",
    }
)
"""What is done about each finding unless the settings say otherwise: what would end at max_kl, or in a worse model, is acted on."""
HEALTH_ADAPTS: Final = ("P-KL-HIGH", "P-ENTROPY-LOST", "P-RATIO", "P-CLIP-HIGH")
"""Findings that there is a correction for."""


class HealthSettings(Settings):
    """What is done about findings of the health rules."""

    on: bool = Field(True, description="false: no rule is asked")
    actions: dict[str, HealthAction] = Field(
        default_factory=dict,
        description="by a rule's code, where not [its default](health.md): off, warn (say it once), adapt (its correction) or stop "
        "(end with the best weights so far)",
    )

    @field_validator("actions", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML reads a bare `off` as false."""
        return {k: "off" if v is False else v for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _known(self) -> HealthSettings:
        for code, action in self.actions.items():
            if code not in HEALTH_ACTIONS:
                near = difflib.get_close_matches(code, HEALTH_ACTIONS, n=1)
                known = f"did you mean {near[0]}?" if near else f"known: {', '.join(HEALTH_ACTIONS)}"
                raise ValueError(f"there is no health rule {code}; {known}")
            if action == "adapt" and code not in HEALTH_ADAPTS:
                raise ValueError(f"there is no correction for {code}; adapt is for {', '.join(HEALTH_ADAPTS)}")
        return self

    def action(self, code: str) -> HealthAction:
        """What is done about a finding."""
        return self.actions.get(code, HEALTH_ACTIONS[code]) if self.on else "off"


class Rollout(Settings):
    """How answers are sampled during PPO and GRPO."""

    batch: int = Field(64, ge=1, description="episodes per iteration")
    max_new_tokens: int = Field(64, ge=1, description="tokens of an answer at most")
    temperature: float = Field(1.0, gt=0, description="also divides the logits of the ratio")


class Ppo(Settings):
    """The algorithm's own numbers."""

    kl_coef: float = Field(0.05, ge=0, description="weight of the token KL to the reference (TRL's default)")
    gamma: float = Field(1.0, ge=0, le=1, description="discount per token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="of generalised advantage estimation")
    clip_range: float = Field(0.2, gt=0, lt=1, description="policy ratio (Schulman et al. 2017)")
    value_clip_range: float = Field(0.2, gt=0, description="critic, in units of reward (DeepSpeed-Chat)")
    epochs: int = Field(2, ge=1, description="passes over each batch of episodes")
    minibatches: int = Field(2, ge=1, description="optimizer steps per pass")
    score_clip: float = Field(5.0, gt=0, description="scores are clipped to +- this (DeepSpeed-Chat)")
    missing_stop_penalty: float = Field(1.0, ge=0, description="taken from the score of an answer without stop token")
    critic_learning_rate: float = Field(1e-4, gt=0, description="peak rate of AdamW for the critic")
    max_kl: float = Field(
        50.0, gt=0, description="stop when the KL of an answer to the reference (nats, mean) exceeds this"
    )


class PpoSettings(TrainSettings):
    """Proximal policy optimisation against a reward model; `max_steps` counts iterations."""

    reward_model: str = Field("", description="folder or stage of the reward model")
    rollout: Rollout = Field(default_factory=lambda: Rollout())
    ppo: Ppo = Field(default_factory=lambda: Ppo())
    health: HealthSettings = Field(default_factory=lambda: HealthSettings())
    ref_bits: Literal[8, 32] = Field(
        32, description="of the frozen reference's weights beside a policy that trains all of its own; 8: int8 trunk"
    )
    learning_rate: float = Field(3e-6, gt=0, description="peak rate of AdamW for the policy (arXiv 2403.17031)")
    schedule: Schedule = Field("linear", description="rate after the warm-up")


class Grpo(Settings):
    """The algorithm's own numbers."""

    group_size: int = Field(8, ge=2, description="answers to each prompt; rollout.batch is a multiple of it")
    kl_coef: float = Field(0.04, ge=0, description="weight of the token KL to the reference in the loss (DeepSeekMath)")
    clip_range: float = Field(0.2, gt=0, lt=1, description="policy ratio (Schulman et al. 2017)")
    loss_average: Literal["sequence", "token"] = Field(
        "sequence", description="mean over answers of their means over tokens (DeepSeekMath), or over all tokens (DAPO)"
    )
    epochs: int = Field(1, ge=1, description="passes over each batch of answers")
    minibatches: int = Field(1, ge=1, description="optimizer steps per pass")
    missing_stop_penalty: float = Field(1.0, ge=0, description="taken from the score of an answer without stop token")
    max_kl: float = Field(
        50.0, gt=0, description="stop when the KL of an answer to the reference (nats, mean) exceeds this"
    )


class GrpoSettings(TrainSettings):
    """Group-relative policy optimisation against a reward model or a verifier; `max_steps` counts iterations."""

    method: Literal["grpo"] = Field("grpo", description="grpo: the plain form (Shao et al. 2024)")
    reward_model: str = Field("", description="folder or stage of the reward model; none: the verifier alone")
    verifier: Literal["auto", "number", "exact", "none"] = Field(
        "auto", description="how an answer is held against its prompt's reference; auto: as the reference says"
    )
    verifier_weight: float = Field(1.0, gt=0, description="what a right answer adds to the score")
    rollout: Rollout = Field(default_factory=lambda: Rollout())
    grpo: Grpo = Field(default_factory=lambda: Grpo())
    health: HealthSettings = Field(default_factory=lambda: HealthSettings())
    ref_bits: Literal[8, 32] = Field(
        32, description="of the frozen reference's weights beside a policy that trains all of its own; 8: int8 trunk"
    )
    learning_rate: float = Field(1e-6, gt=0, description="peak rate of AdamW (DeepSeekMath)")
    schedule: Schedule = Field("constant", description="rate after the warm-up")

    @model_validator(mode="after")
    def _whole_groups(self) -> GrpoSettings:
        prompts, rest = divmod(self.rollout.batch, self.grpo.group_size)
        if rest or prompts < self.grpo.minibatches:
            raise ValueError(
                f"rollout.batch ({self.rollout.batch}) must hold whole groups of grpo.group_size "
                f"({self.grpo.group_size}), at least one for each of grpo.minibatches ({self.grpo.minibatches})"
            )
        return self
