"""Frozen, typed settings of every stage; `parsing.py` makes them from plain values.

The command line's flags, a recipe's keys and these fields are the same names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

Schedule = Literal["cosine", "linear", "constant", "wsd"]
Pairs = Literal["best-worst", "all", "adjacent"]
"""Which comparisons a ranking gives: the best against the worst answer, all pairs, or neighbours in order of score."""


class Settings(BaseModel):
    """Base: immutable, no unknown keys, defaults are checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class Source(Settings):
    """Data with something to say about it, in place of a bare path."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    path: str = Field(min_length=1, description="file, folder, glob or hf:owner/name[:split]")
    weight: float = Field(1.0, gt=0, description="how often its records count: 2 is twice, 0.5 a seeded half of them")
    format: str | None = Field(None, alias="as", description="a format's name, in place of recognising it")
    columns: dict[str, str] = Field(
        default_factory=dict, description="danlu's field to the table's column, as prompt: content"
    )
    source_prefix: str = Field("", description="put before every prompt")
    licence: str = Field("", description="of the data, where its rows do not say")


def _source_shape(value: Any) -> str | None:
    if isinstance(value, str):
        return "<path>"
    if isinstance(value, (dict, Source)):
        return "<source>"
    return "<list>" if isinstance(value, (list, tuple)) else None


def _one_of(what: str) -> Discriminator:
    return Discriminator(_source_shape, custom_error_type="source", custom_error_message=f"expected {what}")


_Path = Annotated[str, Tag("<path>")]
_Described = Annotated[Source, Tag("<source>")]
_One = Annotated[_Path | _Described, _one_of("a path, or an object with a path")]
Sources = Annotated[
    _Path | _Described | Annotated[list[_One], Tag("<list>")],
    _one_of("a path, an object with a path, or a list of these"),
]
"""What `data:` takes: a path, an object with a path, or a list of these."""


def as_list(sources: Sources) -> list[Source]:
    """Every source as an object; an empty path is left out."""
    given = sources if isinstance(sources, list) else [sources]
    return [Source(path=one) if isinstance(one, str) else one for one in given if one != ""]


class EarlyStopping(Settings):
    """Stop when a held-out metric no longer gets better."""

    monitor: str = Field("eval_loss", description="metric of the held-out evaluation to watch")
    mode: Literal["min", "max"] = Field("min", description="whether smaller or larger is better")
    patience: int = Field(3, ge=1, description="evaluations without a better value before stopping")


class Best(Settings):
    """Keep the weights that were best on a held-out metric."""

    monitor: str = Field(
        "eval_loss", description="metric to watch, of the held-out evaluation or of the step before it"
    )
    mode: Literal["min", "max"] = Field("min", description="whether smaller or larger is better")
    keep: int = Field(1, ge=1, description="how many of the best are kept")
    restore: bool = Field(True, description="the stage ends with the best weights, not the last ones")


class Defence(Settings):
    """What training does about steps that go wrong: a loss or gradient that is no number, a loss spike, a gradient blow-up.

    The update of such a step is not made and its batch is skipped, so weights and optimizer stay as they were; the rate is
    lowered for a while. Several in a row: back to the last checkpoint.
    """

    on: bool = Field(True, description="false: train on, and stop at the first number that is none")
    spike_z: float = Field(
        20.0,
        gt=0,
        description="a loss (or log gradient norm) so many robust standard deviations above its running median is a spike; "
        "healthy runs stay below 13",
    )
    window: int = Field(
        64, ge=4, description="updates that median and deviation are taken over; judged from a quarter of it on"
    )
    patience: int = Field(3, ge=1, description="bad steps in a row before going back to the last checkpoint")
    cooldown_steps: int = Field(50, ge=0, description="steps at a lowered rate after a bad one")
    cooldown_rate: float = Field(
        0.5, gt=0, le=1, description="what the rate is multiplied by then; once more for each return to a checkpoint"
    )
    max_skipped: int = Field(20, ge=0, description="skipped batches before giving up")
    max_rollbacks: int = Field(3, ge=0, description="returns to a checkpoint before giving up")


class Lora(Settings):
    """Low-rank adapters (Hu et al. 2021); read when `adapter: lora`."""

    r: int = Field(8, ge=1, description="rank")
    alpha: float = Field(16.0, gt=0, description="scale: the update is alpha / r times B A")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target: str | list[str] = Field("all-linear", description="modules that get an adapter")


class StageSettings(Settings):
    """What every stage has."""

    out: str = Field("", description="folder the stage writes into")
    seed: int = Field(0, ge=0, description="every random number is a function of (seed, stage, step, sample)")


class TrainSettings(StageSettings):
    """What every training stage has."""

    model: str = Field("", description="folder, run or hub id to start from")
    data: Sources = Field("", description="file, folder, glob or hf:owner/name[:split]; a list of them; or objects")
    eval_data: Sources | None = Field(None, description="held-out data; none: a share of `data` is held out")
    eval_fraction: float = Field(
        0.02, ge=0, lt=1, description="share of `data` held out (by hash of the prompt) if no eval_data"
    )
    skip_bad: bool = Field(False, description="leave out faulty rows (counted in the manifest) instead of stopping")
    max_records: int | None = Field(
        None, ge=1, description="use only so many records (the first after a seeded shuffle)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="compute dtype; auto: measured once, then kept; float16 only on cards that have no bfloat16"
    )
    adapter: Literal["full", "lora"] = Field("full", description="train all weights, or LoRA adapters")
    lora: Lora = Field(default_factory=lambda: Lora())
    processes: int | Literal["auto"] = Field(
        1,
        description="processes of this machine that share the work; auto: one for each GPU, or for each core up to four; "
        "under torchrun: as many as it started",
    )
    strategy: Literal["ddp", "fsdp2"] = Field(
        "ddp", description="with several processes: each holds the whole model, or its share of it (FSDP2)"
    )
    template: str | None = Field(None, description="a chat template that danlu ships, in place of the tokenizer's own")
    max_length: int = Field(
        512,
        ge=8,
        description="tokens of one conversation: its oldest exchanges are dropped until it fits, or all of it; both are counted",
    )
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="tokens of a prompt at most (comparisons, prompts of RL)"
    )
    max_answer_tokens: int | None = Field(None, ge=1, description="tokens of one answer at most")
    overlength: Literal["drop", "truncate", "error"] = Field(
        "drop", description="what happens to what exceeds a limit: prompts of RL lose their left end when truncated"
    )
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; wins over epochs")
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    tokens_per_step: int = Field(2048, ge=8, description="tokens of an optimizer step, accumulated from micro-batches")
    micro_tokens: int = Field(2048, ge=8, description="tokens that are in memory at once")
    optimizer: Literal["adamw", "adamw8bit", "adamw_offload"] = Field(
        "adamw",
        description="AdamW; adamw8bit keeps its averages in 8 bits, adamw_offload keeps them in the CPU's memory",
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep only each layer's input for the backward pass and compute the rest again: slower, smaller",
    )
    on_oom: Literal["stop", "halve"] = Field(
        "stop", description="when memory runs out: stop and say what to change, or halve micro_tokens and go on"
    )
    learning_rate: float = Field(1e-4, gt=0, description="peak rate of AdamW")
    schedule: Schedule = Field("cosine", description="rate after the warm-up; wsd: constant, then a short decay")
    warmup: float = Field(0.03, ge=0, description="below 1 a share of the steps, else a number of steps")
    decay: float = Field(
        0.1,
        ge=0,
        description="wsd: its last part, in which the rate falls; below 1 a share of the steps, else a number of them",
    )
    min_rate: float | None = Field(
        None, ge=0, le=1, description="share of the peak rate at the end; none: 0.1 for cosine, 0 for linear and wsd"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on matrices only")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    log_every: int = Field(10, ge=1, description="steps between lines in metrics.jsonl")
    eval_every: int = Field(100, ge=1, description="steps between held-out evaluations")
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many checkpoints to keep")
    checkpoint_best: Best | None = Field(None, description="keep the weights that were best on a metric")
    early_stopping: EarlyStopping | None = Field(None, description="stop when a held-out metric stops improving")
    defence: Defence = Field(default_factory=lambda: Defence())
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="where metrics go beside metrics.jsonl"
    )

    @field_validator("processes", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        if value != "auto" and not (str(value).isdecimal() and int(value) > 0):
            raise ValueError("expected a number from 1 on, or auto")
        return value if value == "auto" else int(value)

    @field_validator("report_to", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """`report_to: tensorboard, wandb` means the list."""
        return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _budget(self) -> TrainSettings:
        if self.micro_tokens < self.max_length:
            raise ValueError(
                f"micro_tokens ({self.micro_tokens}) must hold one conversation of max_length ({self.max_length})"
            )
        return self


class TokenizerSettings(StageSettings):
    """Train a tokenizer."""

    data: Sources = Field("", description="text to learn from: data of any kind")
    skip_bad: bool = Field(False, description="leave out faulty rows instead of stopping")
    vocab_size: int = Field(2048, ge=260, description="256 bytes, 4 special tokens, the rest is learned")
    model_type: Literal["bpe", "sentencepiece", "sentencepiece-bpe"] = Field(
        "bpe", description="BPE over bytes, or SentencePiece's Unigram or BPE over characters with bytes for the rest"
    )
    sample_mb: int = Field(
        32, ge=1, description="megabytes of text, evenly from all of it, that are learned from; memory grows with them"
    )


class EngineSettings(Settings):
    """The engine that answers for a loaded model (`danlu.load(..., engine=...)`, `danlu serve`)."""

    slots: int = Field(64, ge=1, description="answers that are written at once")
    cache_gib: float = Field(
        0.0,
        ge=0,
        description="memory for keys and values; 0: a quarter of what is free, at most 4 on a CPU and 32 on a GPU",
    )
    speculate: str = Field(
        "off", description="guess tokens ahead: off, ngram, or a smaller model's folder; the answers stay the same"
    )
    guesses: int = Field(4, ge=1, le=32, description="tokens that are guessed at once")


class Starter(Settings):
    """The small Llama that is pre-trained from nothing when no model is given."""

    hidden_size: int = Field(192, ge=16, description="width D")
    layers: int = Field(4, ge=1, description="transformer blocks")
    heads: int = Field(6, ge=1, description="query heads")
    kv_heads: int = Field(3, ge=1, description="key and value heads (grouped-query attention)")
    context: int = Field(512, ge=32, description="positions")

    @model_validator(mode="after")
    def _divides(self) -> Starter:
        if self.hidden_size % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError("hidden_size must be an even multiple of heads, and heads a multiple of kv_heads")
        return self


class PretrainSettings(TrainSettings):
    """Next-token prediction on documents."""

    tokenizer: str = Field("", description="tokenizer folder for a starter; a given model brings its own")
    starter: Starter = Field(default_factory=lambda: Starter())
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of AdamW")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's, on matrices only")


class SftSettings(TrainSettings):
    """Supervised fine-tuning: every assistant turn and its stop token are trained, nothing else."""


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


class EvalSettings(StageSettings):
    """Rubric, exact match or perplexity on held-out questions, for one or several models."""

    models: list[str] = Field(
        default_factory=list, description="folders or stages; none: every policy of the run so far"
    )
    data: Sources = Field(
        "", description="prompts with references (rubric, exact) or conversations or documents (perplexity)"
    )
    task: Literal["rubric", "exact", "perplexity"] = Field("rubric", description="how answers are judged")
    temperature: float = Field(1.0, ge=0, description="0 takes the most likely token")
    max_new_tokens: int = Field(64, ge=1, description="tokens of an answer at most")
    limit: int | None = Field(None, ge=1, description="use only the first so many questions")
    max_length: int = Field(512, ge=8, description="tokens of one text (perplexity)")
    samples: int = Field(3, ge=0, description="sample dialogues for the report")


class QuantizeSettings(StageSettings):
    """Weight-only int8."""

    model: str = Field("", description="folder or stage")
    bits: Literal[8] = Field(8, description="of a weight")
    eval_data: Sources | None = Field(
        None, description="text or conversations for perplexity before and after (G-QUANT)"
    )
    questions: Sources | None = Field(None, description="prompts with references: scored by the rubric for the table")
    max_perplexity_increase: float = Field(0.01, ge=0, description="G-QUANT: allowed relative increase")
    temperature: float = Field(1.0, ge=0, description="for the questions; 0 takes the most likely token")
    max_new_tokens: int = Field(64, ge=1, description="tokens of an answer at most")
    max_length: int = Field(512, ge=8, description="tokens of one text (perplexity)")


KINDS: dict[str, type[StageSettings]] = {
    "tokenizer": TokenizerSettings,
    "pretrain": PretrainSettings,
    "sft": SftSettings,
    "reward": RewardSettings,
    "dpo": DpoSettings,
    "ppo": PpoSettings,
    "grpo": GrpoSettings,
    "eval": EvalSettings,
    "quantize": QuantizeSettings,
}
POLICY_KINDS = ("pretrain", "sft", "dpo", "ppo", "grpo")
