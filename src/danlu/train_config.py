"""Frozen, typed settings: what all stages and what all training stages have; `parsing.py` makes settings from plain values.

The command line's flags, a recipe's keys and these fields are the same names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

AdapterKind = Literal["full", "freeze", "lora", "rslora", "dora", "adalora", "qlora", "ptuning", "prompt", "ia3"]
QUANTISED_BASES = ("lora", "rslora", "qlora", "ptuning", "prompt")
"""Adapters that can stand on a base of 8 or 4 bits."""
Schedule = Literal["cosine", "linear", "constant", "wsd"]
Pairs = Literal["best-worst", "all", "adjacent"]
"""Which comparisons a ranking gives: the best against the worst answer, all pairs, or neighbours in order of score."""


class Settings(BaseModel):
    """Base: immutable, no unknown keys, defaults are checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _yaml_words(cls, value: Any) -> Any:
        """YAML reads the bare key `on` as true."""
        return {"on" if k is True else k: v for k, v in value.items()} if isinstance(value, dict) else value


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
    phase: str = Field(
        "",
        pattern=r"^$|^(sft|reward|rl) of [0-9.]+,[0-9.]+,[0-9.]+$",
        description="only the prompts of a phase, as 'reward of 2,4,4': no phase sees another's (DeepSpeed-Chat's data split)",
    )
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


def as_models(named: str | list[str]) -> list[str]:
    """One model or several as a list; an empty name is left out."""
    return [name for name in ([named] if isinstance(named, str) else named) if name]


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
    """Low-rank adapters (Hu et al. 2021); read by `adapter: lora`, `rslora`, `dora`, `qlora` and, but for `r`, `adalora`."""

    r: int = Field(8, ge=1, description="rank")
    alpha: float = Field(
        16.0, gt=0, description="scale: the update is alpha / r times B A; rslora: alpha / sqrt(r) times"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target: str | list[str] = Field(
        "auto",
        description="modules that get an adapter: auto and all-linear: the linear layers of the trunk, found by family; or names",
    )
    init: Literal["default", "pissa"] = Field(
        "default", description="first weights: B is zero; or the principal singular vectors (PiSSA)"
    )
    rate_ratio: float = Field(1.0, gt=0, description="learning rate of B over that of A (LoRA+ advises 16)")
    embeddings: Literal["auto", "on", "off"] = Field(
        "auto",
        description="train embeddings and output head beside the adapter; auto: where the template ends answers with a token "
        "that the model does not end with yet",
    )


class AdaLora(Settings):
    """Ranks that go where they are needed (Zhang et al. 2023); read when `adapter: adalora`."""

    initial_r: int = Field(12, ge=1, description="rank of every layer at first")
    target_r: int = Field(8, ge=1, description="mean rank at the end")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the updates before ranks fall")
    final: float = Field(0.3, ge=0, lt=1, description="share of the updates after ranks have fallen")
    every: int = Field(
        10, ge=1, description="updates between two allocations of rank at most; a short run allocates more often"
    )
    beta: float = Field(0.85, gt=0, lt=1, description="how slowly the importance of a rank changes")
    orthogonality: float = Field(0.5, ge=0, description="weight of the loss that keeps A and B orthogonal")

    @model_validator(mode="after")
    def _falls(self) -> AdaLora:
        if self.target_r >= self.initial_r:
            raise ValueError(f"target_r ({self.target_r}) must be below initial_r ({self.initial_r})")
        if self.warmup + self.final >= 1:
            raise ValueError(f"warmup ({self.warmup}) and final ({self.final}) leave no updates in which ranks fall")
        return self


class NaturalSteps(Settings):
    """Steps along the natural gradient (`training/natural.py`); read when `optimizer: natural`."""

    trust: float = Field(
        4e-7,
        gt=0,
        description="how far a step at the peak rate goes, in nats a token as the metric has them; the policy moves several times "
        "as far, since it takes places of an answer for independent",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="how slowly the mean of the gradients forgets")
    every: int = Field(30, ge=1, description="updates between two measurements of the metric")


class Prefix(Settings):
    """Learned tokens in front of everything; read when `adapter: ptuning` (in every layer) or `prompt` (input embeddings)."""

    tokens: int = Field(16, ge=1, description="how many")
    projection: bool = Field(False, description="ptuning: make keys and values of embeddings by a small network")
    hidden: int | None = Field(None, ge=1, description="width of that network; none: the model's")


class Freeze(Settings):
    """Train a part of the model's own weights; read when `adapter: freeze`."""

    layers: int = Field(2, ge=1, description="how many of the last layers train")
    head: bool = Field(False, description="the output head, too (with tied weights that is the embedding)")


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
    skip_bad: bool = Field(
        False,
        description="leave out faulty rows, and answers with numbers that tools did not find, instead of stopping; "
        "counted in the manifest",
    )
    max_records: int | None = Field(
        None, ge=1, description="use only so many records (the first after a seeded shuffle)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="compute dtype; auto: measured once, then kept; float16 only on cards that have no bfloat16"
    )
    adapter: AdapterKind = Field(
        "full", description="what trains: all weights, the last layers (freeze), or an adapter of this kind"
    )
    lora: Lora = Field(default_factory=lambda: Lora())
    adalora: AdaLora = Field(default_factory=lambda: AdaLora())
    prefix: Prefix = Field(default_factory=lambda: Prefix())
    freeze: Freeze = Field(default_factory=lambda: Freeze())
    base_bits: Literal[16, 8, 4] = Field(
        16, description="bits of the frozen base under an adapter; 16: as it is; qlora: 4 unless 8 is given"
    )
    base_format: Literal["rounded", "nf4"] = Field(
        "rounded", description="of a base of 4 bits: danlu's own, rounded to nearest, or NF4 by bitsandbytes"
    )
    neftune_alpha: float = Field(
        0.0, ge=0, description="noise in the embeddings while training (NEFTune; 5 is usual); sft, pretrain and reward"
    )
    processes: int | Literal["auto"] = Field(
        1,
        description="processes of this machine that share the work; auto: one for each GPU, or for each core up to four; "
        "under torchrun: as many as it started",
    )
    strategy: Literal["ddp", "zero2", "fsdp2"] = Field(
        "ddp",
        description="with several processes: each holds the whole model; its share of gradients and optimizer (zero2); "
        "or of the weights too (fsdp2, ZeRO-3)",
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
    overlength: Literal["drop", "split", "truncate", "error"] = Field(
        "drop",
        description="what happens to what exceeds a limit: prompts of RL lose their left end when truncated; the oldest exchanges "
        "of a conversation that is split become one of their own",
    )
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; wins over epochs")
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    tokens_per_step: int = Field(2048, ge=8, description="tokens of an optimizer step, accumulated from micro-batches")
    micro_tokens: int = Field(2048, ge=8, description="tokens that are in memory at once")
    optimizer: Literal["adamw", "adamw8bit", "adamw_offload", "natural"] = Field(
        "adamw",
        description="AdamW; adamw8bit keeps its averages in 8 bits, adamw_offload keeps them in the CPU's memory; natural, of PPO "
        "and GRPO: steps as long as the policy may move, over the linear layers alone",
    )
    natural: NaturalSteps = Field(default_factory=NaturalSteps, description="steps of `optimizer: natural`")
    activation_checkpointing: bool = Field(
        False,
        description="keep only each layer's input for the backward pass and compute the rest again: slower, smaller",
    )
    compile_head: bool = Field(
        False,
        description="torch.compile for what stands between the head's products; takes long to begin, and on CPUs a C++ compiler",
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

    @property
    def adapted(self) -> bool:
        """Whether an adapter trains on a frozen base that all roles share."""
        return self.adapter not in ("full", "freeze")

    @property
    def frozen_bits(self) -> int:
        """Bits of the frozen base: 16 (as it is), 8 or 4."""
        return 4 if self.adapter == "qlora" and self.base_bits == 16 else self.base_bits

    @model_validator(mode="after")
    def _adapter(self) -> TrainSettings:
        if self.base_bits != 16 and self.adapter not in QUANTISED_BASES:
            raise ValueError(
                f"base_bits: {self.base_bits} needs an adapter of: {', '.join(QUANTISED_BASES)} (found {self.adapter})"
            )
        if self.base_format == "nf4" and self.frozen_bits != 4:
            raise ValueError(
                f"base_format: nf4 is of 4 bits: adapter: qlora, or base_bits: 4 (found {self.frozen_bits} bits)"
            )
        if (
            self.lora.init == "pissa"
            and self.adapted
            and (self.adapter not in ("lora", "rslora") or self.frozen_bits != 16)
        ):
            raise ValueError(
                f"lora.init: pissa needs adapter: lora or rslora on a base of 16 bits (found {self.adapter})"
            )
        if self.strategy == "fsdp2" and (self.adapter in ("adalora", "ptuning", "prompt") or self.frozen_bits != 16):
            raise ValueError(
                f"strategy: fsdp2 does not split adapter: {self.adapter} (base of {self.frozen_bits} bits)"
            )
        return self

    @model_validator(mode="after")
    def _natural(self) -> TrainSettings:
        if self.optimizer != "natural":
            return self
        if not self.natural_steps:
            raise ValueError(
                "optimizer: natural is for policy gradients: ppo, and grpo with any method but online-dpo, raft and best-of-n"
            )
        if self.adapter != "full":
            raise ValueError(
                f"optimizer: natural moves the weights themselves, and adapter: {self.adapter} leaves them"
            )
        if self.strategy != "ddp":
            raise ValueError(f"optimizer: natural needs whole weights, and strategy: {self.strategy} shards them")
        return self

    @property
    def natural_steps(self) -> bool:
        """Whether the stage can have `optimizer: natural`."""
        return False

    @model_validator(mode="after")
    def _budget(self) -> TrainSettings:
        if self.micro_tokens < self.max_length:
            raise ValueError(
                f"micro_tokens ({self.micro_tokens}) must hold one conversation of max_length ({self.max_length})"
            )
        return self
