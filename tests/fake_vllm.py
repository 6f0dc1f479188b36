"""A stand-in for vLLM with the names, signatures and habits of its own classes, on a transformers model in this process.

It answers for real (with danlu's sampler), keeps what it has read until it is told to forget, and takes weights as its workers do.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from danlu.generation import protocol
from danlu.generation.sampling import sample

INF = float("inf")
SHARED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    bad_words: list[str] | None = None

    def __post_init__(self) -> None:
        if self.seed == -1:
            self.seed = None
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens must be less than or equal to max_tokens")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are only supported when detokenize is True")
        if self.temperature < 1e-5 and (self.top_p, self.top_k, self.min_p) != (1.0, 0, 0.0):
            raise ValueError("the real one resets these; danlu should not rely on it")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: None
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class _Running:
    prompt: list[int]
    params: SamplingParams
    ids: list[int] = field(default_factory=list)


class LLMEngine:
    def __init__(self, model: Any, max_model_len: int, max_logprobs: int) -> None:
        self.model = model
        self.model_config = SimpleNamespace(max_model_len=max_model_len, max_logprobs=max_logprobs)
        self.read: dict[tuple[int, ...], Tensor] = {}
        self.running: dict[str, _Running] = {}
        self.fails = False

    def add_request(
        self,
        request_id: str,
        prompt: Mapping[str, Any],
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
    ) -> str:
        ids = prompt["prompt_token_ids"]
        if len(ids) + 1 > self.model_config.max_model_len:
            raise ValueError("the prompt is longer than the maximum model length")
        if (params.logprobs or 0) > self.model_config.max_logprobs:
            raise ValueError("more log-probabilities than max_logprobs")
        self.running[request_id] = _Running(list(ids), params)
        return request_id

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        for request_id in request_ids:
            self.running.pop(request_id, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[RequestOutput]:
        if self.fails:
            raise RuntimeError("out of memory")
        return [self._continue(name) for name in list(self.running)]

    def _logits(self, ids: tuple[int, ...]) -> Tensor:
        if ids not in self.read:
            with torch.no_grad():
                self.read[ids] = self.model(torch.tensor([ids])).logits[:, -1]
        return self.read[ids]

    def _continue(self, name: str) -> RequestOutput:
        row = self.running[name]
        p = row.params
        text = [*row.prompt, *row.ids]
        wanted = p.logprobs or 0
        own = protocol.SamplingParams(
            max_new_tokens=p.max_tokens or 16,
            min_new_tokens=p.min_tokens,
            stop_ids=frozenset(p.stop_token_ids or ()),
            logit_bias=p.logit_bias or {},
            seed=p.seed or 0,
            logprobs=wanted,
            **{name: getattr(p, name) for name in SHARED},
        )
        [token], [logprob], [top] = sample(self._logits(tuple(text)), [own], [len(row.ids)], [text])
        row.ids.append(token)
        entries = {i: Logprob(v, rank) for rank, (i, v) in enumerate(top, 1)}
        for other in range(wanted - len(entries)):  # tokens that were cut off, as vLLM lists them
            entries.setdefault(next(i for i in range(99) if i not in entries), Logprob(-INF, other))
        entries.setdefault(token, Logprob(logprob, 1 + len(entries)))
        ends = {*(p.stop_token_ids or ()), *(() if p.ignore_eos else (self.model.config.eos_token_id,))}
        stops = token in ends and len(row.ids) > p.min_tokens
        reason = "stop" if stops else "length" if len(row.ids) >= (p.max_tokens or 16) else None
        if reason is not None:
            del self.running[name]
        delta = p.output_kind is RequestOutputKind.DELTA
        output = CompletionOutput(0, "", [token] if delta else row.ids, None, [entries], reason)
        return RequestOutput(name, None, row.prompt, None, [output], reason is not None)


class LLM:
    """`models` has what "folders" hold; `calls` is what was called with what, in order."""

    models: dict[str, Any]
    calls: list[tuple[str, Any]]

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        **kwargs: Any,
    ) -> None:
        engine_args = {"max_model_len", "max_logprobs", "logprobs_mode", "generation_config", "worker_extension_cls"}
        engine_args |= {"enable_sleep_mode", "enable_prefix_caching", "max_num_seqs", "distributed_executor_backend"}
        if unknown := set(kwargs) - engine_args:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        self.arguments = kwargs | {"tensor_parallel_size": tensor_parallel_size, "dtype": dtype}
        loaded = self.models[model]
        limit = kwargs.get("max_model_len") or loaded.config.max_position_embeddings
        self.llm_engine = LLMEngine(loaded, limit, kwargs.get("max_logprobs", 20))
        module, _, name = kwargs["worker_extension_cls"].rpartition(".")
        extension = getattr(importlib.import_module(module), name)
        worker = type("Worker", (extension,), {})()
        worker.model_runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load_weights))
        self._workers = [worker]

    def _load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        own = dict(self.llm_engine.model.named_parameters())
        loaded = set()
        for name, tensor in weights:
            own[name].data.copy_(tensor)  # a KeyError for unknown names, as in vLLM's own models
            loaded.add(name)
        self.calls.append(("load_weights", sorted(loaded)))
        return loaded

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        assert all(isinstance(a, str) for a in args), "what is no plain data does not reach another process"
        self.calls.append(("collective_rpc", method))
        return [getattr(worker, method)(*args, **(kwargs or {})) for worker in self._workers]

    def reset_prefix_cache(self) -> bool:
        self.llm_engine.read.clear()
        self.calls.append(("reset_prefix_cache", None))
        return True

    def sleep(self, level: int = 1) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(("wake_up", tags))


def install(models: dict[str, Any], monkeypatch: Any) -> list[tuple[str, Any]]:
    """Makes `import vllm` find this, with these models, and returns the list of calls."""
    calls: list[tuple[str, Any]] = []
    module, inner = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    inner.RequestOutputKind, inner.SamplingParams = RequestOutputKind, SamplingParams  # type: ignore[attr-defined]
    module.SamplingParams, module.sampling_params = SamplingParams, inner  # type: ignore[attr-defined]
    module.LLM = type("LLM", (LLM,), {"models": models, "calls": calls})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", inner)
    return calls
