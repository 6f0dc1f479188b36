"""Settings of what scores answers beside reward models: the terms of `rewards:`, and where code is run."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from danlu.train_config import Settings


class RewardTerm(Settings):
    """What every term of `rewards` has."""

    weight: float = Field(1.0, description="what its number is multiplied by; negative: the less the better")
    name: str = Field(
        "",
        pattern=r"^[\w-]*$",
        description="in metrics (`reward_NAME`) and errors; none: the kind, numbered from the second on",
    )


class Endpoint(RewardTerm):
    """What every term that asks over the network has; nothing here but `api_key_env` can change an answer's score."""

    api_key_env: str = Field(
        "", description="environment variable that holds the key; the key itself never stands here"
    )
    concurrency: int = Field(8, ge=1, description="requests under way at once")
    timeout: float = Field(60.0, gt=0, description="seconds until a request counts as failed")
    retries: int = Field(
        3, ge=0, description="further tries after a connection that fails, a time-out, status 429 or 5xx"
    )
    backoff: float = Field(1.0, ge=0, description="seconds before the first further try; doubled each time")
    cache: bool = Field(
        True, description="keep what was answered in the stage's folder, so that nothing is asked twice"
    )


class JudgeTerm(Endpoint):
    """An LLM behind an OpenAI-compatible endpoint, at temperature 0; its score is mapped to 0..1."""

    kind: Literal["judge"] = Field("judge", description="an LLM as judge")
    base_url: str = Field(pattern=r"^https?://", description="such as https://host/v1, before /chat/completions")
    model: str = Field(min_length=1, description="its name at the endpoint")
    rubric: str = Field("", description="what a good answer is; none: helpful, right, honest and clear")
    rubric_file: str = Field("", description="a text file in place of `rubric`")
    scale_min: float = Field(1.0, description="the worst score")
    scale_max: float = Field(10.0, description="the best score")
    pairwise: bool = Field(
        False,
        description="where the reference has an answer, ask which of the two is better, in both orders: 1, 0, or 1/2 if the "
        "two verdicts differ; the scale elsewhere",
    )
    max_tokens: int = Field(512, ge=1, description="of a verdict")

    @model_validator(mode="after")
    def _one_rubric(self) -> JudgeTerm:
        if self.rubric and self.rubric_file:
            raise ValueError("rubric and rubric_file are both given; one of them counts")
        if self.scale_max <= self.scale_min:
            raise ValueError(f"scale_max ({self.scale_max:g}) must be above scale_min ({self.scale_min:g})")
        return self


class HttpTerm(Endpoint):
    """A server of your own: POST `{"prompts", "responses", "references"}`, answered by `{"scores": [...]}`."""

    kind: Literal["http"] = Field("http", description="scores from a server of your own")
    url: str = Field(pattern=r"^https?://", description="where the batch is posted to")
    batch: int = Field(16, ge=1, description="answers in one request")


class PythonTerm(RewardTerm):
    """A function of your own: `f(responses, prompts, references, **options) -> list of numbers`."""

    kind: Literal["python"] = Field("python", description="scores from a function of your own")
    function: str = Field(
        pattern=r"^.+:[^\W\d]\w*$",
        description="module:function, or path/to/file.py:function; it runs with all your rights",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments, by name")


class LengthTerm(RewardTerm):
    """Minus how much too long (`limit`), or how far off (`target`), in parts of that length; tokens without the stop token."""

    kind: Literal["length"] = Field("length", description="a punishment for length")
    limit: int | None = Field(None, ge=1, description="0 up to so many tokens, then -(tokens - limit) / limit")
    target: int | None = Field(None, ge=1, description="-|tokens - target| / target")

    @model_validator(mode="after")
    def _one_form(self) -> LengthTerm:
        if (self.limit is None) == (self.target is None):
            raise ValueError("expected limit or target, one of the two")
        return self


class RepetitionTerm(RewardTerm):
    """Share of an answer's n-grams of tokens that stood in it before: 0 to 1; give it a negative weight."""

    kind: Literal["repetition"] = Field("repetition", description="how much repeats")
    n: int = Field(3, ge=1, description="tokens of an n-gram")


class FormatTerm(RewardTerm):
    """1 for an answer that has the form that is asked for, else 0."""

    kind: Literal["format"] = Field("format", description="whether the form is right")
    pattern: str | None = Field(None, description="a regular expression of Python's")
    match: Literal["search", "fullmatch"] = Field(
        "search", description="where it matches: somewhere, or the whole answer"
    )
    json_schema: dict[str, Any] | None = Field(None, description="the answer is JSON that fits this schema")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"expected a regular expression ({error})") from None
        return pattern

    @model_validator(mode="after")
    def _something(self) -> FormatTerm:
        if self.pattern is None and self.json_schema is None:
            raise ValueError("expected pattern, json_schema or both")
        return self


TERMS: dict[str, type[RewardTerm]] = {
    "judge": JudgeTerm,
    "http": HttpTerm,
    "python": PythonTerm,
    "length": LengthTerm,
    "repetition": RepetitionTerm,
    "format": FormatTerm,
}
TERM_NO_EFFECT = ("concurrency", "timeout", "retries", "backoff", "cache", "api_key_env")


def _term_kind(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return f"<{kind}>" if kind in TERMS else None


Term = Annotated[
    Annotated[JudgeTerm, Tag("<judge>")]
    | Annotated[HttpTerm, Tag("<http>")]
    | Annotated[PythonTerm, Tag("<python>")]
    | Annotated[LengthTerm, Tag("<length>")]
    | Annotated[RepetitionTerm, Tag("<repetition>")]
    | Annotated[FormatTerm, Tag("<format>")],
    Discriminator(
        _term_kind,
        custom_error_type="reward",
        custom_error_message=f"expected an object with kind: {', '.join(TERMS)}",
    ),
]
"""One term of `rewards:`; which settings it has follows from its `kind`."""


class Sandbox(Settings):
    """Where the verifier `tests` runs the code of an answer."""

    timeout: float = Field(10.0, gt=0, description="seconds for an answer's code and all its tests")
    memory_mb: int = Field(512, ge=64, description="memory of the code, and of the tests")
