"""Settings of the stages that learn from preferences and rewards."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from danlu.health_config import HealthSettings
from danlu.reward_config import JudgeTerm, PythonTerm, Sandbox, Term
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
    """Reward model on comparisons, rankings, scores or single labelled answers."""

    loss: Literal["pairwise", "kwise", "pointwise", "unpaired"] = Field(
        "pairwise",
        description="pairs alone; all pairs of a ranking in one tree (InstructGPT); the given score of each answer "
        "(ChatLLaMA); or whether somebody liked an answer",
    )
    level: Literal["answer", "token"] = Field(
        "answer",
        description="pairwise: what the loss compares, the scores at the last tokens, or those of all tokens from where the "
        "answers part (DeepSpeed-Chat)",
    )
    pairs: Pairs = Field("best-worst", description="pairwise: which of them several ranked or scored answers give")
    margin: bool = Field(
        False,
        description="use the comparisons' margins in the loss; those made of scores get the difference; pairwise only",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of comparisons taken to be the wrong way round; pairwise and kwise"
    )
    centring: float = Field(0.0, ge=0, description="weight of (r_chosen + r_rejected)^2; pairwise and kwise")
    score_range: list[float] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="pointwise: lowest and highest score that was given, mapped to 0 and 1 (ChatLLaMA: 0 and 5); none: as given",
    )
    balance: bool = Field(
        True, description="unpaired: liked answers weigh as much as those that were not, however many there are"
    )
    collect: Collect | None = Field(None, description="gather comparisons of the policy's own answers first")
    min_accuracy: float = Field(
        0.6, ge=0, le=1, description="G-RM: held-out pair accuracy (unpaired: that of a liked against another answer)"
    )
    max_length_correlation: float = Field(
        0.5, ge=0, le=1, description="G-RM: correlation of the score with answer length"
    )

    @model_validator(mode="after")
    def _fits_the_loss(self) -> RewardSettings:
        if self.margin and self.loss != "pairwise":
            raise ValueError("margin needs loss: pairwise (a ranking's answers have an order, but no margins)")
        if self.level == "token" and self.loss != "pairwise":
            raise ValueError(f"level: token needs loss: pairwise (found: {self.loss})")
        for name in ("label_smoothing", "centring"):
            if getattr(self, name) and self.loss not in ("pairwise", "kwise"):
                raise ValueError(f"{name} needs loss: pairwise or kwise (found: {self.loss})")
        if self.collect is not None and self.loss == "pointwise":
            raise ValueError("collect gathers comparisons, and loss: pointwise needs scores")
        if self.score_range is not None:
            if self.loss != "pointwise":
                raise ValueError(f"score_range needs loss: pointwise (found: {self.loss})")
            if self.score_range[0] >= self.score_range[1]:
                raise ValueError(f"score_range is lowest and highest score (found: {self.score_range})")
        return self


Ensemble = Literal["mean", "min", "mean-std"]
"""What becomes of the scores of several reward models: their mean, the lowest, or the mean less the standard deviation."""

PreferenceLoss = Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo", "kto"]
REFERENCE_FREE = frozenset({"simpo", "orpo"})
"""Losses that know no reference."""


class DpoSettings(TrainSettings):
    """Direct preference optimisation on comparisons, and its relatives; dropout is off."""

    loss: PreferenceLoss = Field(
        "sigmoid",
        description="sigmoid: the plain form (Rafailov et al. 2023); robust: unbiased if label_smoothing of the comparisons are "
        "the wrong way round; ipo, hinge: other curves; simpo, orpo: without a reference; kto: on single answers with a label",
    )
    pairs: Pairs = Field(
        "best-worst", description="which comparisons several ranked or scored answers to one prompt give"
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="how dear it is to leave the reference; orpo: weight of the odds ratio; none: 0.1, simpo 2",
    )
    gamma: float = Field(1.0, ge=0, description="simpo: by how much the chosen answer must lead")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="sigmoid, robust: share of comparisons taken to be the wrong way round (cDPO, rDPO)",
    )
    sft_weight: float = Field(
        0.0, ge=0, description="weight of the chosen answers' cross entropy per token beside the loss (iterative RPO)"
    )
    desirable_weight: float = Field(1.0, gt=0, description="kto: what an answer that was liked counts for")
    undesirable_weight: float = Field(1.0, gt=0, description="kto: what an answer that was not liked counts for")
    reference: Literal["precomputed", "online"] = Field(
        "precomputed",
        description="log-probs of the model before training: of all pairs at the start, without a second model in memory; "
        "or anew at every step, beside a frozen copy (with LoRA: the bare base); simpo and orpo have none",
    )
    ref_bits: Literal[8, 32] = Field(
        32, description="of the frozen reference's weights beside a policy that trains all of its own; 8: int8 trunk"
    )
    learning_rate: float = Field(1e-6, gt=0, description="peak rate of AdamW (Rafailov et al. 2023)")

    @property
    def strength(self) -> float:
        """`beta`, or the loss's own default."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1

    @model_validator(mode="after")
    def _of_this_loss(self) -> DpoSettings:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing needs loss: sigmoid or robust, not {self.loss}")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError(
                "loss: robust needs label_smoothing, the share of comparisons that are the wrong way round"
            )
        if self.sft_weight and self.loss in ("orpo", "kto"):
            why = "has this term already" if self.loss == "orpo" else "has no chosen answers"
            raise ValueError(f"sft_weight cannot be given with loss: {self.loss}, which {why}")
        if self.reference == "online" and self.loss in REFERENCE_FREE:
            raise ValueError(f"loss: {self.loss} has no reference that could be read online")
        if self.ref_bits == 8 and self.reference != "online":
            raise ValueError(
                "ref_bits: 8 needs reference: online; a precomputed reference takes no memory while it trains"
            )
        for name, loss in (("gamma", "simpo"), ("desirable_weight", "kto"), ("undesirable_weight", "kto")):
            if getattr(self, name) != 1.0 and self.loss != loss:
                raise ValueError(f"{name} needs loss: {loss}, not {self.loss}")
        return self


class Rollout(Settings):
    """How answers are sampled during PPO and GRPO."""

    batch: int = Field(64, ge=1, description="episodes per iteration")
    max_new_tokens: int = Field(64, ge=1, description="tokens of an answer at most")
    temperature: float = Field(1.0, gt=0, description="also divides the logits of the ratio")
    engine: Literal["danlu", "vllm"] = Field(
        "danlu", description="what draws them: danlu's own engine, or vLLM where it is installed (one process; GPU)"
    )
    vllm_memory: float = Field(
        0.3, gt=0, le=1, description="vllm: its share of the GPU's memory, for a copy of the policy and its cache"
    )


class RolloutSettings(TrainSettings):
    """What the stages that learn from scores of their own answers have."""

    reward_model: str | list[str] = Field(
        "", description="folder or stage of the reward model, or of several; none: what else scores answers"
    )
    ensemble: Ensemble = Field("mean", description="several reward models: what becomes of their scores")
    follow_failed: bool = Field(
        False, description="follow a reward model although it did not pass G-RM; `--force` says so for one run"
    )
    verifier: Literal["auto", "number", "exact", "choice", "regex", "json", "tests", "none"] = Field(
        "auto", description="how an answer is held against its prompt's reference; auto: as the reference says"
    )
    verifier_weight: float = Field(1.0, gt=0, description="what a right answer adds to the score")
    rewards: list[Term] = Field(
        default_factory=list, description="what else scores answers; all is weighted and added up"
    )
    eval_rewards: list[Term] = Field(
        default_factory=list, description="measured on held-out prompts (`eval_gold`), and never trained on"
    )
    eval_reward_model: str | list[str] = Field(
        "",
        description="a reward model, or several, beside `eval_rewards`: a larger or another one shows when the first is exploited "
        "(Gao et al. 2022)",
    )
    max_failed: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of an iteration's answers that may fail to be scored; they are left out; more: the run stops",
    )
    sandbox: Sandbox = Field(default_factory=lambda: Sandbox())
    health: HealthSettings = Field(default_factory=lambda: HealthSettings())
    rollout: Rollout = Field(default_factory=lambda: Rollout())
    ref_bits: Literal[8, 32] = Field(
        32, description="of the frozen reference's weights beside a policy that trains all of its own; 8: int8 trunk"
    )

    def reward_files(self) -> list[str]:
        """Files that the terms are made of: their content is part of what was asked for."""
        found = []
        for term in [*self.rewards, *self.eval_rewards]:
            if isinstance(term, JudgeTerm) and term.rubric_file:
                found.append(term.rubric_file)
            if isinstance(term, PythonTerm) and ".py:" in term.function:
                found.append(term.function.rpartition(":")[0])
        return found


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
    keep_graphs: bool = Field(
        False,
        description="the first update goes back through the readings of policy and critic and has no forward pass of its own; its "
        "mini-batch's activations stay in memory, of both",
    )
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
        description="what the critic starts from; reward: the reward model, of any size but with the policy's vocabulary; auto: "
        "that if it has the policy's width, too (arXiv 2403.17031), with adapters the policy",
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


class PpoSettings(RolloutSettings):
    """Proximal policy optimisation against whatever scores answers; `max_steps` counts iterations."""

    rollout: PpoRollout = Field(default_factory=lambda: PpoRollout())
    ppo: Ppo = Field(default_factory=lambda: Ppo())
    ptx: Ptx | None = Field(None, description="a language-model loss beside the policy's")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an average of the policy's weights, kept as a model of its own in `ema` (DeepSpeed-Chat 0.992)",
    )
    learning_rate: float = Field(3e-6, gt=0, description="peak rate of AdamW for the policy (arXiv 2403.17031)")
    schedule: Schedule = Field("linear", description="rate after the warm-up")

    @model_validator(mode="after")
    def _critic(self) -> PpoSettings:
        if self.ppo.critic_init == "reward" and self.adapted:
            raise ValueError(
                "ppo.critic_init: reward needs adapter: full (an adapter's critic stands on the policy's base)"
            )
        if self.ppo.keep_graphs and self.optimizer == "natural":
            raise ValueError("optimizer: natural reads answers anew, and ppo.keep_graphs keeps their graphs")
        return self

    @property
    def natural_steps(self) -> bool:
        return True


Advantage = Literal["group", "group-mean", "leave-one-out", "batch", "group-batch"]
LossAverage = Literal["sequence", "token", "constant", "sum"]


class Grpo(Settings):
    """The algorithm's own numbers; where nothing is given, those of the method (docs/training.md has the table)."""

    group_size: int = Field(8, ge=2, description="answers to each prompt; rollout.batch is a multiple of it")
    advantage: Advantage | None = Field(
        None,
        description="what a score is held against: the group's mean, over its deviation (group) or not (group-mean); the "
        "others' mean (leave-one-out); the whole batch (batch); the group's mean, then the batch (group-batch); none: the method's",
    )
    loss_average: LossAverage | None = Field(
        None,
        description="mean over answers of their means over tokens (sequence), over all tokens (token), over answers times "
        "max_new_tokens (constant), or of whole answers (sum); none: the method's",
    )
    ratio: Literal["token", "sequence"] | None = Field(
        None,
        description="clip the ratio of each token, or that of the whole answer per token (GSPO); none: the method's",
    )
    clip_range: float | None = Field(
        None, gt=0, lt=1, description="policy ratio (Schulman et al. 2017): 0.2, gspo 3e-4; none: the method's"
    )
    clip_range_high: float | None = Field(
        None, gt=0, description="upwards: dapo 0.28, gspo 4e-4; none: the method's, which is mostly clip_range"
    )
    kl_coef: float | None = Field(
        None, ge=0, description="weight of the token KL to the reference: grpo 0.04 (DeepSeekMath); none: the method's"
    )
    kl_in: Literal["loss", "reward"] | None = Field(
        None, description="where the KL is: a term of the loss, or taken from the score; none: the method's"
    )
    kl_estimator: Literal["k2", "k3"] | None = Field(
        None, description="of the KL in the loss (Schulman 2020); none: the method's"
    )
    max_resample: int | None = Field(
        None,
        ge=0,
        description="roll-out batches at most that replace groups of equal scores: dapo 3; none: the method's",
    )
    overlong: float | None = Field(
        None,
        ge=0,
        le=1,
        description="last share of max_new_tokens over which the score falls by 1: dapo 0.2; none: the method's",
    )
    importance_clip: float | None = Field(
        2.0,
        gt=0,
        description="bound of a token's weight for the difference between engine and trainer (truncated importance sampling); "
        "none: no weights",
    )
    epochs: int = Field(1, ge=1, description="passes over each batch of answers")
    minibatches: int = Field(1, ge=1, description="optimizer steps per pass")
    missing_stop_penalty: float | None = Field(
        None, ge=0, description="taken from the score of an answer without stop token: 1, dapo 0; none: the method's"
    )
    max_kl: float = Field(
        50.0, gt=0, description="stop when the KL of an answer to the reference (nats, mean) exceeds this"
    )


class OnlineDpo(Settings):
    """method: online-dpo: DPO on the best and the worst of each group."""

    loss: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="on the pairs, as in the stage dpo")
    beta: float = Field(0.1, gt=0, description="how dear it is to leave the reference")


class Raft(Settings):
    """method: raft: SFT on the best of each group."""

    keep: int = Field(1, ge=1, description="best answers of each group that are kept")
    min_score: float | None = Field(None, description="keep an answer only if its score is above this")
    unfinished: bool = Field(False, description="keep answers without stop token too")
    train: bool = Field(True, description="false: only write selected.jsonl; the model stays as it is")


GrpoMethod = Literal[
    "grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce++", "reinforce++-baseline", "online-dpo", "raft", "best-of-n"
]


class GrpoSettings(RolloutSettings):
    """Group-relative policy optimisation against whatever scores answers, and its relatives; `max_steps` counts iterations."""

    method: GrpoMethod = Field(
        "grpo",
        description="grpo: the plain form (Shao et al. 2024); the others but the last three are its settings under `grpo:` "
        "by name; online-dpo: pairs of its own answers; raft: SFT on its own best answers; best-of-n: raft with raft.train: "
        "false, which only writes them",
    )
    grpo: Grpo = Field(default_factory=lambda: Grpo())
    online_dpo: OnlineDpo = Field(default_factory=lambda: OnlineDpo())
    raft: Raft = Field(default_factory=lambda: Raft())
    learning_rate: float = Field(1e-6, gt=0, description="peak rate of AdamW (DeepSeekMath)")
    schedule: Schedule = Field("constant", description="rate after the warm-up")

    @model_validator(mode="before")
    @classmethod
    def _best_of_n(cls, value: Any) -> Any:
        """best-of-n is another name for RAFT without the training."""
        if not isinstance(value, dict) or value.get("method") != "best-of-n":
            return value
        given = value.get("raft") or {}
        options = given.model_dump() if isinstance(given, Raft) else dict(given)
        return {**value, "method": "raft", "raft": {**options, "train": False}}

    @property
    def natural_steps(self) -> bool:
        return self.method not in ("online-dpo", "raft")

    @model_validator(mode="after")
    def _whole_groups(self) -> GrpoSettings:
        prompts, rest = divmod(self.rollout.batch, self.grpo.group_size)
        if rest or prompts < self.grpo.minibatches:
            raise ValueError(
                f"rollout.batch ({self.rollout.batch}) must hold whole groups of grpo.group_size "
                f"({self.grpo.group_size}), at least one for each of grpo.minibatches ({self.grpo.minibatches})"
            )
        return self

    @model_validator(mode="after")
    def _of_this_method(self) -> GrpoSettings:
        for name, group in (("online_dpo", self.online_dpo), ("raft", self.raft)):
            if group != type(group)() and self.method != name.replace("_", "-"):
                raise ValueError(f"{name} needs method: {name.replace('_', '-')}, not {self.method}")
        if self.method in ("online-dpo", "raft"):
            given = [n for n in SWITCHES if getattr(self.grpo, n) is not None]
            if given:
                raise ValueError(f"grpo.{given[0]} has no meaning with method: {self.method}")
        if self.raft.keep >= self.grpo.group_size:
            raise ValueError(
                f"raft.keep ({self.raft.keep}) must leave some of grpo.group_size ({self.grpo.group_size}) out"
            )
        return self


SWITCHES = (
    "advantage",
    "loss_average",
    "ratio",
    "clip_range",
    "clip_range_high",
    "kl_coef",
    "kl_in",
    "kl_estimator",
    "max_resample",
    "overlong",
)
"""What tells the policy-gradient methods apart; pairs and SFT on own answers have none of these."""
