"""Shared vocabulary: messages and the four kinds of records that data files are read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant", "tool"]
RecordKind = Literal["conversation", "comparison", "prompt", "document"]


class Message(TypedDict):
    """One turn. `train` (assistant turns only, default true) says whether its tokens carry loss."""

    role: Role
    content: str
    train: NotRequired[bool]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record came from: file, 1-based line (or row number in a JSON array), and what is known of its licence."""

    file: str
    line: int
    source: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages to imitate. On disk: `{"messages": [...]}`."""

    messages: list[Message]
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to one prompt. On disk: `{"prompt": [...], "chosen": [...], "rejected": [...]}`; `margin` >= 0."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float = 0.0
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question without an answer to imitate. On disk: `{"prompt": [...]}`.

    `reference` holds what an evaluator or verifier needs to judge an answer (`evals/rubric.py` documents its keys).
    """

    prompt: list[Message]
    reference: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text for pre-training. On disk: `{"text": "..."}` or a text file."""

    text: str
    origin: Origin | None = None


Record = Conversation | Comparison | Prompt | Document
