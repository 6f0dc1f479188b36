"""Settings of the other stages, and every kind of stage by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from danlu.alignment_config import DpoSettings, GrpoSettings, PpoSettings, RewardSettings
from danlu.knowledge_config import TeachSettings
from danlu.train_config import Settings, Sources, StageSettings, TrainSettings


class TokenizerSettings(StageSettings):
    """Train a tokenizer."""

    data: Sources = Field("", description="text to learn from: data of any kind")
    skip_bad: bool = Field(False, description="leave out faulty rows instead of stopping")
    vocab_size: int = Field(2048, ge=260, description="256 bytes, special tokens (chatml: 4), the rest is learned")
    model_type: Literal["bpe", "sentencepiece", "sentencepiece-bpe"] = Field(
        "bpe", description="BPE over bytes, or SentencePiece's Unigram or BPE over characters with bytes for the rest"
    )
    template: str = Field(
        "chatml", description="a chat template that danlu ships, for the models that will have it; its tokens are added"
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
    """The small model that is pre-trained from nothing when no model is given."""

    family: Literal["llama", "mistral", "qwen2", "gpt2", "codegen", "bloom", "gpt_neox", "opt", "chatglm2"] = Field(
        "llama", description="whose layers it has (MOSS: codegen; CPM-1 and Wenzhong: gpt2; ChatGLM2 and 3: chatglm2)"
    )
    hidden_size: int = Field(192, ge=16, description="width D")
    layers: int = Field(4, ge=1, description="transformer blocks")
    heads: int = Field(6, ge=1, description="query heads")
    kv_heads: int = Field(
        3, ge=1, description="key and value heads (grouped-query attention: llama, mistral, qwen2, chatglm2)"
    )
    context: int = Field(512, ge=32, description="positions")

    @model_validator(mode="after")
    def _divides(self) -> Starter:
        grouped = self.family in ("llama", "mistral", "qwen2", "chatglm2")
        if self.hidden_size % (2 * self.heads) or (grouped and self.heads % self.kv_heads):
            raise ValueError("hidden_size must be an even multiple of heads, and heads a multiple of kv_heads")
        return self


class Blanks(Settings):
    """How `objective: glm` cuts texts (Du et al. 2022); defaults are those of the published GLM-10B."""

    blank: float = Field(0.5, ge=0, le=1, description="share of rows with many short spans")
    sentence: float = Field(
        0.3, ge=0, le=1, description="share of rows with whole sentences; the rest are long ends of texts"
    )
    ratio: float = Field(0.15, gt=0, lt=1, description="of the tokens that spans and sentences take")
    mean_span: float = Field(3.0, gt=0, description="mean of the Poisson distribution of span lengths")
    single: float = Field(0.0, ge=0, le=1, description="share of rows with one span only")
    short: float = Field(0.02, ge=0, le=1, description="share of texts that are cut to a random length")
    blocked: float = Field(0.1, ge=0, le=1, description="share of a span's inputs that are hidden by [dBLOCK]")
    rest_min: float = Field(0.25, gt=0, le=1, description="least share of a text that a long end takes")
    infill: float = Field(0.5, ge=0, le=1, description="share of long blanks that are ends; the others stand inside")

    @model_validator(mode="after")
    def _shares(self) -> Blanks:
        if self.blank + self.sentence > 1:
            raise ValueError(f"blank and sentence are shares of one whole (found {self.blank} + {self.sentence})")
        return self


PRESETS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "presets.json").read_text("utf-8"))["presets"]
"""Shapes and rates for pre-training from nothing, by name."""


class PretrainSettings(TrainSettings):
    """Next-token prediction on documents, or another objective."""

    objective: Literal["causal", "glm", "unilm", "t5"] = Field(
        "causal",
        description="what is learnt: the next token; blanks (GLM); masked tokens in four modes (UniLM); cut spans (T5)",
    )
    preset: str = Field("", description="size, rate and batch of a published model to train from nothing, as opt-125m")
    blanks: Blanks = Field(default_factory=lambda: Blanks())
    instruction_data: Sources = Field(
        "", description="conversations whose answers are learnt as blanks (glm, unilm, t5)"
    )
    instruction_share: float = Field(0.05, gt=0, lt=1, description="of the items, of instruction_data (GLM-130B: 0.05)")

    tokenizer: str = Field("", description="tokenizer folder for a starter; a given model brings its own")
    starter: Starter = Field(default_factory=lambda: Starter())
    new_words: int = Field(
        0, ge=0, description="frequent words of `data` that a given model's tokenizer learns first, at most"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of AdamW")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's, on matrices only")

    @model_validator(mode="before")
    @classmethod
    def _published(cls, value: Any) -> Any:
        """A preset's rate, batch and context, where nothing else is said."""
        name = value.get("preset") if isinstance(value, dict) else None
        if not name:
            return value
        if name not in PRESETS:
            raise ValueError(f"preset '{name}' is not known; there are {', '.join(PRESETS)}")
        size = PRESETS[name]
        taken = {"learning_rate": size["learning_rate"], "tokens_per_step": size["tokens_per_step"]}
        taken |= {"max_length": size["context"], "micro_tokens": max(2048, size["context"])}
        return {**taken, **value}

    @model_validator(mode="after")
    def _one_start(self) -> PretrainSettings:
        if self.preset and self.model:
            raise ValueError("a preset is trained from nothing: give a tokenizer, and no model")
        if self.preset and self.objective != "causal":
            raise ValueError(f"presets are causal models; the objective is {self.objective}")
        if self.instruction_data and self.objective == "causal":
            raise ValueError("instruction_data belongs to the objectives glm, unilm and t5; use danlu sft")
        return self


class SftSettings(TrainSettings):
    """Supervised fine-tuning: every assistant turn and its stop token are trained, nothing else."""

    task: Literal["chat", "classify", "token-classify"] = Field(
        "chat", description="answers; or a class for each text (`text`, `label`), or for each token (`tokens`, `tags`)"
    )


class EvalSettings(StageSettings):
    """Rubric, exact match or perplexity on held-out questions, for one or several models."""

    models: list[str] = Field(
        default_factory=list, description="folders or stages; none: every policy of the run so far"
    )
    data: Sources = Field(
        "",
        description="prompts with references (rubric, exact), conversations (overlap), conversations or documents (perplexity)",
    )
    task: Literal["rubric", "exact", "overlap", "perplexity", "cloze"] = Field(
        "rubric",
        description="how answers are judged; overlap: BLEU-4 and ROUGE with the written ones; cloze: blanks (GLM)",
    )
    temperature: float = Field(1.0, ge=0, description="0 takes the most likely token")
    max_new_tokens: int = Field(64, ge=1, description="tokens of an answer at most")
    limit: int | None = Field(None, ge=1, description="use only the first so many questions")
    max_length: int = Field(512, ge=8, description="tokens of one text (perplexity)")
    samples: int = Field(3, ge=0, description="sample dialogues for the report")


class QuantizeSettings(StageSettings):
    """Weights in 8 or 4 bits, rounded to nearest or calibrated on text."""

    model: str = Field("", description="folder or stage")
    bits: Literal[8, 4] = Field(8, description="of a weight")
    method: Literal["rtn", "gptq"] = Field(
        "rtn", description="rtn: rounded to nearest; gptq: calibrated on text (4 bits)"
    )
    calibration: Sources | None = Field(None, description="text or conversations that gptq calibrates on")
    group_size: Literal[32, 64, 128] = Field(64, description="weights of a row that share a scale (4 bits)")
    symmetric: bool = Field(False, description="4 bits without zeros: a little smaller and coarser")
    layout: Literal["danlu", "gptq"] = Field(
        "danlu", description="of the files; gptq: symmetric, for vLLM and transformers"
    )
    max_shard_size: str = Field("", description="of a weight file, as 2GB; none: one file")
    eval_data: Sources | None = Field(
        None, description="text or conversations for perplexity before and after (G-QUANT)"
    )
    questions: Sources | None = Field(None, description="prompts with references: scored by the rubric for the table")
    max_perplexity_increase: float | None = Field(
        None, ge=0, description="G-QUANT: allowed relative increase; none: 0.01 for 8 bits, 0.1 for 4"
    )
    temperature: float = Field(1.0, ge=0, description="for the questions; 0 takes the most likely token")
    max_new_tokens: int = Field(64, ge=1, description="tokens of an answer at most")
    max_length: int = Field(512, ge=8, description="tokens of one text (perplexity), of a row of calibration text")

    @model_validator(mode="after")
    def _calibrated(self) -> QuantizeSettings:
        if self.method == "gptq" and self.bits != 4:
            raise ValueError("method gptq is for bits: 4; 8 bits are rounded to nearest (method: rtn)")
        if self.method == "gptq" and self.calibration is None:
            raise ValueError("method gptq needs calibration: text or conversations like those the model is for")
        if self.method == "rtn" and self.calibration is not None:
            raise ValueError("calibration is read by method: gptq only")
        return self

    @property
    def perplexity_limit(self) -> float:
        """What G-QUANT allows."""
        default = 0.01 if self.bits == 8 else 0.1
        return default if self.max_perplexity_increase is None else self.max_perplexity_increase


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
    "teach": TeachSettings,
}
POLICY_KINDS = ("pretrain", "sft", "dpo", "ppo", "grpo", "teach")
