"""The shapes that go over the wire: what the OpenAI API calls a chat completion, our votes, and errors.

Requests are checked strictly and errors name the field, as OpenAI's do; fields that are not known are ignored. The
answers are plain dictionaries in the order in which OpenAI sends their fields.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from danlu.generation.protocol import SamplingParams
from danlu.generation.seeds import mix_seed
from danlu.types import Message

MAX_CHOICES: Final = 8
MAX_STOPS: Final = 16
MAX_BIASES: Final = 1024
# Fields whose name and meaning are those of `SamplingParams`.
DRAWING: Final = ("temperature", "top_k", "top_p", "min_p", "typical_p")
PENALTIES: Final = ("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size")


class ApiError(Exception):
    """An error that the client is told about, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole HTTP response."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return JSONResponse(self.body, self.status, headers)


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request, with the path of the field."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The request body is no valid JSON: {first['ctx']['error']}.", code="invalid_json")
    path = ""
    for part in first["loc"][1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():  # others are pydantic's names for the alternatives of a union
            path += f".{part}" if path else part
    if not path:
        return ApiError(400, "The request body must be a JSON object, sent as application/json.", code="invalid_json")
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
    reason = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"Invalid '{path}': {reason}.", param=path, code="invalid_value")


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def _whole_characters(text: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer, database or file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"found \\u{ord(text[error.start]):04x}, half of a character") from error
    return text


WireText = Annotated[str, AfterValidator(_whole_characters)]


class TextPart(_Wire):
    """One part of a message's content. Only text is understood."""

    type: Literal["text"]
    text: WireText


def _listed(value: Any) -> Any:
    """A plain string is a list of one part, so that errors can name the place inside a list."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("expected text or a list of text parts")
    return value


Content = Annotated[list[TextPart], BeforeValidator(_listed)]


class ChatMessage(_Wire):
    """One message. `developer` is OpenAI's newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content

    def plain(self) -> Message:
        """The message in danlu's own words."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
StopText = Annotated[WireText, Field(min_length=1, max_length=256)]


def _stops(value: Any) -> Any:
    if value is not None and not isinstance(value, (str, list)):
        raise ValueError("expected text or a list of texts")
    return [value] if isinstance(value, str) else value


class StreamOptions(_Wire):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None


class ChatRequest(_Wire):
    """`POST /v1/chat/completions`. `model` is looked at where adapters are served, by whose names it chooses."""

    model: str | None = None
    messages: Messages
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None
    ) = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[StopText], Field(max_length=MAX_STOPS), BeforeValidator(_stops)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def check(self, vocabulary: int) -> None:
        """What no single field can say.

        Args:
            vocabulary: of the model; token ids are below it.

        Raises:
            ApiError: a combination that cannot be served.
        """
        if self.stream and (self.n or 1) > 1:
            raise ApiError(
                400, "A stream has one choice: use n=1, or stream=false.", param="n", code="unsupported_value"
            )
        if self.stream and self.logprobs:
            raise ApiError(
                400, "Log-probabilities come with stream=false only.", param="logprobs", code="unsupported_value"
            )
        if self.top_logprobs is not None and not self.logprobs:
            message = "'top_logprobs' is for logprobs=true only."
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
        if unknown := [i for i in self.logit_bias or {} if int(i) >= vocabulary]:
            message = f"'logit_bias' names the token {unknown[0]}, and this model has tokens 0 to {vocabulary - 1}."
            raise ApiError(400, message, param="logit_bias", code="invalid_value")
        if self.stream_options is not None and not self.stream:
            message = "'stream_options' is for stream=true only."
            raise ApiError(400, message, param="stream_options", code="invalid_value")

    def sampling(self, defaults: SamplingParams) -> list[SamplingParams]:
        """One set of parameters for each choice; without a seed each request draws its own.

        Raises:
            ApiError: parameters that make no sense together.
        """
        given = {name: getattr(self, name) for name in (*DRAWING, *PENALTIES)} | {
            "logit_bias": {int(i): bias for i, bias in self.logit_bias.items()} if self.logit_bias else None,
            "min_new_tokens": self.min_tokens,
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "stop": tuple(self.stop) if self.stop else None,
            "logprobs": self.top_logprobs,
        }
        known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        try:
            base = replace(defaults, **known)
        except ValueError as error:
            raise ApiError(400, f"{error}.", code="invalid_value") from error
        base = replace(base, temperature=0.0 if base.greedy else base.temperature)
        seed = self.seed if self.seed is not None else secrets.randbits(31)
        return [replace(base, seed=mix_seed(seed, i) if i else seed) for i in range(self.n or 1)]


class VoteRequest(_Wire):
    """`POST /api/vote`: the messages before the answer, the answer as it was shown, and how it was sampled."""

    messages: Messages
    answer: Annotated[WireText, Field(max_length=1 << 20)]
    vote: Literal["up", "down", "none"]
    params: Annotated[dict[WireText, bool | int | float | WireText | None], Field(max_length=32)] = Field(
        default_factory=dict
    )


class Envelope:
    """The fields that all parts of one answer share."""

    def __init__(self, model: str) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def completion(self, choices: Sequence[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """A whole answer."""
        return self._head("chat.completion") | {"choices": list(choices), "usage": usage}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """A part of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last part of a stream with `include_usage`."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage}


def choice(index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """One answer of a plain response."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
