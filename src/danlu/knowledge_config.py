"""Settings of teaching: `danlu teach`, `danlu forget` and the stage kind `teach`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from danlu.train_config import Sources, StageSettings


class TeachSettings(StageSettings):
    """Teach a model facts, one at a time, and leave the rest of what it answers as it is."""

    model: str = Field("", description="folder, run or hub id to teach")
    facts: list[Any] = Field(default_factory=list, description='facts: "keyword: description", or objects')
    file: str = Field("", description="a YAML file of facts, taught after `facts`")
    replay: Sources = Field(
        "",
        description="questions whose answers must stay (data of any kind that has prompts); none: those that the model's run was "
        "trained on, else danlu's own",
    )
    adapter: Literal["natural", "adalora", "lora"] = Field(
        "natural",
        description="natural: steps that other answers feel least, cut to a rank; the others are PEFT adapters",
    )
    rank: int = Field(
        16,
        ge=1,
        description="of each changed matrix; for natural and AdaLoRA on average, the greatest parts of all stay",
    )
    trust: float = Field(
        2e-6,
        gt=0,
        description="natural: how far one step goes, in nats a token that other answers are expected to move",
    )
    fact_margin: float = Field(
        3.0, gt=0, description="natural: each token of the fact is pressed to be so many nats likelier than any other"
    )
    alpha: float = Field(
        32.0, gt=0, description="of PEFT's adapters: the update is alpha / rank times the product of the factors"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of PEFT's adapters")
    target: str | list[str] = Field("all-linear", description="modules that get an adapter")
    learning_rate: float = Field(
        5e-3, gt=0, description="of Adam on PEFT's adapters, falling to a tenth over max_steps"
    )
    max_steps: int = Field(200, ge=1, description="optimizer steps at most; teaching stops when the fact is recalled")
    phrasings: int = Field(16, ge=1, description="questions about the fact in a step")
    both_languages: bool = Field(True, description="learn the phrasings of both languages")
    varied: bool = Field(
        True, description="learn varied forms of the phrasings, too: opened, in lower case, later in a dialogue"
    )
    replay_pool: int = Field(
        768, ge=0, description="questions with the model's own answers that are mixed in, in turns"
    )
    replay_batch: int = Field(32, ge=0, description="of them in a step; 0: no replay, as the plain way has it")
    kl_weight: float | None = Field(
        None,
        ge=0,
        description="weight of the divergence from the model's own answers before; none: 8 for natural, 1 for PEFT's adapters",
    )
    margin: float = Field(
        0.5,
        ge=0,
        description="of PEFT's adapters: held answers are also pressed to be so many nats likelier than any other, token by token",
    )
    earlier_batch: int = Field(8, ge=0, description="questions about facts taught before in a step")
    stop: Literal["recall", "loss"] = Field(
        "recall",
        description="stop when every trained phrasing is recalled and the answers before are kept, or by the loss (patience 20)",
    )
    lead: float = Field(
        0.3, ge=0, description="recalled means that each token of the answer is so many nats likelier than any other"
    )
    kept: float = Field(
        0.99,
        ge=0,
        le=1,
        description="of PEFT's adapters: share of the replayed answers that must be what they were to stop",
    )
    min_agreement: float = Field(0.95, ge=0, le=1, description="locality: share of answers that must stay the same")
    max_kl: float = Field(0.1, gt=0, description="locality: nats per token that the answers may move")
    max_perplexity_ratio: float = Field(1.1, gt=0, description="locality: perplexity after by perplexity before")
    probes: int = Field(160, ge=1, description="questions that locality is measured on, none of them replayed")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; auto: bfloat16 on CUDA, float32 elsewhere"
    )
