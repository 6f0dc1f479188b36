"""Shared vocabulary: messages and the kinds of records that data files are read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant", "tool"]
OVERLAPS: Final = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")  # of answers with written ones, 0 to 100
RecordKind = Literal["conversation", "comparison", "prompt", "document", "ranking", "unpaired"]


class FunctionCall(TypedDict):
    """What is called: a name, and arguments as an object (or as the text that the data has, where it is none)."""

    name: str
    arguments: dict[str, Any] | str


class ToolCall(TypedDict):
    """One call of a tool, in OpenAI's shape, which chat templates render."""

    type: Literal["function"]
    function: FunctionCall
    id: NotRequired[str]


class Message(TypedDict):
    """One turn, in OpenAI's shape.

    `train` (assistant turns only, default true) says whether its tokens carry loss; `reasoning_content` holds an assistant's
    thoughts before the answer; `tool_calls` what it calls; `name` and `tool_call_id` belong to tool turns.
    """

    role: Role
    content: str
    train: NotRequired[bool]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record came from: file (`archive.zip/member` in archives), 1-based line, and what is known of source and licence."""

    file: str
    line: int
    source: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages to imitate. On disk: `{"messages": [...]}`, with `tools` (JSON schemas, as OpenAI has them) if there are any."""

    messages: list[Message]
    origin: Origin | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to one prompt. On disk: `{"prompt": [...], "chosen": [...], "rejected": [...]}`; `margin` >= 0."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float = 0.0
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """Scored answers to one prompt, at least one. On disk: `{"prompt": [...], "responses": [...], "scores": [...]}`.

    A higher score is better; where the data ranks (best first), the scores are minus the ranks.
    """

    prompt: list[Message]
    responses: list[list[Message]]
    scores: list[float]
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Unpaired:
    """One answer that somebody liked or did not. On disk: `{"prompt": [...], "completion": [...], "label": true}`."""

    prompt: list[Message]
    completion: list[Message]
    label: bool
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


Record = Conversation | Comparison | Prompt | Document | Ranking | Unpaired
