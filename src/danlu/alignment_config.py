"""Settings of the stages that learn from preferences and rewards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

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


class Rollout(Settings):
    """How answers are sampled during PPO and GRPO."""

    batch: int = Field(64, ge=1, description="episodes per iteration")
    max_new_tokens: int = Field(64, ge=1, description="tokens of an answer at most")
    temperature: float = Field(1.0, gt=0, description="also divides the logits of the ratio")


class PpoRollout(Rollout):
    """How PPO's answers are sampled, kept and used again."""

    per_update: int = Field(
        1,
        ge=1,
        description="batches of answers drawn at once; further iterations take what waits, then one version old each",
    )
    reuse: int = Field(1, ge=1, description="iterations that may train on an answer; 1: on-policy")
    buffer: Literal["memory", "disk"] = Field(
        "memory", description="where answers wait; disk: files in the stage's folder"
    )


class Ppo(Settings):
    """The algorithm's own numbers."""

    kl_coef: float = Field(0.05, ge=0, description="weight of the token KL to the reference (TRL's default)")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="of the KL per token (Schulman 2020)")
    kl_in: Literal["reward", "loss"] = Field(
        "reward", description="KL taken from each token's reward, or added to the loss (k2 or k3; Liu et al. 2025)"
    )
    kl_controller: Literal["fixed", "adaptive"] = Field(
        "fixed", description="adaptive: kl_coef follows the KL of answers to kl_target (Ziegler et al. 2019)"
    )
    kl_target: float = Field(6.0, gt=0, description="nats per answer that an adaptive kl_coef aims at")
    kl_horizon: float = Field(10_000, gt=0, description="episodes in which an adaptive kl_coef can change by a fifth")
    gamma: float = Field(1.0, ge=0, le=1, description="discount per token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="of generalised advantage estimation")
    critic_lambda: float | None = Field(
        None, ge=0, le=1, description="the same for the critic's returns (VC-PPO); none: gae_lambda"
    )
    whiten_rewards: bool = Field(
        False, description="token rewards scaled to variance 1 over the batch, mean kept (arXiv 2403.17031)"
    )
    clip_range: float = Field(0.2, gt=0, lt=1, description="policy ratio (Schulman et al. 2017)")
    clip_range_high: float | None = Field(
        None, gt=0, description="policy ratio upwards (DAPO: 0.28); none: as clip_range"
    )
    dual_clip: float | None = Field(
        None, gt=1, description="bound of the loss of bad tokens, in advantages (Ye et al. 2020: 3); none: no bound"
    )
    importance_clip: float | None = Field(
        2.0,
        ge=1,
        description="bound of the weight between the policy that sampled a token and the one before the update (Yao et al. "
        "2025); none: no weight",
    )
    value_clip_range: float = Field(0.2, gt=0, description="critic, in units of reward (DeepSpeed-Chat)")
    entropy_coef: float = Field(0.0, ge=0, description="what a nat of entropy per token takes from the loss")
    epochs: int = Field(2, ge=1, description="passes over each batch of episodes")
    minibatches: int = Field(2, ge=1, description="optimizer steps per pass")
    update_kl: float | None = Field(
        None,
        gt=0,
        description="KL per token to the policy before the iteration that ends its updates; none: all are made",
    )
    score_norm: Literal["none", "running", "batch"] = Field(
        "none", description="scores to mean 0 and variance 1, over all so far or over the batch (Secrets of RLHF I)"
    )
    score_clip: float = Field(5.0, gt=0, description="scores are clipped to +- this (DeepSpeed-Chat)")
    missing_stop_penalty: float = Field(1.0, ge=0, description="taken from the score of an answer without stop token")
    critic_learning_rate: float = Field(1e-4, gt=0, description="peak rate of AdamW for the critic")
    critic_warmup: int = Field(0, ge=0, description="first iterations in which the critic learns alone")
    critic_init: Literal["auto", "reward", "policy"] = Field(
        "auto",
        description="what the critic starts from; auto: the reward model if it has the policy's width and vocabulary (arXiv "
        "2403.17031), with adapters the policy",
    )
    max_kl: float = Field(
        50.0, gt=0, description="stop when the KL of an answer to the reference (nats, mean) exceeds this"
    )

    @model_validator(mode="after")
    def _kl_has_a_gradient(self) -> Ppo:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_in: loss needs kl_estimator k2 or k3 (the mean gradient of k1 is 0: it holds nothing back)"
            )
        return self


class Ptx(Settings):
    """A language-model loss beside the policy's, against forgetting (Ouyang et al. 2022, eq. 2)."""

    data: Sources = Field("", description="documents or conversations to go on imitating")
    form: Literal["additive", "convex"] = Field(
        "additive", description="policy + coef * ce, or (1 - coef) * policy + coef * ce"
    )
    coef: float = Field(
        0.05, gt=0, description="additive: OpenRLHF 0.05, DeepSpeed-Chat 27.8; convex: Coati 0.9, at most 1"
    )
    tokens: int = Field(1024, ge=8, description="tokens drawn for every update of the policy")

    @model_validator(mode="after")
    def _share(self) -> Ptx:
        if self.form == "convex" and self.coef > 1:
            raise ValueError(f"coef ({self.coef:g}) is a share with form: convex, at most 1")
        return self


class PpoSettings(TrainSettings):
    """Proximal policy optimisation against a reward model; `max_steps` counts iterations."""

    reward_model: str = Field("", description="folder or stage of the reward model")
    rollout: PpoRollout = Field(default_factory=lambda: PpoRollout())
    ppo: Ppo = Field(default_factory=lambda: Ppo())
    ptx: Ptx | None = Field(None, description="a language-model loss beside the policy's")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an average of the policy's weights, kept as a model of its own in `ema` (DeepSpeed-Chat 0.992)",
    )
    ref_bits: Literal[8, 32] = Field(
        32, description="of the frozen reference's weights beside a policy that trains all of its own; 8: int8 trunk"
    )
    learning_rate: float = Field(3e-6, gt=0, description="peak rate of AdamW for the policy (arXiv 2403.17031)")
    schedule: Schedule = Field("linear", description="rate after the warm-up")

    @model_validator(mode="after")
    def _critic(self) -> PpoSettings:
        if self.ppo.critic_init == "reward" and self.adapter == "lora":
            raise ValueError(
                "ppo.critic_init: reward needs adapter: full (an adapter's critic stands on the policy's base)"
            )
        return self


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
