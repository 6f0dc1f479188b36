"""Frozen, typed settings of every stage. Checked before anything runs; an unknown key is refused with the nearest right name.

The command line's flags, a recipe's keys and these fields are the same names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from danlu.exceptions import SettingsError

S = TypeVar("S", bound="Settings")


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
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; auto: measured once, then kept"
    )
    adapter: Literal["full", "lora"] = Field("full", description="train all weights, or LoRA adapters")
    lora: Lora = Field(default_factory=lambda: Lora())
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
    learning_rate: float = Field(1e-4, gt=0, description="peak rate of AdamW")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="rate after the warm-up")
    warmup: float = Field(0.03, ge=0, description="below 1 a share of the steps, else a number of steps")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on matrices only")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    log_every: int = Field(10, ge=1, description="steps between lines in metrics.jsonl")
    eval_every: int = Field(100, ge=1, description="steps between held-out evaluations")
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many checkpoints to keep")
    early_stopping: EarlyStopping | None = Field(None, description="stop when a held-out metric stops improving")
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="where metrics go beside metrics.jsonl"
    )

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
    """Pairwise reward model (Bradley-Terry)."""

    pairs: Literal["best-worst", "all", "adjacent"] = Field(
        "best-worst", description="which comparisons several ranked or scored answers to one prompt give"
    )
    margin: bool = Field(
        False, description="use the comparisons' margins in the loss; those made of scores get the difference"
    )
    centring: float = Field(0.0, ge=0, description="weight of (r_chosen + r_rejected)^2")
    collect: Collect | None = Field(None, description="gather comparisons of the policy's own answers first")
    min_accuracy: float = Field(0.6, ge=0, le=1, description="G-RM: held-out pair accuracy")
    max_length_correlation: float = Field(
        0.5, ge=0, le=1, description="G-RM: correlation of the score with answer length"
    )


class Rollout(Settings):
    """How answers are sampled during PPO."""

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
    learning_rate: float = Field(3e-6, gt=0, description="peak rate of AdamW for the policy (arXiv 2403.17031)")
    schedule: Literal["cosine", "linear", "constant"] = Field("linear", description="rate after the warm-up")


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
    "ppo": PpoSettings,
    "eval": EvalSettings,
    "quantize": QuantizeSettings,
}
POLICY_KINDS = ("pretrain", "sft", "ppo")


def parse(cls: type[S], values: Mapping[str, Any], *, file: str | None = None, prefix: str = "") -> S:
    """Settings from plain values.

    Args:
        values: from YAML or the command line.
        file: named in errors.
        prefix: what stands before a field's name in errors, such as "sft.".

    Raises:
        SettingsError: an unknown key (with the nearest right name), a wrong type or a value out of range; the first one found.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(p) for p in first["loc"] if not str(p).startswith("<")]  # <...>: which shape of a union it has
        name = prefix + ".".join(path)
        if first["type"] == "extra_forbidden":
            known = _fields_at(cls, path[:-1])
            near = difflib.get_close_matches(path[-1], known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
            raise SettingsError("there is no such setting", file=file, field=name, hint=hint) from None
        found = "" if first["type"] == "missing" else f" (found: {first['input']!r})"
        message = first["msg"].removeprefix("Value error, ")
        raise SettingsError(
            f"{message[0].lower()}{message[1:]}{found}", file=file, field=name.rstrip(".") or None
        ) from None


def _fields_at(cls: type[BaseModel], path: list[str]) -> list[str]:
    for name in path:
        found = cls.model_fields.get(name)
        cls = next(_models_in(found.annotation), cls) if found is not None else cls
    return [field.alias or name for name, field in cls.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
