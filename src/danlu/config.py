"""Settings of the other stages, and every kind of stage by name."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from danlu.alignment_config import DpoSettings, GrpoSettings, PpoSettings, RewardSettings
from danlu.knowledge_config import TeachSettings
from danlu.train_config import Settings, Sources, StageSettings, TrainSettings


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


class PretrainSettings(TrainSettings):
    """Next-token prediction on documents."""

    tokenizer: str = Field("", description="tokenizer folder for a starter; a given model brings its own")
    starter: Starter = Field(default_factory=lambda: Starter())
    new_words: int = Field(
        0, ge=0, description="frequent words of `data` that a given model's tokenizer learns first, at most"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of AdamW")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's, on matrices only")


class SftSettings(TrainSettings):
    """Supervised fine-tuning: every assistant turn and its stop token are trained, nothing else."""


class EvalSettings(StageSettings):
    """Rubric, exact match or perplexity on held-out questions, for one or several models."""

    models: list[str] = Field(
        default_factory=list, description="folders or stages; none: every policy of the run so far"
    )
    data: Sources = Field(
        "",
        description="prompts with references (rubric, exact), conversations (overlap), conversations or documents (perplexity)",
    )
    task: Literal["rubric", "exact", "overlap", "perplexity"] = Field(
        "rubric", description="how answers are judged; overlap: BLEU-4 and ROUGE with the written ones"
    )
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
    "teach": TeachSettings,
}
POLICY_KINDS = ("pretrain", "sft", "dpo", "ppo", "grpo", "teach")
