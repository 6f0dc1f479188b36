"""vLLM behind the `Engine` protocol, for roll-outs of models that are worth it. vLLM itself is not among danlu's dependencies.

vLLM runs its model in processes of its own and continues requests in steps; as in danlu's engine, whoever waits for a token takes
the lock and moves all of them one step on. New weights reach its processes through files in shared memory, a piece at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from danlu.exceptions import EngineError
from danlu.generation.protocol import (
    FinishReason,
    Request,
    SamplingParams,
)
from danlu.generation.stepwise import Row, StepwiseEngine
from danlu.models.virtual_root import NAME as PREFIX

SHARED_MEMORY: Final = Path("/dev/shm")
PIECE_BYTES: Final = 1 << 30
MAX_LOGPROBS: Final = 20
COLDEST_DRAW: Final = 1e-2  # vLLM raises lower temperatures to this
REASONS: Final[dict[str, FinishReason]] = {"stop": "stop", "length": "length", "abort": "cancelled"}


@dataclass(eq=False)
class _Row(Row):
    top: int  # log-probabilities asked for


class VllmEngine(StepwiseEngine[_Row]):
    """Generates with vLLM.

    Seeds make draws repeatable, but they are not danlu's draws: another batch or another version of vLLM may give others.
    min_p acts before top_k and top_p here.

    Args:
        model: a model folder or hub id.
        dtype: "auto" takes the model's own.
        tensor_parallel: GPUs that share the model.
        memory_share: of a GPU's memory, for weights, activations and the cache; in (0, 1].
        context: tokens of prompt and answer together. Default: what the model was made for.
        transfer: a folder for weights on their way, which all processes of vLLM see (on several machines, a shared one). Default:
            shared memory where there is some.
        options: other arguments of `vllm.LLM`.

    Raises:
        EngineError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        tensor_parallel: int = 1,
        memory_share: float = 0.9,
        context: int | None = None,
        transfer: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._vllm = _import_vllm()
        self._llm = self._vllm.LLM(
            model=str(model),
            dtype=dtype,
            tensor_parallel_size=tensor_parallel,
            gpu_memory_utilization=memory_share,
            max_model_len=context,
            max_logprobs=MAX_LOGPROBS,
            logprobs_mode="processed_logprobs",  # of the distribution that is drawn from
            generation_config="vllm",  # no defaults from the model's folder
            worker_extension_cls=f"{WeightReceiver.__module__}.{WeightReceiver.__qualname__}",
            **options,
        )
        self._engine = self._llm.llm_engine
        self.context = int(self._engine.model_config.max_model_len)
        self._transfer = Path(transfer) if transfer else (SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)

    # -- protocol -------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> str:
        """See `Engine.submit`."""
        self._check(request)
        arguments = sampling_arguments(request.params, self.context - len(request.prompt_ids))
        delta = self._vllm.sampling_params.RequestOutputKind.DELTA
        params = self._vllm.SamplingParams(**arguments, output_kind=delta)
        with self._lock:
            row = _Row(request.params.logprobs, version=self.version)
            self._engine.add_request(row.id, {"prompt_token_ids": list(request.prompt_ids)}, params)
            self._rows[row.id] = row
        return row.id

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        with self._lock:
            row = self._rows.get(request_id)
            if row is not None and row.finished is None:
                row.finished = "cancelled"
                self._engine.abort_request([request_id])

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Engine.update_weights`. The names are those of the transformers model; vLLM maps them to its own."""
        with self._lock:
            if any(row.finished is None for row in self._rows.values()):
                raise EngineError("weights cannot change while requests are running")
            with tempfile.TemporaryDirectory(prefix="danlu-weights-", dir=self._transfer) as folder:
                path = Path(folder) / "piece.safetensors"
                for piece in _pieces(_without_prefix(named_tensors)):
                    save_file(piece, path)
                    self._llm.collective_rpc("danlu_load_weights", args=(str(path),))
            self._llm.reset_prefix_cache()  # its keys and values are of the old weights
            self.version = version

    def close(self) -> None:
        """Lets go of vLLM, whose processes end; the engine answers nothing after that."""
        with self._lock:
            if any(row.finished is None for row in self._rows.values()):
                raise EngineError("the engine cannot close while requests are running")
            self._llm = self._engine = None

    # -- memory ---------------------------------------------------------------------------------------------------------

    def sleep(self, *, keep_weights: bool = True) -> None:
        """Frees the GPU for training: the cache goes, the weights move to the CPU, or go too if new ones follow.

        The engine must have been made with `enable_sleep_mode=True`.
        """
        self._llm.sleep(level=1 if keep_weights else 2)

    def wake(self) -> None:
        """Takes the GPU back."""
        self._llm.wake_up()

    # -- steps ----------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """See `StepwiseEngine.step`."""
        try:
            outputs = self._engine.step()
        except BaseException as error:  # Ctrl-C too: whoever waits for one of these requests must hear of it
            for row in self._rows.values():
                if row.finished is None:
                    row.error, row.finished = error, "cancelled"
            raise
        for output in outputs:
            waiting = self._rows.get(output.request_id)
            if waiting is not None and waiting.finished is None:
                _take(waiting, output.outputs[0])


def _take(row: _Row, output: Any) -> None:
    """Adds what a step has made of a request."""
    for token, known in zip(output.token_ids, output.logprobs, strict=True):
        row.logprobs.append(known[token].logprob)
        if row.top:
            # The drawn token is among them in any case, and so are tokens that were cut off.
            best = sorted(((other, entry.logprob) for other, entry in known.items()), key=lambda pair: -pair[1])
            row.tops.append(tuple(pair for pair in best[: row.top] if pair[1] > float("-inf")))
        row.ids.append(token)  # last: readers without the lock go by its length
    if output.finish_reason is not None:
        row.finished = REASONS[output.finish_reason]


def sampling_arguments(params: SamplingParams, room: int) -> dict[str, Any]:
    """Arguments of vLLM's own `SamplingParams`.

    Args:
        params: of one answer.
        room: tokens that the context leaves.

    Raises:
        EngineError: vLLM has no such parameter, or not this value.
    """
    lacking = {
        "typical_p": params.typical_p < 1.0,
        "no_repeat_ngram_size": params.no_repeat_ngram_size > 0,
        "num_beams": params.num_beams > 1,
        "penalty_alpha": params.penalty_alpha > 0,
        "bad_words of several tokens": any(len(word) > 1 for word in params.bad_words),
        f"logprobs above {MAX_LOGPROBS}": params.logprobs > MAX_LOGPROBS,
        f"a temperature above 0 and below {COLDEST_DRAW}": not params.greedy and params.temperature < COLDEST_DRAW,
    }
    if names := [name for name, asked in lacking.items() if asked]:
        raise EngineError(f"vLLM cannot serve {', '.join(names)}", hint="danlu's own engine can")
    banned = {word[0]: float("-inf") for word in params.bad_words}
    limit = min(params.max_new_tokens, room)
    return {
        "max_tokens": limit,
        "min_tokens": min(params.min_new_tokens, limit),
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_k": 0 if params.greedy else params.top_k,
        "top_p": 1.0 if params.greedy else params.top_p,
        "min_p": 0.0 if params.greedy else params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "logit_bias": {**params.logit_bias, **banned} or None,
        "seed": params.seed & ((1 << 63) - 1),
        "stop": list(params.stop) or None,
        "stop_token_ids": sorted(params.stop_ids),
        "ignore_eos": True,  # stop_ids say what ends an answer
        "detokenize": bool(params.stop),
        "logprobs": params.logprobs,
    }


def _without_prefix(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors; raises EngineError for a prefix (P-Tuning v2), which vLLM cannot read before a text."""
    for name, tensor in named_tensors:
        if name.startswith(f"{PREFIX}."):
            raise EngineError(
                "vLLM takes no prefix", hint="generate with danlu's own engine, or train with adapter: lora"
            )
        yield name, tensor


def _pieces(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors on the CPU, in pieces of at most PIECE_BYTES or one tensor."""
    piece: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        if piece and size + tensor.nbytes > PIECE_BYTES:
            yield piece
            piece, size = {}, 0
        # A copy: tensors that share memory, as tied embeddings do, do not go into one file.
        piece[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    if piece:
        yield piece


class WeightReceiver:
    """What vLLM's workers learn from danlu: vLLM adds this class to theirs, and `collective_rpc` calls its method in each."""

    model_runner: Any  # the worker's own

    def danlu_load_weights(self, path: str) -> int:
        """Reads tensors from a file into the running model and says how many parameters of vLLM's they filled."""
        weights = load_file(path)
        with torch.no_grad():
            return len(self.model_runner.model.load_weights(weights.items()) or ())


def _import_vllm() -> Any:
    try:
        import vllm
        import vllm.sampling_params
    except ImportError as error:
        raise EngineError(
            f"vLLM cannot be imported: {error}",
            hint="it needs a GPU and an environment of its own (it pins other versions): pip install vllm danlu",
        ) from error
    return vllm
